"""Teacher forcing under masks: reference answers run once through the lower layers, then masked through the upper ones."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from dyrate.data import Example, Examples
from dyrate.engine import run_above, run_below
from dyrate.engine.kept import take
from dyrate.features import looks
from dyrate.generation import encode
from dyrate.predictor import RatePredictor, chosen_mask, kept_counts, query_bias, rate_grid, rate_masks
from dyrate.segments import Segments, find_segments, system_ids

IGNORE = -100


@dataclass
class Prepared:
    """Teacher-forced sequences as layer `first_pruned_layer` sees them: what does not depend on any rate, computed once.

    n_prompt: length of the left-padded prompts; answers follow, padded at the end. labels: the token that each step must
    choose, IGNORE after the end. score, features: what the strategy would see at each step. tasks: of the examples.
    teacher: logits to imitate in place of the labels.
    """

    n_prompt: int
    hidden: Float[Tensor, "batch length width"]
    rotary: tuple[Tensor, ...]
    real: Bool[Tensor, "batch length"]
    positions: Int[Tensor, "batch image_token"]
    image: Bool[Tensor, "batch image_token"]
    labels: Int[Tensor, "batch step"]
    score: Float[Tensor, "batch step image_token"]
    features: Float[Tensor, "batch step feature"]
    tasks: list[str] = field(default_factory=list)
    teacher: Float[Tensor, "batch step vocabulary"] | None = None
    _counts: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def counts(self, n_rates: int) -> Int[Tensor, "batch rate"]:
        """Image tokens that each rate keeps: computed once, so that no training step waits for the device."""
        if n_rates not in self._counts:
            self._counts[n_rates] = kept_counts(self.image.sum(1), rate_grid(n_rates))
        return self._counts[n_rates]

    @property
    def valid(self) -> Bool[Tensor, "batch step"]:
        """Steps that exist: an answer in a batch may end before others."""
        return self.labels != IGNORE


def prepare_examples(model, processor, predictor: RatePredictor, examples: Examples, size: int) -> list[Prepared]:
    """All examples whose image can be used (`Examples.readable`), in batches of `size`. Raises ValueError if there is none."""
    return [prepare(model, processor, predictor, batch, images) for batch, images in examples.batches(size, processor)]


def prepare(model, processor, predictor: RatePredictor, batch: list[Example], images: list) -> Prepared:
    """Encode prompts and reference answers and run the layers before the first pruned one."""
    inputs = encode(processor, images, [e.prompt for e in batch]).to(model.device, model.dtype)
    end = processor.tokenizer.eos_token_id
    answers = [processor.tokenizer(e.references[0], add_special_tokens=False)["input_ids"] + [end] for e in batch]
    prepared = prepare_tokens(model, predictor, dict(inputs), answers, system_ids(processor))
    prepared.tasks = [e.task for e in batch]
    return prepared


def prepare_tokens(model, predictor: RatePredictor, inputs: dict, answers: list[list[int]], system=None) -> Prepared:
    """As `prepare`, from processed prompts and the token ids of their answers."""
    prompt, mask = inputs["input_ids"], inputs["attention_mask"]
    n_prompt, steps = prompt.shape[1], max(len(a) for a in answers)
    labels = torch.full((len(answers), steps), IGNORE, device=prompt.device)
    for i, answer in enumerate(answers):
        labels[i, : len(answer)] = torch.tensor(answer)
    fed = labels[:, :-1].clamp(min=0)  # the last token of an answer is only predicted
    inputs = dict(inputs, input_ids=torch.cat([prompt, fed], 1))
    inputs["attention_mask"] = torch.cat([mask, (labels[:, :-1] != IGNORE).long()], 1)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(fed)], 1)
    segments = find_segments(prompt, model.config.image_token_id, mask, system)
    positions, image = segments.positions("image")
    first = predictor.first_pruned_layer
    hidden, rotary, attention = run_below(model, inputs, first, sorted({first - 1, *predictor.observed_layers}))
    queries = torch.arange(n_prompt - 1, n_prompt - 1 + steps, device=prompt.device).expand(len(prompt), -1)
    rows = {layer: of_layer.rows(queries) for layer, of_layer in attention.items()}  # (batch, head, step, key)
    index = positions[:, None].expand(-1, steps, -1)
    score = rows[first - 1].mean(1).gather(2, index) * image[:, None]
    features = features_of(predictor, rows, segments, hidden[:, n_prompt - 1 :])
    return Prepared(n_prompt, hidden, rotary, inputs["attention_mask"].bool(), positions, image, labels, score, features)


def features_of(
    predictor: RatePredictor, rows: dict[int, Float[Tensor, "batch head step key"]], segments: Segments,
    newest: Float[Tensor, "batch step width"],
) -> Float[Tensor, "batch step feature"]:  # fmt: skip
    """What the predictor reads at each step, from attention by layer and the hidden states of the newest tokens."""
    of_steps, steps = [], newest.shape[1]
    for step in range(1 if predictor.once else steps):
        observed = [rows[layer][:, :, step] for layer in predictor.observed_layers]
        of_steps.append(predictor.features(looks(predictor.reads, observed, segments, step, newest[:, step]), step))
    return torch.stack(of_steps, 1).expand(-1, steps, -1)


def masks_over_steps(
    choice: Float[Tensor, "batch step rate"], prepared: Prepared, residency: str, delay: int = 0
) -> Float[Tensor, "batch step image_token"]:
    """Which image tokens each step sees, under one-hot choices of rates; gradients reach the choices.

    In "evict" a step chooses among the tokens that the one before kept; in "mask" among all. The first `delay` steps see all.
    """
    counts = prepared.counts(choice.shape[-1])
    candidates = prepared.image
    mask = prepared.image.to(choice.dtype)
    masks = [mask] * min(delay, choice.shape[1])
    for step in range(len(masks), choice.shape[1]):
        chosen = chosen_mask(choice[:, step], rate_masks(prepared.score[:, step], candidates, counts))
        mask = mask * chosen if residency == "evict" else chosen
        if residency == "evict":
            candidates = candidates & (mask > 0.5)
        masks.append(mask)
    return torch.stack(masks, 1)


def masked_logits(
    model, predictor: RatePredictor, prepared: Prepared, masks: Float[Tensor, "batch step image_token"],
    checkpointing: bool = False,
) -> Float[Tensor, "batch step vocabulary"]:  # fmt: skip
    """Logits of the answer, each step seeing the image tokens that its mask keeps."""
    if not masks.requires_grad:
        prepared, masks = without_unseen(prepared, masks)
    bias = query_bias(masks.float(), prepared.positions, prepared.image, prepared.real, prepared.n_prompt)
    queries = torch.arange(prepared.n_prompt - 1, prepared.n_prompt - 1 + prepared.labels.shape[1], device=bias.device)
    first, hidden = predictor.first_pruned_layer, prepared.hidden
    if bias.is_cuda and bias.requires_grad:  # the fused kernel's backward fails where the mask alone wants a gradient
        hidden = hidden.detach().requires_grad_()
    return run_above(model, first, hidden, prepared.rotary, bias, queries, checkpointing)


def without_unseen(
    prepared: Prepared, masks: Float[Tensor, "batch step image_token"]
) -> tuple[Prepared, Float[Tensor, "batch step image_token"]]:
    """Sequences without the image tokens that no step sees, which changes no logit and saves what they would cost.

    Rows that keep more than others decide the length; the others get more padding on the left.
    """
    seen = prepared.image & (masks > 0).any(1)
    left = prepared.real.scatter(1, prepared.positions, seen | ~prepared.image & prepared.real.gather(1, prepared.positions))
    gone = int((~left[:, : prepared.n_prompt]).sum(1).min())
    prompt = left[:, : prepared.n_prompt].to(torch.uint8).argsort(dim=1, stable=True)[:, gone:]
    answer = torch.arange(prepared.n_prompt, left.shape[1], device=left.device).expand(len(left), -1)
    index = torch.cat([prompt, answer], 1)
    place = torch.zeros_like(prepared.real, dtype=torch.long)
    place.scatter_(1, index, torch.arange(index.shape[1], device=left.device).expand_as(index))
    shorter = replace(
        prepared, n_prompt=prepared.n_prompt - gone, hidden=take(prepared.hidden, index), real=left.gather(1, index),
        rotary=tuple(take(x, index) for x in prepared.rotary), positions=place.gather(1, prepared.positions), image=seen,
    )  # fmt: skip
    return shorter, masks * seen[:, None]


def token_losses(
    model, predictor: RatePredictor, prepared: Prepared, masks: Float[Tensor, "batch step image_token"],
    checkpointing: bool = False,
) -> Float[Tensor, "batch step"]:  # fmt: skip
    """Cross-entropy of each answer token in nats, 0 after the end, each step seeing image tokens through its mask in [0, 1]."""
    logits = masked_logits(model, predictor, prepared, masks, checkpointing).float()
    return F.cross_entropy(logits.transpose(1, 2), prepared.labels, ignore_index=IGNORE, reduction="none")


def answer_losses(
    model, predictor: RatePredictor, prepared: Prepared, choice: Float[Tensor, "batch step rate"],
    checkpointing: bool = False,
) -> Float[Tensor, " batch"]:  # fmt: skip
    """Loss of each answer in nats a token under one-hot choices of rates; gradients reach the choices."""
    masks = masks_over_steps(choice, prepared, predictor.residency, predictor.delay)
    return token_losses(model, predictor, prepared, masks, checkpointing).sum(1) / prepared.valid.sum(1)


@torch.no_grad()
def unpruned_logits(model, predictor: RatePredictor, prepared: Prepared) -> Float[Tensor, "batch step vocabulary"]:
    """Logits of the answer where every step sees every image token."""
    return masked_logits(model, predictor, prepared, prepared.image[:, None].expand(-1, prepared.labels.shape[1], -1))


@contextmanager
def frozen(model):
    """No gradient for the base model inside; afterwards each parameter is as it was."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)


@torch.no_grad()
def teacher_forced(model, predictor: RatePredictor, batches: list[Prepared], rate: float | None = None) -> list[dict]:
    """Teacher-forced loss without noise, one row an answer: task, loss (nats a token), retention, and rates by step.

    rate: the same at every step, in place of the predictor's; rounded to its grid.
    """
    rows = []
    for prepared in batches:
        best = predictor(prepared.features).argmax(-1)
        if rate is not None:
            best = torch.full_like(best, _nearest(predictor, rate))
        choice = F.one_hot(best, len(predictor.rates)).float()
        masks = masks_over_steps(choice, prepared, predictor.residency, predictor.delay)
        logits = masked_logits(model, predictor, prepared, masks).float()
        retention = masks.sum(-1) / prepared.image.sum(1)[:, None]
        for i, (labels, valid) in enumerate(zip(prepared.labels, prepared.valid, strict=True)):
            rows.append({
                "task": prepared.tasks[i] if prepared.tasks else "",
                "loss": float(F.cross_entropy(logits[i][valid], labels[valid])),
                "retention": float(retention[i][valid].mean()), "rates": predictor.rates[best[i]][valid].tolist(),
            })  # fmt: skip
    return rows


def predicted_by_gradient(
    model, predictor: RatePredictor, batches: list[Prepared], rate: float, *, n_shown: int = 9, checkpointing: bool = False
) -> list[dict]:
    """What the straight-through gradient at one constant rate predicts for other constant rates, and what they really cost.

    One row an answer and rate: task, rate, loss (nats a token), and `predicted`, the loss at `rate` continued along its
    gradient. rate: rounded to the grid. n_shown: rates, spread evenly over the grid.
    """
    here, n_rates = _nearest(predictor, rate), len(predictor.rates)
    others = np.unique(np.linspace(0, n_rates - 1, n_shown).round().astype(int))

    def constant(prepared, index):
        return F.one_hot(torch.full_like(prepared.labels, index), n_rates).float()

    rows = []
    for prepared in batches:
        choice = constant(prepared, here).requires_grad_()
        with frozen(model):
            start = answer_losses(model, predictor, prepared, choice, checkpointing)
            (gradient,) = torch.autograd.grad(start.sum(), choice)
        for index in others:
            with torch.no_grad():
                measured = answer_losses(model, predictor, prepared, constant(prepared, index), checkpointing)
            predicted = start.detach() + (gradient[..., index] - gradient[..., here]).sum(1)
            rows += [
                {"task": task, "rate": float(predictor.rates[index]), "loss": float(a), "predicted": float(b)}
                for task, a, b in zip(prepared.tasks, measured, predicted, strict=True)
            ]
    return rows


def _nearest(predictor: RatePredictor, rate: float) -> int:
    return int((predictor.rates - rate).abs().argmin())


def rate_changes(rows: list[dict]) -> list[float]:
    """By how much the rate changes from the first third of an answer to the last; answers of nine tokens and more."""
    courses = [row["rates"] for row in rows if len(row["rates"]) >= 9]
    return [float(np.mean(r[-(len(r) // 3) :]) - np.mean(r[: len(r) // 3])) for r in courses]
