"""The front page's figures: what is lost at which cost, and how the method works."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from dyrate.segments import SEGMENTS
from study.figures.style import POLICY_COLOURS, SEGMENT_COLOURS

STYLES = {
    "FastV": {"color": "#0072B2", "marker": "o"}, "SparseVLM": {"color": "#56B4E9", "marker": "s"},
    "PyramidDrop": {"color": "#009E73", "marker": "^"}, "VisionZip": {"color": "#E69F00", "marker": "D"},
    "RandomPrune": {"color": "#777777", "marker": "x", "linestyle": ":"},
    "DyRate, the paper's recipe": {"color": POLICY_COLOURS["DyRate"], "marker": "*", "markersize": 11},
    "DyRate, curves": {"color": POLICY_COLOURS["DyRate"], "marker": "P", "markersize": 9},
}  # fmt: skip
OTHER = {"color": POLICY_COLOURS["DyRate"], "marker": "v"}  # a recipe that came later
SPOKEN = {"RandomPrune": "random pruning"}
COSTS = {"retention": "measured mean retention ratio (%)", "macs_share": "decoder's multiply-accumulates (% of unpruned)"}


def headline(tables: dict[str, pd.DataFrame]) -> Figure:
    """Score against measured retention (left) and against computation (right), a line a method with its name at its end.

    tables: of each laboratory (a row of panels) its `study.chapters.front.points`.
    """
    figure = Figure(figsize=(9.2, 3.9 * len(tables) + 0.3))
    grid = figure.subplots(len(tables), len(COSTS), sharey="row", squeeze=False)
    for axes, (laboratory, table) in zip(grid, tables.items(), strict=True):
        full = table[table.name == "unpruned"].iloc[0]
        for axis, (cost, label) in zip(axes, COSTS.items(), strict=True):
            axis.axhspan(full.low, full.high, color="black", alpha=0.08, linewidth=0)
            axis.axhline(full.value, color="black", linewidth=0.9)
            axis.annotate("unpruned", (0.99, full.value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
            for name, line in table[table.name != "unpruned"].groupby("name", sort=False):
                line = line.sort_values("retention")
                error = np.stack([line.value - line.low, line.high - line.value])
                style = {"linestyle": "-", "markersize": 5, "linewidth": 1.2, "elinewidth": 0.7, **STYLES.get(name, OTHER)}
                axis.errorbar(100 * line[cost], line.value, error, label=SPOKEN.get(name, name), **style)
            axis.set(xlabel=label, title=laboratory)
        axes[0].set_ylabel("score (share right)")
        named(axes[0], table, "retention")
    return figure


def named(axis, table: pd.DataFrame, cost: str) -> None:
    """Write each line's name beside its cheapest point, the names kept a line apart; what is one point gets a legend."""
    lines = table[(table.name != "unpruned") & ~table.name.str.startswith("DyRate")]
    ends = lines.sort_values(cost).groupby("name", sort=False).first().sort_values("value")
    apart, last = 0.045 * np.ptp(axis.get_ylim()), -np.inf
    axis.set_xlim(-24, None)  # room for the names
    axis.set_xticks(range(0, 51, 10))
    for name, row in ends.iterrows():
        last = max(row.value, last + apart)
        text = SPOKEN.get(name, name)
        axis.text(100 * row[cost] - 2.5, last, text, color=STYLES[name]["color"], ha="right", va="center", fontsize=8)
    points = [(h, name) for h, name in zip(*axis.get_legend_handles_labels(), strict=True) if name.startswith("DyRate")]
    if points:
        axis.legend(*zip(*points, strict=True), loc="lower right", fontsize=8)


def method() -> Figure:
    """How DyRate works, drawn: attention shares, a linear predictor, a rate, and eviction, over the steps of an answer."""
    figure = Figure(figsize=(9.2, 3.1))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 92), ylim=(0, 31))
    axis.set_axis_off()
    left = list(np.random.default_rng(3).permutation(36))  # the order in which the drawn ranking keeps its image tokens
    titles = {14: "attention of the newest token", 38: "one linear layer", 55: "a rate", 76: "what stays in the cache"}
    for x, title in titles.items():
        axis.text(x, 29, title, ha="center", fontsize=10, weight="bold")
    shares = np.array([[0.10, 0.55, 0.30, 0.05], [0.10, 0.40, 0.25, 0.25], [0.08, 0.24, 0.20, 0.48]])
    rates, words = (0.25, 0.5, 0.75), ("three", "red", "mugs")
    for step, (share, rate, word) in enumerate(zip(shares, rates, words, strict=True)):
        y = 21.5 - 8.5 * step
        axis.text(0.5, y + 2, f"step {step + 1}\n“{word}”", va="center", fontsize=9)
        start = 8.0
        for segment, part in zip(SEGMENTS, share, strict=True):
            axis.add_patch(Rectangle((start, y), 18 * part, 4, color=SEGMENT_COLOURS[segment], linewidth=0))
            start += 18 * part
        axis.add_patch(FancyBboxPatch((33, y), 10, 4, boxstyle="round,pad=0.2", facecolor="white", edgecolor="#555555"))
        axis.text(38, y + 2, "predictor", ha="center", va="center", fontsize=9)
        axis.text(55, y + 2, f"drop {100 * rate:.0f} %", ha="center", va="center", fontsize=10)
        for a, b in ((27, 32), (44, 49.5), (60.5, 65.5)):
            axis.add_patch(FancyArrowPatch((a, y + 2), (b, y + 2), arrowstyle="-|>", mutation_scale=12, color="#555555"))
        kept = set(left[: round(len(left) * (1 - rate))])
        for i in range(len(left)):
            colour = SEGMENT_COLOURS["image"] if i in kept else "#EEEEEE"
            axis.add_patch(Rectangle((67 + 1.5 * (i % 12), y + 2.8 - 1.4 * (i // 12)), 1.25, 1.15, color=colour, linewidth=0))
    for i, segment in enumerate(SEGMENTS):
        axis.add_patch(Rectangle((8 + 12 * i, 0.2), 1.2, 1.2, color=SEGMENT_COLOURS[segment], linewidth=0))
        axis.text(9.8 + 12 * i, 0.75, segment, va="center", fontsize=8)
    axis.text(67, 0.75, "image tokens: kept, and evicted for good", va="center", fontsize=8)
    return figure
