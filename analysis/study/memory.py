"""What must fit in a device's memory, from shapes alone: to answer, and to train a predictor. Bytes.

What every formula leaves out: the runtime's own memory (on a GPU some .5 GB) and what an allocator wastes.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from dyrate.cost import Shape, kv_bytes
from dyrate.segments import SEGMENTS


def parameters(shape: Shape) -> int:
    """Weights of decoder, embeddings, lm_head, LLaVA's CLIP tower and its projector."""
    decoder = shape.layers * (shape.layer_weights + 2 * shape.width) + (2 * shape.vocabulary + 1) * shape.width
    d, inner = shape.tower_width, shape.tower_inner
    tower = shape.tower_layers * (4 * d * d + 2 * d * inner + inner + 9 * d) + d * (shape.patch_values + shape.patches + 5)
    projector = d * shape.width + shape.width**2 + 2 * shape.width
    return decoder + tower + projector


def to_answer(shape: Shape, tokens: Sequence[int], new_tokens: int, rows: int = 1, itemsize: int = 2) -> dict[str, int]:
    """The peak of one `generate` of `rows` prompts of whose tokens layer i holds `tokens[i]`.

    activations: in the MLP of the layer with most tokens, or, if that is more, a layer's cache while a token is appended.
    """
    prefill = rows * max(tokens) * (3 * shape.inner + 6 * shape.width) * itemsize
    appended = 2 * rows * (max(tokens) + new_tokens) * shape.kv_heads * shape.head_dim * itemsize
    held = rows * kv_bytes(shape, [n + new_tokens for n in tokens], itemsize)
    return {"weights": parameters(shape) * itemsize, "cache": held, "activations": max(prefill, appended)}


def to_train(
    shape: Shape, n_image: int, n_text: int, answer: int, *, first: int = 2, batch: int = 1, examples: int = 1,
    n_rates: int = 32, checkpointing: bool = True, itemsize: int = 2,
) -> dict[str, int]:  # fmt: skip
    """The peak of a training step of the predictor (`dyrate.training`), the base model frozen.

    prepared: what is computed once for each of `examples`: the hidden states that enter layer `first`, scores, features.
    activations: of layers `first` and up, or with checkpointing their inputs and what one layer needs to run again.
    masks: of every rate at every step, and the biases made from them. logits: of the answer, with their gradients.
    """
    length, features = n_image + n_text + answer - 1, len(SEGMENTS) * shape.heads
    upper, hidden = shape.layers - first, batch * length * shape.width * itemsize
    float32 = batch * length * shape.width * 8 if itemsize < 4 else 0  # both norms compute in float32
    layer = 4 * hidden + float32 + 3 * batch * length * shape.inner * itemsize + batch * shape.heads * length**2 * itemsize
    gradients = hidden + batch * length * max(2 * shape.inner, shape.heads * length) * itemsize
    weights = features * n_rates + n_rates
    prepared = length * (shape.width + 2 * shape.head_dim) * itemsize + 4 * answer * (n_image + features)
    return {
        "weights": parameters(shape) * itemsize,
        "prepared": examples * prepared,
        "activations": gradients + (upper * hidden + layer if checkpointing else upper * (layer + hidden)),
        "masks": batch * (answer * n_rates * n_image + 8 * length**2 + 4 * length * n_image),
        "logits": batch * answer * shape.vocabulary * (2 * itemsize + 3 * 4),
        "predictor": 4 * 4 * weights,  # with its gradient and Adam's two moments
    }  # fmt: skip


def overview(
    shapes: dict[str, Shape], n_image: int = 576, n_text: int = 56, answer: int = 64, examples: int = 200
) -> pd.DataFrame:
    """GB in bfloat16 that answering and training take, unpruned, one line each; the parts stand in columns."""
    rows = []
    for name, shape in shapes.items():
        prompt = [n_image + n_text] * shape.layers
        needs = {
            "one answer": to_answer(shape, prompt, answer),
            "64 answers": to_answer(shape, prompt, answer, 64),
            "training, checkpointing": to_train(shape, n_image, n_text, answer, examples=examples),
            "training": to_train(shape, n_image, n_text, answer, examples=examples, checkpointing=False),
        }
        for what, parts in needs.items():
            rows.append({"model": name, "what": what, "GB": sum(parts.values()) / 1e9} | {k: v / 1e9 for k, v in parts.items()})
    return pd.DataFrame(rows)
