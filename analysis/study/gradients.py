"""Why the paper's recipe finds no more than a constant: rates that decide nothing, and gradients with the wrong sign.

python -m study.gradients --model pocket-plain --n 50 --out data/results/pocket-plain    # two cores: minutes
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

import dyrate
from dyrate.atomic import write_whole
from dyrate.models import describe
from dyrate.predictor import BELL, RatePredictor
from dyrate.strategies.dyrate import DyRate
from dyrate.teacher_forcing import Prepared, answer_losses, frozen, prepare_examples
from study.examples import examples
from study.profiles import ROOT
from study.rows import write_rows

TASKS = ("caption", "description", "look_late", "qa_long_word")
PATTERN = "evict-*"  # predictors that were trained as the paper does
RATE = 0.75  # at which slopes are taken


def gradient_of_choices(
    model, predictor: RatePredictor, prepared: Prepared, indices: Int[Tensor, "batch step"]
) -> Float[Tensor, "batch step rate"]:
    """The straight-through gradient: of each answer's loss by the choice at each step, at these rates."""
    choice = F.one_hot(indices, len(predictor.rates)).float().requires_grad_()
    with frozen(model):
        (gradient,) = torch.autograd.grad(answer_losses(model, predictor, prepared, choice).sum(), choice)
    return gradient


def inert(indices: Int[Tensor, "batch step"]) -> Bool[Tensor, "batch step"]:
    """Steps whose rate evicts nothing: not above the highest one before it. Then any rate up to that one would do the same."""
    highest = indices.cummax(1).values
    return F.pad(indices[:, 1:] <= highest[:, :-1], (1, 0))


def inert_rows(model, predictor: RatePredictor, batches: Sequence[Prepared]) -> pd.DataFrame:
    """One row a step of each answer under the predictor's own rates, for residency "evict". answer: its number.

    inert: the rate evicts nothing. lower: the longest difference that any lower rate makes in the straight-through gradient,
    which is what could tell this step to keep more; NaN at rate 0, below which there is none.
    """
    rows = []
    for prepared in batches:
        indices = predictor(prepared.features).argmax(-1)
        gradient = gradient_of_choices(model, predictor, prepared, indices)
        here = gradient.gather(-1, indices[..., None])
        below = torch.arange(len(predictor.rates), device=indices.device) < indices[..., None]
        lower = ((gradient - here).abs() * below).amax(-1).masked_fill(indices == 0, torch.nan)
        values = zip(inert(indices)[prepared.valid].tolist(), lower[prepared.valid].tolist(), strict=True)
        first = rows[-1]["answer"] + 1 if rows else 0
        lengths = zip(prepared.tasks, prepared.valid.sum(1).tolist(), strict=True)
        steps = [{"answer": first + i, "task": task} for i, (task, n) in enumerate(lengths) for _ in range(n)]
        rows += [step | {"inert": a, "lower": b} for step, (a, b) in zip(steps, values, strict=True)]
    return pd.DataFrame(rows)


def slope_rows(
    model, predictor: RatePredictor, batches: Sequence[Prepared], rate: float, *, temperatures: Sequence[float] = (0.25, 1, 8),
    distances: Sequence[int] = (1, 4, 8),
) -> pd.DataFrame:  # fmt: skip
    """Slopes of the loss by the drop rate at one constant rate, nats a token for a rise of 1; one row an answer and kind.

    kind: "measured" over +- `size` steps of the grid; "predicted" by the straight-through gradient continued to those rates;
    "backward", what the gradient says through a softmax of that temperature (`size`) around the rate, the forward pass hard.
    """
    grid = predictor.rates
    here = int((grid - rate).abs().argmin())

    def constant(prepared, index):
        return torch.full_like(prepared.labels, index)

    def add(prepared, kind, size, values):
        rows.extend(
            {"task": t, "kind": kind, "size": size, "slope": v} for t, v in zip(prepared.tasks, values.tolist(), strict=True)
        )

    rows: list[dict] = []
    for prepared in batches:
        gradient = gradient_of_choices(model, predictor, prepared, constant(prepared, here)).sum(1)
        for distance in distances:
            ends = [max(here - distance, 0), min(here + distance, len(grid) - 1)]
            run = float(grid[ends[1]] - grid[ends[0]])
            with torch.no_grad():
                low, high = (answer_losses(model, predictor, prepared, F.one_hot(constant(prepared, i), len(grid)).float())
                             for i in ends)  # fmt: skip
            add(prepared, "measured", distance, (high - low) / run)
            add(prepared, "predicted", distance, (gradient[:, ends[1]] - gradient[:, ends[0]]) / run)
        for temperature in temperatures:
            add(prepared, "backward", temperature, gradient @ _shift(grid, here, temperature))
    return pd.DataFrame(rows)


def _shift(grid: Float[Tensor, " rate"], here: int, temperature: float) -> Float[Tensor, " rate"]:
    """How probabilities move per unit of mean rate when logits tilt towards higher rates, around the rate `here`."""
    probability = (-(((grid - grid[here]) / BELL) ** 2) / temperature).softmax(0)
    tilted = probability * (grid - (probability * grid).sum())
    return tilted / (tilted * grid).sum()


def measure(model: str, n: int, out: Path, *, batch_size: int = 10) -> None:
    """Measure `n` test answers a task, in float32, and write `gradients_<inert|slopes>.csv.gz` and `gradients.json` into `out`.

    Raises FileNotFoundError if the model has no predictor of the paper's recipe.
    """
    folders = sorted((ROOT / "data" / model / "dyrate").glob(PATTERN))
    if not folders:
        raise FileNotFoundError(f"no predictor {PATTERN} in data/{model}/dyrate: train one with `python analysis/train.py`")
    loaded, processor = dyrate.load(model, dtype=torch.float32)
    asked, inert_of, slopes = examples("laboratories", n, tasks=TASKS, split="test"), [], None
    for folder in folders:
        predictor = DyRate.from_pretrained(folder).predictor.to(loaded.device)
        batches = prepare_examples(loaded, processor, predictor, asked, batch_size)
        inert_of.append(inert_rows(loaded, predictor, batches).assign(predictor=folder.name))
        if slopes is None:  # a slope depends on the grid and the layer of the predictor, not on its weights
            slopes = slope_rows(loaded, predictor, batches, RATE)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("inert", pd.concat(inert_of, ignore_index=True)), ("slopes", slopes)):
        write_rows(out / f"gradients_{name}.csv.gz", rows, digits=4)
    record = {"model": model, "n": n, **describe(loaded), "rate": RATE, "tasks": TASKS, "torch": torch.__version__}
    write_whole(out / "gradients.json", json.dumps(record, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a laboratory with trained predictors: pocket-plain, pocket-dropped, smol")
    parser.add_argument("--n", type=int, default=50, help="answers a task")
    parser.add_argument("--out", type=Path, required=True)
    measure(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
