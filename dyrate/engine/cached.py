"""A KV cache whose layers may hold fewer tokens than were seen, and the picking of tokens out of tensors."""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class Follower(Protocol):
    """Who must know when rows of the batch are reordered, chosen or repeated."""

    def take_rows(self, index: Tensor) -> None: ...


class PrunedLayer(DynamicLayer):
    """A cache layer that may hold fewer tokens than were seen, and still tells how many those were.

    Positions and mask sizes come from the cache's length. lead: is told when rows move; one
    layer of a run has it.
    """

    evicted = 0

    def __init__(self, lead: Follower | None):
        super().__init__()
        self.lead = lead

    def get_seq_length(self) -> int:
        length = super().get_seq_length()
        return length + self.evicted if length else 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.lead:
            self.lead.take_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.lead:
            self.lead.take_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = len(self.keys)
        super().batch_repeat_interleave(repeats)
        if self.lead:
            self.lead.take_rows(torch.arange(rows, device=self.keys.device).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("a pruned cache cannot be cropped: assisted decoding is not supported with a strategy")


def check_cache_layer(layer, index: int) -> None:
    if type(layer) not in (DynamicLayer, PrunedLayer):
        raise ValueError(
            f"layer {index} keeps its keys in a {type(layer).__name__}, which cannot be pruned: generate with the default "
            'cache (no cache_implementation="static", no quantized or sliding-window cache)'
        )


def take(x: Float[Tensor, "*lead batch length dim"], index: Int[Tensor, "batch n"]) -> Float[Tensor, "*lead batch n dim"]:
    """Positions `index` of each row; where x has one row for all, each row takes its own. Whole rows: far faster than gather."""
    batch, n = index.shape
    length, dim = x.shape[-2:]
    x = x.expand(*x.shape[:-3], batch, length, dim)
    flat = (index + length * torch.arange(batch, device=index.device)[:, None]).flatten().to(x.device)
    taken = x.reshape(*x.shape[:-3], batch * length, dim).index_select(-2, flat)
    return taken.view(*x.shape[:-3], batch, n, dim)


def take_cached(x: Float[Tensor, "batch head length dim"], index: Int[Tensor, "batch n"]) -> Float[Tensor, "batch head n dim"]:
    batch, heads, length, dim = x.shape
    taken = take(x.reshape(1, batch * heads, length, dim)[0], index.repeat_interleave(heads, 0))
    return taken.view(batch, heads, index.shape[1], dim)
