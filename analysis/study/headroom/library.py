"""The trajectories that are tried on every answer, and what each costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dyrate.cost import Shape, remaining
from dyrate.predictor import kept_counts, rate_grid

N_RATES = 32  # of the grid that rates are rounded to, the paper's
UNITS = ("retention", "macs", "kv_bytes")


@dataclass(frozen=True)
class Trajectory:
    """A retention ratio for each step: `start` before step `at`, then in a straight line over `over` steps to `end`."""

    start: float
    end: float
    at: int = 0
    over: int = 0

    @property
    def name(self) -> str:
        if self.constant:
            return f"{self.start:g}"
        return f"{self.start:g} to {self.end:g} " + (f"over {self.over}" if self.over else f"at {self.at}")

    @property
    def constant(self) -> bool:
        return self.start == self.end

    def rate_indices(self, steps: int) -> np.ndarray:
        """For each step the index of its drop rate on the grid, (steps,); the retention is rounded to it."""
        t = np.arange(steps)
        progress = np.clip((t - self.at) / self.over, 0, 1) if self.over else (t >= self.at).astype(float)
        retention = self.start + (self.end - self.start) * progress
        return np.clip(np.round((1 - retention) * N_RATES), 0, N_RATES - 1).astype(int)

    def rates(self, steps: int) -> tuple[float, ...]:
        """The drop rate of each step."""
        return tuple((self.rate_indices(steps) / N_RATES).tolist())


CONSTANTS = tuple(Trajectory(x, x) for x in (1, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625, 0.03125))
RAMPS = tuple(
    Trajectory(start, end, over=over)
    for over in (16, 48) for start in (1, 0.5, 0.25) for end in (0.25, 0.125, 0.03125) if start > end
)  # fmt: skip
DROPS = tuple(
    Trajectory(start, end, at=at)
    for at in (1, 6, 24)
    for start, end in ((1, 0.25), (1, 0.125), (1, 0.03125), (0.5, 0.125), (0.5, 0.03125), (0.25, 0.03125))
)
RISES = tuple(
    Trajectory(start, end, at=at)
    for at in (6, 24)
    for start, end in ((0.03125, 0.25), (0.03125, 0.5), (0.03125, 1), (0.125, 0.5))
)
FALLING = (*CONSTANTS, *RAMPS, *DROPS)  # evicted tokens do not return
LIBRARIES = {"evict": FALLING, "mask": (*FALLING, *RISES)}


def kept_tokens(
    indices: Int[Tensor, "batch step"], n_image: Int[Tensor, " batch"], residency: str, n_rates: int = N_RATES
) -> Int[Tensor, "batch step"]:
    """Image tokens that each step keeps, from the index of its rate. In "evict" a lower rate later brings nothing back."""
    kept = kept_counts(n_image, rate_grid(n_rates)).gather(1, indices)
    return kept.cummin(1).values if residency == "evict" else kept


def costs(
    kept: Int[Tensor, "batch step"], valid: Tensor, n_image: Tensor, n_text: Tensor, shape: Shape, first: int, residency: str
) -> dict[str, Float[Tensor, " batch"]]:
    """What remains of the unpruned cost of answers, in each of UNITS, from the image tokens that each step keeps.

    valid: steps that exist, (batch, step). n_image, n_text: tokens of each prompt. In "mask" the prefill is computed whole, as
    `dyrate.cost.ledger` has it.
    """
    computed = torch.cat([n_image[:, None], kept[:, 1:]], 1) if residency == "mask" else kept
    how = {"n_image": n_image, "n_text": n_text, "valid": valid, "first": first}
    return {unit: remaining(unit, shape, (computed if unit == "macs" else kept).double(), **how) for unit in UNITS}
