"""One-token steps over keys and values that stay in place, so that a GPU can replay them as CUDA graphs.

Launching a decoder's kernels from Python takes longer than a large GPU needs to run them. Here the decoder falls into parts,
each from one decision about image tokens to the next, and a part is one graph for each bucket of cache lengths. Decisions
stay outside, as they are. Elsewhere the parts run eagerly, over the same buffers and masks.

No GPU has run this yet: the tests replace the recording of a graph by a stand-in that replays in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from dyrate.attention import LayerAttention
from dyrate.engine.observing import decoder_layers

BUCKET = 32  # slots by which a graph's cache is longer than that of the graph before it


@contextmanager
def static_steps(
    model: PreTrainedModel, stages: Sequence[int] = (), observed: dict[int, LayerAttention] | None = None, room: int = 64
) -> Iterator[None]:
    """Run every step of one token, of `generate` inside the context, over static buffers.

    The tokens are those of eager steps. stages: layers before which tokens are dropped. observed: where an observer of the
    model puts what it observed; filled at each replay. room: new tokens that the buffers take before they are made anew, and
    with them the graphs: best the length of an answer. Graphs are made at first use and last as long as the context.
    Raises ValueError for a model on several devices, or without "sdpa" attention.
    """
    layers = decoder_layers(model)
    if (used := layers[-1].self_attn.config._attn_implementation) != "sdpa":
        raise ValueError(f'static steps need attn_implementation="sdpa": the model has "{used}"')
    if len({p.device for p in model.parameters()}) > 1:
        raise ValueError('static steps need the whole model on one device: load it without device_map="auto"')
    with ExitStack() as stack:
        for first, last in pairwise([0, *(s for s in stages if s > 0), len(layers)]):
            part = _Part(first, [layer.forward for layer in layers[first:last]], {} if observed is None else observed, room)
            for i in range(first, last):
                layers[i].forward = partial(part.enter, i)
                stack.callback(delattr, layers[i], "forward")
        yield


class _Part:
    """Layers from `first` on, which hold the same tokens; inside a step it stands for their cache."""

    def __init__(self, first: int, forwards: list[Callable], observed: dict[int, LayerAttention], room: int):
        self.first, self.forwards, self.observed, self.room = first, forwards, observed, room
        self.buffers: list[tuple[Tensor, Tensor]] = []  # keys and values of each layer: (batch, kv_head, slot, dim)
        self.recorded: dict[torch.Size, tuple] = {}

    def enter(self, i: int, hidden: Tensor, *args, **given) -> Tensor:
        """In place of layer i's forward: the first layer of a part does the step for all of them."""
        if hidden.shape[1] > 1:
            return self.forwards[i - self.first](hidden, *args, **given)
        if i > self.first:
            return hidden
        return self.step(hidden, given["attention_mask"], given["position_embeddings"], given["past_key_values"])

    def step(self, hidden: Tensor, mask: Tensor | None, rotary: tuple[Tensor, ...], cache) -> Tensor:
        held = cache.layers[self.first : self.first + len(self.forwards)]
        length = held[0].keys.shape[2]
        self._settle(held, length)
        self.slot.fill_(length)
        bucket = -(-(length + 1) // BUCKET) * BUCKET
        if mask is None:
            mask = torch.ones(1, 1, 1, length + 1, dtype=torch.bool, device=hidden.device)
        hidden = self._run(hidden, F.pad(mask, (0, bucket - length - 1), value=False), *rotary)
        for layer, buffers in zip(held, self.buffers, strict=True):
            layer.keys, layer.values = (x[:, :, : length + 1] for x in buffers)
        return hidden

    def _settle(self, held: list, length: int) -> None:
        """Move into the buffers what is not there: after a prefill, a compaction, or beams that changed places."""
        like = held[0].keys
        if not self.buffers or self.buffers[0][0].shape[:2] != like.shape[:2] or self.buffers[0][0].shape[2] <= length:
            capacity = -(-(length + self.room) // BUCKET) * BUCKET
            self.recorded.clear()
            self.buffers = [tuple(like.new_zeros(*like.shape[:2], capacity, like.shape[3]) for _ in "kv") for _ in held]
            self.slot = torch.zeros(1, dtype=torch.long, device=like.device)
        for layer, buffers in zip(held, self.buffers, strict=True):
            for name, buffer in zip(("keys", "values"), buffers, strict=True):
                if (mine := getattr(layer, name)).data_ptr() != buffer.data_ptr():
                    buffer[:, :, :length] = mine
                    setattr(layer, name, buffer[:, :, :length])

    def _run(self, *inputs: Tensor) -> Tensor:
        recorder = RECORDERS.get(inputs[0].device.type)
        if recorder is None:
            return self._layers(*inputs)
        key = inputs[1].shape
        if key not in self.recorded:
            mine = [x.clone() for x in inputs]
            replay, output = recorder(partial(self._layers, *mine))
            here = range(self.first, self.first + len(self.forwards))
            self.recorded[key] = (replay, mine, output, {i: x for i, x in self.observed.items() if i in here})
        replay, mine, output, observed = self.recorded[key]
        for x, new in zip(mine, inputs, strict=True):
            x.copy_(new)
        replay()
        self.observed.update({i: replace(x) for i, x in observed.items()})  # a copy forgets what was computed from the last
        return output

    def _layers(self, hidden: Tensor, mask: Tensor, *rotary: Tensor) -> Tensor:
        self.bucket = mask.shape[-1]
        for forward in self.forwards:
            hidden = forward(
                hidden, attention_mask=mask, position_embeddings=rotary, position_ids=None, past_key_values=self, use_cache=True
            )
        return hidden

    def update(self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs) -> list[Tensor]:
        """As a cache's: store the new token, give all to attend to."""
        buffers = self.buffers[layer - self.first]
        for buffer, new in zip(buffers, (keys, values), strict=True):
            buffer.index_copy_(2, self.slot, new)
        return [buffer[:, :, : self.bucket] for buffer in buffers]


def _cuda_graph(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record `run`; returns what replays it, and the tensor that holds its result afterwards."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()  # workspaces that libraries make at first use must not be made while recording
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return graph.replay, output


RECORDERS: dict[str, Callable] = {"cuda": _cuda_graph}  # by kind of device
