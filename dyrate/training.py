"""Train a rate predictor to a budget: the base model is frozen, masks stand for dropping, the budget is met by a multiplier.

    train(model, processor, examples, budget=0.33).predictor
    python -m dyrate.training --budget 0.33 --out data/pocket/dyrate/evict-0.33

What broke in trials, and what stands against it here: samples of a rate are drawn with noise that one answer shares over all its
steps, and the predictor starts at the budget, for otherwise the lowest of many samples wins at once and later rates are inert;
the noise fades to none, so that training ends with the likeliest rate that is deployed; the multiplier of the budget adapts;
and a last calibration measures real generation.
"""

from __future__ import annotations

import argparse
import json
import random
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dyrate import datasets
from dyrate.attention import encode
from dyrate.cost import Shape, kv_bytes, layer_macs, shape_of
from dyrate.datasets import Example, Examples
from dyrate.engine import lower_half, upper_half
from dyrate.evaluate import generated
from dyrate.files import write_whole
from dyrate.models import load
from dyrate.predictor import (
    DyRate,
    RatePredictor,
    chosen_mask,
    gumbel_noise,
    gumbel_one_hot,
    kept_counts,
    query_bias,
    rate_masks,
)  # fmt: skip
from dyrate.segments import Segments, find_segments, segment_shares, system_ids
from dyrate.strategy import Strategy

IGNORE = -100
UNITS = ("kept", "macs", "macs_uncached", "kv_bytes")


@dataclass(frozen=True)
class Settings:
    """One training run.

    budget: in `unit`: "kept" (mean kept share of image tokens over steps), or what remains of the decoder's
    multiply-accumulates ("macs": with a KV cache; "macs_uncached": every step over the whole sequence, most likely the
    paper's) or of the bytes that decoding reads from the cache ("kv_bytes"). distill: imitate the unpruned model's words
    instead of the references'. noise ends at `quiet` of all steps.
    """

    budget: float = 0.33
    unit: str = "kept"
    first_pruned_layer: int = 2
    residency: str = "evict"
    n_rates: int = 32
    with_step: bool = False
    steps: int = 200
    batch: int = 8
    rate: float = 0.05
    temperature: float = 1.0
    last_temperature: float = 0.3
    quiet: float = 0.7
    firmness: float = 10.0
    distill: bool = False
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.unit not in UNITS:
            raise ValueError(f"unit is one of {UNITS}, not {self.unit!r}")
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget is the share that remains and lies in (0, 1], not {self.budget}")
        if self.first_pruned_layer < 1:
            raise ValueError("first_pruned_layer must be at least 1: the layer before it is observed")


@dataclass
class Prepared:
    """Teacher-forced sequences as layer `first_pruned_layer` sees them: what does not depend on any rate, computed once.

    n_prompt: length of the left-padded prompts; answers follow, padded at the end. labels: the token that each step must
    choose, IGNORE after the end. score, features: what the strategy would see at each step.
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
    teacher: Float[Tensor, "batch step word"] | None = None


def prepare(model, processor, batch: list[Example], images: list, predictor: RatePredictor) -> Prepared:
    """Encode prompts and reference answers and run the layers before the first pruned one."""
    inputs = encode(processor, images, [e.prompt for e in batch]).to(model.device, model.dtype)
    end = processor.tokenizer.eos_token_id
    texts = [processor.tokenizer(e.references[0], add_special_tokens=False)["input_ids"] + [end] for e in batch]
    return prepare_tokens(model, dict(inputs), texts, predictor, system_ids(processor))


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


@dataclass
class Trained:
    """A predictor and how it came to be: one row a step in `history`, warnings of the diagnostics in `warnings`."""

    predictor: RatePredictor
    history: list[dict]
    warnings: list[str]


def train(
    model, processor, examples: Examples, settings: Settings | None = None, *, work: Path | None = None,
    validation: Examples | None = None, progress: bool = True, **fields,
) -> Trained:  # fmt: skip
    """Train a predictor on examples with reference answers. fields: of `Settings`, if no settings are given.

    Under `torchrun` or `accelerate launch` each process trains on its part of the examples. work: a folder for checkpoints; an
    interrupted training goes on from there (one process only). validation: examples on whose real
    generation the budget is calibrated (default: none, no calibration).
    """
    settings = settings or Settings(**fields)
    text = model.config.get_text_config()
    predictor = RatePredictor(
        text.num_attention_heads, text.num_hidden_layers, model.config.model_type, n_rates=settings.n_rates,
        first_pruned_layer=settings.first_pruned_layer, residency=settings.residency, with_step=settings.with_step,
        about={"settings": asdict(settings), "examples": examples.source},
    ).to(model.device)  # fmt: skip
    state = PartialState(cpu=not torch.cuda.is_available())
    mine = Examples(list(examples)[state.process_index :: state.num_processes], examples.source, examples.problems)
    batches = [prepare(model, processor, *pair, predictor) for pair in mine.batches(settings.batch)]
    if settings.distill:
        for b in batches:
            b.teacher = _unpruned(model, predictor, b)
    features = torch.cat([b.features[b.labels != IGNORE] for b in batches])
    start = settings.budget if settings.unit == "kept" else 0.5
    predictor.start_at(start, features)
    _average([predictor.mean, predictor.deviation])
    with frozen(model):
        trained = _descend(model, predictor, batches, settings, work, progress)
    if validation is not None:
        trained.history.append(calibrate(model, processor, predictor, validation, settings, progress=progress))
    predictor.about["history"] = trained.history[-1:]
    trained.warnings += warnings_of(predictor, batches, trained.history, settings)
    return trained


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
def _unpruned(model, predictor, prepared: Prepared) -> Tensor:
    everything = prepared.image[:, None].expand(-1, prepared.labels.shape[1], -1)
    return pruned_logits(model, predictor, prepared, everything)


def _descend(model, predictor, batches: list[Prepared], settings: Settings, work: Path | None, progress: bool) -> Trained:
    shape = shape_of(model)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=settings.rate)
    state = {"step": 0, "multiplier": 0.0, "history": []}
    path = None if work is None else Path(work) / "predictor-state.safetensors"
    if path is not None and path.exists():
        state = _load(path, predictor, optimizer, settings)
    bar = tqdm(range(state["step"], settings.steps), initial=state["step"], total=settings.steps, disable=not progress,
               desc=f"predictor for {settings.budget:.2f} {settings.unit}")  # fmt: skip
    for step in bar:
        prepared = batches[random.Random(f"{settings.seed} {step // len(batches)}").sample(range(len(batches)), len(batches))[
            step % len(batches)]]  # fmt: skip
        done = step / settings.steps
        noisy = max(0.0, 1 - done / settings.quiet)
        temperature = settings.temperature + (settings.last_temperature - settings.temperature) * done
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        noise = gumbel_noise((len(prepared.labels), 1, settings.n_rates), generator).to(model.device) * noisy
        logits = predictor(prepared.features)
        choice = gumbel_one_hot(logits, noise, temperature)
        masks = masks_over_steps(choice, prepared, predictor.rates, settings.residency)
        words = pruned_logits(model, predictor, prepared, masks, settings.checkpointing)
        valid = prepared.labels != IGNORE
        task = _task_loss(words, prepared, valid)
        n_text = prepared.real[:, : prepared.n_prompt].sum(1) - prepared.image.sum(1)
        spent = cost(
            settings.unit, shape, masks.sum(-1), prepared.image.sum(1), n_text, valid, settings.first_pruned_layer
        ).mean()
        excess = spent - settings.budget
        loss = task + state["multiplier"] * excess + settings.firmness / 2 * excess**2
        optimizer.zero_grad()
        loss.backward()
        excess = excess.detach()
        _average([*(p.grad for p in predictor.parameters()), excess])
        norm = torch.nn.utils.clip_grad_norm_(predictor.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * (1 - 0.9 * done)
        optimizer.step()
        state["multiplier"] += settings.firmness / 10 * float(excess)
        share = (masks.detach().sum(-1) / prepared.image.sum(1)[:, None])[valid]
        state["history"].append({
            "step": step, "loss": float(loss.detach()), "task": float(task.detach()), "cost": float(spent.detach()),
            "kept": float(share.mean()), "spread": float(share.std()), "multiplier": state["multiplier"],
            "entropy": float(torch.distributions.Categorical(logits=logits.detach()[valid]).entropy().mean()),
            "gradient": float(norm),
        })  # fmt: skip
        state["step"] = step + 1
        bar.set_postfix_str(f"loss {task.item():.3f}, cost {spent.item():.3f}, spread {float(share.std()):.3f}")
        if path is not None and (step % 25 == 24 or step + 1 == settings.steps):
            _save(path, predictor, optimizer, state, settings)
    return Trained(predictor.eval(), state["history"], [])


def _task_loss(words: Tensor, prepared: Prepared, valid: Tensor) -> Tensor:
    if prepared.teacher is None:
        return F.cross_entropy(words[valid].float(), prepared.labels[valid])
    return F.kl_div(words[valid].float().log_softmax(-1), prepared.teacher[valid].float().log_softmax(-1), log_target=True,
                    reduction="batchmean")  # fmt: skip


def _average(tensors: list[Tensor]) -> None:
    """Under `torchrun` or `accelerate launch` every process trains on its part and steps with the mean gradient."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for x in tensors:
            torch.distributed.all_reduce(x)
            x /= torch.distributed.get_world_size()


def _save(path: Path, predictor, optimizer, state: dict, settings: Settings) -> None:
    tensors = {f"predictor.{k}": v.detach().cpu() for k, v in predictor.state_dict().items()}
    for name, p in predictor.named_parameters():
        tensors |= {f"adam.{name}:{k}": v.detach().cpu() for k, v in optimizer.state[p].items()}
    about = {"state": state, "settings": asdict(settings)}
    write_whole(path, lambda part: save_file(tensors, part, metadata={"about": json.dumps(about)}))


def _load(path: Path, predictor, optimizer, settings: Settings) -> dict:
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        if about["settings"] != asdict(settings):
            raise ValueError(f"{path} holds a training with other settings: name another folder, or remove it to start anew")
        predictor.load_state_dict(
            {k.removeprefix("predictor."): file.get_tensor(k) for k in file.keys() if k.startswith("predictor.")}  # noqa: SIM118
        )
        for name, p in predictor.named_parameters():
            moments = {k: f"adam.{name}:{k}" for k in ("step", "exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {k: file.get_tensor(v) if k == "step" else file.get_tensor(v).to(p.device)
                                  for k, v in moments.items()}  # fmt: skip
    return about["state"]


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


def rate_changes(rows: list[dict]) -> list[float]:
    """By how much the rate changes from the first third of an answer to the last; answers of nine tokens and more."""
    found = [row["rates"] for row in rows if len(row["rates"]) >= 9]
    return [float(np.mean(r[-(len(r) // 3) :]) - np.mean(r[: len(r) // 3])) for r in found]


def trajectories(
    model, processor, strategy: Strategy, examples: Examples, *, batch_size: int = 32, max_new_tokens: int = 100
) -> dict[str, list[float]]:
    """Kept share at each step of real, greedy generation, by example."""
    found = {}
    for batch, images in examples.batches(batch_size):
        strategy.meet(batch)
        with strategy(model, processor) as trace:
            _, lengths = generated(model, processor, batch, images, {"max_new_tokens": max_new_tokens})
        kept = trace.kept_share()
        found |= {e.name: kept[:length, i].tolist() for i, (e, length) in enumerate(zip(batch, lengths, strict=True))}
    return found


def calibrate(
    model, processor, predictor, examples: Examples, settings: Settings, *, rounds: int = 7, progress: bool = True
) -> dict:
    """Move the tilt until the mean kept share of real generation is the budget, by bisection; other units are left alone."""
    if settings.unit != "kept":
        return {"calibrated": False}
    low, high = -64.0, 64.0  # more tilt: higher rates, fewer tokens
    best = (float("inf"), 0.0, 0.0)
    tilt = 0.0
    for _ in tqdm(range(rounds), desc="calibrating", disable=not progress):
        predictor.tilt.fill_(tilt)
        paths = trajectories(model, processor, DyRate.of(predictor), examples)
        share = float(np.mean([np.mean(path) for path in paths.values()]))
        best = min(best, (abs(share - settings.budget), tilt, share))
        if best[0] < 0.004:
            break
        low, high = (tilt, high) if share > settings.budget else (low, tilt)
        tilt = (low + high) / 2 if abs(high - low) < 100 else (8.0 if share > settings.budget else -8.0)
    predictor.tilt.fill_(best[1])
    return {"calibrated": True, "tilt": best[1], "share": best[2]}


@torch.no_grad()
def warnings_of(predictor, batches: list[Prepared], history: list[dict], settings: Settings) -> list[str]:
    """What went wrong, each with its remedy: stagnation, collapse, instability."""
    rates = torch.cat([predictor.rates[predictor(b.features).argmax(-1)][b.labels != IGNORE] for b in batches])
    found = []
    if float(rates.std()) < 1 / settings.n_rates:
        found.append(
            f"rates stagnate: their deviation over steps and inputs, {float(rates.std()):.3f}, is below one grid step. The "
            "features may not tell when tokens are needed: try with_step=True, another observed layer, or a longer answer"
        )
    if float((rates == rates.min()).float().mean()) > 0.95 and float(rates.min()) in (0.0, float(predictor.rates[-1])):
        found.append(f"rates collapsed to {float(rates.min()):.2f}: raise `firmness`, or ask for another budget")
    losses = [row["task"] for row in history if "task" in row]
    if len(losses) > 40 and np.mean(losses[-10:]) > 1.5 * np.mean(losses[:10]) + 0.1:
        found.append("the loss rose while training: lower `rate`, or raise `last_temperature`")
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a rate predictor and save it (safetensors and JSON).")
    parser.add_argument("--model", default="pocket", help='"pocket", a folder, or a hub name')
    parser.add_argument("--source", default="pocket", help='"pocket", or a folder of photographs with captions')
    parser.add_argument("--tasks", nargs="+", default=["description", "caption", "qa_count", "qa_place"])
    parser.add_argument("--n-train", type=int, default=48, help="examples a task to train on")
    parser.add_argument("--n-validation", type=int, default=16, help="examples a task to calibrate the budget on")
    parser.add_argument("--out", type=Path, required=True, help="where the predictor goes")
    parser.add_argument("--work", type=Path, help="checkpoints to go on from")
    for name, value in asdict(Settings()).items():
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(value, bool) else {"type": type(value)}
        parser.add_argument(f"--{name.replace('_', '-')}", default=value, **kind)
    given = vars(parser.parse_args(argv))
    settings = Settings(**{name: given[name] for name in asdict(Settings())})
    model, processor = load(given["model"])
    sets = {
        split: datasets.examples(given["source"], given[f"n_{split}"], tasks=given["tasks"], split=split)
        for split in ("train", "validation")
    }
    trained = train(model, processor, sets["train"], settings, validation=sets["validation"], work=given["work"])
    trained.predictor.save_pretrained(given["out"])
    for warning in trained.warnings:
        print(f"warning: {warning}")


if __name__ == "__main__":
    main()
