"""Chapter 7, is it the dynamics? Controls made from a predictor's own rates, and three questions that they answer one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

import dyrate
from dyrate.data import Examples
from dyrate.models import describe
from dyrate.strategies.controls import Constant, LinearAnneal, MeanTrajectory, RandomPrune
from dyrate.strategies.dyrate import DyRate
from dyrate.strategies.fastv import FastVRerank
from dyrate.strategies.full import Full
from dyrate.strategy import Strategy
from dyrate.training import trajectories
from study.answers import Condition, answer_all
from study.book import ROOT, Chapter
from study.controls import Oracle, ShuffledRates, TaskConstant
from study.examples import examples as study_examples
from study.examples import has_scenes
from study.intervals import MATTERS, bootstrap_crossed, verdict
from study.predictors import condition_of
from study.scores import scored

QUESTIONS = {  # the two methods whose difference answers each, and their names in a sentence
    "a schedule against a constant": ("mean trajectory", "constant", "a schedule", "a constant rate"),
    "adapting against its mean schedule": ("DyRate", "mean trajectory", "adapting to the input", "one schedule for all"),
    "learning against annealing": ("DyRate", "annealing", "learning", "a straight line"),
    "DyRate against a constant": ("DyRate", "constant", "DyRate as a whole", "a constant rate"),
    "DyRate against a constant of the task": ("DyRate", "constant by task", "it", "one constant for each kind of task"),
}
MAIN_QUESTIONS = tuple(QUESTIONS)[:3]  # what the chapter is about; the others are whole comparisons
SCHEDULES = ("constant", "mean trajectory", "annealing")  # the controls that depend on the step alone


@dataclass
class Dynamics:
    """What the chapter measured, with `scored` rows of all predictors (method "DyRate") and controls on the test prompts.

    about: `dyrate.models.describe` of the model. paths: `retention_paths` of the predictors on the validation prompts.
    schedules: of them and of the controls made from them. others: scored rows of further predictors and their controls, with
    the name of their condition.
    """

    about: dict
    examples: Examples
    paths: pd.DataFrame
    schedules: pd.DataFrame
    scored: pd.DataFrame
    others: pd.DataFrame


def measure(
    *, model: str, source: str, tasks: Sequence[str], n_validation: int, n: int, predictors: str, prefix: str,
    others: dict[str, str], max_new_tokens: int, batch_size: int, seed: int, store: str, device_map: str = "", **_,
) -> Dynamics:  # fmt: skip
    """Answers under predictors and under the controls made from their rates on validation prompts. Parameters: the notebook's."""
    validation = study_examples(source, n_validation, tasks=tasks, split="validation", seed=seed)
    test = study_examples(source, n, tasks=tasks, split="test", seed=seed)
    loaded, processor = dyrate.load(model, device_map=device_map or None)
    how = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}

    def under(start: str, only: Sequence[str] | None = None) -> tuple[pd.DataFrame, dict[str, Strategy], pd.DataFrame]:
        learned = seeds(ROOT / predictors, start)
        paths = retention_paths(loaded, processor, learned, validation, **how)
        made = controls(paths, learned[0].strategy, describe(loaded)["layers"], oracle=has_scenes(test))
        made = {name: strategy for name, strategy in made.items() if only is None or name in only}
        conditions = [*learned, *(Condition(name, strategy, name) for name, strategy in made.items())]
        return paths, made, scored(answer_all(loaded, processor, conditions, test, ROOT / store, seed=seed, **how), test)

    paths, made, rows = under(prefix)
    further = [under(start, SCHEDULES)[2].assign(condition=name) for name, start in others.items()]
    further = pd.concat(further, ignore_index=True) if further else rows[:0].assign(condition="")
    return Dynamics(describe(loaded), test, paths, schedules(paths, made), rows, further)


def seeds(folder: Path, prefix: str) -> list[Condition]:
    """The predictors in folders that begin with `prefix`. Raises FileNotFoundError that says how to train one."""
    learned = [condition_of(path) for path in sorted(folder.glob(f"{prefix}*"))]
    if not learned:
        raise FileNotFoundError(f"no predictor {folder}/{prefix}*: train one with `python analysis/train.py --out ...`")
    return learned


def retention_paths(
    model, processor, learned: Sequence[Condition], examples: Examples, *, max_new_tokens: int, batch_size: int = 32
) -> pd.DataFrame:
    """Retention at every step of every answer under every predictor: label, sample, task, step, retention."""
    tasks = {e.name: e.task for e in examples}
    how = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    rows = [
        {"label": condition.label, "sample": name, "task": tasks[name], "step": t, "retention": retention}
        for condition in learned
        for name, path in trajectories(model, processor, condition.strategy, examples, **how).items()
        for t, retention in enumerate(path)
    ]
    return pd.DataFrame(rows)


def controls(paths: pd.DataFrame, like: DyRate, n_layers: int, oracle: bool) -> dict[str, Strategy]:
    """Strategies at the mean retention of `paths`, each without one thing that DyRate has. like: for layer and residency.

    constant: no schedule. mean trajectory: no adaptation. others' rates: adapted to another input. annealing: not learned.
    constant by task: knows no more than the task. random pruning, re-ranked, oracle: the constant under another ranking.
    A schedule is scaled until answers as long as those of `paths` have that mean: a short answer sees its start alone.
    """
    answers = paths.groupby(["label", "sample", "task"], sort=False).retention
    budget = float(answers.mean().mean())
    each = [path.to_numpy() for _, path in answers]
    lengths = np.array([len(path) for path in each])
    mean_path = paths.groupby("step").retention.mean().to_numpy()
    if like.residency == "evict":
        mean_path = np.minimum.accumulate(mean_path)
    common = {"first_pruned_layer": like.first_pruned_layer, "residency": like.residency}

    def line(retention: float) -> Strategy:
        return LinearAnneal.at(retention, n_layers, steps=max(1, round(lengths.mean())), **common)

    def scaled(schedules: Sequence[np.ndarray]) -> list[np.ndarray]:
        def at(x: float) -> list[np.ndarray]:
            return [np.minimum(1, x * path) for path in schedules]

        return at(_level(budget, lambda x: mean_retention(at(x), lengths), 4))

    start = _level(budget, lambda x: mean_retention([_schedule(line(x), lengths.max())], lengths), 1)
    by_task = answers.mean().groupby("task", sort=False).mean()
    made = {
        "Full": Full(),
        "constant": Constant(rate=1 - budget, **common),
        "mean trajectory": MeanTrajectory(rates=_rates(*scaled([mean_path])), **common),
        "others' rates": ShuffledRates(rates=tuple(_rates(path) for path in scaled(each)), **common),
        "annealing": line(start),
        "constant by task": TaskConstant(rates={task: float(1 - x) for task, x in by_task.items()}, **common),
        "constant, random pruning": RandomPrune(rate=1 - budget, **common),
        "constant, re-ranked": FastVRerank(rate=1 - budget, first_pruned_layer=like.first_pruned_layer),
    }
    return made | ({"constant, oracle": Oracle(rate=1 - budget, **common)} if oracle else {})


def mean_retention(schedules: Sequence[np.ndarray], lengths: np.ndarray) -> float:
    """Mean retention of answers of these lengths, each under each schedule (retention by step; its last one goes on)."""
    steps = np.arange(1, max(lengths) + 1)
    return float(np.mean([(np.cumsum(s[np.minimum(steps, len(s)) - 1]) / steps)[lengths - 1] for s in schedules]))


def _level(wanted: float, retention_at: Callable[[float], float], high: float) -> float:
    """The x in [0, high] at which a rising `retention_at` is what is wanted, by bisection."""
    low = 0.0
    for _ in range(30):
        x = (low + high) / 2
        low, high = (x, high) if retention_at(x) < wanted else (low, x)
    return high


def _rates(retention: np.ndarray) -> tuple[float, ...]:
    return tuple(float(1 - x) for x in retention)


def _schedule(strategy: Strategy, steps: int) -> np.ndarray:
    """Retention at each step, (steps,), of a strategy that looks at the step alone."""
    return np.array([strategy.keep(SimpleNamespace(step=t)) for t in range(steps)])


def schedules(paths: pd.DataFrame, strategies: dict[str, Strategy]) -> pd.DataFrame:
    """Mean retention by step of each predictor (method "DyRate") and of the controls that depend on the step alone."""
    rows = [paths.groupby(["label", "step"], sort=False).retention.mean().reset_index().assign(method="DyRate")]
    last = paths.step.max() + 1
    for name in SCHEDULES:
        retention = _schedule(strategies[name], last)
        rows.append(pd.DataFrame({"label": name, "step": range(last), "retention": retention, "method": name}))
    return pd.concat(rows, ignore_index=True)


def explained(paths: pd.DataFrame) -> dict[str, float]:
    """Share of the variance of the retention that a straight line in the step, or the task alone, explains."""
    if paths.retention.std() == 0:
        return {"step": 0.0, "task": 0.0}
    by_task = paths.groupby("task").retention.transform("mean")
    line = np.corrcoef(paths.step, paths.retention)[0, 1] ** 2
    return {"step": float(line), "task": float(by_task.var() / paths.retention.var())}


def verdicts(rows: pd.DataFrame, tasks: Sequence[str]) -> pd.DataFrame:
    """Paired differences for each question and task, and over all tasks but captions, whose score has another scale.

    rows: `scored`, with the predictors' seeds under the method "DyRate". Intervals are over scenes and seeds; a scene that
    several tasks ask about counts once, with the mean of their differences.
    """
    wide = rows.pivot(index=["task", "scene"], columns="label", values="score")
    labels = rows.groupby("method", sort=False).label.unique()
    table = []
    for question, (one, other, *_) in QUESTIONS.items():
        if not {one, other} <= set(labels.index):
            continue
        difference = pd.DataFrame(wide[labels[one]].to_numpy() - wide[labels[other]].to_numpy(), index=wide.index).dropna()
        table += [{"question": question, "task": task} | bootstrap_crossed(difference.loc[task]) for task in tasks]
        shared = [task for task in tasks if task != "caption"]
        if shared:
            mean = difference.loc[shared].groupby("scene").mean()
            table.append({"question": question, "task": "all but captions"} | bootstrap_crossed(mean))
    return pd.DataFrame(table)


def by_length(rows: pd.DataFrame, task: str) -> dict[str, pd.DataFrame]:
    """The rows of a task in two halves: samples whose unpruned answer is short, and long, by the median number of tokens."""
    rows = rows[rows.task == task]
    tokens = rows[rows.method == "Full"].set_index("sample").tokens
    short = rows["sample"].isin(tokens.index[tokens <= tokens.median()])
    name = task.replace("_", " ")
    halves = {f"short {name}s": rows[short], f"long {name}s": rows[~short]}
    return {half: part for half, part in halves.items() if len(part)}


def conditions(measured: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The questions under each condition, over all tasks but captions: rows of `verdicts` whose task names the condition.

    measured: `scored` rows by condition.
    """
    tables = {name: verdicts(rows, list(dict.fromkeys(rows.task))) for name, rows in measured.items()}
    return pd.concat([_pooled(table).assign(task=name) for name, table in tables.items()], ignore_index=True)


def all_conditions(measured: Dynamics, task: str) -> pd.DataFrame:
    """`conditions` of the main predictors, of the others, and of the main ones on short and long answers to a task."""
    others = {name: rows.drop(columns="condition") for name, rows in measured.others.groupby("condition", sort=False)}
    return conditions({"evict, all": measured.scored, **others, **by_length(measured.scored, task)})


def _pooled(table: pd.DataFrame) -> pd.DataFrame:
    """Of verdicts, those over all tasks; of captions alone, theirs."""
    return table[table.task == ("all but captions" if "all but captions" in set(table.task) else table.task.iloc[0])]


def bars(table: pd.DataFrame, rows: pd.DataFrame, tasks: Sequence[str]) -> pd.DataFrame:
    """Whether DyRate is no worse than constants on the tasks that a bar was set for, by the bound that was set beforehand.

    table: `verdicts` of rows. bound: `MATTERS` as a share of the task's unpruned score. met: the whole interval lies above minus
    the bound; missed: below it; else undecided, as a small sample is.
    """
    unpruned = rows[rows.method == "Full"].groupby("task").score.mean()
    shown = table[table.question.str.startswith("DyRate") & table.task.isin(tasks)]
    shown = shown[["question", "task", "value", "low", "high", "n", "seeds"]].assign(bound=MATTERS * shown.task.map(unpruned))
    reached = ["met" if r.low > -r.bound else "missed" if r.high < -r.bound else "undecided" for r in shown.itertuples()]
    return shown.assign(bar=reached)


def budgets(rows: pd.DataFrame, tasks: Sequence[str]) -> pd.DataFrame:
    """Mean score of each condition on each task, and its measured mean retention over all of them."""
    scores = rows.groupby(["label", "task"], sort=False).score.mean().unstack("task").reindex(columns=list(tasks))
    return scores.join(rows.groupby("label", sort=False).retention.mean().rename("mean retention")).reset_index()


def by_seed(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean score (all tasks but captions, if there are others) and mean retention of each predictor."""
    rows = rows[rows.method == "DyRate"]
    others = rows[rows.task != "caption"]
    score = (others if len(others) else rows).groupby("label").score.mean()
    return pd.DataFrame({"score": score, "retention": rows.groupby("label").retention.mean()})


def helps(table: pd.DataFrame, question: str) -> str:
    """Where the interval of a question lies above zero and where below it, in words."""
    rows = table[table.question == question]
    sides = {"helps": rows[rows.low > 0], "harms": rows[rows.high < 0]}
    parts = [f"{side} with {', '.join(part.task.str.replace('_', ' '))}" for side, part in sides.items() if len(part)]
    if len(rows) > sum(len(part) for part in sides.values()):
        parts.append(f"has no significant effect {'elsewhere' if parts else 'anywhere'}")
    return "; ".join(parts)


def finding(table: pd.DataFrame, rows: pd.DataFrame, place: str) -> str:
    """The three verdicts in words, and DyRate as a whole against constants, with their intervals and what they cost.

    table: `verdicts`. rows: the scored ones. place: model and images in words.
    """
    pooled, sentences = _pooled(table), []
    for row in pooled.to_dict("records"):
        *_, one, other = QUESTIONS[row["question"]]
        sentences.append(f"{one} {verdict(row)} {other} ({row['value']:+.3f}, {row['low']:+.3f} to {row['high']:+.3f})")
    main, whole = sentences[: len(MAIN_QUESTIONS)], sentences[len(MAIN_QUESTIONS) :]
    budget = rows[rows.method == "DyRate"].retention.mean()
    costs = ", ".join(f"{name} {100 * share:.0f} %" for name, share in computation(rows).items())
    tasks, pools = set(table.task) - {"all but captions"}, "all but captions" in set(table.task)
    apart = " (captions, on another scale, apart)" if pools and "caption" in tasks else ""
    return (
        f"**With {place}, at an equal mean retention of {budget:.2f}, {'; '.join(main)}.** "
        + (f"{'; '.join(whole)}. " if whole else "")
        + f"Differences in score with 95 % intervals over {pooled.n.max()} scenes and "
        f"{_counted(pooled.seeds.max(), 'training seed')}, on {_counted(len(tasks) - bool(apart), 'task')}{apart}. Equal "
        f"retention is not equal computation; of the unpruned multiply-accumulates: {costs}."
    )


def computation(rows: pd.DataFrame) -> dict[str, float]:
    """The decoder's multiply-accumulates, prefill and decode, of DyRate and of schedules over those without pruning."""
    macs = (rows.prefill + rows.decode).groupby(rows.method).mean()
    return {name: macs[name] / macs["Full"] for name in ("DyRate", *SCHEDULES) if name in macs}


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' if n > 1 else ''}"


def retention_by_task(rows: pd.DataFrame) -> str:
    """DyRate's mean retention on each task, mean over its seeds, from most to least, in words."""
    mean = rows[rows.method == "DyRate"].groupby("task").retention.mean().sort_values(ascending=False)
    return ", ".join(f"{retention:.2f} for {task.replace('_', ' ')}" for task, retention in mean.items())


def record(chapter: Chapter, measured: Dynamics, table: pd.DataFrame, by_condition: pd.DataFrame, place: str) -> None:
    """The chapter's headline numbers and sentences.

    table: `verdicts` on all tasks; by_condition: `all_conditions`; place: model and images in words.
    """
    for what, part in explained(measured.paths).items():
        chapter.number(f"{what}_explains", part)
    chapter.number("budget", measured.paths.groupby(["label", "sample"]).retention.mean().mean())
    retention = measured.scored.groupby("method").retention.mean()
    chapter.number("budget_missed", (retention.drop(["DyRate", "Full"]) - retention["DyRate"]).abs().max())
    predictors = by_seed(measured.scored)
    chapter.number("n_seeds", len(predictors))
    chapter.number("seed_deviation", predictors.score.std(ddof=0))
    chapter.number("seed_worst", predictors.score.min())
    chapter.number("seed_best", predictors.score.max())
    chapter.number("seed_retention_low", predictors.retention.min())
    chapter.number("seed_retention_high", predictors.retention.max())
    for row in _pooled(table).to_dict("records"):
        chapter.number(row["question"].replace(" ", "_"), {k: row[k] for k in ("value", "low", "high", "n")})
    everywhere = pd.concat([table[table.task != "all but captions"], by_condition])
    for question, key in zip(MAIN_QUESTIONS, ("schedule", "adapting", "learning"), strict=True):
        chapter.text(f"{key}_helps", helps(everywhere, question))
    chapter.text("retention_by_task", retention_by_task(measured.scored))
    chapter.text("dynamics_finding", finding(table, measured.scored, place))
