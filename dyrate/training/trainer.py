"""One training, step by step."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dyrate import diagnostics
from dyrate.cost import remaining_by_step, shape_of
from dyrate.predictor import RatePredictor, gumbel_noise, gumbel_one_hot
from dyrate.teacher_forcing import Prepared, frozen, masked_logits, masks_over_steps
from dyrate.training import checkpoint
from dyrate.training.settings import Settings

SAVE_EVERY = WARN_EVERY = 25  # steps


@dataclass
class Draw:
    """What was drawn for one batch: one trajectory of each answer, or several, which are then the first axis.

    kept: image tokens that each step keeps; cost: of each step, as a share of the answer's unpruned cost. masks: where the model
    is to run under them. log_prob: of each choice of a rate, where they were sampled.
    """

    prepared: Prepared
    logits: Float[Tensor, "batch step rate"]
    kept: Float[Tensor, "*sample batch step"]
    cost: Float[Tensor, "*sample batch step"]
    masks: Float[Tensor, "*sample batch step image_token"] | None = None
    log_prob: Float[Tensor, "sample batch step"] | None = None


class Trainer:
    """Trains a predictor on prepared batches. `run` takes one `train_step` after the other; the rest serves that.

    step, multipliers, history: how far it has come, which a checkpoint holds beside the weights and Adam's moments. multipliers:
    prices of the cost, by the task that is held to the budget, or one for the mean of all.
    """

    def __init__(
        self, model, predictor: RatePredictor, batches: list[Prepared], settings: Settings, *, work: Path | None = None,
        progress: bool = True,
    ):  # fmt: skip
        self.model, self.predictor, self.batches, self.settings = model, predictor, batches, settings
        self.progress = progress
        self.checkpoint = None if work is None else Path(work) / "predictor-state.safetensors"
        self.shape = shape_of(model)
        self.optimizer = torch.optim.Adam(predictor.parameters(), lr=settings.learning_rate)
        groups = {group for prepared in batches for group in self.groups(prepared)}
        self.step, self.multipliers = 0, dict.fromkeys(sorted(gather_object(list(groups))), 0.0)
        self.history: list[dict] = []
        self.warned: set[str] = set()
        self.start()

    def start(self) -> None:
        """Standardise the features, and let the predictor begin at the budget."""
        features = torch.cat([b.features[b.valid] for b in self.batches])
        self.predictor.start_at(self.target if self.settings.unit == "retention" else max(0.5, self.target), features)
        _average([self.predictor.mean, self.predictor.deviation])

    def run(self) -> list[dict]:
        """All steps that are left, from the checkpoint where there is one. Returns the history."""
        if self.checkpoint is not None and self.checkpoint.exists():
            checkpoint.load(self, self.checkpoint)
        name = f"predictor for {self.settings.budget:.2f} {self.settings.unit}"
        with (
            frozen(self.model),
            tqdm(initial=self.step, total=self.settings.steps, desc=name, disable=not self.progress) as bar,
        ):
            while self.step < self.settings.steps:
                self.train_step()
                self.step += 1
                bar.update()
                bar.set_postfix_str("loss {loss:.3f}, cost {cost:.3f}, spread {spread:.3f}".format(**self.history[-1]))
                if self.step % WARN_EVERY == 0:
                    self.warn(bar.write)
                if self.checkpoint is not None and (self.step % SAVE_EVERY == 0 or self.step == self.settings.steps):
                    checkpoint.save(self, self.checkpoint)
        self.predictor.eval()
        return self.history

    # -- the schedules ---------------------------------------------------------------------------------------------------

    @property
    def done(self) -> float:
        """The share of the steps that are done."""
        return self.step / self.settings.steps

    @property
    def target(self) -> float:
        """The budget of this step."""
        return self.settings.budget

    @property
    def noise(self) -> float:
        """The factor of the Gumbel noise: from 1 to 0 at `noise_until`."""
        return max(0.0, 1 - self.done / self.settings.noise_until) if self.settings.noise_until else 0.0

    @property
    def temperature(self) -> float:
        return self.settings.temperature + (self.settings.last_temperature - self.settings.temperature) * self.done

    # -- one step --------------------------------------------------------------------------------------------------------

    def train_step(self) -> None:
        """Draw rates for all batches of the step, and descend on the loss plus the augmented Lagrangian of the budget."""
        draws = self.draw_all()
        costs = self.costs(draws)
        excess = {group: cost / n - self.target for group, (cost, n) in costs.items() if n}
        # the gradient of multiplier * excess + penalty / 2 * excess^2, whose excess is the mean over all that accumulates
        pulls = {group: self.multipliers[group] + self.settings.budget_penalty * found for group, found in excess.items()}
        self.optimizer.zero_grad()
        loss = 0.0
        for draw in draws:
            pull = torch.tensor([pulls[group] for group in self.groups(draw.prepared)], device=draw.cost.device)
            objective, task_loss = self.objective(draw, pull)
            (objective / len(draws)).backward()
            loss += float(task_loss.detach()) / len(draws)
        gradient = self.descend()
        for group, found in excess.items():
            self.multipliers[group] += self.settings.budget_penalty / 30 * found
        cost, n = map(sum, zip(*costs.values(), strict=True))
        self.record(draws, loss, cost / n, gradient)

    def groups(self, prepared: Prepared) -> list[str]:
        """For each answer, what is held to the budget together with it: its task, or all."""
        return prepared.tasks if self.settings.per_task else [""] * len(prepared.labels)

    def costs(self, draws: Sequence[Draw]) -> dict[str, tuple[float, float]]:
        """Of each group the sum of its answers' costs, and how many it has in this step: both a mean over processes."""
        found = torch.zeros(len(self.multipliers), 2, device=draws[0].cost.device)
        number = {group: i for i, group in enumerate(self.multipliers)}
        for draw in draws:
            index = torch.tensor([number[group] for group in self.groups(draw.prepared)], device=found.device)
            costs = draw.cost.detach().sum(-1).reshape(-1, len(index)).mean(0)  # over samples, where there are several
            found.index_add_(0, index, torch.stack([costs, torch.ones_like(costs)], 1))
        _average([found])
        return dict(zip(number, map(tuple, found.tolist()), strict=True))

    def draw_all(self) -> list[Draw]:
        """One draw for each batch of this step, from a random stream of the step's own."""
        n = self.settings.accumulate
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.step)
        return [self.draw(self.batch(self.step * n + i), generator) for i in range(n)]

    def batch(self, i: int) -> Prepared:
        """The i-th batch of an endless stream in which every epoch has an order of its own."""
        n = len(self.batches)
        order = random.Random(f"{self.settings.seed} {i // n}").sample(range(n), n)
        return self.batches[order[i % n]]

    def draw(self, prepared: Prepared, generator: torch.Generator) -> Draw:
        """Rates with noise that an answer's steps share, the masks that follow, and what they cost."""
        noise = gumbel_noise((len(prepared.labels), 1, self.settings.n_rates), generator).to(prepared.hidden.device) * self.noise
        logits = self.predictor(prepared.features)
        choice = gumbel_one_hot(logits, noise, self.temperature)
        masks = masks_over_steps(choice, prepared, self.settings.residency, self.settings.delay)
        return Draw(prepared, logits, masks.sum(-1), self.cost(prepared, masks.sum(-1)), masks)

    def cost(self, prepared: Prepared, kept: Float[Tensor, "batch step"]) -> Float[Tensor, "batch step"]:
        """What each step costs that keeps so many image tokens, as a share of the answer's unpruned cost."""
        n_image = prepared.image.sum(1)
        n_text = prepared.real[:, : prepared.n_prompt].sum(1) - n_image
        return remaining_by_step(
            self.settings.unit, self.shape, kept, n_image, n_text, prepared.valid, self.settings.first_pruned_layer
        )

    def objective(self, draw: Draw, pull: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        """What one draw adds to what is descended on, and the loss in it (nats a token). pull: price of each answer's cost."""
        loss = self.task_loss(draw)
        return loss + (pull * draw.cost.sum(-1)).mean(), loss

    def task_loss(self, draw: Draw) -> Tensor:
        """The mean loss over all tokens of the batch, nats a token."""
        return self.losses(draw.prepared, draw.masks)[draw.prepared.valid].mean()

    def losses(self, prepared: Prepared, masks: Float[Tensor, "batch step image_token"]) -> Float[Tensor, "batch step"]:
        """Cross-entropy of each token with the references in nats, or divergence from the unpruned model; 0 after the end."""
        valid = prepared.valid
        logits = masked_logits(self.model, self.predictor, prepared, masks, self.settings.checkpointing)[valid].float()
        if prepared.teacher is None:
            losses = F.cross_entropy(logits, prepared.labels[valid], reduction="none")
        else:
            teacher = prepared.teacher[valid].float().log_softmax(-1)
            losses = F.kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="none").sum(-1)
        return torch.zeros_like(valid, dtype=losses.dtype).masked_scatter(valid, losses)

    def descend(self) -> float:
        """One step of Adam with the mean gradient of all processes, clipped to length 1. Returns its length before."""
        _average([p.grad for p in self.predictor.parameters()])
        length = torch.nn.utils.clip_grad_norm_(self.predictor.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * (1 - 0.9 * self.done)
        self.optimizer.step()
        return float(length)

    def record(self, draws: Sequence[Draw], loss: float, cost: float, gradient: float) -> None:
        """Append a row to the history. retention, spread: mean and deviation over steps and answers; entropy: nats a choice."""
        shares = [(d.kept.detach() / d.prepared.image.sum(1)[:, None])[..., d.prepared.valid] for d in draws]
        retention = torch.cat([share.flatten() for share in shares])
        logits = torch.cat([d.logits.detach()[d.prepared.valid] for d in draws])
        self.history.append({
            "step": self.step, "loss": loss, "cost": cost, "retention": float(retention.mean()), "spread": float(retention.std()),
            "multiplier": sum(self.multipliers.values()) / len(self.multipliers), "gradient": gradient,
            "entropy": float(torch.distributions.Categorical(logits=logits).entropy().mean()),
        })  # fmt: skip

    def warn(self, write: Callable[[str], None]) -> None:
        """Write each sign of failure once, as soon as rates are drawn without noise."""
        if self.noise == 0:
            for sign in diagnostics.while_training(self.history, 1 / self.settings.n_rates):
                if sign.name not in self.warned:
                    write(f"warning at step {self.step}: {sign}")
                self.warned.add(sign.name)


def _average(tensors: list[Tensor]) -> None:
    """Under `torchrun` or `accelerate launch` every process trains on its part and steps with the mean gradient."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for x in tensors:
            torch.distributed.all_reduce(x)
            x /= torch.distributed.get_world_size()
