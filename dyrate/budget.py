"""The budget of a predictor: what a run costs against no pruning, and the calibration that meets it in real generation."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from dyrate.attention import encode
from dyrate.cost import Shape, kv_bytes, layer_macs
from dyrate.datasets import Examples
from dyrate.evaluate import generated
from dyrate.predictor import DyRate
from dyrate.strategy import Strategy

UNITS = ("kept", "macs", "macs_uncached", "kv_bytes")


def cost(
    unit: str, shape: Shape, kept: Float[Tensor, "batch step"], n_image: Tensor, n_text: Tensor, valid: Tensor, first: int
) -> Float[Tensor, " batch"]:
    """What remains of the unpruned cost, from the number of image tokens kept at each step; differentiable.

    valid: (batch, step), steps that exist. first: first pruned layer.
    """
    valid = valid.to(kept.dtype)
    if unit == "kept":
        return (kept / n_image[:, None] * valid).sum(1) / valid.sum(1)
    upper = shape.layers - first
    text = n_text[:, None] + torch.arange(kept.shape[1], device=kept.device)  # tokens beside the image at each step
    whole = text + n_image[:, None]

    def spent(tokens):
        if unit == "kv_bytes":
            return (first * whole + upper * tokens) * kv_bytes(shape, [1], 1) * valid
        if unit == "macs_uncached":
            return (first * layer_macs(shape, whole, whole) + upper * layer_macs(shape, tokens, tokens)) * valid
        prefill = first * layer_macs(shape, whole, whole) + upper * layer_macs(shape, tokens, tokens)
        decode = first * layer_macs(shape, 1, whole) + upper * layer_macs(shape, 1, tokens)
        return torch.cat([prefill[:, :1], decode[:, 1:] * valid[:, 1:]], 1)

    return spent(text + kept).sum(1) / spent(whole.to(kept.dtype)).sum(1)


def trajectories(
    model, processor, strategy: Strategy, examples: Examples, *, batch_size: int = 32, max_new_tokens: int = 100
) -> dict[str, list[float]]:
    """Kept share at each step of real, greedy generation, by example."""
    found = {}
    for batch, images in examples.batches(batch_size):
        strategy.meet(batch)
        with strategy(model, processor) as trace:
            said = generated(model, encode(processor, images, [e.prompt for e in batch]), {"max_new_tokens": max_new_tokens})
        kept = trace.kept_share()
        found |= {e.name: kept[: len(ids), i].tolist() for i, (e, ids) in enumerate(zip(batch, said, strict=True))}
    return found


def calibrate(
    model, processor, predictor, examples: Examples, budget: float, *, batch_size: int = 32, rounds: int = 7,
    progress: bool = True,
) -> dict[str, float]:  # fmt: skip
    """Move the tilt until the mean kept share of real generation is the budget, by bisection: returns tilt and share."""
    low, high = -64.0, 64.0  # more tilt: higher rates, fewer tokens
    best = (float("inf"), 0.0, 0.0)
    tilt = 0.0
    for _ in tqdm(range(rounds), desc="calibrating", disable=not progress):
        predictor.tilt.fill_(tilt)
        paths = trajectories(model, processor, DyRate.of(predictor), examples, batch_size=batch_size)
        share = float(np.mean([np.mean(path) for path in paths.values()]))
        best = min(best, (abs(share - budget), tilt, share))
        if best[0] < 0.004:
            break
        low, high = (tilt, high) if share > budget else (low, tilt)
        tilt = (low + high) / 2 if abs(high - low) < 100 else (8.0 if share > budget else -8.0)
    predictor.tilt.fill_(best[1])
    return {"tilt": best[1], "share": best[2]}
