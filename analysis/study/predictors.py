"""Trained predictors among the conditions of a chapter."""

from __future__ import annotations

from pathlib import Path

from dyrate.strategies.dyrate import DyRate
from study.answers import Condition


def condition_of(folder: Path) -> Condition:
    """A trained predictor as a condition named after its folder, with the budget (if it had one) and seed of its training.

    Its method is "DyRate" where it was trained as the paper does, else "DyRate, <recipe>".
    """
    strategy = DyRate.from_pretrained(folder)
    settings = strategy.predictor.about.get("settings", {})
    budget = settings.get("budget") if settings.get("budget_penalty") != 0 else None
    recipe = settings.get("recipe", "paper")
    method = "DyRate" if recipe == "paper" else f"DyRate, {recipe}"
    return Condition(f"DyRate {folder.name}", strategy, method, budget, settings.get("seed"))
