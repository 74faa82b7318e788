"""Train a rate predictor to a budget: the base model is frozen, masks stand for dropping, the budget is met by a multiplier.

    train(model, processor, examples, budget=0.33).predictor
    python -m dyrate.training --budget 0.33 --out data/pocket/dyrate/evict-0.33

What broke in trials, and what stands against it here: samples of a rate are drawn with noise that one answer shares over all its
steps, and the predictor starts at the budget, for otherwise the lowest of many samples wins at once and later rates are inert;
the noise fades early, so that most of training sees the likeliest rate that is deployed; batches mix tasks, for a batch of one
task would hold that task to the budget; the relaxation is hot, for a cold one saturates and passes no gradient; the multiplier of
the budget adapts; and a last calibration measures real generation.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dyrate import datasets, diagnostics
from dyrate.budget import UNITS, calibrate, cost
from dyrate.cost import shape_of
from dyrate.data import Examples
from dyrate.diagnostics import Sign
from dyrate.atomic import write_whole
from dyrate.teacher_forcing import IGNORE, Prepared, frozen, masks_over_steps, prepare, pruned_logits
from dyrate.models import load
from dyrate.predictor import RatePredictor, gumbel_noise, gumbel_one_hot


@dataclass(frozen=True)
class Settings:
    """One training run.

    budget: in `unit`: "kept" (mean kept share of image tokens over steps), or what remains of the decoder's
    multiply-accumulates ("macs": with a KV cache; "macs_uncached": every step over the whole sequence, most likely the
    paper's) or of the bytes that decoding reads from the cache ("kv_bytes"). distill: imitate the unpruned model's words
    instead of the references'. noise ends at `quiet` of all steps. observed_layers: default the one before the first pruned.
    firmness 0: no budget. accumulate: batches to a step, for where memory holds few sequences; the budget is over all of them.
    """

    budget: float = 0.33
    unit: str = "kept"
    first_pruned_layer: int = 2
    observed_layers: list[int] | None = None
    residency: str = "evict"
    n_rates: int = 32
    with_step: bool = False
    steps: int = 200
    batch: int = 8
    accumulate: int = 1
    rate: float = 0.1
    temperature: float = 8.0
    last_temperature: float = 8.0
    quiet: float = 0.3
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
class Trained:
    """A predictor and how it came to be: one row a step in `history`; calibration: tilt and share; signs of failure."""

    predictor: RatePredictor
    history: list[dict]
    calibration: dict[str, float] = field(default_factory=dict)
    signs: list[Sign] = field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        return [str(sign) for sign in self.signs if sign.warns]


def train(
    model, processor, examples: Examples, settings: Settings | None = None, *, work: Path | None = None,
    validation: Examples | None = None, batch_size: int = 32, progress: bool = True, **fields,
) -> Trained:  # fmt: skip
    """Train a predictor on examples with reference answers. fields: of `Settings`, if no settings are given.

    Under `torchrun` or `accelerate launch` each process trains on its part of the examples. work: a folder for checkpoints; an
    interrupted training goes on from there (one process only). validation: examples on whose real generation, `batch_size`
    prompts together, the budget is calibrated and signs of failure are sought (default: no calibration, signs on the training
    examples).
    """
    settings = settings or Settings(**fields)
    text = model.config.get_text_config()
    predictor = RatePredictor(
        text.num_attention_heads, text.num_hidden_layers, model.config.model_type, n_rates=settings.n_rates,
        first_pruned_layer=settings.first_pruned_layer, residency=settings.residency, with_step=settings.with_step,
        observed_layers=settings.observed_layers, about={"settings": asdict(settings), "examples": examples.source},
    ).to(model.device)  # fmt: skip
    state = PartialState(cpu=not torch.cuda.is_available())
    # mixed, so that a batch tells the mean cost over all tasks: batches of one task would hold each task to the budget
    mixed = random.Random(settings.seed).sample(list(examples), len(examples))
    mine = Examples(mixed[state.process_index :: state.num_processes], examples.source, examples.problems)
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
    if validation is not None and settings.unit == "kept" and settings.firmness:
        trained.calibration = calibrate(
            model, processor, predictor, validation, settings.budget, batch_size=batch_size, progress=progress
        )
        predictor.about["calibration"] = trained.calibration
    if validation is not None:
        batches = [prepare(model, processor, *pair, predictor) for pair in validation.batches(settings.batch)]
    trained.signs = diagnostics.signs(model, processor, predictor, batches, trained.history, validation)
    return trained


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
    warned: set[str] = set()
    bar = tqdm(range(state["step"], settings.steps), initial=state["step"], total=settings.steps, disable=not progress,
               desc=f"predictor for {settings.budget:.2f} {settings.unit}")  # fmt: skip
    for step in bar:
        done = step / settings.steps
        noisy = max(0.0, 1 - done / settings.quiet)
        temperature = settings.temperature + (settings.last_temperature - settings.temperature) * done
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        group = [_batch(batches, step * settings.accumulate + i, settings.seed) for i in range(settings.accumulate)]
        drawn = [_draw(predictor, prepared, generator, noisy, temperature, settings, shape) for prepared in group]
        spent = torch.stack([d.spent.detach() for d in drawn]).mean()
        _average([spent])
        # the gradient of multiplier * excess + firmness / 2 * excess^2, whose excess is the mean over all that accumulates
        pull = state["multiplier"] + settings.firmness * (float(spent) - settings.budget)
        optimizer.zero_grad()
        task = 0.0
        for d in drawn:
            words = pruned_logits(model, predictor, d.prepared, d.masks, settings.checkpointing)
            loss = _task_loss(words, d.prepared, d.valid)
            ((loss + pull * d.spent) / len(drawn)).backward()
            task += float(loss.detach()) / len(drawn)
        _average([p.grad for p in predictor.parameters()])
        norm = torch.nn.utils.clip_grad_norm_(predictor.parameters(), 1.0)
        for parameters in optimizer.param_groups:
            parameters["lr"] = settings.rate * (1 - 0.9 * done)
        optimizer.step()
        state["multiplier"] += settings.firmness / 30 * (float(spent) - settings.budget)
        share = torch.cat([(d.masks.detach().sum(-1) / d.prepared.image.sum(1)[:, None])[d.valid] for d in drawn])
        logits = torch.cat([d.logits.detach()[d.valid] for d in drawn])
        state["history"].append({
            "step": step, "task": task, "cost": float(spent), "kept": float(share.mean()), "spread": float(share.std()),
            "multiplier": state["multiplier"], "entropy": float(torch.distributions.Categorical(logits=logits).entropy().mean()),
            "gradient": float(norm),
        })  # fmt: skip
        state["step"] = step + 1
        bar.set_postfix_str(f"loss {task:.3f}, cost {float(spent):.3f}, spread {float(share.std()):.3f}")
        if step % 25 == 24 and noisy == 0:
            for sign in diagnostics.while_training(state["history"], 1 / settings.n_rates):
                if sign.name not in warned:
                    bar.write(f"warning at step {step + 1}: {sign}")
                warned.add(sign.name)
        if path is not None and (step % 25 == 24 or step + 1 == settings.steps):
            _save(path, predictor, optimizer, state, settings)
    return Trained(predictor.eval(), state["history"])


@dataclass
class _Drawn:
    """Masks drawn for one batch: logits of the rates, which steps exist, and what the masks cost."""

    prepared: Prepared
    logits: Tensor
    masks: Tensor
    valid: Tensor
    spent: Tensor


def _batch(batches: list[Prepared], i: int, seed: int) -> Prepared:
    """The i-th batch of an endless stream in which every epoch has an order of its own."""
    order = random.Random(f"{seed} {i // len(batches)}").sample(range(len(batches)), len(batches))
    return batches[order[i % len(batches)]]


def _draw(predictor, prepared: Prepared, generator, noisy: float, temperature: float, settings: Settings, shape) -> _Drawn:
    noise = gumbel_noise((len(prepared.labels), 1, settings.n_rates), generator).to(prepared.hidden.device) * noisy
    logits = predictor(prepared.features)
    choice = gumbel_one_hot(logits, noise, temperature)
    masks = masks_over_steps(choice, prepared, predictor.rates, settings.residency)
    valid = prepared.labels != IGNORE
    n_image = prepared.image.sum(1)
    n_text = prepared.real[:, : prepared.n_prompt].sum(1) - n_image
    spent = cost(settings.unit, shape, masks.sum(-1), n_image, n_text, valid, settings.first_pruned_layer).mean()
    return _Drawn(prepared, logits, masks, valid, spent)


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
        if name == "observed_layers":
            kind = {"type": int, "nargs": "+"}
        parser.add_argument(f"--{name.replace('_', '-')}", default=value, **kind)
    given = vars(parser.parse_args(argv))
    settings = Settings(**{name: given[name] for name in asdict(Settings())})
    model, processor = load(given["model"])
    sets = {
        split: datasets.examples(given["source"], given[f"n_{split}"], tasks=given["tasks"], split=split)
        for split in ("train", "validation")
    }
    trained = train(model, processor, sets["train"], settings, validation=sets["validation"], work=given["work"])
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    trained.predictor.about |= {"model": given["model"], "tasks": given["tasks"], "n_train": len(sets["train"]),
                                "torch": torch.__version__, "commit": commit or None}  # fmt: skip
    if PartialState().is_main_process:
        trained.predictor.save_pretrained(given["out"])
    for warning in trained.warnings:
        print(f"warning: {warning}")


if __name__ == "__main__":
    main()
