"""Signs that a rate predictor failed, each measured, held against a limit and answered with a remedy.

After the failure signatures that a reader of the paper would look for: rates that stagnate or collapse, unstable training,
fine-grained tasks that pay for the rest, and pruning that saves no time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from dyrate.generation import encode
from dyrate.data import Examples
from study.answers import generated
from dyrate.teacher_forcing import Prepared, taught
from dyrate.predictor import RatePredictor
from dyrate.strategies.dyrate import DyRate

ENOUGH_STEPS = 40  # of training, before its course says anything


@dataclass(frozen=True)
class Sign:
    """One measured quantity. limit: beyond it (`above` or below it) the sign warns; None for what only describes. at: where."""

    name: str
    measured: float
    unit: str
    limit: float | None = None
    above: bool = True
    remedy: str = ""
    at: str = ""

    @property
    def warns(self) -> bool:
        return self.limit is not None and (self.measured > self.limit if self.above else self.measured < self.limit)

    def __str__(self) -> str:
        side = "above" if self.above else "below"
        return f"{self.name}: {self.measured:.3g} {self.unit}{self.at}, {side} {self.limit:g}: {self.remedy}"


def entropy(rates: Sequence[float]) -> float:
    """Entropy of the rates that were chosen, in bits: 0 if one rate serves all, log2 of the grid if all are as frequent."""
    share = np.unique(np.round(rates, 6), return_counts=True)[1] / len(rates)
    return float(-(share * np.log2(share)).sum())


def mutual_information(rates: Sequence[float], labels: Sequence, shuffles: int = 20) -> float:
    """Bits that knowing the label tells of the rate, less what as many shuffled labels seem to tell (a small sample's bias)."""

    def told(labels) -> float:
        return entropy(rates) - sum(len(rates[labels == x]) / len(rates) * entropy(rates[labels == x]) for x in set(labels))

    rates, labels = np.asarray(rates), np.asarray(labels)
    generator = np.random.default_rng(0)
    return told(labels) - float(np.mean([told(generator.permutation(labels)) for _ in range(shuffles)]))


def of_rates(rates: Sequence[Sequence[float]], tasks: Sequence[str], grid: Sequence[float]) -> list[Sign]:
    """Stagnation and collapse, from the rates chosen at each step of each answer. grid: all rates, rising."""
    flat = np.concatenate([np.asarray(r) for r in rates])
    steps = np.concatenate([np.arange(len(r)) // 8 for r in rates])
    named = np.concatenate([[task] * len(r) for task, r in zip(tasks, rates, strict=True)])
    low, high = (float(np.isclose(flat, end).mean()) for end in (grid[0], grid[-1]))
    return [
        Sign("rates stagnate", float(flat.std() / (grid[1] - grid[0])), "grid steps of deviation", 1, False,
             "the features may not tell when tokens are needed: try with_step=True, another observed layer, or longer answers"),
        Sign("rates collapse", max(low, high), "of all choices", 0.95,
             remedy="raise `firmness`, or ask for another budget", at=" keep all" if low > high else " are the highest rate"),
        Sign("entropy", entropy(flat), "bits"),
        Sign("information on the task", mutual_information(flat, named), "bits"),
        Sign("information on the step", mutual_information(flat, steps), "bits"),
    ]  # fmt: skip


def of_training(history: Sequence[dict]) -> Sign:
    """Instability: by which factor the loss (nats a token, from .05 up) ends above where it began."""
    losses = [row["task"] for row in history if "task" in row]
    floor = 0.05
    ratio = (np.mean(losses[-10:]) + floor) / (np.mean(losses[:10]) + floor) if len(losses) >= ENOUGH_STEPS else 1.0
    if not np.isfinite(losses).all():
        ratio = float("inf")
    return Sign("training is unstable", float(ratio), "x the loss at the start", 1.5,
                remedy="lower `rate`, or raise `last_temperature`")  # fmt: skip


def of_tasks(pruned: Sequence[float], unpruned: Sequence[float], tasks: Sequence[str]) -> Sign:
    """Quality collapse: the loss that the worst task pays, nats a token; at .69 the right word is half as likely as before."""
    paid = np.asarray(pruned) - np.asarray(unpruned)
    by_task = {task: float(paid[np.asarray(tasks) == task].mean()) for task in dict.fromkeys(tasks)}
    worst = max(by_task, key=by_task.get)
    return Sign(
        "a task pays for the rest", by_task[worst], "nats a token", float(np.log(2)), at=f" lost by {worst.replace('_', ' ')}",
        remedy="ask for a larger budget, prune later (first_pruned_layer), or train on more such examples",
    )  # fmt: skip


def of_speed(model, processor, predictor: RatePredictor, examples: Examples, *, batch: int = 8, repeats: int = 3) -> Sign:
    """No speed-up: time of generation with the predictor over time without it, for as many words, runs in turn."""
    chunk, images = next(examples.batches(batch))
    inputs = encode(processor, images, [e.prompt for e in chunk])
    settings = {"min_new_tokens": 32, "max_new_tokens": 32}
    ratios = []
    for _ in range(repeats):
        marks = [time.perf_counter()]
        generated(model, inputs, settings)
        marks.append(time.perf_counter())
        with DyRate.of(predictor)(model, processor):
            generated(model, inputs, settings)
        marks.append(time.perf_counter())
        plain, pruned = (end - begun for begun, end in pairwise(marks))
        ratios.append(pruned / plain)
    return Sign("no speed-up", float(np.median(ratios)), "x the plain time", 1,
                remedy="evict, do not hide; enlarge batches; see with `python -m study.bench` what can be gained")  # fmt: skip


@torch.no_grad()
def signs(
    model, processor, predictor: RatePredictor, batches: list[Prepared], history: list[dict], examples: Examples | None = None
) -> list[Sign]:
    """Every sign, measured on teacher-forced answers; speed on examples, where there are some."""
    tasks = [task for b in batches for task in b.tasks]
    chosen, whole = taught(model, predictor, batches), taught(model, predictor, batches, rate=0.0)
    found = of_rates([row["rates"] for row in chosen], tasks, predictor.rates.tolist())
    found += [of_training(history), of_tasks([r["loss"] for r in chosen], [r["loss"] for r in whole], tasks)]
    return found + ([of_speed(model, processor, predictor, examples)] if examples is not None else [])


def warnings_by_sign(found: dict[float, Sequence[Sign]]) -> str:
    """What warns at which budget, each sign once with its remedy. found: the signs of the predictor for each budget."""
    warning = [(budget, sign) for budget, signs in found.items() for sign in signs if sign.warns]
    said = []
    for name in dict.fromkeys(sign.name for _, sign in warning):
        budgets, signs = zip(*((budget, sign) for budget, sign in warning if sign.name == name), strict=True)
        values = ", ".join(f"{sign.measured:.3g}" for sign in signs)
        side = f"{'above' if signs[0].above else 'below'} {signs[0].limit:.3g}"
        where = ", ".join(f"{budget:g}" for budget in budgets)
        said.append(f"{name} at budget {where}: {values} {signs[0].unit}, {side}; {signs[0].remedy}")
    return "It warns: " + ". ".join(said) + "." if said else "None warns here."


def while_training(history: list[dict], grid_step: float) -> list[Sign]:
    """What can be told from the course so far: spread and mean of the kept share, and the loss."""
    late = history[-10:]
    kept, spread = (float(np.mean([row[k] for row in late])) for k in ("kept", "spread"))
    if len(history) < ENOUGH_STEPS:
        return []
    found = [
        Sign("rates stagnate", spread / grid_step, "grid steps of deviation", 1, False,
             "the features may not tell when tokens are needed: try with_step=True or another observed layer"),
        Sign("rates collapse", max(kept, 1 - kept), "kept" if kept > 0.5 else "dropped", 0.99, remedy="raise `firmness`"),
        of_training(history),
    ]  # fmt: skip
    return [sign for sign in found if sign.warns]
