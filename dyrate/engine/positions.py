"""Rotary embeddings of tokens that were renumbered."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel


def rotary_at(
    model: PreTrainedModel, hidden: Float[Tensor, "batch length width"], positions: Int[Tensor, "batch length"]
) -> tuple[Tensor, ...]:
    """Cosines and sines of these positions, as the decoder's layers take them.

    Families that place image tokens in a plane (M-RoPE) number renumbered tokens as text, alike in all directions.
    """
    if hasattr(model.model, "rope_deltas"):
        positions = positions.expand(3, -1, -1)
    return model.get_decoder().rotary_emb(hidden, positions)
