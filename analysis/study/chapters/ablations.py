"""Chapter 4, what matters in the method. Ablations are data: a line of YAML becomes a condition, and a row of a table.

{group: decoding, label: beam-2, strategy: FastV, fields: {rate: 0.5}, generate: {num_beams: 2}}
{group: number of rates, label: "8", train: {n_rates: 8, budget: 0.33}}
{group: predictor, label: seed 1, predictor: data/pocket/dyrate/evict-0.33-seed1}
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd

import dyrate
from dyrate.data import Examples
from dyrate.distributed import this_process
from dyrate.models import describe
from dyrate.strategies import STRATEGIES
from dyrate.training import Settings, train
from study import controls  # noqa: F401  (registers its strategies)
from study.answers import Condition, answer_all
from study.book import ROOT, Chapter
from study.examples import examples as study_examples
from study.intervals import bootstrap, in_words, interpolated, verdict
from study.predictors import condition_of, training_key
from study.scores import scored

KEYS = {"group", "label", "strategy", "fields", "generate", "train", "predictor"}
REPORTED = {  # the paper's names of lines in Table IV, and where the same stands here: group and label
    "Greedy": ("decoding", "greedy"), "Beam-2": ("decoding", "beam-2"), "Beam-5": ("decoding", "beam-5"),
    "top_p": ("decoding", "top-p 0.9"), "LLaVA": ("constant rate", "1"), "FastV": ("constant rate", "0.5"),
    "DyRate (FP)": ("which layers", "FixedPrune"), "DyRate (DP)": ("which layers", "DepthPrune"),
}  # fmt: skip
CONSTANT = "constant rate"  # the group of lines that the others are compared with


@dataclass
class Ablations:
    """What the chapter measured. about: `dyrate.models.describe` of the model; rows: `scored` answers with group and label."""

    about: dict
    examples: Examples
    rows: pd.DataFrame


def measure(
    *, model: str, source: str, tasks: Sequence[str], n: int, n_train: int, n_validation: int, learn_tasks: Sequence[str],
    ablations: Sequence[dict], constant_retentions: Sequence[float], trained: str, max_new_tokens: int, batch_size: int,
    seed: int, store: str, device_map: str = "", **_,
) -> Ablations:  # fmt: skip
    """Answers under every line and every constant rate, after training what lines train. Parameters: the notebook's."""
    lines = [*constants(constant_retentions), *ablations]
    check(lines)
    test = study_examples(source, n, tasks=tasks, split="test", seed=seed)
    learn = study_examples(source, n_train, tasks=learn_tasks, split="train", seed=seed)
    validation = study_examples(source, n_validation, tasks=learn_tasks, split="validation", seed=seed)
    loaded, processor = dyrate.load(model, device_map=device_map or None)
    conditions = [condition(line, loaded, processor, learn, validation, ROOT / trained, batch_size) for line in lines]
    answers = answer_all(
        loaded, processor, conditions, test, ROOT / store, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed
    )
    return Ablations(describe(loaded), test, by_line(scored(answers, test), lines))


def constants(retentions: Sequence[float]) -> list[dict]:
    """Lines with the same rate at every step, which the others are compared with, each at its own retention ratio."""
    return [
        {"group": CONSTANT, "label": f"{x:g}", "strategy": "Constant", "fields": {"rate": 1 - x}} for x in sorted(retentions)
    ]


def check(lines: Sequence[dict]) -> None:
    """Raises ValueError that names the first line that cannot be understood, before anything is run."""
    names = set()
    for line in lines:
        if problem := _problem(line):
            raise ValueError(f"ablation {line}: {problem}")
        if _name(line) in names:
            raise ValueError(f"ablation {line}: there is another line with this group and label")
        names.add(_name(line))


def _problem(line: dict) -> str | None:
    """What is wrong with a line; None if it can be run."""
    if unknown := set(line) - KEYS:
        return f"unknown {sorted(unknown)}; a line has {sorted(KEYS)}"
    if not {"group", "label"} <= set(line):
        return "every line has a group and a label"
    if len({"strategy", "train", "predictor"} & set(line)) != 1:
        return "name one of strategy, predictor and train"
    if "predictor" in line:
        return None
    if "strategy" in line and line["strategy"] not in STRATEGIES:
        return f"no strategy is called {line['strategy']}; there are {sorted(STRATEGIES)}"
    cls, given = (Settings, line["train"]) if "train" in line else (STRATEGIES[line["strategy"]], line.get("fields", {}))
    known = [field.name for field in fields(cls)]
    if unknown := set(given) - set(known):
        return f"{cls.__name__} has no field {', '.join(sorted(unknown))}; it has {', '.join(known)}"
    try:
        cls(**given)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def _name(line: dict) -> str:
    return f"{line['group']}: {line['label']}"


def condition(
    line: dict, model, processor, learn: Examples, validation: Examples, trained: Path, batch_size: int = 32
) -> Condition:
    """What a line means; where it says `train`, the predictor in the folder `trained`, or one trained now and stored there."""
    how = {"label": _name(line), "settings": line.get("generate", {})}
    if "strategy" in line:
        return Condition(strategy=STRATEGIES[line["strategy"]](**line.get("fields", {})), method=line["strategy"], **how)
    if "predictor" in line:
        return replace(condition_of(ROOT / line["predictor"]), **how)
    settings = Settings(**line["train"])
    key = training_key(model, settings, learn, validation)
    name = re.sub(r"[^a-z0-9.]+", "-", f"{line['group']} {line['label']}".lower())
    folder = next(trained.glob(f"*-{key}"), trained / f"{name}-{key}")  # lines of several groups may share one
    if not folder.exists():
        predictor = train(model, processor, learn, settings, validation=validation, batch_size=batch_size).predictor
        if this_process().is_main_process:
            part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
            predictor.save_pretrained(part)
            try:
                part.rename(folder)
            except OSError:  # another run has trained the same meanwhile
                shutil.rmtree(part)
        this_process().wait_for_everyone()
    return replace(condition_of(folder), **how)


def by_line(rows: pd.DataFrame, lines: Sequence[dict]) -> pd.DataFrame:
    """Scored rows with the group and the label of their line, which is the row's label so far."""
    of = {_name(line): line for line in lines}
    return rows.assign(group=[of[name]["group"] for name in rows.label], label=[of[name]["label"] for name in rows.label])


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for each group, label and task: mean score with its interval, retention, and decoder multiply-accumulates.

    over: difference from a constant rate at the same retention, on the same samples, with low and high; at_cost: the same at the
    same computation (macs). The constant's score is interpolated between the lines of `constants`; NaN where none of them is
    as cheap, or as dear. The intervals over_all_low, over_all_high, at_cost_all_low and at_cost_all_high hold for all lines of a
    task at once (Bonferroni's correction).
    """
    table = []
    rows = rows.assign(macs=rows.prefill + rows.decode)
    compared = rows[rows.group != CONSTANT].groupby("task").apply(lambda r: r.groupby(["group", "label"]).ngroups)
    for (group, label, task), line in rows.groupby(["group", "label", "task"], sort=False):
        constant = rows[(rows.group == CONSTANT) & (rows.task == task)]
        row = {"group": group, "label": label, "method": line.method.iloc[0], "task": task, **bootstrap(line.score)}
        row |= {"retention": line.retention.mean(), "macs": line.macs.mean(), "tokens": line.tokens.mean()}
        for name, cost in (("over", "retention"), ("at_cost", "macs")):
            difference = (line.set_index("sample").score - _constant_at(row[cost], constant, cost)).dropna()
            over = bootstrap(difference)
            row |= {name: over["value"], f"{name}_low": over["low"], f"{name}_high": over["high"]}
            if group != CONSTANT:
                every = bootstrap(difference, level=1 - 0.05 / compared[task], resamples=20_000)
                row |= {f"{name}_all_low": every["low"], f"{name}_all_high": every["high"]}
        table.append(row)
    return pd.DataFrame(table)


def beside_reported(name: str, table: pd.DataFrame, unit: str) -> pd.DataFrame:
    """One of the paper's tables (`data/reported/<name>.csv`) with this run's lines beside it; blank where none is alike.

    table: `summary` of one task; unit: what its score is.
    """
    reported = pd.read_csv(ROOT / "data" / "reported" / f"{name}.csv", dtype=str)
    lines = table.drop_duplicates(["group", "label"]).set_index(["group", "label"])
    whole = _unpruned(table)
    rows = []
    for strategy in reported.strategy:
        where = REPORTED.get(strategy)
        row = lines.loc[where] if where in lines.index else None
        rows.append({
            f"here: {unit}": "" if row is None else in_words(row), "here: retention": np.nan if row is None else row.retention,
            "here: computation": np.nan if row is None else row.macs / whole,
        })  # fmt: skip
    return reported.rename(columns=lambda c: f"reported: {c}" if c != "strategy" else c).join(pd.DataFrame(rows))


def _constant_at(cost: float, rows: pd.DataFrame, kind: str) -> pd.Series:
    """Score of each sample under a constant rate of this cost. kind: the column of the cost, "retention" or "macs"."""
    scores = rows.pivot(index="sample", columns="label", values="score")
    return interpolated(rows.groupby("label")[kind].mean(), scores, cost)


def once(table: pd.DataFrame) -> pd.DataFrame:
    """`summary` without lines that several groups share: each where it stands first."""
    return table.drop_duplicates(["task", "value", "retention", "macs", "tokens"])


def shown(table: pd.DataFrame, unit: str) -> pd.DataFrame:
    """`summary` of one task for the page, each line once; blank: not compared. unit: what its score is."""
    lines = once(table)
    rows = [row for _, row in lines.iterrows()]
    return pd.DataFrame({
        "group": lines.group, "label": lines.label, unit: [in_words(row, ".3f") for row in rows], "retention": lines.retention,
        "computation": lines.macs / _unpruned(table), "over a constant": [_difference(row, "over") for row in rows],
        "at equal computation": [_difference(row, "at_cost") for row in rows], "tokens": lines.tokens,
    })  # fmt: skip


def _unpruned(table: pd.DataFrame) -> float:
    """The multiply-accumulates of the line that prunes nothing; NaN where it was not measured. table: `summary` of one task."""
    macs = table[(table.group == CONSTANT) & (table.retention == 1)].macs
    return macs.item() if len(macs) else float("nan")


def difference(rows: pd.DataFrame, one: str, other: str) -> dict | None:
    """Paired difference in score between the lines of two labels, with its interval; None where one of them was not measured."""
    scores = [rows[rows.label == label].drop_duplicates("sample").set_index("sample").score for label in (one, other)]
    return None if any(s.empty for s in scores) else bootstrap((scores[0] - scores[1]).dropna())


def finding(table: pd.DataFrame, place: str, dropped: bool) -> str:
    """How many lines differ from a constant rate at equal retention and at equal computation, what DyRate costs, what matters.

    place: model and images in words. dropped: whether the model was trained with random dropping.
    """
    known = table[(table.group != CONSTANT) & table.over.notna()]
    if known.empty:
        return f"**With {place}, no line has a retention at which a constant rate was measured.**"
    distinct = once(known)
    cost = distinct[distinct.at_cost.notna()]
    spread = known.groupby("group", sort=False).over.agg(lambda v: v.max() - v.min()).sort_values(ascending=False)
    lines = known[known.group == spread.index[0]].sort_values("over")
    ends = (f"{_difference(row, 'over')} with *{row['label']}*" for row in (lines.iloc[-1], lines.iloc[0]))
    trained = " The model was trained with random dropping, which favours random pruning." if dropped else ""
    return (
        f"**With {place}, of {len(distinct)} lines {_counted(distinct, 'over_all')} than a constant rate at equal retention; at "
        f"equal computation, of {len(cost)}, {_counted(cost, 'at_cost_all')}.{_cost_of_dyrate(table)}** The counts are by "
        f"intervals that hold for all lines at once, n = {known.n.max()} answers. At equal retention *{spread.index[0]}* matters "
        f"most (95 % intervals): {' against '.join(dict.fromkeys(ends))}.{trained} The groups by their spread: "
        f"{', '.join(spread.index)}."
    )


def _counted(rows: pd.DataFrame, name: str) -> str:
    return f"{(rows[f'{name}_low'] > 0).sum()} score higher and {(rows[f'{name}_high'] < 0).sum()} lower"


def _difference(row: pd.Series, name: str) -> str:
    """A difference from a constant with its interval, in words; "" where there was none to compare with."""
    number = {"value": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"]}
    return "" if pd.isna(row[name]) else in_words(number, "+.3f")


def _cost_of_dyrate(table: pd.DataFrame) -> str:
    """What the first line under a trained predictor keeps and computes, beside a constant that keeps as much, in words."""
    learned, constant = table[table.method == "DyRate"], table[table.group == CONSTANT].sort_values("retention")
    unpruned = _unpruned(table)
    if learned.empty or np.isnan(unpruned):
        return ""
    line = learned.iloc[0]
    same = np.interp(line.retention, constant.retention, constant.macs)
    share, of_constant = (100 * macs / unpruned for macs in (line.macs, same))
    text = (
        f" DyRate (*{line.label}*) keeps {line.retention:.2f} of the image tokens at {share:.0f} % of the unpruned "
        f"multiply-accumulates, where a constant rate that keeps as much needs {of_constant:.0f} %"
    )
    said = {"retention": _difference(line, "over"), "computation": _difference(line, "at_cost")}
    differences = [f"{difference} at equal {what}" for what, difference in said.items() if difference]
    return f"{text}; its score differs from a constant's by {' and '.join(differences)}." if differences else f"{text}."


def record(chapter: Chapter, rows: pd.DataFrame, place: str, dropped: bool) -> None:
    """The chapter's headline numbers and sentences, from the rows of its main task. place, dropped: as in `finding`."""
    table = summary(rows)
    chapter.text("ablations_finding", finding(table, place, dropped))
    lines = once(table[table.group != CONSTANT])
    chapter.number("lines_better", (lines.over_all_low > 0).sum())
    chapter.number("lines_worse", (lines.over_all_high < 0).sum())
    pairs = {"fixed_minus_depth": ("FixedPrune", "DepthPrune"), "top_k_minus_greedy": ("top-k 6", "greedy")}
    for key, (one, other) in pairs.items():
        if measured := difference(rows, one, other):
            chapter.number(key, measured)
    fixed = difference(rows, *pairs["fixed_minus_depth"])
    said = f"Here, at equal retention, FixedPrune {verdict(fixed)} DepthPrune: {in_words(fixed, '+.3f')}." if fixed else ""
    chapter.text("ablations_fixed", said)
