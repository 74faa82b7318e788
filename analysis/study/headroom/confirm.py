"""The best schedules, and trained predictors, on generated answers: what teacher-forced losses promised, on other scenes.

A schedule rarely meets a budget by itself. The two that the frontier mixes, below and above it, both answer; the mean score at
the budget is read between them at their measured mean retention, as the teacher-forced loss is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

import dyrate
from dyrate.data import Examples
from dyrate.strategies.controls import Constant, MeanTrajectory
from dyrate.strategies.dyrate import DyRate
from dyrate.strategies.full import Full
from dyrate.strategy import Strategy
from study.answers import Condition, answer_all
from study.controls import TaskSchedule
from study.examples import examples
from study.headroom.frontier import Library, choices, number, of_mean, of_task, over_trainings, resampled
from study.headroom.library import LIBRARIES, Trajectory
from study.headroom.measure import trained_here
from study.headroom.report import Measured, library, recipe_of
from study.rows import read_answers, write_rows
from study.scores import scored

BUDGETS = (0.25, 0.33)
CONSTANTS = (0.2, 0.25, 0.33, 0.4, 0.55, 0.7)  # retention ratios between which a constant is read at a predictor's own
EQUAL = ("retention", "computation")  # what a constant has in common with what it is compared with
TRAINED = "DyRate "  # before the recipe, in the method of a trained predictor's rows
OTHER_SCENES = 100_000  # those that chose the schedules come before
MAX_NEW_TOKENS = 100
STEPS = 128  # of a schedule; its last rate goes on
METHODS = {"schedule": of_mean, "schedule by task": of_task}


def bracket(asked: Library, method: str, budget: float) -> list[np.ndarray]:
    """The trajectory of each task (in the order of its number) below and above a budget, or twice the one that meets it."""
    tasks, everyone = np.unique(asked.task, return_index=True)[1], np.arange(len(asked.task))
    believed = [METHODS[method](asked, values, everyone, tasks) for values in (asked.loss, asked.cost)]
    choice = np.unique(choices(*believed), axis=1)
    by_task = of_task(asked, asked.cost, everyone, tasks)
    mean_cost = np.take_along_axis(by_task, choice, 1).mean(0)
    below, above = mean_cost <= budget, mean_cost >= budget
    if not below.any():
        raise ValueError(f"no {method} is as cheap as {budget:g}: the cheapest keeps {mean_cost.min():.3f}")
    return [choice[:, np.where(below, mean_cost, -1).argmax()], choice[:, np.where(above, mean_cost, 2).argmin()]]


def strategy_of(method: str, chosen: dict[str, Trajectory], **common) -> Strategy:
    """The strategy that follows a trajectory for each task; `common`: its layer and residency."""
    rates = {task: trajectory.rates(STEPS) for task, trajectory in chosen.items()}
    if method == "schedule by task":
        return TaskSchedule(rates=rates, **common)
    return MeanTrajectory(rates=next(iter(rates.values())), **common)


def conditions(measured: Measured, residency: str, budgets: Sequence[float], trained: dict[str, DyRate]) -> list[Condition]:
    """No pruning; constants; at each budget the schedules on both sides of it, of all tasks and of each; trained predictors."""
    common = {"first_pruned_layer": measured.layer, "residency": residency}
    found = [Condition("Full", Full(), "Full")]
    for retention in sorted({*CONSTANTS, *budgets}):
        found.append(Condition(f"constant {retention:g}", Constant(rate=1 - retention, **common), "constant", retention))
    for budget in budgets:
        for method in METHODS:
            for side, choice in zip(
                ("below", "above"), bracket(library(measured, "FastV", residency), method, budget), strict=True
            ):
                chosen = dict(zip(measured.about["tasks"], (LIBRARIES[residency][i] for i in choice), strict=True))
                strategy = strategy_of(method, chosen, **common)
                found.append(Condition(f"{method} {budget:g} {side}", strategy, method, budget))
    for name, strategy in trained.items():
        if strategy.residency == residency:
            found.append(Condition(name, strategy, f"{TRAINED}{recipe_of(name)}"))
    return found


def questions(measured: Measured, n: int) -> Examples:
    """The questions that are answered: other scenes than those on which the schedules were chosen."""
    return examples(measured.about["source"], n, tasks=measured.about["tasks"], split="test", start=OTHER_SCENES)


def confirm(
    folder: Path, n: int, out: Path, *, layer: int = 2, residency: str = "evict", budgets: Sequence[float] = BUDGETS,
    predictors: Path | None = None, store: Path = Path("build/answers"), batch_size: int = 100, add: bool = False,
) -> None:  # fmt: skip
    """Answer `n` questions a task under each condition and write the answers into `out`.

    folder: of the measured losses; predictors: a folder of trained ones, to answer too. add: only the conditions that the
    folder's scored answers lack. Raises ValueError where these are to another number of questions.
    """
    measured = Measured(folder, layer)
    known = set()
    if add:
        before = generated(folder, layer=layer, residency=residency)
        known, questions_before = set(before.label), before.groupby("task")["sample"].nunique().max()
        if questions_before != n:
            raise ValueError(f"{folder} has scored answers to {questions_before} questions a task: give --n {questions_before}")
    model, processor = dyrate.load(measured.name, dtype=torch.float32)
    wanted = conditions(measured, residency, budgets, trained_here(predictors, layer, model))
    wanted = [condition for condition in wanted if condition.label not in known]
    how = {"max_new_tokens": MAX_NEW_TOKENS, "batch_size": batch_size}
    write_rows(out / _file(layer, residency), answer_all(model, processor, wanted, questions(measured, n), store, **how))


def score(source: Path, folder: Path, *, layer: int = 2, residency: str = "evict", add: bool = False) -> None:
    """Score answers that `confirm` wrote into `source`, and write them without their texts into the laboratory's folder.

    add: beside what was scored there before, in place of the conditions that were answered anew.
    """
    rows = read_answers(source / _file(layer, residency))
    measured, n = Measured(folder, layer), rows.groupby("task")["sample"].nunique().max()
    columns = ["label", "method", "budget", "sample", "task", "tokens", "retention", "prefill", "decode", "score"]
    table = scored(rows.assign(budget=pd.to_numeric(rows.budget)), questions(measured, int(n)))[columns]
    if add:
        before = generated(folder, layer=layer, residency=residency)
        table = pd.concat([before[~before.label.isin(table.label)], table], ignore_index=True)
    write_rows(folder / _file(layer, residency), table, digits=6)


def _file(layer: int, residency: str) -> str:
    return f"headroom_layer{layer}_generated_{residency}.csv.gz"


def generated(folder: Path, *, layer: int = 2, residency: str = "evict") -> pd.DataFrame:
    """Scored rows of a laboratory. Raises FileNotFoundError that says how to make them."""
    path = folder / _file(layer, residency)
    if not path.exists():
        raise FileNotFoundError(f"no {path}: `python -m study.headroom confirm`, then `score`, make it")
    return pd.read_csv(path)


def confirmed(rows: pd.DataFrame) -> pd.DataFrame:
    """Score of each method, and its gain on the constant, at the constant's measured retention; tasks weigh alike, paired."""
    wide = _wide(rows)
    weights, n = resampled(wide["score"].index.get_level_values("task").to_numpy()), len(wide["score"])
    table = []
    for budget, of_budget in rows[rows.method != "Full"].groupby("budget"):
        ends = {method: list(of.label.unique()) for method, of in of_budget.groupby("method", sort=False)}
        columns = ("score", "retention")
        measured = {m: [weights @ wide[column][labels].to_numpy() for column in columns] for m, labels in ends.items()}
        retention = measured["constant"][1][:, 0]
        reached = {method: _between(score, kept, retention) for method, (score, kept) in measured.items()}
        for method, scores in reached.items():
            row = {"budget": budget, "retention": retention[0], "method": method, "score": scores[0]}
            table.append(row | number(scores - reached["constant"], n))
    return pd.DataFrame(table).assign(unpruned=weights[0] @ wide["score"]["Full"].to_numpy())


def controllers(rows: pd.DataFrame) -> pd.DataFrame:
    """Trained predictors against one constant rate for all tasks that costs as much, read between constants.

    Two rows a recipe, for `equal` in EQUAL: the constant has the predictor's own measured mean retention, or its computation (the
    decoder's multiply-accumulates, prefill and decode, over those without pruning). score, constant (its score), and the gain
    with its interval over answers and trainings; tasks weighted equally, answers paired. No pruning is the constant that keeps
    everything. Raises ValueError where a predictor costs less than every constant.
    """
    wide = _wide(rows)
    weights, n = resampled(wide["score"].index.get_level_values("task").to_numpy()), len(wide["score"])
    constants = [*rows[rows.method == "constant"].sort_values("budget").label.unique(), "Full"]
    means = {column: weights @ values[constants].to_numpy() for column, values in wide.items()}
    table = []
    for recipe, of in by_recipe(rows).items():
        labels = list(of.label.unique())
        own = {column: weights @ values[labels].to_numpy() for column, values in wide.items()}
        drawn = over_trainings(len(labels), len(weights))
        mean = {column: np.take_along_axis(values, drawn, 1).mean(1) for column, values in own.items()}
        for equal in EQUAL:
            at, cost = own[equal], means[equal]
            if (at.min(1) < cost.min(1)).any():
                raise ValueError(f"DyRate {recipe}: {equal} {at[0].min():.3f}, below the constants {constants}")
            constant = np.array([np.interp(*of) for of in zip(at, cost, means["score"], strict=True)])
            constant = np.take_along_axis(constant, drawn, 1).mean(1)
            row = {"recipe": recipe, "equal": equal, **{name: mean[name][0] for name in ("retention", "computation", "score")}}
            row |= {"constant": constant[0], "seeds": len(labels)}
            table.append(row | number(mean["score"] - constant, n))
    return pd.DataFrame(table)


def by_recipe(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of trained predictors by recipe, in the order of its name: the method without what marks it as trained."""
    trained = rows[rows.method.str.startswith(TRAINED)]
    return {method.removeprefix(TRAINED): of for method, of in trained.groupby("method")}


def _wide(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Score, retention and computation by answer (rows: task, sample) and condition (columns: its label).

    Scores are shares of right answers and slots; captions' CIDEr is taken as a share of the unpruned. Computation is a share of
    the task's mean without pruning.
    """
    full = rows[rows.method == "Full"]
    unpruned = full[full.task == "caption"].score.mean()
    macs = rows.prefill + rows.decode
    rows = rows.assign(
        score=rows.score.where(rows.task != "caption", rows.score / unpruned),
        computation=macs / rows.task.map(macs[full.index].groupby(full.task).mean()),
    )
    return {column: rows.pivot(index=["task", "sample"], columns="label", values=column) for column in ("score", *EQUAL)}


def _between(
    score: Float[np.ndarray, "resample side"], retention: Float[np.ndarray, "resample side"], at: Float[np.ndarray, " resample"]
) -> Float[np.ndarray, " resample"]:
    """The score at a retention, on the line through the two sides of it (of one side alone: its own)."""
    width = retention[:, -1] - retention[:, 0]
    share = np.divide(at - retention[:, 0], width, out=np.zeros_like(width), where=abs(width) > 1e-9)
    return score[:, 0] + share * (score[:, -1] - score[:, 0])
