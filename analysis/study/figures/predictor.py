"""How a rate predictor trains, what it chooses, and whether it can be believed."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn
from matplotlib.figure import Figure

from dyrate.segments import SEGMENTS
from study.figures.style import TASK_COLOURS, axes_of


def training_curves(history: pd.DataFrame) -> Figure:
    """Loss, cost and spread of the rates over training, one line a budget; dashed: the budget asked for."""
    figure, axes = axes_of(9.2, 3.4, 3)
    labels = {
        "loss": "cross-entropy (nats a token)",
        "cost": "retention ratio",
        "spread": "deviation of the retention ratio",
    }
    palette = seaborn.color_palette("viridis", history.budget.nunique())
    for colour, (budget, rows) in zip(palette, history.groupby("budget"), strict=True):
        for axis, (column, label) in zip(axes, labels.items(), strict=True):
            axis.plot(rows.step, rows[column].rolling(10, min_periods=1).mean(), color=colour, label=f"{budget:g}")
            axis.set(xlabel="training step", ylabel=label)
        axes[1].axhline(budget, color=colour, linestyle="--", linewidth=0.8)
    figure.legend(
        *axes[0].get_legend_handles_labels(), title="budget", loc="outside upper center", ncols=history.budget.nunique()
    )
    return figure


def signs_of_failure(rows: pd.DataFrame) -> Figure:
    """One panel a sign: what was measured of each training, by budget, and, shaded, where it warns."""
    names = list(dict.fromkeys(rows.sign))
    lines = -(-len(names) // 4)
    figure = Figure(figsize=(10.8, 2.3 * lines))
    axes = figure.subplots(lines, 4, squeeze=False).flatten()
    for axis, name in zip(axes, names, strict=False):
        found = rows[rows.sign == name]
        budgets, x = np.unique(found.budget, return_inverse=True)
        axis.scatter(x, found.measured, c=np.where(found.warns, "#D55E00", "#0072B2"), alpha=0.7, zorder=3)
        limit = found.limit.iloc[0]
        ends = [0, *found.measured, *found.limit.dropna()]
        low, high = min(ends), max(ends)
        edge = 0.12 * (high - low) or 1
        if pd.notna(limit):
            axis.axhline(limit, color="#D55E00", linewidth=0.8)
            axis.axhspan(limit, high + edge if found.above.iloc[0] else low - edge, color="#D55E00", alpha=0.12, linewidth=0)
        axis.set_xticks(range(len(budgets)), [f"{b:g}" for b in budgets])
        axis.set(xlabel="budget", ylabel=found.unit.iloc[0], xlim=(-0.5, len(budgets) - 0.5), ylim=(low - edge, high + edge))
        axis.set_title(name, fontsize=9)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    return figure


def gradient_truth(rows: pd.DataFrame, rate: float) -> Figure:
    """Loss at constant rates (line), and the loss that the gradient at one of them predicts (dashed); one panel a task."""
    tasks = list(dict.fromkeys(rows.task))
    figure, axes = axes_of(4.4 * len(tasks), 3.0, len(tasks), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        mean = rows[rows.task == task].groupby("rate")[["loss", "predicted"]].mean()
        axis.plot(mean.index, mean.loss, "o-", color="#0072B2", label="measured")
        axis.plot(mean.index, mean.predicted, "--", color="#D55E00", label="predicted by the gradient")
        axis.axvline(rate, color="black", linewidth=0.8)
        low, high = mean.loss.min(), mean.loss.max()
        edge = 0.5 * (high - low) + 0.02
        axis.set(title=task.replace("_", " "), xlabel="constant drop rate", ylabel="cross-entropy (nats a token)")
        axis.set_ylim(low - edge, high + edge)
        axis.title.set_fontsize(9)
    axes[0, 0].legend(loc="best")
    return figure


def budget_met(rows: pd.DataFrame) -> Figure:
    """The budget asked for and the mean retention of real generation on unseen data, with 95 % intervals."""
    figure, axis = axes_of(4.2, 3.4)
    error = np.stack([rows.value - rows.low, rows.high - rows.value])
    axis.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    axis.errorbar(rows.budget, rows.value, error, fmt="o", color="#0072B2", capsize=3)
    axis.set(xlabel="retention ratio asked for", ylabel="measured in generation", xlim=(0, 1), ylim=(0, 1))
    return figure


def rates_over_steps(rows: pd.DataFrame) -> Figure:
    """The predicted rate at each generation step, mean over answers with its 10th to 90th percentile, one line a task."""
    figure, axis = axes_of(7.2, 3.1)
    for task, dash in zip(dict.fromkeys(rows.task), ("-", "--", ":", "-.") * 4, strict=False):
        found = rows[rows.task == task].groupby("step").rate
        mean, low, high = found.mean(), found.quantile(0.1), found.quantile(0.9)
        (line,) = axis.plot(mean.index, mean, dash, label=task.replace("_", " "), color=TASK_COLOURS.get(task))
        axis.fill_between(mean.index, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set(xlabel="generation step (token)", ylabel="predicted drop rate", ylim=(-0.02, 1.02))
    axis.legend(loc="best", ncols=2)
    return figure


def rates_by_image(rows: pd.DataFrame) -> Figure:
    """The rate at each step, one row a sequence, ordered by mean rate; blank after the end."""
    grid = rows.pivot(index="sequence", columns="step", values="rate")
    grid = grid.loc[grid.mean(axis=1).sort_values().index]
    figure, axis = axes_of(7.2, 0.9 + 0.1 * len(grid))
    shown = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="none")
    axis.set(xlabel="generation step (token)", ylabel="image")
    axis.grid(False)
    axis.set_yticks([])
    figure.colorbar(shown, label="predicted drop rate")
    return figure


def predictor_weights(weights: pd.DataFrame) -> Figure:
    """How each head's attention to each segment moves the rate, one row a head: change of the mean logit-weighted rate."""
    segments = weights[list(SEGMENTS)].T
    figure, axis = axes_of(5.6, 2.6)
    limit = float(segments.abs().max(axis=None)) or 1.0
    seaborn.heatmap(
        segments, ax=axis, cmap="RdBu_r", center=0, vmin=-limit, vmax=limit, cbar_kws={"label": "towards dropping more"}
    )
    axis.set(xlabel="attention head of the observed layer", ylabel="")
    axis.tick_params(rotation=0)
    return figure


def loss_by_retention(constant: pd.DataFrame, learned: pd.DataFrame) -> Figure:
    """Teacher-forced loss of a constant rate over its retention, and of each trained predictor at its own."""
    constant = constant.sort_values("retention")
    figure, axis = axes_of(7.2, 3.2)
    axis.plot(constant.retention, constant.loss, "-", color="#777777", label="constant rate")
    axis.fill_between(constant.retention, constant.low, constant.high, color="#777777", alpha=0.2, linewidth=0)
    error = np.stack([learned.loss - learned.low, learned.high - learned.loss])
    axis.errorbar(learned.retention, learned.loss, error, fmt="o", color="#D55E00", capsize=3, label="DyRate")
    axis.set(xlabel="mean retention ratio", ylabel="cross-entropy (nats a token)")
    axis.legend(loc="upper right")
    return figure
