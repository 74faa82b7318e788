"""What dropping saves, computed and measured."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from study.figures.style import axes_of


def share_by_text(rows: pd.DataFrame, matching: pd.DataFrame) -> Figure:
    """Prefill of LLaVA-1.5-7B relative to Full, against the number of text tokens; dots: what the paper prints.

    rows, matching: as `chapters.efficiency.share_by_text` and `matching_text` make them.
    """
    figure, axis = axes_of(7.2, 3.2)
    for dot, dash in zip(matching.itertuples(), ("-", "--", ":"), strict=True):
        curve = rows[(rows.method == dot.method) & (rows.first_pruned_layer == dot.first_pruned_layer)]
        label = f"{dot.method}, K = {dot.first_pruned_layer}, R = {1 - dot.retention:g}"
        (line,) = axis.plot(curve.text, curve.percent, dash, label=label)
        axis.plot(dot.text, dot.reported, "o", color=line.get_color())
        highest = dot.reported == matching.reported.max()
        place, side = ((-6, 6), "right") if highest else ((6, -12), "left")  # where no curve runs
        axis.annotate(
            f"{dot.reported:.1f} % at {dot.text:.0f}", (dot.text, dot.reported), xytext=place, textcoords="offset points",
            ha=side, fontsize=8,
        )  # fmt: skip
    axis.set(
        xlabel="text tokens in the prompt", ylabel="multiply-accumulates\n(% of Full)", xlim=(rows.text.min(), rows.text.max())
    )
    axis.legend(loc="lower right")
    return figure


def decode_reads(rows: pd.DataFrame) -> Figure:
    """Bytes that one decode step reads, against the batch, and by how much less a pruned cache would take at best."""
    figure, axes = axes_of(9.2, 3.1, 2)
    curves = rows.groupby(["retention", "first_pruned_layer"], sort=False)
    for ((retention, first), curve), dash in zip(curves, ("-", "--", ":", "-."), strict=False):
        label = "Full" if retention == 1 else f"keep {retention:.0%} from layer {first}"
        axes[0].plot(curve.batch, curve.gib, dash, label=label)
        if retention < 1:
            axes[1].plot(curve.batch, curve.faster, dash, label=label, color=axes[0].lines[-1].get_color())
    axes[0].set(xlabel="batch (rows)", ylabel="read in a decode step (GiB)", xscale="log", ylim=(0, None))
    axes[1].set(xlabel="batch (rows)", ylabel="decode speed-up at best\n(1 = as Full)", xscale="log", ylim=(0.9, None))
    axes[1].axhline(1, color="black", linewidth=0.8)
    for axis in axes:
        axis.xaxis.set_major_locator(LogLocator(2))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
    axes[0].legend(loc="upper left")
    return figure


def saving_realised(results: pd.DataFrame) -> Figure:
    """The share of the ideal saving that was measured, with 95 % intervals; ticks: the bars set beforehand."""
    figure, axis = axes_of(7.2, 0.9 + 0.35 * len(results))
    y = np.arange(len(results))[::-1]
    error = np.stack([results.value - results.low, results.high - results.value])
    axis.barh(y, results.value, 0.6, xerr=error, color="#56B4E9", ecolor="#555555", capsize=2.5)
    has_bar = results.bar.notna()
    axis.plot(results.bar[has_bar], y[has_bar], "|", color="#D55E00", markersize=16, markeredgewidth=2, label="bar")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(y, results.case)
    axis.set(xlabel="measured saving / ideal saving (1 = as a model that natively has so few tokens)")
    axis.legend(loc="lower right")
    return figure
