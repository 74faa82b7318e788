"""Headroom: loss against cost for each way to choose a trajectory, and what each gains on a constant rate."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from study.figures.style import POLICY_COLOURS

MARKS = {"schedule": "s", "schedule by task": "D", "by features": "^", "best for each answer": "o"}
LINES = ("constant", "schedule", "schedule by task", "by features", "best for each answer")


def loss_by_cost(curves: pd.DataFrame, trained: pd.DataFrame) -> Figure:
    """Loss against mean retention, a panel a laboratory, a line a policy with its interval; trained predictors as points.

    curves: rows of `study.chapters.headroom.losses`; trained: of its `dyrate`, with FastV's ranking, evicted.
    """
    names = list(dict.fromkeys(curves.laboratory))
    rows = -(-len(names) // 2)
    figure = Figure(figsize=(7.2, 3.3 * rows + 0.6))
    axes = figure.subplots(rows, min(2, len(names)), squeeze=False).ravel()
    for axis, name in zip(axes, names, strict=False):
        for policy in LINES:
            line = curves[(curves.laboratory == name) & (curves.policy == policy)].dropna(subset="value")
            style = {"color": POLICY_COLOURS[policy], "linestyle": "--" if policy == "constant" else "-"}
            axis.plot(line.cost, line.value, marker=MARKS.get(policy), markersize=4, label=policy, **style)
            axis.fill_between(line.cost, line.low, line.high, color=style["color"], alpha=0.12, linewidth=0)
        for row in trained[trained.laboratory == name].itertuples():
            axis.plot(row.cost, row.controller, "*" if row.paper else "P", color=POLICY_COLOURS["DyRate"], markersize=11)
        axis.set(title=name, xlabel="mean retention ratio", xscale="log", ylim=(0, None))
        axis.set_xticks([0.06, 0.12, 0.25, 0.5, 1], ["6 %", "12 %", "25 %", "50 %", "100 %"])
        axis.minorticks_off()
    for axis in axes[:: min(2, len(names))]:
        axis.set_ylabel("loss (nats a token)")
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    for mark, name in (("*", "DyRate, the paper's recipe"), ("P", "DyRate, other recipes")):
        axes[0].plot([], [], mark, color=POLICY_COLOURS["DyRate"], markersize=9, label=name)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def gains_by_ranking(table: pd.DataFrame) -> Figure:
    """What each policy gains on a constant rate, with its interval: a group a ranking and residency, a panel a laboratory.

    table: rows of `study.chapters.headroom.gains`.
    """
    names = list(dict.fromkeys(table.laboratory))
    groups = list(dict.fromkeys(zip(table.ranking, table.residency, strict=True)))
    figure = Figure(figsize=(7.2, (0.34 * len(groups) + 1.1) * len(names) + 0.5))
    axes = figure.subplots(len(names), 1, sharex=True, squeeze=False).ravel()
    for axis, name in zip(axes, names, strict=True):
        axis.axvline(0, color="black", linewidth=0.9)
        for shift, (policy, mark) in zip(np.linspace(-0.24, 0.24, len(MARKS)), MARKS.items(), strict=True):
            rows = table[(table.laboratory == name) & (table.policy == policy)]
            error = np.stack([rows.value - rows.low, rows.high - rows.value])
            at = np.array([groups.index(pair) for pair in zip(rows.ranking, rows.residency, strict=True)]) + shift
            style = {"color": POLICY_COLOURS[policy], "marker": mark, "linestyle": "none", "markersize": 5, "elinewidth": 1}
            axis.errorbar(rows.value, at, xerr=error, label=policy, **style)
        axis.set_yticks(range(len(groups)), [f"{ranking}, {residency}" for ranking, residency in groups])
        axis.set(title=name)
        axis.invert_yaxis()
    axes[-1].set_xlabel("gain on a constant rate (nats a token)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
