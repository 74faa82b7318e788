"""The orders in which image tokens go: FastV's, a random one, and what each token is truly worth to the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from dyrate.predictor import RatePredictor
from dyrate.strategies.controls import random_scores
from dyrate.teacher_forcing import Prepared, frozen, token_losses

RANKINGS = ("FastV", "random", "importance")
STATIC = ("random", "importance")  # the same at every step: evicted or masked, a falling trajectory shows the same tokens


def ranked(model, predictor: RatePredictor, prepared: Prepared, ranking: str, names: Sequence[str]) -> Prepared:
    """`prepared` with the scores of another ranking. names: of the examples, which decide their random scores."""
    if ranking == "FastV":
        return prepared
    if ranking == "random":
        score = torch.stack([random_scores(name, prepared.image.shape[1]) for name in names]).to(prepared.score)
    else:
        score = importance_scores(model, predictor, prepared)
    return replace(prepared, score=score[:, None].expand_as(prepared.score))


def importance_scores(model, predictor: RatePredictor, prepared: Prepared, nodes: int = 8) -> Float[Tensor, "batch image_token"]:
    """Integrated gradients (arXiv:1703.01365) of the answer's log-likelihood, in nats, as gates of all tokens open together.

    One gate an image token, the same at every step. The integral is a midpoint rule in the gate's fourth root, for most of the
    loss falls while the gates are nearly shut.
    """
    total = torch.zeros_like(prepared.image, dtype=torch.float32)
    for k in range(nodes):
        root = (k + 0.5) / nodes
        gate = torch.full_like(total, root**4).requires_grad_()
        masks = (gate * prepared.image)[:, None].expand(-1, prepared.labels.shape[1], -1)
        with frozen(model):
            loss = token_losses(model, predictor, prepared, masks).sum()
            total -= torch.autograd.grad(loss, gate)[0] * 4 * root**3 / nodes
    return total
