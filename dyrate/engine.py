"""The only file that knows transformers' internals: it reads attention from a live model, which it leaves as found."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

_NAME = "dyrate_observed"

Observer = Callable[[int, Float[Tensor, "batch head key"]], None]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The language decoder's layers of a vision-language model."""
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None or not hasattr(layers[0], "self_attn"):
        raise TypeError(f"{type(model).__name__} has no stack of decoder layers with self-attention that dyrate knows")
    return layers


def last_row(
    query: Float[Tensor, "batch head query dim"],
    key: Float[Tensor, "batch kv_head key dim"],
    attention_mask: Tensor | None,
    scaling: float,
) -> Float[Tensor, "batch head key"]:
    """Attention weights of the last query, in float32. Heads may share keys (GQA).

    attention_mask: None, the 4-D boolean or additive mask of the fused kernels, or the 2-D padding mask of flash attention.
    """
    batch, heads, _, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    asked = (query[:, :, -1] * scaling).reshape(batch, kv_heads, heads // kv_heads, dim)
    logits = (asked @ key.transpose(-1, -2)).reshape(batch, heads, length).float()
    if attention_mask is not None:
        seen = attention_mask[:, None] if attention_mask.ndim == 2 else attention_mask[:, :, -1]
        seen = seen[..., :length]
        if seen.dtype.is_floating_point:
            logits = logits + seen
        else:
            logits = logits.masked_fill(~seen.bool(), torch.finfo(torch.float32).min)
    return logits.softmax(-1)


@contextmanager
def observe(model: PreTrainedModel, observer: Observer, layers: Iterable[int] | None = None) -> Iterator[None]:
    """Call `observer(layer, row)` with the newest query's attention weights in each of `layers`, at every forward pass.

    The model keeps its attention implementation: each observed layer computes one more row, (batch, head, key), beside
    it. layers: indices (default: all). Observing a model twice at a time is an error.
    """
    stack = decoder_layers(model)
    chosen = range(len(stack)) if layers is None else list(layers)
    attentions = {i: stack[i].self_attn for i in chosen}
    if any(_NAME in module.config._attn_implementation for module in attentions.values()):
        raise RuntimeError("this model is observed already: leave the first `observe` before entering another")
    number = {id(module): i for i, module in attentions.items()}
    found = {i: module.config for i, module in attentions.items()}
    usual = _usual_attention(next(iter(attentions.values())))

    def observed(module, query, key, value, attention_mask, *args, scaling=None, **kwargs):
        scale = module.scaling if scaling is None else scaling
        observer(number[id(module)], last_row(query, key, attention_mask, scale))
        return usual(module, query, key, value, attention_mask, *args, scaling=scaling, **kwargs)

    name = f"{_NAME}_{id(observed):x}"
    AttentionInterface.register(name, observed)
    try:
        for module in attentions.values():
            module.config = copy.copy(module.config)
            module.config._attn_implementation_internal = name
        yield
    finally:
        for i, module in attentions.items():
            module.config = found[i]
        del AttentionInterface._global_mapping[name]


def _usual_attention(module: nn.Module) -> Callable:
    """The function with which this attention module computes."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return AttentionInterface().get_interface(module.config._attn_implementation, eager)
