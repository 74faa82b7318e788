"""What image tokens are worth to an answer: integrated gradients of its log-likelihood, and leaving tokens out.

Both are teacher-forced on the reference answer, and ask for what the answer loses when tokens are missing from one layer on,
which is what pruning there does.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dyrate.predictor import RatePredictor
from dyrate.teacher_forcing import Prepared, frozen, token_losses

NODES = 12  # points of the path


def pruned_from(model, layer: int, **grid) -> RatePredictor:
    """A predictor that only says from which layer on (1 or later) tokens are missing: `prepare` and `token_losses` take it."""
    text = model.config.get_text_config()
    settings = {"first_pruned_layer": layer} | grid
    return RatePredictor(text.num_attention_heads, text.num_hidden_layers, model.config.model_type, **settings).to(model.device)


def every_token(prepared: Prepared) -> Float[Tensor, "batch step image_token"]:
    """The masks under which every step sees every image token."""
    return prepared.image[:, None].expand(-1, prepared.labels.shape[1], -1).float()


def path(nodes: int) -> list[tuple[float, float]]:
    """Points m in (0, 1) and their weights for an integral over m: Gauss-Legendre in the sixth root of m.

    Most of the loss falls while m is small, for a softmax sees little difference between half of a large weight and all of it.
    """
    x, weight = np.polynomial.legendre.leggauss(nodes)
    x, weight = (x + 1) / 2, weight / 2
    return list(zip((x**6).tolist(), (weight * 6 * x**5).tolist(), strict=True))


def integrated_gradients(
    model, place: RatePredictor, prepared: Prepared, nodes: int = NODES
) -> Float[Tensor, "batch step image_token"]:
    """By how much reading each image token at each step lowers the loss of the whole answer, in nats (arXiv:1703.01365).

    The gradient in the masks is integrated from no image token to all, all masks growing alike; over steps and tokens the
    values sum to the loss without the image minus the loss with it. Step 0 is the prompt with the first answer token. A token
    read at one step also lowers the loss of later ones, which read that step's keys: all of it is counted where it was read.
    """
    whole = every_token(prepared)
    total = torch.zeros_like(whole)
    with frozen(model):
        for m, weight in path(nodes):
            masks = (m * whole).requires_grad_()
            (gradient,) = torch.autograd.grad(token_losses(model, place, prepared, masks).sum(), masks)
            total += weight * gradient
    return -total * whole


@torch.no_grad()
def left_out(
    model, place: RatePredictor, prepared: Prepared, tokens: Bool[Tensor, "batch image_token"]
) -> Float[Tensor, "batch step"]:
    """By how much the loss of each answer token grows, in nats, when no step sees these image tokens."""
    whole = every_token(prepared)
    return token_losses(model, place, prepared, whole * ~tokens[:, None]) - token_losses(model, place, prepared, whole)
