"""Recipes of training: what each gains on a constant rate, and what the gradient says against what is true."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from study.figures.style import POLICY_COLOURS, axes_of

MARKS = {"retention": ("o", -0.12, True), "computation": ("s", 0.12, False)}  # marker, shift, filled: by what is equal


def recipe_gains(losses: pd.DataFrame, answers: pd.DataFrame) -> Figure:
    """Gain of each recipe on a constant rate: in the teacher-forced loss, and in the score of generated answers where there are.

    losses, answers: rows of `study.chapters.recipes` (laboratory, recipe, value, low, high; of answers also `equal`, what the
    constant has in common with the predictor).
    """
    panels = [("lower loss than the constant's\n(nats a token)", losses), ("higher score than the constant's\n(share)", answers)]
    panels = [(what, table) for what, table in panels if len(table)]
    rows = list(dict.fromkeys(zip(losses.laboratory, losses.recipe, strict=True)))
    figure, axes = axes_of(7.2, 1.5 + 0.36 * len(rows), max(1, len(panels)), sharey=True, squeeze=False)
    for axis, (what, table) in zip(axes.ravel(), panels, strict=True):
        axis.axvline(0, color="black", linewidth=0.9)
        for row in table.itertuples():
            marker, shift, filled = MARKS[getattr(row, "equal", "retention")]
            style = {"color": POLICY_COLOURS["DyRate"], "marker": marker, "markersize": 6, "elinewidth": 1.2}
            error = [[row.value - row.low], [row.high - row.value]]
            at = row.value, rows.index((row.laboratory, row.recipe)) + shift
            axis.errorbar(*at, xerr=error, markerfacecolor=None if filled else "white", **style)
        axis.set(xlabel=what)
        axis.locator_params(axis="x", nbins=5)
    first = axes.ravel()[0]
    first.set_yticks(range(len(rows)), [f"{recipe}\n({laboratory})" for laboratory, recipe in rows], fontsize=8)
    first.set_ylim(len(rows) - 0.5, -0.5)
    for equal, (marker, _, filled) in MARKS.items():
        style = {"color": POLICY_COLOURS["DyRate"], "marker": marker, "markerfacecolor": None if filled else "white"}
        first.plot([], [], linestyle="none", label=f"at equal {equal}", **style)
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def variant_gains(table: pd.DataFrame) -> Figure:
    """Gain in teacher-forced loss of each variant of a recipe on one laboratory: rows of `study.chapters.recipes.variants`."""
    recipes = list(table.recipe[table.equal == "retention"])
    figure, axis = axes_of(6.6, 1.4 + 0.34 * len(recipes))
    axis.axvline(0, color="black", linewidth=0.9)
    for equal, (marker, shift, filled) in MARKS.items():
        of = table[table.equal == equal].set_index("recipe").loc[recipes]
        error = np.stack([of.value - of.low, of.high - of.value])
        style = {"color": POLICY_COLOURS["DyRate"], "marker": marker, "markerfacecolor": None if filled else "white"}
        at = np.arange(len(recipes)) + shift
        axis.errorbar(of.value, at, xerr=error, linestyle="none", elinewidth=1.2, label=f"at equal {equal}", **style)
    axis.set_yticks(range(len(recipes)), recipes)
    axis.invert_yaxis()
    axis.set_xlabel("lower loss than the constant's (nats a token)")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def gradient_slopes(table: pd.DataFrame) -> Figure:
    """Slopes of the loss by the drop rate, a panel a task: measured, and by the gradient at each temperature, coldest first.

    table: rows of `study.chapters.recipes.slopes`.
    """
    tasks = list(dict.fromkeys(table.task))
    figure, axes = axes_of(8.2, 3.0, len(tasks), squeeze=False)
    for axis, task in zip(axes.ravel(), tasks, strict=True):
        rows = table[table.task == task].sort_values(["kind", "size"], ascending=[False, True])  # measured, then backward
        colours = np.where(rows.kind == "measured", "#000000", POLICY_COLOURS["DyRate"])
        axis.axhline(0, color="black", linewidth=0.9)
        for x, (row, colour) in enumerate(zip(rows.itertuples(), colours, strict=True)):
            axis.errorbar(x, row.value, [[row.value - row.low], [row.high - row.value]], color=colour, marker="o", elinewidth=1.2)
        names = ["measured" if row.kind == "measured" else f"gradient, T = {row.size:g}" for row in rows.itertuples()]
        axis.set_xticks(range(len(rows)), names, rotation=60, ha="right", fontsize=8)
        axis.set(title=task.replace("_", " "), xlim=(-0.5, len(rows) - 0.5))
    axes.ravel()[0].set_ylabel("change of the loss per unit\nof the drop rate (nats a token)")
    return figure
