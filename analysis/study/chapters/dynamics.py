"""Is it the dynamics? Controls made from a predictor's own rates, and three questions that they answer one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from dyrate import evaluate
from dyrate.budget import trajectories
from dyrate.data import Examples
from study.intervals import bootstrap_crossed
from dyrate.strategies.dyrate import DyRate
from dyrate.strategies import STRATEGIES
from dyrate.strategy import Strategy

QUESTIONS = {
    "a schedule against a constant": ("mean trajectory", "constant"),
    "adapting against its mean schedule": ("DyRate", "mean trajectory"),
    "learning against annealing": ("DyRate", "annealing"),
    "DyRate against a constant": ("DyRate", "constant"),
    "DyRate against a constant of the task": ("DyRate", "constant by task"),
}
ASKED = tuple(QUESTIONS)[:3]  # what the chapter is about; the others are whole comparisons


def seeds(folder: Path, prefix: str) -> dict[str, DyRate]:
    """The predictors in folders that begin with `prefix`. Raises FileNotFoundError that says how to train one."""
    found = {f"DyRate {path.name.removeprefix(prefix)}": path for path in sorted(folder.glob(f"{prefix}*"))}
    if not found:
        raise FileNotFoundError(f"no predictor {folder}/{prefix}*: train one with `python -m dyrate.training --out ...`")
    return {label: DyRate.from_pretrained(path) for label, path in found.items()}


def kept_paths(model, processor, learned: dict[str, DyRate], examples, max_new_tokens: int, batch_size: int = 32) -> pd.DataFrame:
    """Kept share at every step of every answer under every predictor: strategy, sample, task, step, kept."""
    tasks = {e.name: e.task for e in examples}
    rows = [
        {"strategy": label, "sample": name, "task": tasks[name], "step": t, "kept": share}
        for label, strategy in learned.items()
        for name, path in trajectories(
            model, processor, strategy, examples, max_new_tokens=max_new_tokens, batch_size=batch_size
        ).items()
        for t, share in enumerate(path)
    ]
    return pd.DataFrame(rows)


def controls(paths: pd.DataFrame, like: DyRate, n_layers: int, oracle: bool) -> dict[str, Strategy]:
    """Strategies at the mean kept share of `paths`, each without one thing that DyRate has. like: for layer and residency.

    constant: no schedule. mean trajectory: no adaptation. others' rates: adapted to another input. annealing: not learned.
    constant by task: knows no more than the task. lots, reranked, oracle: the constant under another ranking.
    A schedule is scaled until answers as long as those of `paths` keep that mean: a short answer sees its start alone.
    """
    answers = paths.groupby(["strategy", "sample", "task"], sort=False).kept
    budget = float(answers.mean().mean())
    each = [path.to_numpy() for _, path in answers]
    lengths = np.array([len(path) for path in each])
    mean_path = paths.groupby("step").kept.mean().to_numpy()
    if like.residency == "evict":
        mean_path = np.minimum.accumulate(mean_path)
    make = STRATEGIES
    common = {"first_pruned_layer": like.first_pruned_layer, "residency": like.residency}

    def line(share: float) -> Strategy:
        return make["LinearAnneal"].at(share, n_layers, steps=max(1, round(lengths.mean())), **common)

    def drawn(strategy: Strategy) -> np.ndarray:
        return np.array([strategy.keep(_Step(t)) for t in range(lengths.max())])

    mean_path = np.minimum(1, mean_path * _level(budget, lambda x: mean_kept([np.minimum(1, x * mean_path)], lengths), 4))
    scale = _level(budget, lambda x: mean_kept([np.minimum(1, x * path) for path in each], lengths), 4)
    found = {
        "Full": make["Full"](),
        "constant": make["Constant"](rate=1 - budget, **common),
        "mean trajectory": make["MeanTrajectory"](rates=_rates(mean_path), **common),
        "others' rates": make["ShuffledRates"](rates=tuple(_rates(np.minimum(1, scale * path)) for path in each), **common),
        "annealing": line(_level(budget, lambda share: mean_kept([drawn(line(share))], lengths), 1)),
        "constant by task": make["TaskConstant"](
            rates={task: float(1 - x) for task, x in answers.mean().groupby("task", sort=False).mean().items()}, **common
        ),
        "constant, lots": make["RandomPrune"](rate=1 - budget, **common),
        "constant, reranked": make["FastVRerank"](rate=1 - budget, first_pruned_layer=like.first_pruned_layer),
    }
    if oracle:
        found["constant, oracle"] = make["Oracle"](rate=1 - budget, **common)
    return found


def mean_kept(schedules: Sequence[np.ndarray], lengths: np.ndarray) -> float:
    """Mean kept share of answers of these lengths, each under each schedule (kept share by step; its last one goes on)."""
    steps = np.arange(1, max(lengths) + 1)
    return float(np.mean([(np.cumsum(s[np.minimum(steps, len(s)) - 1]) / steps)[lengths - 1] for s in schedules]))


def _level(wanted: float, kept_at: Callable[[float], float], high: float) -> float:
    """The x in [0, high] at which a rising `kept_at` is what is wanted, by bisection."""
    low = 0.0
    for _ in range(30):
        x = (low + high) / 2
        low, high = (x, high) if kept_at(x) < wanted else (low, x)
    return high


def _rates(kept: np.ndarray) -> tuple[float, ...]:
    return tuple(float(1 - x) for x in kept)


def measure(
    model, processor, learned: dict[str, DyRate], check: Examples, examples: Examples, store: Path, *, max_new_tokens: int,
    batch_size: int, only: Sequence[str] | None = None,
) -> tuple[pd.DataFrame, dict[str, Strategy], pd.DataFrame]:  # fmt: skip
    """Predictors and the controls made from their rates on `check`: paths, controls, and scored answers to `examples`.

    only: which controls; default all.
    """
    paths = kept_paths(model, processor, learned, check, max_new_tokens, batch_size)
    n_layers = model.config.get_text_config().num_hidden_layers
    made = controls(paths, next(iter(learned.values())), n_layers, oracle=examples[0].scene is not None)
    made = {name: strategy for name, strategy in made.items() if only is None or name in only}
    answered = evaluate.run(
        model, processor, {**learned, **made}, examples, store, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    return paths, made, evaluate.scored(answered, examples)


def schedules(paths: pd.DataFrame, strategies: dict[str, Strategy]) -> pd.DataFrame:
    """Mean kept share by step of each predictor and of the controls that depend on the step alone."""
    rows = [paths.groupby(["strategy", "step"], sort=False).kept.mean().reset_index()]
    last = paths.step.max() + 1
    for name in ("constant", "mean trajectory", "annealing"):
        shares = [strategies[name].keep(_Step(t)) for t in range(last)]
        rows.append(pd.DataFrame({"strategy": name, "step": range(last), "kept": shares}))
    return pd.concat(rows, ignore_index=True)


class _Step:
    """All that a schedule looks at."""

    def __init__(self, step: int):
        self.step = step


def explained(paths: pd.DataFrame) -> dict[str, float]:
    """Share of the variance of the kept share that a straight line in the step, or the task alone, explains."""
    if paths.kept.std() == 0:
        return {"step": 0.0, "task": 0.0}
    by_task = paths.groupby("task").kept.transform("mean")
    return {"step": float(np.corrcoef(paths.step, paths.kept)[0, 1] ** 2), "task": float(by_task.var() / paths.kept.var())}


def verdicts(scored: pd.DataFrame, learned: Sequence[str], tasks: Sequence[str]) -> pd.DataFrame:
    """Paired differences for each question and task, and over all tasks but captions, whose score has another scale.

    scored: rows of `evaluate.scored`. learned: labels of the predictors' seeds. Intervals are over scenes and seeds; a scene
    that several tasks ask about counts once, with the mean of their differences.
    """
    scene = [name.removeprefix(f"{task}-") for name, task in zip(scored["sample"], scored.task, strict=True)]
    wide = scored.assign(scene=scene).pivot(index=["task", "scene"], columns="strategy", values="score")
    rows = []
    for question, sides in QUESTIONS.items():
        one, other = (list(learned) if side == "DyRate" else [side] for side in sides)
        if not one or not {*one, *other} <= set(wide):
            continue
        difference = pd.DataFrame(wide[one].to_numpy() - wide[other].to_numpy(), index=wide.index).dropna()
        rows += [{"question": question, "task": task} | bootstrap_crossed(difference.loc[task]) for task in tasks]
        shared = [task for task in tasks if task != "caption"]
        if shared:
            mean = difference.loc[shared].groupby("scene").mean()
            rows.append({"question": question, "task": "all but captions"} | bootstrap_crossed(mean))
    return pd.DataFrame(rows)


def by_length(scored: pd.DataFrame, task: str, reference: str = "Full") -> dict[str, pd.DataFrame]:
    """The rows of a task in two halves: samples whose unpruned answer is short, and long, by the median number of tokens."""
    rows = scored[scored.task == task]
    tokens = rows[rows.strategy == reference].set_index("sample").tokens
    short = set(tokens.index[tokens <= tokens.median()])
    name = task.replace("_", " ")
    halves = {f"short {name}s": rows[rows["sample"].isin(short)], f"long {name}s": rows[~rows["sample"].isin(short)]}
    return {half: found for half, found in halves.items() if len(found)}


def conditions(measured: dict[str, tuple[pd.DataFrame, Sequence[str]]]) -> pd.DataFrame:
    """The questions under each condition, over all tasks but captions: rows of `verdicts` whose task names the condition.

    measured: scored rows and the labels of the predictors' seeds, by condition.
    """
    rows = []
    for condition, (scored, learned) in measured.items():
        found = verdicts(scored, learned, list(dict.fromkeys(scored.task)))
        rows.append(_pooled(found).assign(task=condition))
    return pd.concat(rows, ignore_index=True)


def _pooled(found: pd.DataFrame) -> pd.DataFrame:
    """Of verdicts, those over all tasks; of captions alone, theirs."""
    return found[found.task == ("all but captions" if "all but captions" in set(found.task) else found.task.iloc[0])]


def bars(found: pd.DataFrame, tasks: Sequence[str]) -> pd.DataFrame:
    """DyRate against constants on the tasks that a bar was set for: missed where the whole interval is below zero."""
    rows = found[found.question.str.startswith("DyRate") & found.task.isin(tasks)]
    said = ["missed" if high < 0 else "met, better" if low > 0 else "met" for low, high in zip(rows.low, rows.high, strict=True)]
    return rows[["question", "task", "value", "low", "high", "n", "seeds"]].assign(bar=said)


def by_seed(scored: pd.DataFrame, learned: Sequence[str]) -> pd.DataFrame:
    """Mean score (all tasks but captions, if there are others) and mean kept share of each predictor."""
    rows = scored[scored.strategy.isin(list(learned))]
    others = rows[rows.task != "caption"]
    score = (others if len(others) else rows).groupby("strategy").score.mean()
    return pd.DataFrame({"score": score, "kept": rows.groupby("strategy").kept.mean()})


def helps(found: pd.DataFrame, question: str) -> str:
    """Where the interval of a question lies above zero and where below it, in words."""
    rows = found[found.question == question]
    sides = {"helps": rows[rows.low > 0], "harms": rows[rows.high < 0]}
    said = [f"{side} with {', '.join(part.task.str.replace('_', ' '))}" for side, part in sides.items() if len(part)]
    unsaid = len(rows) - sum(len(part) for part in sides.values())
    if unsaid:
        said.append("cannot be told to help or harm elsewhere" if said else "cannot be told to help or harm anywhere")
    return "; ".join(said)


def sentence(found: pd.DataFrame) -> str:
    """The three verdicts in words, and DyRate as a whole against constants, with their intervals."""
    words = {
        "a schedule against a constant": ("a schedule", "a constant rate"),
        "adapting against its mean schedule": ("adapting to the input", "one schedule for all"),
        "learning against annealing": ("learning", "a straight line"),
        "DyRate against a constant": ("DyRate as a whole", "a constant rate"),
        "DyRate against a constant of the task": ("it", "one constant for each kind of task"),
    }
    pooled = _pooled(found)
    said = []
    for row in pooled[pooled.question.isin(list(words))].itertuples():
        one, other = words[row.question]
        verb = "beats" if row.low > 0 else "loses to" if row.high < 0 else "cannot be told from"
        said.append(f"{one} {verb} {other} ({row.value:+.3f}, {row.low:+.3f} to {row.high:+.3f})")
    asked, whole = said[: len(ASKED)], said[len(ASKED) :]
    return (
        f"**At equal mean kept share {'; '.join(asked)}.** "
        + (f"{'; '.join(whole)}. " if whole else "")
        + "Differences in the score, 95 % intervals."
    )


def shares_by_task(scored: pd.DataFrame, learned: Sequence[str]) -> str:
    """What DyRate keeps of each task, mean over its seeds, from most to least, in words."""
    kept = scored[scored.strategy.isin(list(learned))].groupby("task").kept.mean().sort_values(ascending=False)
    return ", ".join(f"{share:.2f} for {task.replace('_', ' ')}" for task, share in kept.items())
