"""DeepStack (Qwen3-VL): features that the decoder adds to image tokens after its first layers, for the tokens still there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dyrate.engine.kept import take


@contextmanager
def deepstack(model: PreTrainedModel, columns: Callable[[], Tensor | None]) -> Iterator[None]:
    """Let the decoder add features to pruned hidden states.

    columns: the prompt position of each token that the layer run last holds, (batch, n); None while all are there.
    """
    decoder = model.get_decoder()
    if not hasattr(decoder, "_deepstack_process"):
        yield
        return
    usual = decoder._deepstack_process

    def process(hidden: Tensor, visual: Tensor, features: Tensor) -> Tensor:
        """visual (batch, prompt): where image tokens stand. features: of all of them, rows of the batch one after the other."""
        if (held := columns()) is None:
            return usual(hidden, visual, features)
        placed = torch.zeros(*visual.shape, features.shape[-1], dtype=features.dtype, device=features.device)
        placed[visual] = features
        left = visual.gather(1, held.to(visual.device))
        return usual(hidden, left, take(placed, held)[left])

    decoder._deepstack_process = process
    try:
        yield
    finally:
        del decoder._deepstack_process


def check_deepstack(model: PreTrainedModel, first: int) -> None:
    """Raises ValueError where the decoder adds features after layer `first` or a deeper one."""
    added = len(getattr(model.config.vision_config, "deepstack_visual_indexes", ()))
    if first < added:
        raise ValueError(
            f"this {model.config.model_type!r} model adds visual features after each of its first {added} layers: train a "
            f"predictor with first_pruned_layer={added} or more"
        )
