"""From stored losses to numbers: what each policy reaches in one laboratory, and what trained predictors capture of it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dyrate.atomic import write_whole
from dyrate.cost import Shape
from study.headroom.frontier import Library, against_constant, at_budget, best_of, resampled
from study.headroom.library import LIBRARIES, UNITS, costs, kept_tokens
from study.headroom.rankings import STATIC

BUDGETS = (0.5, 0.33, 0.25, 0.15)
PAPER = re.compile(r"(evict|mask|paper)-[0-9.]+")  # folders of predictors that were trained as the paper does
BEST_OTHER = "best other recipe"
SPOKEN = {"curves": "curves once an answer", "curves_each_step": "curves at every step"}  # by the beginning of a recipe's name
EVERYWHERE = ("evict", *SPOKEN)  # such beginnings, of what is trained for every laboratory; the paper's first


def recipe_of(name: str) -> str:
    """The recipe in the name of a trained predictor's folder: the name without its seed."""
    return re.sub(r"-seed\d+$", "", name)


def spoken(recipe: str) -> str:
    """The name of a recipe in a sentence or legend: the same whatever its budget."""
    name = recipe.split("-")[0]
    return "the paper's recipe" if PAPER.fullmatch(recipe) else SPOKEN.get(name, name)


@dataclass(eq=False)
class Measured:
    """The tables of one laboratory and first pruned layer, as `study.headroom.measure` wrote them."""

    folder: Path
    layer: int = 2

    def _table(self, name: str) -> pd.DataFrame:
        try:
            return pd.read_csv(self.folder / f"headroom_layer{self.layer}_{name}.csv.gz")
        except pd.errors.EmptyDataError:
            return pd.DataFrame(columns=["sample", "predictor", "ranking", "residency", "loss", *UNITS])

    @cached_property
    def about(self) -> dict:
        path = self.folder / f"headroom_layer{self.layer}_about.json"
        if not path.exists():
            raise FileNotFoundError(f"no {path}: `python -m study.headroom measure` makes it")
        return json.loads(path.read_text())

    @cached_property
    def answers(self) -> pd.DataFrame:
        return self._table("answers")

    @cached_property
    def losses(self) -> pd.DataFrame:
        return self._table("losses")

    @cached_property
    def dyrate(self) -> pd.DataFrame:
        return self._table("dyrate")

    @property
    def name(self) -> str:
        return self.about["model"]

    @cached_property
    def costs(self) -> dict[tuple[str, str, str], np.ndarray]:
        """Cost of each answer under each trajectory, by residency, trajectory and unit."""
        kinds, of_answer = np.unique(self.answers[["tokens", "text", "image"]].to_numpy(), axis=0, return_inverse=True)
        tokens, text, image = torch.from_numpy(kinds).unbind(1)
        valid = torch.arange(int(tokens.max())) < tokens[:, None]
        shape, found = Shape(**self.about["shape"]), {}
        for residency, trajectories in LIBRARIES.items():
            for trajectory in trajectories:
                indices = torch.from_numpy(trajectory.rate_indices(valid.shape[1])).expand(len(kinds), -1)
                kept = kept_tokens(indices, image, residency)
                for unit, values in costs(kept, valid, image, text, shape, self.layer, residency).items():
                    found[residency, trajectory.name, unit] = values.numpy()[of_answer.ravel()]
        return found

    def recipes(self, ranking: str, residency: str) -> dict[str, list[pd.DataFrame]]:
        """Rows of the answers under each training of each recipe, in the order of `answers`."""
        rows = self.dyrate[(self.dyrate.ranking == ranking) & (self.dyrate.residency == residency)]
        found: dict[str, list[pd.DataFrame]] = {}
        for name, of in rows.groupby("predictor", sort=True):
            found.setdefault(recipe_of(name), []).append(of.set_index("sample").loc[self.answers["sample"]])
        return found


@cache
def library(measured: Measured, ranking: str, residency: str, unit: str = "retention") -> Library:
    """Losses and costs under the trajectories of a ranking and residency."""
    measured_in = "mask" if ranking in STATIC else residency  # under a fixed ranking evicting is masking
    trajectories = LIBRARIES[residency]
    columns = [f"{ranking} {measured_in} {t.name}" for t in trajectories]
    if missing := [c for c in columns if c not in measured.losses]:
        raise ValueError(f"{measured.folder}: no losses under {missing[0]!r}: measure anew with `python -m study.headroom`")
    return Library(
        measured.losses[columns].to_numpy(), np.stack([measured.costs[residency, t.name, unit] for t in trajectories], 1),
        np.array([t.constant for t in trajectories]), pd.factorize(measured.answers.task)[0],
        measured.answers.filter(like="feature").to_numpy(),
    )  # fmt: skip


def cost_of_constant(measured: Measured, residency: str, retention: float, unit: str) -> float:
    """Mean cost of a constant rate in a unit, tasks weighted equally; the library must have one of this retention."""
    return float(resampled(library(measured, "FastV", residency).task, 0)[0] @ measured.costs[residency, f"{retention:g}", unit])


def captured(measured: Measured, ranking: str, residency: str, unit: str = "retention") -> dict[str, dict]:
    """`against_constant` of each recipe that was trained in this residency, and of the best that is not the paper's."""
    asked, rows = library(measured, ranking, residency, unit), measured.recipes(ranking, residency)
    trained = {recipe: tuple(np.stack([of[c] for of in each], 1) for c in ("loss", unit)) for recipe, each in rows.items()}
    found = {recipe: against_constant(asked, *values) for recipe, values in trained.items()}
    others = {recipe: values for recipe, values in trained.items() if not PAPER.fullmatch(recipe)}
    return found | ({BEST_OTHER: best_of(asked, others)} if others else {})


def report(folder: Path, layers: tuple[int, ...] = (2, 6)) -> dict:
    """Everything measured in a laboratory at mean retention, by layer, ranking and residency; also as `headroom.json` there."""
    found = {}
    for layer in layers:
        measured = Measured(folder, layer)
        if not (folder / f"headroom_layer{layer}_about.json").exists():
            continue
        found[f"layer {layer}"] = {
            f"{ranking}, {residency}": {
                "budgets": {f"{budget:g}": at_budget(library(measured, ranking, residency), budget) for budget in BUDGETS},
                "DyRate": captured(measured, ranking, residency),
            }
            for ranking in measured.about["rankings"] for residency in LIBRARIES
        }  # fmt: skip
    if not found:
        raise FileNotFoundError(f"no measured losses in {folder}: `python -m study.headroom measure` makes them")
    write_whole(folder / "headroom.json", json.dumps(_rounded(found), indent=1) + "\n")
    return found


def _rounded(value):
    """Numbers to five digits, for a file that is compared by people; what is not finite as null."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, float):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    return value
