"""What an answer costs: multiply-accumulates and bytes, from shapes and from how many tokens each layer held.

Papers on token pruning count one prefill of the decoder and call multiply-accumulates "FLOPs"; whether the MLP has two
matrices (FastV) or three (LLaMA; PyramidDrop, SparseVLM) and whether text counts differs between them. Here each choice is
an argument. Attention counts every query times every key, as these papers do, not the causal half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from dyrate.strategy import Strategy
from dyrate.trace import Trace


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder and its vision tower. inner: width of the MLP's hidden layer; patches: with [CLS], an image."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    tower_layers: int = 0
    tower_width: int = 0
    tower_inner: int = 0
    patches: int = 0
    patch_values: int = 0  # numbers in one patch of pixels

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def layer_weights(self) -> int:
        """Weights of one decoder layer, norms left out; three MLP matrices."""
        return self.width * self.head_dim * 2 * (self.heads + self.kv_heads) + 3 * self.width * self.inner


LLAVA_7B = Shape(32, 4096, 32, 32, 11008, 32064, 24, 1024, 4096, 577, 588)
LLAVA_13B = Shape(40, 5120, 40, 40, 13824, 32064, 24, 1024, 4096, 577, 588)


def shape_of(model) -> Shape:
    """The shape of a live model; the tower is counted for LLaVA's only."""
    text, vision = model.config.get_text_config(), model.config.vision_config
    tower = {}
    if model.config.model_type == "llava":
        patches = (vision.image_size // vision.patch_size) ** 2 + 1
        tower = {
            "tower_layers": vision.num_hidden_layers, "tower_width": vision.hidden_size,
            "tower_inner": vision.intermediate_size, "patches": patches, "patch_values": 3 * vision.patch_size**2,
        }  # fmt: skip
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return Shape(
        text.num_hidden_layers, text.hidden_size, text.num_attention_heads, kv_heads, text.intermediate_size,
        text.vocab_size, **tower,
    )  # fmt: skip


def layer_macs(shape: Shape, queries, keys, mlp_matrices: int = 3):
    """Multiply-accumulates of one decoder layer. With queries = keys = n and equal heads: 4nd^2 + 2n^2d + gndm."""
    heads = shape.heads * shape.head_dim
    projections = queries * shape.width * 2 * (heads + shape.kv_heads * shape.head_dim)
    return projections + 2 * queries * keys * heads + mlp_matrices * queries * shape.width * shape.inner


def prefill_macs(shape: Shape, tokens: Sequence[int], mlp_matrices: int = 3) -> int:
    """All layers over a prompt of which layer i holds `tokens[i]`."""
    return sum(layer_macs(shape, n, n, mlp_matrices) for n in tokens)


def decode_macs(shape: Shape, tokens: Sequence[int], mlp_matrices: int = 3) -> int:
    """All layers for one new token, which sees `tokens[i]` keys (itself among them) in layer i."""
    return sum(layer_macs(shape, 1, n, mlp_matrices) for n in tokens)


def tower_macs(shape: Shape, images: int = 1) -> int:
    """The vision tower and a projector of two matrices, for whole images."""
    n, d = shape.patches, shape.tower_width
    if not n:
        return 0
    layer = 4 * n * d**2 + 2 * n**2 * d + 2 * n * d * shape.tower_inner
    projector = (n - 1) * (d * shape.width + shape.width**2)
    return images * (shape.tower_layers * layer + (n - 1) * shape.patch_values * d + projector)


def kv_bytes(shape: Shape, tokens: Sequence[int], itemsize: int = 2) -> int:
    """Bytes of cached keys and values of one row whose layer i holds `tokens[i]`."""
    return 2 * sum(tokens) * shape.kv_heads * shape.head_dim * itemsize


def read_bytes(shape: Shape, tokens: Sequence[int], itemsize: int = 2, rows: int = 1) -> int:
    """Bytes that one decode step must read: the decoder's weights and lm_head once, the cache of each of `rows` rows."""
    weights = shape.layers * shape.layer_weights + shape.width * shape.vocabulary
    return weights * itemsize + rows * kv_bytes(shape, tokens, itemsize)


def layer_tokens(trace: Trace, n_layers: int) -> np.ndarray:
    """Tokens that each layer holds or, in residency "mask", reads: (step, row, layer), measured by a trace."""
    n_image = np.array(trace.n_image)
    held = np.zeros((len(trace.steps), len(n_image), n_layers), dtype=int)
    for t, step in enumerate(trace.steps):
        held[t] = np.array(step.tokens)[:, None]
        for stage in step.stages:  # ascending: a later stage overrides from its layer on
            held[t, :, stage.layer :] = (np.array(step.tokens) - n_image + np.array(stage.counts))[:, None]
    return held


def ledger(
    shape: Shape, trace: Trace, strategy: Strategy, *, mlp_matrices: int = 3, cache: bool = True, text: bool = True,
    itemsize: int = 2, lengths: Sequence[int] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """What a traced run cost, one line per batch row: multiply-accumulates of tower, prefill, decode, lm_head, selector; bytes.

    strategy: what the trace is of; in residency "mask" prefill and cache are whole. cache: False if every step ran over the
    whole sequence again. text: False counts image tokens alone. lengths: tokens of each row's answer, if some ended early.
    """
    masked = strategy.residency == "mask"
    observed = list(strategy.observes(shape.layers))
    tokens = layer_tokens(trace, shape.layers)
    if not text:
        tokens = tokens - (np.array([step.tokens for step in trace.steps]) - np.array(trace.n_image))[:, :, None]
    whole = np.repeat(tokens[:1].max(-1, keepdims=True), shape.layers, -1) if masked else tokens[:1]
    rows = []
    for row in range(tokens.shape[1]):
        steps = tokens[1 : None if lengths is None else lengths[row], row]
        decode = sum((decode_macs if cache else prefill_macs)(shape, n, mlp_matrices) for n in steps)
        held = [n[:1].repeat(shape.layers) for n in steps] if masked else list(steps)
        last = held[-1] if held else whole[0, row]
        rows.append({
            "row": row, "tower": tower_macs(shape, trace.n_image[row] // max(1, shape.patches - 1)),
            "prefill": prefill_macs(shape, whole[0, row], mlp_matrices), "decode": decode,
            "lm_head": (1 + len(steps)) * shape.width * shape.vocabulary,
            "selector": int(tokens[: 1 + len(steps) if strategy.each_step else 1, row][:, observed].sum()) * shape.width
            + strategy.selector_macs(shape, trace.prefill(row)),
            "kv_bytes": kv_bytes(shape, last, itemsize),
            "kv_read_bytes": sum(kv_bytes(shape, n, itemsize) for n in steps),
        })  # fmt: skip
    frame = pd.DataFrame(rows)
    frame["macs"] = frame[["tower", "prefill", "decode", "lm_head", "selector"]].sum(axis=1)
    return frame


UNITS = ("retention", "macs", "macs_uncached", "kv_bytes")  # of a budget


def remaining(
    unit: str, shape: Shape, kept: Float[Tensor, "batch step"], n_image: Tensor, n_text: Tensor, valid: Tensor, first: int
) -> Float[Tensor, " batch"]:
    """What remains of the unpruned cost of each answer: the sum of `remaining_by_step`, which says what is what."""
    return remaining_by_step(unit, shape, kept, n_image, n_text, valid, first).sum(1)


def remaining_by_step(
    unit: str, shape: Shape, kept: Float[Tensor, "batch step"], n_image: Tensor, n_text: Tensor, valid: Tensor, first: int
) -> Float[Tensor, "batch step"]:
    """What each step costs as a share of its answer's unpruned cost, from how many image tokens it keeps; differentiable.

    unit: "retention" (mean retention ratio over steps), "macs" (the decoder's multiply-accumulates with a KV cache),
    "macs_uncached" (as if every step ran over the whole sequence) or "kv_bytes" (read from the cache). n_image, n_text:
    tokens of each prompt, (batch,). valid: steps that exist, (batch, step). first: first pruned layer.
    """
    valid = valid.to(kept.dtype)
    if unit == "retention":
        return kept / n_image[:, None] * valid / valid.sum(1, keepdim=True)
    pruned_layers = shape.layers - first
    text = n_text[:, None] + torch.arange(kept.shape[1], device=kept.device)  # tokens beside the image at each step
    whole = text + n_image[:, None]

    def spent(tokens):
        if unit == "kv_bytes":
            return (first * whole + pruned_layers * tokens) * kv_bytes(shape, [1], 1) * valid
        if unit == "macs_uncached":
            return (first * layer_macs(shape, whole, whole) + pruned_layers * layer_macs(shape, tokens, tokens)) * valid
        prefill = first * layer_macs(shape, whole, whole) + pruned_layers * layer_macs(shape, tokens, tokens)
        decode = first * layer_macs(shape, 1, whole) + pruned_layers * layer_macs(shape, 1, tokens)
        return torch.cat([prefill[:, :1], decode[:, 1:] * valid[:, 1:]], 1)

    return spent(text + kept) / spent(whole.to(kept.dtype)).sum(1, keepdim=True)
