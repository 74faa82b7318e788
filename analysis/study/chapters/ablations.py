"""Ablations as data: a line of YAML names a strategy, its fields, how to decode or how to train, and becomes a row of a table.

{group: decoding, label: beam-2, strategy: FastV, fields: {rate: 0.5}, generate: {num_beams: 2}}
{group: number of rates, label: "8", train: {n_rates: 8, budget: 0.33}}
{group: predictor, label: seed 1, predictor: data/pocket/dyrate/evict-0.33-seed1}
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from dyrate import evaluate
from dyrate.data import Examples
from study.intervals import bootstrap
from dyrate.models import describe
from dyrate.strategies.dyrate import DyRate
from dyrate.distributed import this_process
from dyrate.strategies import STRATEGIES
from dyrate.strategy import Strategy
from dyrate.training import Settings, train

KEYS = {"group", "label", "strategy", "fields", "generate", "train", "predictor"}
CONSTANT = "constant rate"  # the group of lines that the others are set against


def check(lines: Sequence[dict]) -> None:
    """Raises ValueError that names the first line that cannot be understood, before anything is run."""
    for line in lines:
        if unknown := set(line) - KEYS:
            raise ValueError(f"ablation {line}: unknown {sorted(unknown)}; a line has {sorted(KEYS)}")
        if "group" not in line or "label" not in line:
            raise ValueError(f"ablation {line}: every line has a group and a label")
        if len({"strategy", "train", "predictor"} & set(line)) != 1:
            raise ValueError(f"ablation {line}: name one of strategy, predictor and train")
        if "strategy" in line and line["strategy"] not in STRATEGIES:
            raise ValueError(f"ablation {line}: no strategy is called {line['strategy']}; there are {sorted(STRATEGIES)}")


def strategy_of(
    line: dict, model, processor, learn: Examples, validation: Examples, root: Path, trained: Path, batch_size: int = 32
) -> Strategy:
    """The strategy that a line means; where it says `train`, the predictor in `trained`, or one trained now and stored there."""
    if "predictor" in line:
        return DyRate.from_pretrained(root / line["predictor"])
    if "train" not in line:
        return STRATEGIES[line["strategy"]](**line.get("fields", {}))
    settings = Settings(**line["train"])
    about = {k: v for k, v in describe(model).items() if k in ("family", "parameters", "layers", "heads")}
    asked = {"settings": asdict(settings), "model": about, "examples": [e.name for e in (*learn, *validation)]}
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
    name = re.sub(r"[^a-z0-9.]+", "-", f"{line['group']} {line['label']}".lower())
    folder = next(trained.glob(f"*-{key}"), trained / f"{name}-{key}")  # lines of several groups may share one
    if not folder.exists():
        predictor = train(model, processor, learn, settings, validation=validation, batch_size=batch_size).predictor
        if this_process().is_main_process:
            part = folder.with_name(folder.name + ".part")
            predictor.save_pretrained(part)
            part.replace(folder)
        this_process().wait_for_everyone()
    return DyRate.from_pretrained(folder)


def run(
    model, processor, lines: Sequence[dict], examples: Examples, learn: Examples, validation: Examples, *, root: Path,
    trained: Path, store: Path, max_new_tokens: int, batch_size: int, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Answers under every line, scored: the rows of `evaluate.scored` with `group` and `label`. Sampling is seeded by `seed`.

    trained: folder of predictors that earlier runs trained for such lines.
    """
    check(lines)
    found = []
    for line in lines:
        strategy = strategy_of(line, model, processor, learn, validation, root, trained, batch_size)
        rows = evaluate.run(
            model, processor, {line["label"]: strategy}, examples, store, max_new_tokens=max_new_tokens, batch_size=batch_size,
            seed=seed, **line.get("generate", {}),
        )  # fmt: skip
        found.append(evaluate.scored(rows, examples).assign(group=line["group"], label=line["label"]))
    return pd.concat(found, ignore_index=True)


def constants(shares: Sequence[float]) -> list[dict]:
    """Lines that keep the same share at every step: what the others are set against, each at its own kept share."""
    return [{"group": CONSTANT, "label": f"{x:g}", "strategy": "Constant", "fields": {"rate": 1 - x}} for x in sorted(shares)]


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for each group, label and task: mean score with its interval, mean kept share, decoder multiply-accumulates.

    over, over_low, over_high: difference from a constant rate at the same kept share, on the same samples. The constant's score
    is interpolated between the lines of `constants`; NaN where none of them keeps as little.
    """
    table = []
    for (group, label, task), found in rows.groupby(["group", "label", "task"], sort=False):
        score = bootstrap(found.score)
        kept = found.kept.mean()
        same = _constant_at(kept, rows[(rows.group == CONSTANT) & (rows.task == task)])
        over = bootstrap((found.set_index("sample").score - same).dropna())
        table.append(
            {"group": group, "label": label, "task": task, **score, "kept": kept, "over": over["value"], "over_low": over["low"],
             "over_high": over["high"], "macs": (found.prefill + found.decode).mean(), "tokens": found.tokens.mean()}
        )  # fmt: skip
    return pd.DataFrame(table)


def _constant_at(kept: float, lines: pd.DataFrame) -> pd.Series:
    """Score of each sample under a constant rate that keeps this share, between the two measured ones next to it."""
    shares = lines.groupby("label").kept.mean().sort_values()
    above = int(np.searchsorted(shares, kept - 1e-6))
    scores = lines.pivot(index="sample", columns="label", values="score")
    if above < len(shares) and np.isclose(shares.iloc[above], kept):
        return scores[shares.index[above]]
    if above in (0, len(shares)):
        return pd.Series(np.nan, index=scores.index)
    high = scores[shares.index[above]]
    part = (kept - shares.iloc[above - 1]) / (shares.iloc[above] - shares.iloc[above - 1])
    return (1 - part) * scores[shares.index[above - 1]] + part * high


def finding(table: pd.DataFrame) -> str:
    """Which group of lines differs most from a constant rate at equal kept share, its best and its worst line, in words."""
    known = table[(table.group != CONSTANT) & table.over.notna()]
    if known.empty:
        return "**No line keeps a share at which a constant rate was measured.**"
    spread = known.groupby("group", sort=False).over.agg(lambda v: v.max() - v.min()).sort_values(ascending=False)
    lines = known[known.group == spread.index[0]].sort_values("over")
    ends = (
        f"{row.over:+.3f} ({row.over_low:+.3f} to {row.over_high:+.3f}) with *{row.label}*"
        for row in (lines.iloc[-1], lines.iloc[0])
    )
    better, worse = (known.over_low > 0).sum(), (known.over_high < 0).sum()
    return (
        f"**Set against a constant rate that keeps as much, *{spread.index[0]}* matters most: "
        f"{' against '.join(dict.fromkeys(ends))}; of {len(known)} lines {better} are better than the constant and "
        f"{worse} worse.** The groups by their spread: {', '.join(spread.index)}."
    )
