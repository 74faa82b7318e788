"""Strategies side by side: quality against computation by families of methods, and loss by task."""

from __future__ import annotations

from textwrap import wrap

import numpy as np
import pandas as pd
import seaborn
from matplotlib.figure import Figure

from study.figures.style import axes_of, unpruned

FAMILIES = {  # of methods, by where and by what they choose; one panel of at most six each, and random pruning for comparison
    "inside the decoder": ("FastV", "FastVRerank", "PyramidDrop", "SparseVLM", "DART", "DyCoke"),
    "before the decoder": ("VisionZip", "PruMerge", "PruMergePlus", "DivPrune", "VisPruner", "CDPruner"),
    "by depth or by step": ("VTW", "FixedPrune", "DepthPrune", "DSTP", "DyRate", "DyRate, curves"),
    "controls": ("LinearAnneal", "Oracle", "UniformPool", "NoRoPE", "DiversityAlone", "WorstFirst"),
}  # fmt: skip
HUES = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9")
MARKS = "osD^vPX"
RANDOM = "RandomPrune"
COSTS = {
    "macs_share": "multiply-accumulates\n(% of unpruned)", "retention": "measured retention\n(% of image tokens)",
    "latency": "time of an answer\n(% of unpruned)",
}  # fmt: skip


def families(methods: list[str]) -> dict[str, list[str]]:
    """The methods in each family that has some; those of no family with the controls, where random pruning may stand alone."""
    known = {name for names in FAMILIES.values() for name in names} | {"Full", RANDOM}
    found = {family: [m for m in names if m in methods] for family, names in FAMILIES.items()}
    found["controls"] += [m for m in methods if m not in known]
    found = {family: names for family, names in found.items() if names}
    return found or {"controls": []}


def pareto(summary: pd.DataFrame, groups: dict[str, str], cost: str = "macs_share") -> Figure:
    """Score against a cost: a row a group of tasks, a column a family of methods.

    summary: rows of `study.scores.compare`; a line joins one method's budgets. groups: task -> what its score is. cost: one of
    COSTS, shares of what no pruning costs.
    """
    columns = families(list(dict.fromkeys(summary.method)))
    figure = Figure(figsize=(2.5 * max(2, len(columns)), 2.1 * len(groups) + 1.4))
    axes = figure.subplots(len(groups), len(columns), squeeze=False, sharex=True, sharey="row")
    for axis, family in zip(axes[0], columns, strict=True):
        axis.set_title(family, fontsize=10)
    for line, (task, unit) in zip(axes, groups.items(), strict=True):
        for axis, names in zip(line, columns.values(), strict=True):
            _draw(axis, summary[summary.task == task], names, cost)
        line[0].set_ylabel("\n".join([task.replace("_", " "), *wrap(unit, 22)]), fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel(COSTS[cost], fontsize=8)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.42), fontsize=8, frameon=False)
    return figure


def _draw(axis, rows: pd.DataFrame, names: list[str], cost: str) -> None:
    """The unpruned score as a line and band, random pruning dotted, and each method in its own hue and mark."""
    unpruned(axis, rows[rows.method == "Full"].iloc[0])
    styles = {RANDOM: {"color": "#777777", "marker": "x", "linestyle": ":", "label": "random pruning"}}
    styles |= {
        name: {"color": HUES[i % len(HUES)], "marker": MARKS[i % len(MARKS)], "label": name, "linestyle": "-"}
        for i, name in enumerate(names)
    }
    for method, style in styles.items():
        line = rows[rows.method == method].sort_values("retention")
        if len(line):
            error = np.stack([line.value - line.low, line.high - line.value])
            axis.errorbar(100 * line[cost], line.value, error, **style, markersize=4, linewidth=1, elinewidth=0.6)


def loss_heat(summary: pd.DataFrame, retention: float) -> Figure:
    """Change of the score against no pruning in percent of the unpruned one, method by task; the smallest losses above.

    retention: the ratio at which methods are shown; what has none of its own is shown as it is.
    """
    here = summary.budget == retention
    rows = summary[(summary.method != "Full") & (here | ~summary.method.isin(summary.method[here]))]
    change = rows.assign(change=100 * rows.difference_value / (rows.value - rows.difference_value))
    table = change.pivot(index="label", columns="task", values="change")
    table = table.loc[table.mean(axis=1).sort_values(ascending=False).index, list(dict.fromkeys(rows.task))]
    figure, axis = axes_of(8.2, 0.9 + 0.27 * len(table))
    seaborn.heatmap(
        table, ax=axis, cmap="RdBu", center=0, vmin=-100, vmax=100, annot=True, fmt=".0f", annot_kws={"fontsize": 7},
        cbar_kws={"label": "change of the score (% of the unpruned)"},
    )  # fmt: skip
    axis.set(xlabel="", ylabel="")
    axis.tick_params(axis="x", rotation=35)
    axis.tick_params(axis="y", rotation=0)
    return figure
