"""Trained predictors among the conditions of a chapter."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from dyrate.data import Examples
from dyrate.models import describe
from dyrate.strategies.dyrate import DyRate
from dyrate.training import Settings
from study.answers import Condition


def condition_of(folder: Path) -> Condition:
    """A trained predictor as a condition named after its folder, with the budget (if it had one) and seed of its training.

    Its method is "DyRate" where it was trained as the paper does, else "DyRate, <recipe>"; `curves` alone chooses once an answer.
    """
    strategy = DyRate.from_pretrained(folder)
    settings = strategy.predictor.about.get("settings", {})
    budget = settings.get("budget") if settings.get("budget_penalty") != 0 else None
    recipe = settings.get("recipe", "paper")
    if recipe == "curves" and not strategy.predictor.once:
        recipe = "curves at every step"
    method = "DyRate" if recipe == "paper" else f"DyRate, {recipe}"
    return Condition(f"DyRate {folder.name}", strategy, method, budget, settings.get("seed"))


def training_key(model, settings: Settings, learn: Examples, validation: Examples) -> str:
    """Eight letters by which a stored training is found: they change with its settings, the model's shape and the examples."""
    about = {k: v for k, v in describe(model).items() if k in ("family", "parameters", "layers", "heads")}
    decisive = {"settings": settings.decisive(), "model": about, "examples": [e.name for e in (*learn, *validation)]}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]
