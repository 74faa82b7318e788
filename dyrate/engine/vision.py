"""What encoder-side strategies read: the vision tower's features, keys and [CLS] attention of one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import BatchFeature, PreTrainedModel

from dyrate.attention import LayerAttention
from dyrate.engine.observing import observe_modules
from dyrate.seen import Vision


def encode_images(model: PreTrainedModel, inputs: BatchFeature) -> BatchFeature:
    """Inputs of `generate` with the vision tower's output, so that several calls on a batch run the tower once.

    Give each call a deep copy, since `generate` repeats the output in place for beams; and give a strategy that needs
    "vision" the inputs without it, since it reads the tower at work.
    """
    return BatchFeature(model._maybe_prepare_encoder_kwargs_for_generation(None, dict(inputs), None, None))


class Tower:
    """Reads the tower whenever the model runs it. Images are rows, patches follow their [CLS]."""

    def __init__(self, model: PreTrainedModel):
        self.project, self.layer, self.last = _parts(model)
        self.features: Tensor | None = None  # (image, 1 + patch, vision_width), of the layer that the decoder gets
        self.attention: LayerAttention | None = None  # of that layer
        self.joint: dict[str, Tensor] = {}  # queries and keys of the last layer, heads side by side

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Read until the context is left."""
        with ExitStack() as stack:
            stack.enter_context(observe_modules({-1: self.layer.self_attn}, self._at_attention))
            stack.callback(self.layer.register_forward_hook(self._after_layer).remove)
            for name in ("q_proj", "k_proj"):
                projection = getattr(self.last.self_attn, name)
                stack.callback(projection.register_forward_hook(lambda m, a, out, n=name: self.joint.__setitem__(n, out)).remove)
            yield

    def vision(self, image: Bool[Tensor, "row image_token"], n_image: list[int]) -> Vision:
        """The same by row of the batch. image: where a row has image tokens; n_image: how many."""
        n_images, n_patches = self.features.shape[0], self.features.shape[1] - 1
        copies, odd = divmod(sum(n_image), n_images * n_patches)  # each row once for every beam
        if copies == 0 or odd:
            raise ValueError(
                f"the tower gave {n_images} x {n_patches} patches for {sum(n_image)} image tokens: encoder-side "
                "strategies need one image token a patch, as LLaVA-1.5 has"
            )

        def by_row(x: Tensor) -> Tensor:
            rows = x.new_zeros(*image[::copies].shape, *x.shape[2:])
            rows[image[::copies]] = x.flatten(0, 1)
            return rows.repeat_interleave(copies, 0)

        per_row = torch.tensor(n_image[::copies]) // n_patches  # images
        first = (per_row.cumsum(0) - per_row).to(self.features.device)
        query, key = self.joint["q_proj"], self.joint["k_proj"]
        joint = (query[:, :1] @ key.transpose(1, 2) * key.shape[-1] ** -0.5).float().softmax(-1)
        start = torch.zeros(n_images, 1, dtype=torch.long, device=key.device)
        return Vision(
            features=by_row(self.features[:, 1:]), cls=self.features[first, 0].repeat_interleave(copies, 0),
            cls_attention=by_row(self.attention.rows(start).mean(1)[:, 0, 1:]),
            keys=by_row(self.attention.key.transpose(1, 2)[:, 1:]),
            joint_attention=by_row(joint[:, 0, 1:]), joint_keys=by_row(key[:, 1:]), project=self.project,
        )  # fmt: skip

    def _at_attention(self, layer: int, attention: LayerAttention) -> None:
        self.attention = attention

    def _after_layer(self, module, args, output) -> None:
        self.features = output[0] if isinstance(output, tuple) else output


def _parts(model: PreTrainedModel) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The projector, the tower's layer whose output the decoder gets, and the tower's last layer."""
    inner, used = model.model, getattr(model.config, "vision_feature_layer", None)
    tower = getattr(inner, "vision_tower", None)
    tower = getattr(tower, "vision_model", tower)
    if model.config.model_type != "llava" or not isinstance(used, int) or not hasattr(tower.embeddings, "class_embedding"):
        raise ValueError(
            f"encoder-side strategies need LLaVA-1.5's tower, with one [CLS] an image and one layer of features; this is a "
            f"{model.config.model_type!r} model. Use a strategy that drops inside the decoder, such as FastV"
        )
    layers = tower.encoder.layers
    return inner.multi_modal_projector, layers[used - 1 if used >= 0 else len(layers) + used], layers[-1]
