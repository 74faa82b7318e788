"""A KV cache whose layers may hold fewer tokens than were seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from dyrate.engine.kept import take


class PrunedLayer(DynamicLayer):
    """A cache layer that may hold fewer tokens than were seen, and still reports how many those were.

    Positions and mask sizes come from the cache's length. take_rows: is called when rows of the batch are reordered, chosen
    or repeated; one layer of a model has it.
    """

    evicted = 0

    def __init__(self, take_rows: Callable[[Tensor], None] | None):
        super().__init__()
        self.take_rows = take_rows

    def get_seq_length(self) -> int:
        length = super().get_seq_length()
        return length + self.evicted if length else 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.take_rows:
            self.take_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.take_rows:
            self.take_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = len(self.keys)
        super().batch_repeat_interleave(repeats)
        if self.take_rows:
            self.take_rows(torch.arange(rows, device=self.keys.device).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("a pruned cache cannot be cropped: assisted decoding is not supported with a strategy")

    def compact(self, index: Int[Tensor, "batch n"], slots: int) -> None:
        """Of the first `slots` slots keep those of `index`, and all that follow."""
        following = torch.arange(slots, self.keys.shape[2], device=index.device).expand(len(index), -1)
        self.evicted += slots - index.shape[1]
        index = torch.cat([index, following], 1).to(self.keys.device)
        self.keys, self.values = (_take_slots(x, index) for x in (self.keys, self.values))


    def close(self) -> None:
        """From now on refuse new tokens: nobody knows any more where in the prompt the kept ones were."""
        self.update = _refused


def _refused(*_, **__):
    raise RuntimeError("this cache was pruned by a strategy that has left it: give the whole prompt, with a fresh cache")


def _take_slots(x: Tensor, index: Int[Tensor, "batch n"]) -> Tensor:
    """x: (batch, head, slot, dim)."""
    batch, heads, slots, dim = x.shape
    taken = take(x.reshape(1, batch * heads, slots, dim)[0], index.repeat_interleave(heads, 0))
    return taken.view(batch, heads, index.shape[1], dim)


def check_layers(model: PreTrainedModel, pruned: Iterable[int]) -> None:
    """Raises ValueError that names the layers which attend in sliding windows: these cannot miss tokens."""
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    if sliding := [i for i in pruned if i < len(layers) and type(layers[i]) is not DynamicLayer]:
        named = ", ".join(map(str, sliding[:6])) + (", ..." if len(sliding) > 6 else "")
        raise ValueError(
            f"layers {named} of this {model.config.model_type!r} model attend in sliding-window caches, which cannot be pruned: "
            "choose a model with full attention in every layer from first_pruned_layer on"
        )


def check_cache_layer(layer, index: int) -> None:
    """Raises ValueError for a kind of cache that cannot be pruned."""
    if type(layer) not in (DynamicLayer, PrunedLayer):
        raise ValueError(
            f"layer {index} keeps its keys in a {type(layer).__name__}, which cannot be pruned: generate with the default "
            'cache (no cache_implementation="static", no quantized or sliding-window cache)'
        )
