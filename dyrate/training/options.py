"""The command line that every way to train shares."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import torch

from dyrate.cost import UNITS
from dyrate.data import Examples
from dyrate.distributed import this_process
from dyrate.features import FEATURES
from dyrate.models import load
from dyrate.training import train
from dyrate.training.settings import RECIPES, Settings

CHOICES = {"unit": UNITS, "residency": ("evict", "mask"), "recipe": RECIPES, "features": FEATURES}


def add_arguments(parser: argparse.ArgumentParser, model: str | None = None) -> None:
    """The options that every way to train shares: the model, where things go, and one for each of the `Settings`."""
    parser.add_argument("--model", metavar="NAME", required=model is None, default=model,
                        help='vision-language model: a folder, a hub name, or "pocket"' + _default(model))  # fmt: skip
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="where the trained predictor goes")
    parser.add_argument("--work", metavar="FOLDER", type=Path, help="for checkpoints, from which an interrupted training goes on")
    parser.add_argument("--batch-size", metavar="N", type=int, default=32,
                        help="prompts generated together while the budget is calibrated" + _default(32))  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"),
                        help="of the model (default: bfloat16 on a GPU, float32 on a CPU)")  # fmt: skip
    group = parser.add_argument_group("settings of the training")
    for setting in fields(Settings):
        kind: dict = {"type": type(setting.default), "metavar": "N" if isinstance(setting.default, int) else "X"}
        if isinstance(setting.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif setting.name in CHOICES:
            kind = {"choices": CHOICES[setting.name]}
        elif setting.name == "observed_layers":
            kind = {"type": int, "nargs": "+", "metavar": "N"}
        group.add_argument(f"--{setting.name.replace('_', '-')}", default=setting.default,
                           help=setting.metadata["help"] + _default(setting.default), **kind)  # fmt: skip


def _default(value) -> str:
    return "" if value is None else f" (default: {value})"


def train_and_save(given: argparse.Namespace, examples: Examples, validation: Examples, **about) -> None:
    """Train as the parsed options of `add_arguments` ask, save, and print what was met. about: more to note in the predictor."""
    settings = Settings(**{setting.name: getattr(given, setting.name) for setting in fields(Settings)})
    dtype = given.dtype and getattr(torch, given.dtype)
    trained = train(
        *load(given.model, dtype=dtype), examples, settings, validation=validation, work=given.work, batch_size=given.batch_size
    )  # fmt: skip
    trained.predictor.about |= {"model": given.model, "n_train": len(examples), "torch": torch.__version__} | about
    if not this_process().is_main_process:
        return
    trained.predictor.save_pretrained(given.out)
    for warning in trained.warnings:
        print(f"warning: {warning}")
    print(
        f"retention {trained.calibration['retention']:.3f} in answers to {len(validation)} validation prompts (budget: "
        f"{settings.unit} {settings.budget:g}); the predictor is in {given.out}"
    )
