"""Trajectories of retention over an answer that `imitate` chooses from: constants, ramps, early and late drops."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

LEVELS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625, 0.03125)
STARTS, ENDS = (1.0, 0.5, 0.25), (0.25, 0.125, 0.03125)
DROPS, RAMPS = (1, 4, 16), (16, 48)  # steps: of the drop, and over which a ramp falls


def trajectories(steps: int) -> Float[Tensor, "trajectory step"]:
    """Retention ratios of all trajectories over the first `steps` steps; short answers see several of them as one."""
    step = torch.arange(steps)
    paths = [torch.full((steps,), level) for level in LEVELS]
    for start, end in ((a, b) for a in STARTS for b in ENDS if a > b):
        paths += [torch.where(step < at, start, end) for at in DROPS]
        paths += [start + (end - start) * (step / over).clamp(max=1) for over in RAMPS]
    return torch.stack(paths).unique(dim=0)


def rate_indices(retention: Float[Tensor, "*shape"], n_rates: int) -> Int[Tensor, "*shape"]:
    """The index on the grid of rates that comes nearest to a retention ratio."""
    return ((1 - retention) * n_rates).round().long().clamp(0, n_rates - 1)
