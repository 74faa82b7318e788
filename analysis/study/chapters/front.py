"""The front page's figure: score against measured retention and against computation, on laboratories without random dropping.

Drawn from committed rows: methods from the reference run, DyRate's predictors from the generated answers of `study.headroom`.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from study.chapters.laboratories import Laboratory
from study.headroom.confirm import by_recipe, generated
from study.headroom.frontier import number, resampled
from study.headroom.report import spoken

METHODS = ("FastV", "SparseVLM", "PyramidDrop", "VisionZip", "RandomPrune")
TASKS = ("description", "qa_reading", "qa_long_word", "qa_two_step")  # whose score is a share of what is right; of both runs


def points(lab: Laboratory) -> pd.DataFrame:
    """One row a method and retention ratio: name, score (value, low, high, n), measured retention, macs_share, tokens generated.

    Tasks weigh alike. "unpruned" is the reference run's. A laboratory without generated answers has no rows of DyRate.
    """
    asked = pd.concat([lab.rows(part) for part in ("methods", "questions")])
    full = asked[asked.method == "Full"]
    unpruned = _macs(full)
    rows = [_point("unpruned", full, unpruned)]
    for method in METHODS:
        rows += [_point(method, of, unpruned) for _, of in asked[asked.method == method].groupby("budget")]
    try:
        answers = generated(Path(lab.folder))
    except FileNotFoundError:
        return pd.DataFrame(rows)
    unpruned = _macs(answers[answers.method == "Full"])
    for recipe, of in by_recipe(answers).items():
        rows.append(_point(f"DyRate, {spoken(recipe)}", of, unpruned))
    return pd.DataFrame(rows)


def _point(name: str, rows: pd.DataFrame, unpruned: float) -> dict:
    """The mean over TASKS, with the interval over answers; several trainings of one method count with their mean.

    unpruned: multiply-accumulates without pruning, of which the cost is a share.
    """
    means = _by_answer(rows)
    weights = resampled(means.index.get_level_values("task").to_numpy())
    found = {"name": name, "retention": weights[0] @ means.retention, "macs_share": weights[0] @ means.macs / unpruned}
    found["tokens"] = weights[0] @ means.tokens
    return found | number(weights @ means.score.to_numpy(), len(means))


def _by_answer(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean score, retention, multiply-accumulates and length of each answer to TASKS."""
    rows = rows[rows.task.isin(TASKS)].assign(macs=lambda r: r.prefill + r.decode)
    return rows.groupby(["task", "sample"])[["score", "retention", "macs", "tokens"]].mean()


def _macs(rows: pd.DataFrame) -> float:
    """Mean multiply-accumulates of an answer, TASKS weighted equally."""
    return _by_answer(rows).groupby("task").macs.mean().mean()


def said(tables: dict[str, pd.DataFrame]) -> str:
    """The caption's second half: what was measured. tables: `points` of each laboratory."""
    counts = " and ".join(f"{n:,}" for n in sorted({n for table in tables.values() for n in table.n}))
    return (
        f"{' and '.join(tables)}, mean of {len(TASKS)} tasks (descriptions: right slots; questions on painted words and on two "
        f"things at once: right answers), n = {counts} answers a point, greedy; bars and band: 95 % bootstrap intervals. "
        "Retention is measured: the mean over the steps of an answer and the stages of pruning. Multiply-accumulates: the "
        f"decoder's, prefill and decode with a cache.{''.join(turning_back(table, name) for name, table in tables.items())}"
    )


def turning_back(table: pd.DataFrame, laboratory: str) -> str:
    """Of methods that compute more where they keep less: by how much longer their answers are; "" for none. table: `points`."""
    unpruned, said = table[table.name == "unpruned"].tokens.iloc[0], ""
    for name, of in table[table.name.isin(METHODS)].groupby("name", sort=False):
        of = of.sort_values("retention", ascending=False)
        if (of.macs_share.diff() > 0).any():
            longer = f"its answers are {of.tokens.iloc[-1] / unpruned:.1f} times as long as unpruned"
            said += f" {name} turns back on {laboratory}: at its lowest retention {longer}."
    return said
