"""Ways to train other than the paper's: each changes what a step of `Trainer` draws, aims at, or descends on."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from dyrate.predictor import gumbel_noise
from dyrate.teacher_forcing import Prepared, masks_over_steps
from dyrate.training.trainer import Draw, Trainer

HOLD = 0.75  # probability that a sampled trajectory keeps its rate for another step


class Anneal(Trainer):
    """Begin with every token kept and let the budget fall, against the unpruned model's distribution (arXiv:2506.05345).

    The budget falls in a straight line over the first three quarters of the training.
    """

    @property
    def target(self) -> float:
        return 1 + (self.settings.budget - 1) * min(1.0, self.done / 0.75)


class Rloo(Trainer):
    """The score function over sampled trajectories, each held against the others of its answer (RLOO, arXiv:2402.14740).

    No relaxation and no gradient through the base model: the reward is minus the loss, minus the price of the cost.
    """

    def draw(self, prepared: Prepared, generator: torch.Generator) -> Draw:
        logits = self.predictor(prepared.features)
        log_pi = (logits / self.temperature).log_softmax(-1)
        chosen, fresh = sample(log_pi.detach(), self.settings.samples, generator)
        masks = torch.stack([self.masks(prepared, indices) for indices in chosen])
        cost = torch.stack([self.cost(prepared, of_sample) for of_sample in masks])
        log_prob = log_pi.expand(len(chosen), -1, -1, -1).gather(-1, chosen[..., None])[..., 0] * fresh
        return Draw(prepared, logits, masks, cost, log_prob)

    def masks(self, prepared: Prepared, indices: Int[Tensor, "batch step"]) -> Float[Tensor, "batch step image_token"]:
        choice = F.one_hot(indices, self.settings.n_rates).float()
        return masks_over_steps(choice, prepared, self.settings.residency, self.settings.delay)

    @property
    def temperature(self) -> float:
        """Of sampling: 1 at first and .2 when the noise of the other recipes would have gone."""
        return max(0.2, self.noise)

    @torch.no_grad()
    def losses_of(self, draw: Draw) -> Float[Tensor, "sample batch step"]:
        return torch.stack([self.losses(draw.prepared, masks) for masks in draw.masks])

    def objective(self, draw: Draw, pull: float) -> tuple[Tensor, Tensor]:
        """The loss is the mean over answers of their mean over tokens, as the cost is."""
        losses = self.losses_of(draw) / draw.prepared.valid.sum(1, keepdim=True)
        return score_function(draw.log_prob, losses + pull * draw.cost.detach()), losses.sum(-1).mean()


def sample(
    log_pi: Float[Tensor, "batch step rate"], n: int, generator: torch.Generator
) -> tuple[Int[Tensor, "n batch step"], Bool[Tensor, "n batch step"]]:
    """n trajectories of rates, and at which steps a rate was drawn: at the first, later with probability 1 - HOLD.

    In between the rate stays. Were it drawn at every step, the lowest retention of many draws would evict at once, and later
    choices would do nothing.
    """
    batch, steps, n_rates = log_pi.shape
    fresh = torch.rand((n, batch, steps), generator=generator) >= HOLD
    fresh[..., 0] = True
    latest = torch.where(fresh, torch.arange(steps), 0).cummax(-1).values.to(log_pi.device)
    drawn = (log_pi + gumbel_noise((n, batch, steps, n_rates), generator).to(log_pi.device)).argmax(-1)
    return drawn.gather(-1, latest), fresh.to(log_pi.device)


def score_function(
    log_prob: Float[Tensor, "sample batch step"], penalty: Float[Tensor, "sample batch step"]
) -> Float[Tensor, ""]:
    """A number whose gradient is, in the mean over samples, that of the expected sum of penalties over steps.

    A choice answers for the penalties from its step on, less their mean over the other samples of the same answer.
    """
    ahead = penalty.flip(-1).cumsum(-1).flip(-1)
    advantage = (ahead - ahead.mean(0)) * len(ahead) / (len(ahead) - 1)
    return (advantage * log_prob).sum(-1).mean()


class Imitate(Rloo):
    """For each answer the best of a library of trajectories, at the price that meets the budget; then RLOO from there.

    Where relaxations get trapped (GRIP-VLM, arXiv:2605.13375) this starts from what was measured. The first part is an ordinary
    classification: at each step the rate of the answer's best trajectory.
    """

    TAUGHT = 0.5  # share of the steps that imitate


RECIPES: dict[str, type[Trainer]] = {"paper": Trainer, "anneal": Anneal, "rloo": Rloo, "imitate": Imitate}
