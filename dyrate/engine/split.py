"""A model run in two parts: the layers below the first pruned one once, those above under any mask, with gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dyrate.attention import LayerAttention
from dyrate.engine.deepstack import check_deepstack
from dyrate.engine.observing import decoder_layers, observe


class _Enough(Exception):
    """Ends a forward pass whose upper layers are not wanted."""


@torch.no_grad()
def run_below(
    model: PreTrainedModel, inputs: dict, first: int, observed: Iterable[int]
) -> tuple[Tensor, tuple[Tensor, ...], dict[int, LayerAttention]]:
    """Run the layers before `first` over whole sequences: hidden states that enter it, rotary embeddings, observed attention.

    Raises ValueError where the decoder adds visual features after `first` (DeepStack), which `run_above` does not do.
    """
    caught: dict = {}
    check_deepstack(model, first)
    found: dict[int, LayerAttention] = {}

    def stop(module, args, kwargs):
        caught.update(hidden=args[0], rotary=kwargs["position_embeddings"])
        raise _Enough

    handle = decoder_layers(model)[first].register_forward_pre_hook(stop, with_kwargs=True)
    if not hasattr(model.model, "rope_deltas"):  # as generate does for padded rows; others place tokens in the image's plane
        inputs = {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0), **inputs}
    try:
        with observe(model, found.__setitem__, observed):
            model(**inputs, use_cache=False)
    except _Enough:
        pass
    finally:
        handle.remove()
    return caught["hidden"], caught["rotary"], found


def run_above(
    model: PreTrainedModel, first: int, hidden: Tensor, rotary: tuple[Tensor, ...], bias: Tensor, queries: Tensor,
    checkpointing: bool = False,
) -> Float[Tensor, "batch step word"]:  # fmt: skip
    """Run layers `first` and up under an additive bias (batch, 1, length, length); logits of the queries (step) asked for.

    Gradients reach the bias. checkpointing: keep no activations inside a layer, compute them again in the backward pass.
    """
    for layer in decoder_layers(model)[first:]:
        given = {"attention_mask": bias.to(hidden.dtype), "position_embeddings": rotary, "position_ids": None}
        if checkpointing:
            hidden = checkpoint(layer, hidden, **given, use_reentrant=False)
        else:
            hidden = layer(hidden, **given)
    return model.get_output_embeddings()(model.get_decoder().norm(hidden[:, queries]))
