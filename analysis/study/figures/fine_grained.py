"""What dropping costs where details are needed: scores over retention, and schedules against constants."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

STYLES = {  # constants first: solid and dashed; what changes over an answer in colour
    "FastV": ("#000000", "-", "o"), "RandomPrune": ("#777777", "--", "s"), "LinearAnneal": ("#D55E00", "-", "^"),
    "FastVRerank": ("#0072B2", "-", "v"), "VisionZip": ("#009E73", "-.", "D"),
}  # fmt: skip
LABELS = {
    "FastV": "FastV (constant)", "RandomPrune": "random pruning (constant)", "LinearAnneal": "LinearAnneal (rising rate)",
    "FastVRerank": "FastVRerank (re-selectable)", "VisionZip": "VisionZip (before the decoder)",
}  # fmt: skip


def detail_curves(table: pd.DataFrame, name) -> Figure:
    """Score against measured retention, a row of panels a task, a column a laboratory; bands: 95 % intervals.

    table: rows of `study.chapters.fine_grained.curves`. name: of a task, as a reader knows it.
    """
    tasks, labs = list(dict.fromkeys(table.task)), list(dict.fromkeys(table.laboratory))
    figure = Figure(figsize=(8.4, 2.1 * len(tasks) + 0.6))
    axes = figure.subplots(len(tasks), len(labs), sharex=True, sharey="row", squeeze=False)
    for i, task in enumerate(tasks):
        for axis, lab in zip(axes[i], labs, strict=True):
            for method, line in table[(table.task == task) & (table.laboratory == lab)].groupby("method", sort=False):
                colour, dash, mark = STYLES[method]
                line = line.sort_values("retention")
                axis.plot(line.retention, line.value, dash, color=colour, marker=mark, markersize=4, label=LABELS[method])
                axis.fill_between(line.retention, line.low, line.high, color=colour, alpha=0.12, linewidth=0)
            axis.set(xlim=(0, 1.02), title=lab if i == 0 else "", xlabel="measured retention ratio" if task == tasks[-1] else "")
        axes[i][0].set_ylabel(f"{name(task)}\n(score)")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    return figure


def compared_with_constants(table: pd.DataFrame, name) -> Figure:
    """Methods minus a constant rate, a panel a laboratory: filled at equal retention, hollow at equal computation.

    table: rows of `study.chapters.fine_grained.against_constants` at one budget. name: as above.
    """
    labs = list(dict.fromkeys(table.laboratory))
    lines = list(dict.fromkeys(zip(table.task, table.method, strict=True)))[::-1]
    figure = Figure(figsize=(8.4, 1.3 + 0.36 * len(lines)))
    axes = figure.subplots(1, len(labs), sharey=True, sharex=True, squeeze=False)[0]
    for axis, lab in zip(axes, labs, strict=True):
        axis.axvline(0, color="black", linewidth=0.9)
        for basis, shift, face in (("retention", 0.14, None), ("computation", -0.14, "white")):
            of = table[(table.laboratory == lab) & (table.basis == basis)]
            at = np.array([lines.index(key) for key in zip(of.task, of.method, strict=True)]) + shift
            error = np.stack([of.value - of.low, of.high - of.value])
            axis.errorbar(
                of.value, at, xerr=error, fmt="o", color="#0072B2", markerfacecolor=face or "#0072B2", markersize=5,
                elinewidth=1, label=f"equal {basis}",
            )  # fmt: skip
        axis.set(title=lab, xlabel="minus a constant\n(right slots, share)")
        axis.set_yticks(range(len(lines)), [f"{method}, {name(task)}" for task, method in lines])
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    return figure
