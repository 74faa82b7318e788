"""Why the paper's recipe finds no more than a constant: rates that decide nothing, and gradients with the wrong sign."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from dyrate.predictor import BELL, RatePredictor
from dyrate.teacher_forcing import Prepared, answer_losses, frozen


def gradient_of_choices(
    model, predictor: RatePredictor, prepared: Prepared, indices: Int[Tensor, "batch step"]
) -> Float[Tensor, "batch step rate"]:
    """The straight-through gradient: of each answer's loss by the choice at each step, at these rates."""
    choice = F.one_hot(indices, len(predictor.rates)).float().requires_grad_()
    with frozen(model):
        (gradient,) = torch.autograd.grad(answer_losses(model, predictor, prepared, choice).sum(), choice)
    return gradient


def inert(indices: Int[Tensor, "batch step"]) -> Bool[Tensor, "batch step"]:
    """Steps whose rate evicts nothing: not above the highest one before it. Then any rate up to that one would do the same."""
    highest = indices.cummax(1).values
    return F.pad(indices[:, 1:] <= highest[:, :-1], (1, 0))


def inert_rows(model, predictor: RatePredictor, batches: Sequence[Prepared]) -> pd.DataFrame:
    """One row a step of each answer under the predictor's own rates, for residency "evict".

    inert: the rate evicts nothing. lower: the longest difference that any lower rate makes in the straight-through gradient,
    which is what could tell this step to keep more; NaN at rate 0, below which there is none.
    """
    rows = []
    for prepared in batches:
        indices = predictor(prepared.features).argmax(-1)
        gradient = gradient_of_choices(model, predictor, prepared, indices)
        here = gradient.gather(-1, indices[..., None])
        below = torch.arange(len(predictor.rates), device=indices.device) < indices[..., None]
        lower = ((gradient - here).abs() * below).amax(-1).masked_fill(indices == 0, torch.nan)
        values = zip(inert(indices)[prepared.valid].tolist(), lower[prepared.valid].tolist(), strict=True)
        tasks = [task for task, n in zip(prepared.tasks, prepared.valid.sum(1).tolist(), strict=True) for _ in range(n)]
        rows += [{"task": task, "inert": a, "lower": b} for task, (a, b) in zip(tasks, values, strict=True)]
    return pd.DataFrame(rows)


def slope_rows(
    model, predictor: RatePredictor, batches: Sequence[Prepared], rate: float, *, temperatures: Sequence[float] = (0.25, 1, 8),
    distances: Sequence[int] = (1, 4, 8),
) -> pd.DataFrame:  # fmt: skip
    """Slopes of the loss by the drop rate at one constant rate, nats a token for a rise of 1; one row an answer and kind.

    kind: "measured" over +- `size` steps of the grid; "predicted" by the straight-through gradient continued to those rates;
    "backward", what the gradient says through a softmax of that temperature (`size`) around the rate, the forward pass hard.
    """
    grid = predictor.rates
    here = int((grid - rate).abs().argmin())

    def constant(prepared, index):
        return torch.full_like(prepared.labels, index)

    def add(prepared, kind, size, values):
        rows.extend(
            {"task": t, "kind": kind, "size": size, "slope": v} for t, v in zip(prepared.tasks, values.tolist(), strict=True)
        )

    rows: list[dict] = []
    for prepared in batches:
        gradient = gradient_of_choices(model, predictor, prepared, constant(prepared, here)).sum(1)
        for distance in distances:
            ends = [max(here - distance, 0), min(here + distance, len(grid) - 1)]
            run = float(grid[ends[1]] - grid[ends[0]])
            with torch.no_grad():
                low, high = (answer_losses(model, predictor, prepared, F.one_hot(constant(prepared, i), len(grid)).float())
                             for i in ends)  # fmt: skip
            add(prepared, "measured", distance, (high - low) / run)
            add(prepared, "predicted", distance, (gradient[:, ends[1]] - gradient[:, ends[0]]) / run)
        for temperature in temperatures:
            add(prepared, "backward", temperature, gradient @ _shift(grid, here, temperature))
    return pd.DataFrame(rows)


def _shift(grid: Float[Tensor, " rate"], here: int, temperature: float) -> Float[Tensor, " rate"]:
    """How probabilities move per unit of mean rate when logits tilt towards higher rates, around the rate `here`."""
    probability = (-(((grid - grid[here]) / BELL) ** 2) / temperature).softmax(0)
    tilted = probability * (grid - (probability * grid).sum())
    return tilted / (tilted * grid).sum()
