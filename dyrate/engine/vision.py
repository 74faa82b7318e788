"""What encoder-side strategies read: the vision tower's [CLS] attention, keys and features of one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PreTrainedModel

from dyrate.attention import LayerAttention
from dyrate.engine.observing import observe_modules
from dyrate.seen import Vision


class Tower:
    """Reads the tower whenever the model runs it."""

    def __init__(self, model: PreTrainedModel):
        self.projector, self.attention = _parts(model)
        self.projecting = False
        self.features: Tensor | None = None  # (image, patch, vision_width)
        self.keys: Tensor | None = None  # (image, patch, key_width)
        self.cls: Tensor | None = None  # (image, patch)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Read until the context is left."""
        handle = self.projector.register_forward_pre_hook(self._before_projector)
        try:
            with observe_modules({-1: self.attention}, self._at_attention):
                yield
        finally:
            handle.remove()

    def vision(self, image: Bool[Tensor, "row image_token"], n_image: list[int]) -> Vision:
        """The same by row of the batch. image: where a row has image tokens; n_image: how many."""
        n_images, n_patches, _ = self.features.shape
        copies, odd = divmod(sum(n_image), n_images * n_patches)  # each row once for every beam
        if copies == 0 or odd:
            raise ValueError(
                f"the tower gave {n_images} x {n_patches} patches for {sum(n_image)} image tokens: encoder-side "
                "strategies need one image token a patch, as LLaVA-1.5 has"
            )

        def by_row(x: Tensor) -> Tensor:
            first = image[::copies]
            rows = x.new_zeros(*first.shape, x.shape[-1])
            rows[first] = x.flatten(0, 1)
            return rows.repeat_interleave(copies, 0)

        return Vision(by_row(self.features), by_row(self.cls[..., None])[..., 0], by_row(self.keys), self._project)

    def _before_projector(self, module, args) -> None:
        if not self.projecting:
            self.features = args[0]

    def _at_attention(self, layer: int, attention: LayerAttention) -> None:
        first = torch.zeros(len(attention.query), 1, dtype=torch.long, device=attention.query.device)
        self.cls = attention.rows(first).mean(1)[:, 0, 1:]
        self.keys = attention.key.transpose(1, 2).flatten(2)[:, 1:]

    def _project(self, features: Tensor) -> Tensor:
        self.projecting = True  # the projector's own hook must not take this for the tower's
        try:
            return self.projector(features)
        finally:
            self.projecting = False


def _parts(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The projector and the attention of the tower's layer whose features are used."""
    inner, used = model.model, getattr(model.config, "vision_feature_layer", None)
    tower = getattr(inner, "vision_tower", None)
    tower = getattr(tower, "vision_model", tower)
    if model.config.model_type != "llava" or not isinstance(used, int) or not hasattr(tower.embeddings, "class_embedding"):
        raise ValueError(
            f"encoder-side strategies need LLaVA-1.5's tower, with one [CLS] an image and one layer of features; this is a "
            f"{model.config.model_type!r} model. Use a strategy that drops inside the decoder, such as FastV"
        )
    n_layers = len(tower.encoder.layers)
    return inner.multi_modal_projector, tower.encoder.layers[used - 1 if used >= 0 else n_layers + used].self_attn
