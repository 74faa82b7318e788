"""Strategies side by side: quality against computation, ablations, what is left of an image."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn
from matplotlib.figure import Figure

from study.figures.style import axes_of
from dyrate.strategies import STRATEGIES


def method_styles() -> dict[str, dict]:
    """Colour, mark and dash of each registered strategy: published methods in colour, controls in grey."""
    published = [n for n, cls in STRATEGIES.items() if not cls.__module__.endswith(".controls") and n != "Full"]
    controls = [n for n, cls in STRATEGIES.items() if cls.__module__.endswith(".controls")]
    palette = seaborn.color_palette("colorblind", 10)
    found = {"Full": {"color": "black", "marker": "*", "linestyle": "-"}}
    for i, name in enumerate(published):
        found[name] = {"color": palette[i % 10], "marker": "osD^vPXp<"[i % 9], "linestyle": "-"}
    for i, name in enumerate(controls):
        found[name] = {"color": "#777777", "marker": "1234+x|_.,"[i % 10], "linestyle": ":"}
    return found


def pareto(summary: pd.DataFrame, groups: dict[str, str]) -> Figure:
    """Score against the decoder's multiply-accumulates, one panel a group of tasks; a line joins one method's budgets.

    summary: rows of `evaluate.compare` with `method`. groups: task -> what its score is.
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
        axis.axhspan(full.low, full.high, color="black", alpha=0.08, linewidth=0)
        for method, found in rows[rows.method != "Full"].groupby("method", sort=False):
            found = found.sort_values("macs_share")
            error = np.stack([found.value - found.low, found.high - found.value])
            axis.errorbar(
                100 * found.macs_share, found.value, error, **styles[method], label=method, markersize=5, linewidth=1,
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
    """Change of the score against Full in percent of Full's, strategy by task; rows from gentle to harsh."""
    rows = summary[summary.strategy != "Full"]
    change = rows.assign(change=100 * rows.difference_value / (rows.value - rows.difference_value))
    table = change.pivot(index="strategy", columns="task", values="change")
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


def ablation_dots(table: pd.DataFrame, unit: str) -> Figure:
    """Each ablation's difference from a constant rate with its interval, one panel a group; the kept share beside each label."""
    groups = list(dict.fromkeys(table.group))
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.1 * lines))
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
    for axis, group in zip(axes, groups, strict=False):
        rows = table[table.group == group]
        y = np.arange(len(rows))[::-1]
        error = np.stack([rows.over - rows.over_low, rows.over_high - rows.over])
        axis.axvline(0, color="black", linewidth=0.8)
        axis.errorbar(rows.over, y, xerr=error, fmt="o", color="#0072B2", capsize=2.5)
        axis.set_yticks(
            y, [f"{label} ({100 * kept:.0f} %)" for label, kept in zip(rows.label, rows.kept, strict=True)], fontsize=8
        )
        axis.set_title(group, fontsize=9)
        axis.set_ylim(-0.6, len(rows) - 0.4)
        axis.tick_params(labelbottom=True)
    for axis in axes[max(0, len(groups) - columns) : len(groups)]:
        axis.set_xlabel(unit)
    for axis in axes[len(groups) :]:
        axis.set_visible(False)
    return figure


def kept_patches(picture, masks: np.ndarray, words: list[str], shown: int = 5) -> Figure:
    """The paper's Fig. 4: which patches are left at some steps, and the dropped share over all. masks: (step, patch)."""
    side = round(masks.shape[1] ** 0.5)
    steps = np.unique(np.linspace(0, len(masks) - 1, shown).round().astype(int))
    figure = Figure(figsize=(8.6, 3.9))
    above, below = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    for axis, step in zip(above.subplots(1, len(steps), squeeze=False)[0], steps, strict=True):
        axis.imshow(dimmed(picture, masks[step].reshape(side, side)))
        axis.set_title(f"step {step}: {words[step]}", fontsize=9)
        axis.set_axis_off()
    rates = 1 - masks.mean(1)
    axis = below.subplots()
    axis.step(range(len(rates)), rates, where="mid", color="#D55E00")
    axis.plot(steps, rates[steps], "o", color="#D55E00", markersize=4)
    axis.set(xlabel="generation step (token)", ylabel="dropped share", ylim=(-0.02, 1.02))
    return figure


def dimmed(picture, kept: np.ndarray) -> np.ndarray:
    """A picture whose dropped patches are almost white; kept: (row, column)."""
    pixels = np.asarray(picture.convert("RGB"), float) / 255
    height, width = pixels.shape[:2]
    rows = np.arange(height) * kept.shape[0] // height
    columns = np.arange(width) * kept.shape[1] // width
    return np.where(kept[rows][:, columns][..., None], pixels, 0.12 * pixels + 0.88)
