"""Train a rate predictor to a budget: the base model is frozen, masks stand for dropping, a multiplier enforces the budget.

    train(model, processor, examples, budget=0.33, validation=more_examples).predictor
    python -m dyrate.training --model owner/name --data train.jsonl --budget 0.33 --out predictor

What broke in trials, and what stands against it here: samples of a rate are drawn with noise that one answer shares over all its
steps, and the predictor starts at the budget, for otherwise the lowest of many samples wins at once and later rates are inert;
the noise fades early, so that most of training sees the likeliest rate that is deployed; batches mix tasks, for a batch of one
task would hold that task to the budget; the relaxation is hot, for a cold one saturates and passes no gradient; the multiplier of
the budget adapts; and a last calibration measures real generation.

That is the paper's recipe, `Trainer`. Beside it stand others (`recipes`): a class each, for what a step draws and descends on.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from pathlib import Path

from dyrate import diagnostics
from dyrate.data import Examples
from dyrate.diagnostics import Sign
from dyrate.distributed import this_process
from dyrate.predictor import RatePredictor
from dyrate.teacher_forcing import Prepared, prepare_examples, unpruned_logits
from dyrate.training.calibration import calibrate, trajectories
from dyrate.training.recipes import TRAINERS
from dyrate.training.settings import Settings
from dyrate.training.trainer import Trainer

__all__ = ["TRAINERS", "Settings", "Trained", "Trainer", "batches_to_learn", "calibrate", "train", "trajectories", "untrained"]


@dataclass
class Trained:
    """A predictor, one row for each training step, what `calibrate` returned (if it was called), and signs of failure."""

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
    predictor = untrained(model, settings, examples)
    batches = batches_to_learn(model, processor, predictor, examples, settings)
    history = TRAINERS[settings.recipe](model, predictor, batches, settings, work=work, progress=progress).run()
    calibration = {}
    if validation is not None:
        batches = prepare_examples(model, processor, predictor, validation, settings.batch)
        calibration = calibrate(
            model, processor, predictor, validation, settings.retention, batch_size=batch_size, progress=progress
        )
    signs = diagnostics.signs(model, processor, predictor, batches, history, validation)
    return Trained(predictor, history, calibration, signs)


def untrained(model, settings: Settings, examples: Examples) -> RatePredictor:
    """A new predictor for this model, with these settings and the examples' source noted in it."""
    text = model.config.get_text_config()
    return RatePredictor(
        text.num_attention_heads, text.num_hidden_layers, model.config.model_type, n_rates=settings.n_rates,
        first_pruned_layer=settings.first_pruned_layer, residency=settings.residency, with_step=settings.with_step,
        observed_layers=settings.observed_layers, features=settings.features, width=text.hidden_size, delay=settings.delay,
        ordered=settings.ordered, once=settings.once,
        about={"settings": settings.decisive(), "examples": examples.source},
    ).to(model.device)  # fmt: skip


def batches_to_learn(model, processor, predictor: RatePredictor, examples: Examples, settings: Settings) -> list[Prepared]:
    """This process's part of the examples, prepared in batches that mix tasks.

    They depend on `seed`, `batch`, `distill` and the layers of the settings alone: trainings that agree there may share them.
    """
    mixed = random.Random(settings.seed).sample(list(examples), len(examples))
    state = this_process()
    part = mixed[state.process_index :: state.num_processes]
    mine = replace(examples, items=part)
    batches = prepare_examples(model, processor, predictor, mine, settings.batch)
    left_out = set(part) - set(mine)
    examples.items = [example for example in examples if example not in left_out]
    if settings.imitates:
        for prepared in batches:
            prepared.teacher = unpruned_logits(model, predictor, prepared)
    return batches
