"""Read the attention of a live model while it runs, with the attention function that it has."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from dyrate.attention import LayerAttention

_NAME = "dyrate_observed"

Observer = Callable[[int, LayerAttention], None]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The language decoder's layers of a vision-language model."""
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None or not hasattr(layers[0], "self_attn"):
        raise TypeError(f"{type(model).__name__} has no stack of decoder layers with self-attention that dyrate knows")
    return layers


@contextmanager
def observe(model: PreTrainedModel, observer: Observer, layers: Iterable[int] | None = None) -> Iterator[None]:
    """Call `observer(layer, attention)` for each of `layers` at every forward pass, with that layer's attention.

    The model keeps its attention implementation; `attention.newest` computes one more row, (batch, head, key), beside it.
    layers: indices (default: all). Observing a layer twice at a time is an error.
    """
    stack = decoder_layers(model)
    chosen = range(len(stack)) if layers is None else layers
    with observe_modules({i: stack[i].self_attn for i in chosen}, observer):
        yield


@contextmanager
def observe_modules(attentions: dict[int, nn.Module], observer: Observer) -> Iterator[None]:
    """As `observe`, for any attention modules of one model, by number."""
    if any(_NAME in module.config._attn_implementation for module in attentions.values()):
        raise RuntimeError("this model is observed already: leave the first `observe` before entering another")
    if not attentions:
        yield
        return
    number = {id(module): i for i, module in attentions.items()}
    found = {i: module.config for i, module in attentions.items()}
    usual = _usual_attention(next(iter(attentions.values())))

    def observed(module, query, key, value, attention_mask, *args, scaling=None, **kwargs):
        scale = (module.scaling if hasattr(module, "scaling") else module.scale) if scaling is None else scaling
        observer(number[id(module)], LayerAttention(query, key, attention_mask, scale, module.is_causal))
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
