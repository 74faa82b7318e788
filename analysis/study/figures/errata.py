"""What the paper prints against what follows."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from study.figures.style import axes_of


def swapped_columns(rows: pd.DataFrame) -> Figure:
    """What the paper prints and what another report has for the same model and data set, in both readings of its columns."""
    figure, axes = axes_of(7.2, 2.6, 2, sharey=True, sharex=True)
    for axis, (reading, cases) in zip(axes, rows.groupby("reading", sort=False), strict=True):
        y = np.arange(len(cases))[::-1]
        axis.hlines(y, cases.paper, cases.report, color="#bbbbbb", linewidth=2.5)
        axis.plot(cases.report, y, "o", color="#0072B2", markersize=9, markerfacecolor="none", markeredgewidth=1.6,
                  label="FastV's report")  # fmt: skip
        axis.plot(cases.paper, y, "o", color="#D55E00", markersize=5, label="the paper")
        axis.set_yticks(y, cases.case)
        axis.set(title=reading, xlabel="CIDEr x 100", xlim=(60, 120), ylim=(-0.6, len(cases) - 0.4))
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2)
    return figure


def mixed_protocols(panels: dict[str, pd.DataFrame], unpruned: dict[str, dict[str, float]]) -> Figure:
    """One column of a table a panel, its rows marked by protocol. panels: title -> rows of model, value, protocol.

    unpruned: title -> protocol -> the unpruned model's figure, a line in the protocol's colour; grey: protocol not stated.
    """
    figure, axes = axes_of(8.2, 3.4, len(panels))
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        y = pd.Series(np.arange(len(rows))[::-1], index=rows.index)
        known = [name for name in rows.protocol.unique() if not name.endswith("not stated")]
        looks = dict(zip(known, (("#0072B2", "o"), ("#D55E00", "s")), strict=True))
        for name, alike in rows.groupby("protocol", sort=False):
            colour, mark = looks.get(name, ("#777777", "^"))
            axis.plot(alike.value, y[alike.index], mark, color=colour, label=name)
            if name in unpruned[title]:
                axis.axvline(unpruned[title][name], color=colour, linestyle="--", linewidth=1.2)
        axis.set_yticks(y, rows.model)
        axis.set(xlabel=title)
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def macs_by_retention(rows: pd.DataFrame, lines: dict[str, float], dots: pd.DataFrame) -> Figure:
    """Prefill cost over the retention ratio. lines: levels by name.

    dots: printed figures, with `retention`, `percent`, `name` and the name's `offset` in points.
    """
    figure, axis = axes_of(7.2, 3.6)
    for (case, curve), colour, dash in zip(rows.groupby("case", sort=False), ("#0072B2", "#E69F00"), ("-", "--"), strict=True):
        axis.fill_between(curve.retention, curve.low, curve.high, color=colour, alpha=0.35, linewidth=0)
        axis.plot(curve.retention, (curve.low + curve.high) / 2, dash, color=colour, label=case)
    for name, level in lines.items():
        axis.axhline(level, color="black", linewidth=0.9, linestyle=":")
        axis.annotate(name, (1, level), xytext=(0, 3), textcoords="offset points", ha="right", fontsize=9)
    for dot in dots.itertuples():
        axis.plot(dot.retention, dot.percent, "o", color="#D55E00", markersize=6)
        axis.annotate(dot.name, (dot.retention, dot.percent), xytext=dot.offset, textcoords="offset points", fontsize=9)
    axis.set(xlabel="retention ratio of image tokens in the prefill", ylabel="multiply-accumulates left\n(% of no pruning)")
    axis.set(xlim=(0, 1), ylim=(0, 100))
    axis.legend(loc="upper left")
    return figure
