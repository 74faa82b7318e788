"""The front page's figures: what is lost at which cost, and how the method works."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from dyrate.segments import SEGMENTS
from study.figures.style import POLICY_COLOURS, SEGMENT_COLOURS, unpruned

STYLES = {
    "FastV": {"color": "#0072B2", "marker": "o"}, "SparseVLM": {"color": "#56B4E9", "marker": "s"},
    "PyramidDrop": {"color": "#009E73", "marker": "^"}, "VisionZip": {"color": "#E69F00", "marker": "D"},
    "RandomPrune": {"color": "#777777", "marker": "x", "linestyle": ":"},
    "DyRate, the paper's recipe": {"color": POLICY_COLOURS["DyRate"], "marker": "*", "markersize": 11},
    "DyRate, curves once an answer": {"color": POLICY_COLOURS["DyRate"], "marker": "P", "markersize": 9},
    "DyRate, curves at every step": {"color": POLICY_COLOURS["DyRate"], "marker": "v", "markersize": 9},
}  # fmt: skip
OTHER = {"color": POLICY_COLOURS["DyRate"], "marker": "X"}  # a recipe that came later
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
            unpruned(axis, full)
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


@dataclass(frozen=True)
class Layout:
    """Where the parts of the method's picture stand, in tenths of an inch from the lower left, of the picture or of a step.

    first: bottom of the first step, the next `apart` below it. bar: x, y and width. arrows: from x to x at a height. key: of the
    segments' names. evicted: of what the tokens' colours mean.
    """

    size: tuple[float, float]
    first: float
    apart: float
    word: tuple[float, float]
    bar: tuple[float, float, float]
    predictor: tuple[float, float]
    rate: tuple[float, float]
    tokens: tuple[float, float]
    arrows: tuple[tuple[float, float, float], ...]
    titles: dict[tuple[float, float], str]
    key: tuple[float, float]
    evicted: tuple[float, float]


WIDE = Layout(
    size=(92, 31), first=21.5, apart=8.5, word=(0.5, 2), bar=(8, 0, 18), predictor=(33, 0), rate=(55, 2), tokens=(67, 0),
    arrows=((27, 32, 2), (44, 49.5, 2), (60.5, 65.5, 2)), key=(8, 0.4), evicted=(67, 0.4),
    titles={
        (14, 29): "attention of the newest token", (38, 29): "one linear layer", (55, 29): "a rate",
        (76, 29): "what stays in the cache",
    },
)  # fmt: skip
TALL = Layout(
    size=(46, 56), first=41, apart=16.5, word=(0.5, 8.5), bar=(11, 6.5, 34), predictor=(0.5, 0), rate=(18.5, 2), tokens=(27, 0),
    arrows=((11.5, 14, 2), (23, 26, 2)), key=(0.5, 2.6), evicted=(0.5, 0.2),
    titles={(23, 53.5): "attention, linear layer, rate, cache"},
)  # fmt: skip


def method(at: Layout = WIDE) -> Figure:
    """How DyRate works, drawn: attention shares, a linear predictor, a rate, and eviction, over the steps of an answer."""
    figure = Figure(figsize=(at.size[0] / 10, at.size[1] / 10), layout="none")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, at.size[0]), ylim=(0, at.size[1]))
    axis.set_axis_off()
    left = list(np.random.default_rng(3).permutation(36))  # the order in which the drawn ranking keeps its image tokens
    for where, title in at.titles.items():
        axis.text(*where, title, ha="center", fontsize=10, weight="bold")
    shares = np.array([[0.10, 0.55, 0.30, 0.05], [0.10, 0.40, 0.25, 0.25], [0.08, 0.24, 0.20, 0.48]])
    rates, words = (0.25, 0.5, 0.75), ("three", "red", "mugs")
    for step, (share, rate, word) in enumerate(zip(shares, rates, words, strict=True)):
        y = at.first - at.apart * step
        axis.text(at.word[0], y + at.word[1], f"step {step + 1}\n“{word}”", va="center", fontsize=9)
        start, above, width = at.bar
        for segment, part in zip(SEGMENTS, share, strict=True):
            axis.add_patch(Rectangle((start, y + above), width * part, 4, color=SEGMENT_COLOURS[segment], linewidth=0))
            start += width * part
        box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "#555555"}
        axis.add_patch(FancyBboxPatch((at.predictor[0], y + at.predictor[1]), 10, 4, **box))
        axis.text(at.predictor[0] + 5, y + at.predictor[1] + 2, "predictor", ha="center", va="center", fontsize=9)
        axis.text(at.rate[0], y + at.rate[1], f"drop {100 * rate:.0f} %", ha="center", va="center", fontsize=10)
        for begin, end, height in at.arrows:
            ends = (begin, y + height), (end, y + height)
            axis.add_patch(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=12, color="#555555"))
        kept = set(left[: round(len(left) * (1 - rate))])
        for i in range(len(left)):
            colour = SEGMENT_COLOURS["image"] if i in kept else "#EEEEEE"
            corner = at.tokens[0] + 1.5 * (i % 12), y + at.tokens[1] + 2.8 - 1.4 * (i // 12)
            axis.add_patch(Rectangle(corner, 1.25, 1.15, color=colour, linewidth=0))
    for i, segment in enumerate(SEGMENTS):
        axis.add_patch(Rectangle((at.key[0] + 12 * i, at.key[1]), 1.2, 1.2, color=SEGMENT_COLOURS[segment], linewidth=0))
        axis.text(at.key[0] + 1.8 + 12 * i, at.key[1] + 0.55, segment, va="center", fontsize=8)
    axis.text(at.evicted[0], at.evicted[1] + 0.55, "image tokens: kept, and evicted for good", va="center", fontsize=8)
    return figure
