"""Strategies side by side: quality against computation, and loss by task."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn
from matplotlib.figure import Figure

from dyrate.strategies import STRATEGIES
from study.figures.style import axes_of


def method_styles() -> dict[str, dict]:
    """Colour, mark and dash of each registered strategy: published methods in colour, controls in grey."""
    published = [name for name, cls in STRATEGIES.items() if not cls.control and name != "Full"]
    controls = [name for name, cls in STRATEGIES.items() if cls.control]
    palette = seaborn.color_palette("colorblind", 10)
    styles = {"Full": {"color": "black", "marker": "*", "linestyle": "-"}}
    for i, name in enumerate(published):
        styles[name] = {"color": palette[i % 10], "marker": "osD^vPXp<"[i % 9], "linestyle": "-"}
    for i, name in enumerate(controls):
        styles[name] = {"color": "#777777", "marker": "1234+x|_.,"[i % 10], "linestyle": ":"}
    return styles


def pareto(summary: pd.DataFrame, groups: dict[str, str]) -> Figure:
    """Score against the decoder's multiply-accumulates, one panel a group of tasks; a line joins one method's budgets.

    summary: rows of `study.scores.compare`. groups: task -> what its score is.
    """
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * lines))
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    styles = method_styles()
    for axis, (task, unit) in zip(axes, groups.items(), strict=False):
        rows = summary[summary.task == task]
        full = rows[rows.method == "Full"].iloc[0]
        axis.axhline(full.value, color="black", linewidth=0.9)
        if full.n > 1:  # else the interval has no ends
            axis.axhspan(full.low, full.high, color="black", alpha=0.08, linewidth=0)
        for method, line in rows[rows.method != "Full"].groupby("method", sort=False):
            line = line.sort_values("macs_share")
            error = np.stack([line.value - line.low, line.high - line.value])
            axis.errorbar(
                100 * line.macs_share, line.value, error, **styles[method], label=method, markersize=5, linewidth=1,
                elinewidth=0.6,
            )  # fmt: skip
        axis.set(title=task, xlabel="decoder multiply-accumulates\n(% of Full)", ylabel=unit)
    handles, names = axes[0].get_legend_handles_labels()
    if len(groups) < len(axes):
        axes[-1].set_axis_off()
        axes[-1].legend(handles, names, loc="center", ncols=2, frameon=False)
    else:
        figure.legend(handles, names, loc="outside lower center", ncols=3)
    return figure


def loss_heat(summary: pd.DataFrame) -> Figure:
    """Change of the score against Full in percent of Full's, condition by task; rows from the smallest loss to the largest."""
    rows = summary[summary.method != "Full"]
    change = rows.assign(change=100 * rows.difference_value / (rows.value - rows.difference_value))
    table = change.pivot(index="label", columns="task", values="change")
    table = table.loc[table.mean(axis=1).sort_values(ascending=False).index, list(dict.fromkeys(rows.task))]
    figure, axis = axes_of(8.2, 0.6 + 0.27 * len(table))
    seaborn.heatmap(
        table, ax=axis, cmap="RdBu", center=0, vmin=-100, vmax=100, annot=True, fmt=".0f", annot_kws={"fontsize": 7},
        cbar_kws={"label": "change of the score (% of Full's)"},
    )  # fmt: skip
    axis.set(xlabel="", ylabel="")
    axis.tick_params(axis="x", rotation=35)
    axis.tick_params(axis="y", rotation=0)
    return figure
