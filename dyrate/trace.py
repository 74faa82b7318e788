"""What a strategy did while a model generated: one record a step, kept without waiting for the device."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from torch import Tensor

from dyrate.segments import SEGMENTS


@dataclass
class Stage:
    """One stage at one step. counts: kept image tokens of each row; kept: which, (batch, image_token).

    shares: the newest query's attention to each segment, (batch, head, 4); None where attention was not read.
    """

    layer: int
    counts: list[int]
    kept: Tensor
    shares: Tensor | None


@dataclass
class Step:
    """One forward pass. kv_bytes: cached bytes of each layer after it; tokens: length of each row so far, padding left out."""

    stages: list[Stage]
    kv_bytes: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class PrefillTokens:
    """Tokens of one row in the prefill. image: image tokens before the first stage, and after each."""

    text: int
    instruction: int
    image: list[int]


@dataclass
class Trace:
    """The record of one `generate`: `steps[0]` is the prefill. With beams, rows are beams as they stood at each step.

    n_layers: of the decoder. n_image, n_instruction: such tokens of each row.
    """

    n_layers: int = 0
    n_image: list[int] = field(default_factory=list)
    n_instruction: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"Trace({len(self.steps)} steps, {len(self.n_image)} rows; see frame())"

    def retention(self) -> np.ndarray:
        """Share of image tokens kept, (step, row): mean over the pruned layers. Raises RuntimeError before any generation."""
        if not self.steps:
            raise RuntimeError("this trace is empty: call model.generate inside the `with` block first")
        counts = np.array([[stage.counts for stage in step.stages] for step in self.steps], dtype=float)
        starts = [stage.layer for stage in self.steps[0].stages]
        layers = np.diff([*starts, self.n_layers]) if starts[0] < self.n_layers else [1]  # no pruned layer: all are kept
        return np.average(counts, axis=1, weights=layers) / np.array(self.n_image)

    def prefill(self, row: int) -> PrefillTokens:
        """The tokens of one row in the prefill."""
        step = self.steps[0]
        image = [self.n_image[row], *(stage.counts[row] for stage in step.stages)]
        return PrefillTokens(step.tokens[row] - self.n_image[row], self.n_instruction[row], image)

    def frame(self) -> pd.DataFrame:
        """One row per step, batch row and stage: kept image tokens, retention, cached bytes (all layers), segment shares.

        Shares are NaN where no attention was read: after step 0 under a strategy that decides in the prefill alone, as FastV.
        """
        rows = []
        for t, step in enumerate(self.steps):
            for stage in step.stages:
                shares = None if stage.shares is None else stage.shares.float().mean(1).cpu().numpy()
                for i, kept in enumerate(stage.counts):
                    n = self.n_image[i]
                    row = {"step": t, "row": i, "layer": stage.layer, "image_tokens": n, "kept": kept, "retention": kept / n}
                    row["kv_bytes"] = sum(step.kv_bytes) // len(stage.counts)
                    row |= {f"{s}_share": float("nan") if shares is None else shares[i, j] for j, s in enumerate(SEGMENTS)}
                    rows.append(row)
        return pd.DataFrame(rows)
