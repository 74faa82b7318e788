"""Teacher forcing under masks: reference answers run once through the lower layers, then through the upper ones as if dropped."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from dyrate.generation import encode
from dyrate.data import Example
from dyrate.engine import lower_half, upper_half
from dyrate.predictor import RatePredictor, chosen_mask, kept_counts, query_bias, rate_masks
from dyrate.segments import Segments, find_segments, segment_shares, system_ids

IGNORE = -100


@dataclass
class Prepared:
    """Teacher-forced sequences as layer `first_pruned_layer` sees them: what does not depend on any rate, computed once.

    n_prompt: length of the left-padded prompts; answers follow, padded at the end. labels: the token that each step must
    choose, IGNORE after the end. score, features: what the strategy would see at each step. tasks: of the examples.
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
    teacher: Float[Tensor, "batch step word"] | None = None


def prepare(model, processor, batch: list[Example], images: list, predictor: RatePredictor) -> Prepared:
    """Encode prompts and reference answers and run the layers before the first pruned one."""
    inputs = encode(processor, images, [e.prompt for e in batch]).to(model.device, model.dtype)
    end = processor.tokenizer.eos_token_id
    texts = [processor.tokenizer(e.references[0], add_special_tokens=False)["input_ids"] + [end] for e in batch]
    found = prepare_tokens(model, dict(inputs), texts, predictor, system_ids(processor))
    found.tasks = [e.task for e in batch]
    return found


def prepare_tokens(model, inputs: dict, answers: list[list[int]], predictor: RatePredictor, system=None) -> Prepared:
    """As `prepare`, from processed prompts and the token ids of their answers."""
    prompt, mask = inputs["input_ids"], inputs["attention_mask"]
    n_prompt, steps = prompt.shape[1], max(len(a) for a in answers)
    labels = torch.full((len(answers), steps), IGNORE, device=prompt.device)
    for i, answer in enumerate(answers):
        labels[i, : len(answer)] = torch.tensor(answer)
    said = labels[:, :-1].clamp(min=0)
    inputs = dict(inputs, input_ids=torch.cat([prompt, said], 1))
    inputs["attention_mask"] = torch.cat([mask, (labels[:, :-1] != IGNORE).long()], 1)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(said)], 1)
    segments = find_segments(prompt, model.config.image_token_id, mask, system)
    positions, valid = segments.positions("image")
    first = predictor.first_pruned_layer
    hidden, rotary, looks = lower_half(model, inputs, first, sorted({first - 1, *predictor.observed_layers}))
    queries = torch.arange(n_prompt - 1, n_prompt - 1 + steps, device=prompt.device).expand(len(prompt), -1)
    rows = {layer: look.rows(queries) for layer, look in looks.items()}  # (batch, head, step, key)
    index = positions[:, None].expand(-1, steps, -1)
    score = rows[first - 1].mean(1).gather(2, index) * valid[:, None]
    shares = [segment_shares_of(rows[layer], segments) for layer in predictor.observed_layers]
    features = predictor.features(shares, torch.arange(steps, device=prompt.device))
    return Prepared(n_prompt, hidden, rotary, inputs["attention_mask"].bool(), positions, valid, labels, score, features)


def segment_shares_of(rows: Float[Tensor, "batch head step key"], segments: Segments) -> Float[Tensor, "batch step head 4"]:
    """Segment shares of many queries at once."""
    return torch.stack([segment_shares(rows[:, :, t], segments) for t in range(rows.shape[2])], 1)


def masks_over_steps(
    choice: Float[Tensor, "batch step rate"], prepared: Prepared, rates: Tensor, residency: str
) -> Float[Tensor, "batch step image_token"]:
    """Which image tokens each step sees, under one-hot choices of rates; gradients reach the choices.

    In "evict" a step chooses among the survivors of the one before; in "hide" among all.
    """
    counts = kept_counts(prepared.image.sum(1), rates)
    survivors = prepared.image
    mask = prepared.image.to(choice.dtype)
    masks = []
    for step in range(choice.shape[1]):
        chosen = chosen_mask(choice[:, step], rate_masks(prepared.score[:, step], survivors, counts))
        mask = mask * chosen if residency == "evict" else chosen
        if residency == "evict":
            survivors = survivors & (mask > 0.5)
        masks.append(mask)
    return torch.stack(masks, 1)


def pruned_logits(model, predictor: RatePredictor, prepared: Prepared, masks, checkpointing: bool = False) -> Tensor:
    """Logits (batch, step, word) of the answer, each step seeing the image tokens that its mask keeps."""
    bias = query_bias(masks.float(), prepared.positions, prepared.image, prepared.real, prepared.n_prompt)
    queries = torch.arange(prepared.n_prompt - 1, prepared.n_prompt - 1 + prepared.labels.shape[1], device=bias.device)
    first = predictor.first_pruned_layer
    return upper_half(model, first, prepared.hidden, prepared.rotary, bias, queries, checkpointing)


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
def taught(model, predictor: RatePredictor, batches: list[Prepared], rate: float | None = None) -> list[dict]:
    """Teacher-forced loss without noise, one row a sequence: mean cross-entropy (nats a token), mean kept share, rates.

    rate: the same at every step, in place of the predictor's; rounded to its grid.
    """
    rows = []
    for prepared in batches:
        best = predictor(prepared.features).argmax(-1)
        if rate is not None:
            best = torch.full_like(best, int((predictor.rates - rate).abs().argmin()))
        choice = F.one_hot(best, len(predictor.rates)).float()
        masks = masks_over_steps(choice, prepared, predictor.rates, predictor.residency)
        words = pruned_logits(model, predictor, prepared, masks).float()
        share = masks.sum(-1) / prepared.image.sum(1)[:, None]
        for i, labels in enumerate(prepared.labels):
            valid = labels != IGNORE
            loss = float(F.cross_entropy(words[i][valid], labels[valid]))
            kept, said = share[i][valid], predictor.rates[best[i]][valid]
            rows.append({"loss": loss, "kept": float(kept.mean()), "rates": said.tolist(), "kept_steps": kept.tolist()})
    return rows


def foretold(
    model, predictor: RatePredictor, batches: list[Prepared], rate: float, *, shown: int = 9, checkpointing: bool = False
) -> list[dict]:
    """What the straight-through gradient at one constant rate foretells for other constant rates, and what they really cost.

    One row an answer and rate: task, rate, loss (nats a token), and `foretold`, the loss at `rate` continued along its
    gradient. rate: rounded to the grid.
    """
    rows = []
    here = int((predictor.rates - rate).abs().argmin())
    others = np.unique(np.linspace(0, len(predictor.rates) - 1, shown).round().astype(int))

    def losses(prepared, choice):
        masks = masks_over_steps(choice, prepared, predictor.rates, predictor.residency)
        words = pruned_logits(model, predictor, prepared, masks, checkpointing).float()
        wrong = F.cross_entropy(words.transpose(1, 2), prepared.labels, ignore_index=IGNORE, reduction="none")
        return wrong.sum(1) / (prepared.labels != IGNORE).sum(1)

    def constant(prepared, index):
        return F.one_hot(torch.full_like(prepared.labels, index), len(predictor.rates)).float()

    for prepared in batches:
        choice = constant(prepared, here).requires_grad_()
        with frozen(model):
            start = losses(prepared, choice)
            (gradient,) = torch.autograd.grad(start.sum(), choice)
        for index in others:
            with torch.no_grad():
                real = losses(prepared, constant(prepared, index))
            told = start.detach() + (gradient[..., index] - gradient[..., here]).sum(1)
            rows += [
                {"task": task, "rate": float(predictor.rates[index]), "loss": float(a), "foretold": float(b)}
                for task, a, b in zip(prepared.tasks, real, told, strict=True)
            ]
    return rows


def rate_changes(rows: list[dict]) -> list[float]:
    """By how much the rate changes from the first third of an answer to the last; answers of nine tokens and more."""
    found = [row["rates"] for row in rows if len(row["rates"]) >= 9]
    return [float(np.mean(r[-(len(r) // 3) :]) - np.mean(r[: len(r) // 3])) for r in found]
