"""Ablations beside the constant rate that they are compared with."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure


def ablation_dots(table: pd.DataFrame, unit: str) -> Figure:
    """Each ablation's difference from a constant rate with its interval, one panel a group; its retention beside each label."""
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
        labels = [f"{label} ({100 * retention:.0f} %)" for label, retention in zip(rows.label, rows.retention, strict=True)]
        axis.set_yticks(y, labels, fontsize=8)
        axis.set_title(group, fontsize=9)
        axis.set_ylim(-0.6, len(rows) - 0.4)
        axis.tick_params(labelbottom=True)
    for axis in axes[max(0, len(groups) - columns) : len(groups)]:
        axis.set_xlabel(unit)
    for axis in axes[len(groups) :]:
        axis.set_visible(False)
    return figure
