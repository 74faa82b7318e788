"""Whether it is the dynamics: schedules and paired differences."""

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
        found = rows[rows.question == question]
        y = np.arange(len(found))[::-1]
        error = np.stack([found.value - found.low, found.high - found.value])
        axis.errorbar(found.value, y, xerr=error, fmt="o", color="#0072B2", capsize=2.5)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(y, found.task.str.replace("_", " "))
        axis.set_title(question.replace(" against ", "\nagainst "), fontsize=8)
        axis.set_xlabel(xlabel)
        axis.xaxis.set_major_locator(MaxNLocator(4))
    return figure


def mean_schedules(rows: pd.DataFrame) -> Figure:
    """Kept share at each step of generation, mean over answers: the predictor's seeds, and the controls that know the step."""
    figure, axis = axes_of(7.2, 3.4)
    controls = {"mean trajectory": ("#0072B2", "-"), "annealing": ("#D55E00", "--"), "constant": ("black", ":")}
    seeds = [name for name in dict.fromkeys(rows.strategy) if name not in controls]
    for name in [*seeds, *controls]:
        found = rows[rows.strategy == name].groupby("step").kept.mean()
        colour, dash = controls.get(name, ("#56B4E9", "-"))
        label = name if name in controls else "DyRate, each seed" if name == seeds[0] else None
        axis.plot(found.index, found, dash, color=colour, linewidth=2 if name in controls else 1, label=label)
    axis.set(xlabel="generation step (token)", ylabel="kept share of image tokens", ylim=(0, 1.02))
    axis.legend(loc="upper right")
    return figure
