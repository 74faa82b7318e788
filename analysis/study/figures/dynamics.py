"""Schedules of the retention over the steps, and paired differences with their intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from study.figures.style import axes_of


def forest(rows: pd.DataFrame, xlabel: str) -> Figure:
    """Differences with their intervals: one panel a question, one line a task; zero is no difference. CIDEr is drawn / 10."""
    scale = np.where(rows.task == "caption", 0.1, 1.0)
    rows = rows.assign(**{k: rows[k] * scale for k in ("value", "low", "high")})
    rows["task"] = rows.task.replace("caption", "caption / 10")
    questions = list(dict.fromkeys(rows.question))
    figure, axes = axes_of(9.8, 0.8 + 0.34 * rows.task.nunique(), len(questions), sharey=True)
    for axis, question in zip(np.atleast_1d(axes), questions, strict=True):
        part = rows[rows.question == question]
        y = np.arange(len(part))[::-1]
        error = np.stack([part.value - part.low, part.high - part.value])
        axis.errorbar(part.value, y, xerr=error, fmt="o", color="#0072B2", capsize=2.5)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(y, part.task.str.replace("_", " "))
        axis.set_title(question.replace(" against ", "\nagainst "), fontsize=8)
        axis.set_xlabel(xlabel)
        axis.xaxis.set_major_locator(MaxNLocator(4))
    return figure


def mean_schedules(rows: pd.DataFrame) -> Figure:
    """Retention at each generation step, mean over answers: the predictor's seeds, and the controls that know the step.

    rows: of `study.chapters.dynamics.schedules`.
    """
    figure, axis = axes_of(7.2, 3.4)
    seeds = rows[rows.method == "DyRate"]
    for i, (_, line) in enumerate(seeds.groupby("label", sort=False)):
        label = None if i else "DyRate, each seed"
        axis.plot(line.step, line.retention, "-", color="#56B4E9", linewidth=1, label=label)
    controls = {"mean trajectory": ("#0072B2", "-"), "annealing": ("#D55E00", "--"), "constant": ("black", ":")}
    for name, (colour, dash) in controls.items():
        line = rows[rows.method == name]
        axis.plot(line.step, line.retention, dash, color=colour, linewidth=2, label=name)
    axis.set(xlabel="generation step (token)", ylabel="retention ratio of image tokens", ylim=(0, 1.02))
    axis.legend(loc="upper right")
    return figure
