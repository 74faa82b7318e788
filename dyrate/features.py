"""What a rate predictor may read at a step: the paper's shares of attention, and what else could stand in their place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dyrate.segments import SEGMENTS, Segments, segment_shares

PER_HEAD = {"shares": len(SEGMENTS), "log_shares": len(SEGMENTS), "tokens": len(SEGMENTS), "entropy": 1, "step": 0}
LEAST_SHARE = 1e-4  # of which a logarithm is taken: there is no response yet at step 0
FEATURES = (*PER_HEAD, "hidden")


def n_features(kind: str, heads: int, layers: int, width: int) -> int:
    """Numbers of this kind at a step, from `layers` observed layers; of "hidden" the model's width."""
    return width if kind == "hidden" else PER_HEAD[kind] * heads * layers


def looks(
    kind: str, rows: Sequence[Float[Tensor, "batch head key"]], segments: Segments, step: int,
    newest: Float[Tensor, "batch width"],
) -> list[Float[Tensor, "batch group feature"]]:  # fmt: skip
    """What is read at one step, one tensor an observed layer; their values side by side are the features.

    rows: the newest token's attention in each observed layer, the whole prompt in sight. newest: its hidden state as it enters
    the first pruned layer.
    """
    if kind == "hidden":
        return [newest[:, None].float()]
    return [_of_row(kind, row, segments, step) for row in rows]


def _of_row(
    kind: str, row: Float[Tensor, "batch head key"], segments: Segments, step: int
) -> Float[Tensor, "batch head feature"]:
    if kind == "step":
        return row[..., :0]
    if kind == "entropy":
        return _image_entropy(row[..., : segments.kind.shape[1]], segments.mask("image"))[..., None]
    shares = segment_shares(row, segments)
    if kind == "shares":
        return shares
    if kind == "log_shares":
        return shares.clamp(min=LEAST_SHARE).log()
    tokens = segments.counts()
    tokens[:, -1] = step
    return shares / tokens.clamp(min=1)[:, None]


def _image_entropy(row: Float[Tensor, "batch head prompt"], image: Tensor) -> Float[Tensor, "batch head"]:
    """Entropy in nats of the attention over the image tokens alone."""
    weights = row * image[:, None]
    return torch.special.entr(weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)).sum(-1)
