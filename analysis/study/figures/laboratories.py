"""The laboratories side by side: rankings against random pruning, by layer and by method, and what each task needs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn
from matplotlib.figure import Figure

from study.figures.style import axes_of

COLOURS = {"pocket-dropped": "#D55E00", "pocket-plain": "#0072B2", "smol": "#009E73"}
MARKS = {"pocket-dropped": "o", "pocket-plain": "s", "smol": "^"}


def ranking_by_layer(table: pd.DataFrame) -> Figure:
    """FastV minus random pruning against the depth at which tokens are dropped, a panel a retention ratio.

    table: rows of `study.chapters.laboratories.scan`.
    """
    retentions = sorted(table.retention.unique(), reverse=True)
    figure, axes = axes_of(8.2, 3.4, len(retentions), sharey=True)
    for axis, retention in zip(np.atleast_1d(axes), retentions, strict=True):
        axis.axhline(0, color="black", linewidth=0.9)
        for name, line in table[table.retention == retention].groupby("laboratory", sort=False):
            error = np.stack([line.value - line.low, line.high - line.value])
            axis.errorbar(
                line.depth, line.value, error, color=COLOURS.get(name), marker=MARKS.get(name), label=name, markersize=5,
                linewidth=1.2, elinewidth=0.7,
            )  # fmt: skip
        axis.set(title=f"{100 * retention:.0f} % of the tokens kept", xlabel="first pruned layer (share of the depth)")
    np.atleast_1d(axes)[0].set_ylabel("FastV minus random pruning\n(right slots, share)")
    handles, names = np.atleast_1d(axes)[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def methods_against_random(table: pd.DataFrame) -> Figure:
    """Each method minus random pruning, a panel a laboratory; published methods in colour, controls in grey.

    table: rows of `study.chapters.laboratories.against_random`.
    """
    table = table[table.method != "RandomPrune"]
    names = list(dict.fromkeys(table.laboratory))
    last = table[table.laboratory == names[-1]].sort_values(["published", "value"])
    order = {method: i for i, method in enumerate(last.method)}
    figure, axes = axes_of(8.2, 0.9 + 0.27 * len(order), len(names), sharey=True, sharex=True)
    for axis, name in zip(np.atleast_1d(axes), names, strict=True):
        axis.axvline(0, color="black", linewidth=0.9)
        for row in table[table.laboratory == name].itertuples():
            colour = COLOURS.get(name) if row.published else "#777777"
            error = [[row.value - row.low], [row.high - row.value]]
            at = row.value, order[row.method]
            axis.errorbar(*at, xerr=error, color=colour, marker=MARKS.get(name), markersize=5, elinewidth=1)
        axis.set(title=name, xlabel="minus random pruning\n(right slots, share)")
        axis.set_yticks(range(len(order)), list(order))
        axis.grid(axis="y", alpha=0.3)
    return figure


def task_needs(table: pd.DataFrame) -> Figure:
    """What each task's score falls to without the image, or most of it; rows of `study.chapters.laboratories.needs`."""
    columns = ["unpruned", "a tenth at random", "another picture", "no image"]
    names = list(dict.fromkeys(table.laboratory))
    figure, axes = axes_of(8.6, 1.2 + 0.3 * table.task.nunique(), len(names))
    for i, (axis, name) in enumerate(zip(np.atleast_1d(axes), names, strict=True)):
        rows = table[table.laboratory == name]
        scores = rows.set_index(rows.task.str.replace("_", " "))[columns]
        shown = scores.copy()
        shown.loc["caption"] /= scores.loc["caption", "unpruned"]  # CIDEr has no bound: as a share of the unpruned
        seaborn.heatmap(
            shown, ax=axis, cmap="Blues", vmin=0, vmax=1, annot=scores, fmt=".2f", annot_kws={"fontsize": 7},
            cbar=i == len(names) - 1, cbar_kws={"label": "score (captions: of the unpruned)"},
        )  # fmt: skip
        axis.set(title=name, xlabel="", ylabel="")
        axis.set_xticks(axis.get_xticks(), columns, rotation=35, ha="right", fontsize=8)
        axis.set_yticks(axis.get_yticks(), scores.index if i == 0 else [""] * len(scores), rotation=0)
    return figure
