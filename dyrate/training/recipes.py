"""Ways to train other than the paper's: each changes what a step of `Trainer` draws, aims at, or descends on."""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from dyrate.predictor import gumbel_noise
from dyrate.teacher_forcing import Prepared, masks_over_steps
from dyrate.training.library import best_within, constants, interpolated, trajectories
from dyrate.training.trainer import Draw, Trainer

HOLD = 0.75  # probability that a sampled trajectory keeps its rate for another step
TAUGHT = 0.5  # share of its steps that `imitate` imitates


class Anneal(Trainer):
    """Begin with every token kept and let the budget fall, against the unpruned model's distribution (arXiv:2506.05345).

    The budget falls in a straight line over the first three quarters of the training.
    """

    @property
    def target(self) -> float:
        return 1 + (self.settings.budget - 1) * min(1.0, self.done / 0.75)


class Forward(Trainer):
    """A training that needs losses under given rates and no gradient through the base model.

    The loss is the mean over answers of their mean over tokens, as the cost is; in the paper's recipe long answers weigh more.
    """

    def masks(self, prepared: Prepared, indices: Int[Tensor, "batch step"]) -> Float[Tensor, "batch step image_token"]:
        choice = F.one_hot(indices, self.settings.n_rates).float()
        return masks_over_steps(choice, prepared, self.settings.residency, self.settings.delay)

    @torch.no_grad()
    def measured(
        self, prepared: Prepared, trajectories: Int[Tensor, "trajectory *batch step"]
    ) -> tuple[Float[Tensor, "trajectory batch step"], Float[Tensor, "trajectory batch step"]]:
        """What each step adds to the loss of its answer, and to the cost, under each trajectory of rates."""
        n, losses, costs = prepared.valid.sum(1, keepdim=True), [], []
        for indices in trajectories:
            masks = self.masks(prepared, indices.expand(len(n), -1))
            losses.append(self.losses(prepared, masks) / n)
            costs.append(self.cost(prepared, masks.sum(-1)))
        return torch.stack(losses), torch.stack(costs)


class Rloo(Forward):
    """The score function over sampled trajectories, each held against the others of its answer (RLOO, arXiv:2402.14740).

    No relaxation: the reward is minus the loss, minus the price of the cost.
    """

    def draw(self, prepared: Prepared, generator: torch.Generator) -> Draw:
        logits = self.predictor(prepared.features)
        log_pi = logits.log_softmax(-1)
        chosen, fresh = sample(log_pi.detach(), self.settings.samples, generator, 1 if self.settings.once else HOLD)
        masks = torch.stack([self.masks(prepared, indices) for indices in chosen])
        kept = masks.sum(-1)
        cost = torch.stack([self.cost(prepared, of_sample) for of_sample in kept])
        log_prob = log_pi.expand(len(chosen), -1, -1, -1).gather(-1, chosen[..., None])[..., 0] * fresh
        return Draw(prepared, logits, kept, cost, masks, log_prob)

    def objective(self, draw: Draw, pull: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            losses = torch.stack([self.losses(draw.prepared, masks) for masks in draw.masks])
        losses = losses / draw.prepared.valid.sum(1, keepdim=True)
        return score_function(draw.log_prob, losses + pull[:, None] * draw.cost), losses.sum(-1).mean()


def sample(
    log_pi: Float[Tensor, "batch step rate"], n: int, generator: torch.Generator, hold: float = HOLD
) -> tuple[Int[Tensor, "n batch step"], Bool[Tensor, "n batch step"]]:
    """n trajectories of rates, and at which steps a rate was drawn: at the first, later with probability 1 - hold.

    In between the rate stays. Were it drawn at every step, the lowest retention of many draws would evict at once, and later
    choices would do nothing.
    """
    batch, steps, n_rates = log_pi.shape
    fresh = torch.rand((n, batch, steps), generator=generator) >= hold
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

    @property
    def imitating(self) -> bool:
        return self.done < TAUGHT

    def draw(self, prepared: Prepared, generator: torch.Generator) -> Draw:
        if not self.imitating:
            return super().draw(prepared, generator)
        kept = self.masks(prepared, self.best[id(prepared)][0]).sum(-1)
        return Draw(prepared, self.predictor(prepared.features), kept, self.cost(prepared, kept))

    def objective(self, draw: Draw, pull: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        if not self.imitating:
            return super().objective(draw, pull)
        indices, loss = self.best[id(draw.prepared)]
        valid = draw.prepared.valid
        surprise = F.cross_entropy(draw.logits.transpose(1, 2), indices, reduction="none") * valid
        return (surprise.sum(1) / valid.sum(1)).mean(), loss

    @cached_property
    def best(self) -> dict[int, tuple[Int[Tensor, "batch step"], Tensor]]:
        """Of each batch: the rates of its answers' best trajectories, their mean loss. Multipliers begin at their price."""
        libraries = [trajectories(b.labels.shape[1], self.settings.n_rates).to(b.hidden.device) for b in self.batches]
        tables = [self.measured(b, library) for b, library in zip(self.batches, libraries, strict=True)]
        losses, costs = ([table.sum(-1) for table in kind] for kind in zip(*tables, strict=True))
        best, price = best_within(self.settings.budget, losses, costs)
        if self.step == 0:
            self.multipliers = dict.fromkeys(self.multipliers, price)
        of_batches = zip(self.batches, libraries, losses, best, strict=True)
        return {id(b): (library[choice], loss.gather(0, choice[None]).mean()) for b, library, loss, choice in of_batches}


class Curves(Forward):
    """Descend on what was measured: each token's loss at constant rates, interpolated in the retention ratio of its step.

    Left out is that a token's loss depends a little on what earlier steps saw. After the measurement no step runs the model.
    The forward value is that of the likeliest rate, which is deployed; the gradient that of the expected one.
    """

    def draw(self, prepared: Prepared, generator: torch.Generator) -> Draw:
        logits, n_image = self.predictor(prepared.features), prepared.image.sum(1, keepdim=True)
        counts = prepared.counts(self.settings.n_rates)[:, None].expand(-1, logits.shape[1], -1)
        likeliest = counts.gather(-1, logits.argmax(-1, keepdim=True))[..., 0]
        expected = (logits.softmax(-1) * counts).sum(-1)
        kept = likeliest + expected - expected.detach()
        kept = torch.cat([n_image.expand_as(kept)[:, : self.settings.delay], kept[:, self.settings.delay :]], 1)
        if self.settings.residency == "evict":
            kept = kept.cummin(1).values
        return Draw(prepared, logits, kept, self.cost(prepared, kept))

    def objective(self, draw: Draw, pull: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        kept, losses = self.curves[id(draw.prepared)]
        loss = interpolated(kept, losses, draw.kept).sum(1).mean()
        return loss + (pull * draw.cost.sum(1)).mean(), loss

    @cached_property
    def curves(self) -> dict[int, tuple[Float[Tensor, "level batch"], Float[Tensor, "level batch step"]]]:
        """Of each batch: how many image tokens each constant rate keeps, rising, and what each step then adds to the loss."""
        found = {}
        for b in self.batches:
            rates = constants(b.labels.shape[1], self.settings.n_rates).to(b.hidden.device)
            losses, _ = self.measured(b, rates)
            found[id(b)] = b.counts(self.settings.n_rates)[:, rates[:, 0]].T.float(), losses
        return found


TRAINERS: dict[str, type[Trainer]] = {"paper": Trainer, "anneal": Anneal, "rloo": Rloo, "imitate": Imitate, "curves": Curves}
