"""The retention ratio in real generation, and the bias on the rates that brings it to a budget."""

from __future__ import annotations

import numpy as np
from tqdm import tqdm

from dyrate.data import Examples
from dyrate.generation import answer_examples
from dyrate.predictor import RatePredictor
from dyrate.strategies.dyrate import DyRate
from dyrate.strategy import Strategy


def trajectories(
    model, processor, strategy: Strategy, examples: Examples, *, batch_size: int = 32, max_new_tokens: int = 100
) -> dict[str, list[float]]:
    """The retention ratio at each step of real, greedy generation, by example."""
    paths = {}
    for batch, _, answers in answer_examples(
        model, processor, examples, strategy, batch_size=batch_size, max_new_tokens=max_new_tokens
    ):
        paths |= {e.name: path.tolist() for e, path in zip(batch, answers.retention(), strict=True)}
    return paths


def calibrate(
    model, processor, predictor: RatePredictor, examples: Examples, budget: float | None, *, batch_size: int = 32,
    rounds: int = 7, progress: bool = True,
) -> dict[str, float]:  # fmt: skip
    """Move the rate bias until the mean retention of real generation is the budget, by bisection. budget None: only measure.

    Returns the rate bias and the retention measured under it, and notes both in `predictor.about`.
    """
    low, high = -64.0, 64.0  # the higher the bias, the higher the rates and the lower the retention
    bias, measured = 0.0, []
    for _ in tqdm(range(rounds), desc="calibrating", disable=not progress):
        predictor.rate_bias.fill_(bias)
        paths = trajectories(model, processor, DyRate.of(predictor), examples, batch_size=batch_size)
        retention = float(np.mean([np.mean(path) for path in paths.values()]))
        miss = 0.0 if budget is None else abs(retention - budget)
        measured.append((miss, bias, retention))
        if miss < 0.004:
            break
        low, high = (bias, high) if retention > budget else (low, bias)
        bias = (low + high) / 2
    _, bias, retention = min(measured)
    predictor.rate_bias.fill_(bias)
    predictor.about["calibration"] = {"rate_bias": bias, "retention": retention}
    return predictor.about["calibration"]
