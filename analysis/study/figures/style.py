"""One look for all figures: one colour for each token type everywhere.

Colours are Okabe and Ito's, which readers with colour-vision deficiencies tell apart; lines differ in dashes too.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from dyrate.segments import SEGMENTS

plt.style.use(Path(__file__).with_name("study.mplstyle"))

SEGMENT_COLOURS = dict(zip(SEGMENTS, ("#999999", "#E69F00", "#0072B2", "#009E73"), strict=True))
TASK_COLOURS = {"description": "#0072B2", "recap": "#009E73", "look_late": "#D55E00", "caption": "#CC79A7"}
POLICY_COLOURS = {
    "constant": "#000000", "schedule": "#E69F00", "constant by task": "#56B4E9", "schedule by task": "#0072B2",
    "by features": "#009E73", "by task and features": "#999999", "best for each answer": "#D55E00", "DyRate": "#CC79A7",
}  # fmt: skip


def axes_of(width: float, height: float, columns: int = 1, **shared):
    """A figure that pyplot does not keep, so that a notebook shows it once, and its axes."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(1, columns, **shared)


def unpruned(axis, full) -> None:
    """The score without pruning as a line, its interval as a band. full: its row; that of one sample has no ends."""
    axis.axhline(full.value, color="black", linewidth=0.9)
    if full.n > 1:
        axis.axhspan(full.low, full.high, color="black", alpha=0.08, linewidth=0)
