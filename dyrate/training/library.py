"""Trajectories of retention over an answer that `imitate` chooses from: constants, ramps, early and late drops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

LEVELS = (1.0, 0.75, 0.5, 0.375, 0.3125, 0.25, 0.1875, 0.125, 0.0625, 0.03125)
STARTS, ENDS = (1.0, 0.5, 0.25), (0.25, 0.125, 0.03125)
DROPS, RAMPS = (1, 4, 16), (16, 48)  # steps: of the drop, and over which a ramp falls


def trajectories(steps: int, n_rates: int) -> Int[Tensor, "trajectory step"]:
    """The index of each step's rate on the grid, for every trajectory; those that agree over so few steps are one."""
    step = torch.arange(steps)
    paths = [torch.full((steps,), level) for level in LEVELS]
    for start, end in ((a, b) for a in STARTS for b in ENDS if a > b):
        paths += [torch.where(step < at, start, end) for at in DROPS]
        paths += [start + (end - start) * (step / over).clamp(max=1) for over in RAMPS]
    return _on_grid(torch.stack(paths), n_rates).unique(dim=0)


def constants(steps: int, n_rates: int) -> Int[Tensor, "level step"]:
    """The same for constant rates alone, from the highest to keeping all."""
    return _on_grid(torch.tensor(LEVELS), n_rates).unique().flip(0)[:, None].expand(-1, steps)


def _on_grid(retention: Tensor, n_rates: int) -> Tensor:
    return ((1 - retention) * n_rates).round().long().clamp(0, n_rates - 1)


def interpolated(
    known: Float[Tensor, "level batch"], losses: Float[Tensor, "level batch step"], kept: Float[Tensor, "batch step"]
) -> Float[Tensor, "batch step"]:
    """Losses at `kept` image tokens, in straight lines between the known numbers of them, which rise; flat outside."""
    above = torch.searchsorted(known.T.contiguous(), kept.detach()).clamp(1, len(known) - 1)
    high, low = known.T.gather(1, above), known.T.gather(1, above - 1)
    part = ((kept - low) / (high - low)).clamp(0, 1)
    before, after = (losses.gather(0, index[None])[0] for index in (above - 1, above))
    return before + (after - before) * part


def best_within(
    budget: float, losses: Sequence[Float[Tensor, "trajectory answer"]], costs: Sequence[Float[Tensor, "trajectory answer"]]
) -> tuple[list[Int[Tensor, " answer"]], float]:
    """For each answer the trajectory with the least loss + price * cost, and the price at which their mean cost is the budget.

    losses, costs: of batches, whose libraries may differ. The price is found by bisection; of two choices on either side of the
    budget the cheaper is taken.
    """
    low, high = -5.0, 5.0  # powers of ten: a higher price, a lower cost
    for _ in range(30):
        price = 10 ** ((low + high) / 2)
        best = [(loss + price * cost).argmin(0) for loss, cost in zip(losses, costs, strict=True)]
        spent = torch.cat([cost.gather(0, choice[None])[0] for cost, choice in zip(costs, best, strict=True)]).mean()
        low, high = ((low + high) / 2, high) if spent > budget else (low, (low + high) / 2)
    price = 10**high
    return [(loss + price * cost).argmin(0) for loss, cost in zip(losses, costs, strict=True)], price
