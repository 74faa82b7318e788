"""A KV cache whose layers may hold fewer tokens than were seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

ROOM = 32  # slots for new tokens by which a buffer is longer, when it is made, than what it holds


class PrunedLayer(DynamicLayer):
    """A cache layer that may hold fewer tokens than were seen, and still reports how many those were.

    Positions and mask sizes come from the cache's length. New tokens are added in place, for which keys and values are the
    beginnings of longer buffers; a DynamicLayer copies all that it holds at every token. take_rows: is called when rows of
    the batch are reordered, chosen or repeated; one layer of a model has it. read: the slots that the next token attends
    to; None: all.
    """

    evicted = 0
    read: Slots | None = None

    def __init__(self, take_rows: Callable[[Tensor], None] | None):
        super().__init__()
        self.take_rows = take_rows

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized or key_states.requires_grad:
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = _appended(self.keys, key_states), _appended(self.values, value_states)
        if self.read is None:
            return self.keys, self.values
        return self.read.of(self.keys), self.read.of(self.values)

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

    def compact(self, staying: Slots, length: int) -> None:
        """Keep these slots, the first `length` of them in use, and free the memory of the others."""
        self.evicted += self.keys.shape[2] - length
        self.keys, self.values = (staying.of(x)[:, :, :length] for x in (self.keys, self.values))

    def close(self) -> None:
        """From now on refuse new tokens: nobody knows any more where in the prompt the kept ones were."""
        self.update = _refused


def _refused(*_, **__):
    raise RuntimeError("this cache was pruned by a strategy that has left it: give the whole prompt, with a fresh cache")


class Slots:
    """Some slots of each row, to be taken out of the keys and values of layers that hold the same tokens."""

    def __init__(self, index: Int[Tensor, "row n"]):
        self.index = index
        self.flat: tuple[tuple, Tensor] = ((), index)  # for buffers of one shape: those of all these layers

    def of(self, x: Float[Tensor, "row head slot dim"]) -> Float[Tensor, "row head n dim"]:
        """What is in them. Whole vectors are taken: far faster than gather with an expanded index."""
        rows, heads, _, dim = x.shape
        buffer = _buffer(x)
        if self.flat[0] != (like := (x.device, rows, heads, buffer.shape[2])):
            begins = buffer.shape[2] * torch.arange(rows * heads, device=x.device).view(rows, heads, 1)
            self.flat = like, (self.index.to(x.device)[:, None] + begins).flatten()
        return buffer.view(-1, dim).index_select(0, self.flat[1]).view(rows, heads, -1, dim)


def _buffer(x: Float[Tensor, "row head slot dim"]) -> Tensor:
    """The buffer of which x is the beginning, with the free slots behind; x itself, contiguous, where there are none."""
    rows, heads, _, dim = x.shape
    slots = x.untyped_storage().nbytes() // (rows * heads * dim * x.element_size())
    stride = (heads * slots * dim, slots * dim, dim, 1)
    alone = x.storage_offset() == 0 and x.stride() == stride
    return x.as_strided((rows, heads, slots, dim), stride) if alone else x.contiguous()


def _appended(x: Tensor, new: Tensor) -> Tensor:
    """x and, behind it, `new`: in place where there is room."""
    begin, end = x.shape[2], x.shape[2] + new.shape[2]
    buffer = _buffer(x)
    if buffer.shape[2] < end:
        buffer = F.pad(x, (0, 0, 0, end - begin + ROOM))
    buffer[:, :, begin:end] = new
    return buffer[:, :, :end]


def check_layers(model: PreTrainedModel, pruned: Iterable[int]) -> None:
    """Raises ValueError that names the layers which attend in sliding windows: these cannot miss tokens."""
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    if sliding := [i for i in pruned if i < len(layers) and type(layers[i]) is not DynamicLayer]:
        named = ", ".join(map(str, sliding[:6])) + (", ..." if len(sliding) > 6 else "")
        raise ValueError(
            f"layers {named} of this {model.config.model_type!r} model attend in sliding-window caches, which cannot be pruned: "
            "choose a model with full attention in every layer from first_pruned_layer on"
        )


def own_layers(cache, n_layers: int, pruned: Sequence[int] = (), take_rows: Callable[[Tensor], None] | None = None):
    """The empty cache, with layers that add in place and may miss tokens; the first of those that will moves the rows.

    Raises ValueError for a kind of cache that cannot be pruned.
    """
    while len(cache.layers) < n_layers:  # a cache made without a configuration grows as it is filled
        cache.layers.append(DynamicLayer())
    for i in pruned:
        if type(cache.layers[i]) not in (DynamicLayer, PrunedLayer):
            raise ValueError(
                f"layer {i} keeps its keys in a {type(cache.layers[i]).__name__}, which cannot be pruned: generate with the "
                'default cache (no cache_implementation="static", no quantized or sliding-window cache)'
            )
    for i, layer in enumerate(cache.layers):
        if type(layer) in (DynamicLayer, PrunedLayer):
            cache.layers[i] = PrunedLayer(take_rows if i in pruned[:1] else None)
    return cache
