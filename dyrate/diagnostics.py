"""Signs that a rate predictor failed, each measured, held against a limit and answered with a remedy.

They are what a reader of the paper would look for: rates that stagnate or collapse, unstable training, a task whose quality
drops, and pruning that saves no time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from dyrate.data import Examples
from dyrate.generation import answer_batch, encode
from dyrate.predictor import RatePredictor
from dyrate.strategies.dyrate import DyRate
from dyrate.teacher_forcing import Prepared, teacher_forced

ENOUGH_STEPS = 40  # of training, before its course shows anything
STAGNATION = "the features may not show when tokens are needed: try with_step=True, another observed layer, or longer answers"


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
    """Entropy of the rates that were chosen, in bits: 0 if it is always the same, log2 of the grid if all are as frequent."""
    frequency = np.unique(np.round(rates, 6), return_counts=True)[1] / len(rates)
    return float(-(frequency * np.log2(frequency)).sum())


def mutual_information(rates: Sequence[float], labels: Sequence, shuffles: int = 20) -> float:
    """Mutual information of rate and label in bits, less what shuffled labels seem to have (a small sample's bias)."""

    def plain(labels) -> float:
        return entropy(rates) - sum(len(rates[labels == x]) / len(rates) * entropy(rates[labels == x]) for x in set(labels))

    rates, labels = np.asarray(rates), np.asarray(labels)
    generator = np.random.default_rng(0)
    return plain(labels) - float(np.mean([plain(generator.permutation(labels)) for _ in range(shuffles)]))


def of_rates(rates: Sequence[Sequence[float]], tasks: Sequence[str], grid: Sequence[float]) -> list[Sign]:
    """Stagnation and collapse, from the rates chosen at each step of each answer. grid: all rates, rising."""
    flat = np.concatenate([np.asarray(r) for r in rates])
    steps = np.concatenate([np.arange(len(r)) // 8 for r in rates])
    task_of_each = np.concatenate([[task] * len(r) for task, r in zip(tasks, rates, strict=True)])
    low, high = (float(np.isclose(flat, end).mean()) for end in (grid[0], grid[-1]))
    return [
        Sign("rates stagnate", float(flat.std() / (grid[1] - grid[0])), "grid steps of deviation", 1, False, STAGNATION),
        Sign("rates collapse", max(low, high), "of all choices", 0.95,
             at=" keep all" if low > high else " are the highest rate",
             remedy="raise `budget_penalty`, or ask for another budget"),
        Sign("entropy", entropy(flat), "bits"),
        Sign("information on the task", mutual_information(flat, task_of_each), "bits"),
        Sign("information on the step", mutual_information(flat, steps), "bits"),
    ]  # fmt: skip


def of_training(history: Sequence[dict]) -> Sign:
    """Instability: by which factor the loss (nats a token, from .05 up) ends above where it began."""
    losses = [row["loss"] for row in history]
    floor = 0.05
    ratio = (np.mean(losses[-10:]) + floor) / (np.mean(losses[:10]) + floor) if len(losses) >= ENOUGH_STEPS else 1.0
    if not np.isfinite(losses).all():
        ratio = float("inf")
    return Sign("training is unstable", float(ratio), "x the loss at the start", 1.5,
                remedy="lower `learning_rate`, or raise `last_temperature`")  # fmt: skip


def of_tasks(pruned: Sequence[float], unpruned: Sequence[float], tasks: Sequence[str]) -> Sign:
    """Quality collapse: by how much the loss of the worst task rises, nats a token; at .69 the right token is half as likely."""
    risen = np.asarray(pruned) - np.asarray(unpruned)
    by_task = {task: float(risen[np.asarray(tasks) == task].mean()) for task in dict.fromkeys(tasks)}
    worst = max(by_task, key=by_task.get)
    return Sign(
        "a task degrades", by_task[worst], "nats a token", float(np.log(2)), at=f" lost by {worst.replace('_', ' ')}",
        remedy="ask for a larger budget, prune later (first_pruned_layer), or train on more such examples",
    )  # fmt: skip


def of_speed(model, processor, predictor: RatePredictor, examples: Examples, *, batch: int = 8, repeats: int = 3) -> Sign:
    """No speed-up: time of generation with the predictor over time without it, for as many tokens, alternating."""
    chunk, images = next(examples.batches(batch, processor))
    inputs = encode(processor, images, [e.prompt for e in chunk])
    settings = {"min_new_tokens": 32, "max_new_tokens": 32}
    ratios = []
    for _ in range(repeats):
        marks = [time.perf_counter()]
        for strategy in (None, DyRate.of(predictor)):
            answer_batch(model, processor, inputs, strategy, **settings)
            marks.append(time.perf_counter())
        plain, pruned = (end - begun for begun, end in pairwise(marks))
        ratios.append(pruned / plain)
    return Sign("no speed-up", float(np.median(ratios)), "x the plain time", 1,
                remedy='use residency "evict", larger batches or longer prompts: here little is saved')  # fmt: skip


@torch.no_grad()
def signs(
    model, processor, predictor: RatePredictor, batches: list[Prepared], history: list[dict], examples: Examples | None = None
) -> list[Sign]:
    """Every sign, measured on teacher-forced answers; speed on examples, where there are some."""
    pruned, unpruned = teacher_forced(model, predictor, batches), teacher_forced(model, predictor, batches, rate=0.0)
    tasks = [row["task"] for row in pruned]
    return [
        *of_rates([row["rates"] for row in pruned], tasks, predictor.rates.tolist()),
        of_training(history),
        of_tasks([row["loss"] for row in pruned], [row["loss"] for row in unpruned], tasks),
        *([of_speed(model, processor, predictor, examples)] if examples is not None else []),
    ]


def while_training(history: list[dict], grid_step: float) -> list[Sign]:
    """The signs that warn in the course so far: spread and mean of the retention, and the loss. grid_step: of the rates."""
    if len(history) < ENOUGH_STEPS:
        return []
    retention, spread = (float(np.mean([row[k] for row in history[-10:]])) for k in ("retention", "spread"))
    candidates = [
        Sign("rates stagnate", spread / grid_step, "grid steps of deviation", 1, False, STAGNATION),
        Sign("rates collapse", max(retention, 1 - retention), "kept" if retention > 0.5 else "dropped", 0.99,
             remedy="raise `budget_penalty`"),
        of_training(history),
    ]  # fmt: skip
    return [sign for sign in candidates if sign.warns]
