"""Where attention goes while an answer grows."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn
from matplotlib.figure import Figure

from dyrate.segments import SEGMENTS
from study.figures.style import SEGMENT_COLOURS, TASK_COLOURS, axes_of

DEPTH_COLOURS = {"shallow": "#56B4E9", "deep": "#D55E00"}
DASHES = {"shallow": "-", "deep": "--"}
PATCH_COLOURS = {"named object": "#D55E00", "other objects": "#0072B2", "no object": "#999999"}
MEASURE_LABELS = {
    "raw": "share of all attention",
    "undiluted": "share of attention\nnot on the response",
    "per_token": "per token\n(1 = average token)",
}


def attention_stack(curves: pd.DataFrame) -> Figure:
    """The paper's Fig. 2: how one query's attention divides over the four kinds of tokens, per generation step."""
    figure, axes = axes_of(8.2, 3.2, 2, sharey=True)
    for axis, depth in zip(axes, ("shallow", "deep"), strict=True):
        rows = curves[(curves.depth == depth) & curves.what.isin(SEGMENTS)]
        shares = rows.pivot(index="step", columns="what", values="value")[list(SEGMENTS)]
        axis.stackplot(shares.index, shares.T.values, colors=SEGMENT_COLOURS.values(), labels=SEGMENTS, linewidth=0)
        axis.set(title=f"{depth} layers", xlabel="generation step (token)", xlim=(0, shares.index.max()), ylim=(0, 1))
        axis.grid(False)
    axes[0].set_ylabel("share of attention (mean over heads)")
    handles, names = axes[1].get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside right upper")
    return figure


def three_measures(curves: pd.DataFrame) -> Figure:
    """Raw share, undiluted share and attention per image token over the answer, with 95 % intervals."""
    figure, axes = axes_of(9.2, 3.1, 3)
    for axis, (measure, label) in zip(axes, MEASURE_LABELS.items(), strict=True):
        for depth, colour in DEPTH_COLOURS.items():
            rows = curves[(curves.depth == depth) & (curves.what == measure) & (curves.step > 0)]
            axis.plot(rows.step, rows.value, DASHES[depth], color=colour, label=f"{depth} layers")
            axis.fill_between(rows.step, rows.low, rows.high, color=colour, alpha=0.2, linewidth=0)
        axis.set(title=measure.replace("_", " "), xlabel="generation step (token)", ylabel=f"image: {label}")
        axis.set_ylim(bottom=0)
    axes[0].legend(loc="lower left")
    return figure


def change_by_layer(trends: pd.DataFrame) -> Figure:
    """Relative change from the first to the last third of the answer, per layer and measure."""
    figure, axis = axes_of(7.2, 3.2)
    marks = {"raw": ("o", "#E69F00"), "undiluted": ("s", "#CC79A7"), "per_token": ("^", "#0072B2")}
    for i, (measure, (mark, colour)) in enumerate(marks.items()):
        rows = trends[trends.measure == measure]
        error = 100 * np.stack([rows.value - rows.low, rows.high - rows.value])
        axis.errorbar(
            rows.layer + 0.16 * (i - 1),
            100 * rows.value,
            error,
            fmt=mark,
            color=colour,
            capsize=2.5,
            label=measure.replace("_", " "),
        )
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xlabel="decoder layer (0 = first)", ylabel="change over the answer (%)")
    axis.legend(ncols=3, loc="best")
    return figure


def course_by_task(course: pd.DataFrame) -> Figure:
    """Undiluted image share over the answer for descriptions, recaps and look-late descriptions."""
    figure, axis = axes_of(7.2, 3.1)
    for task, dash in zip(course.task.unique(), ("-", "--", ":", "-.") * 3, strict=False):
        rows = course[course.task == task]
        colour = TASK_COLOURS.get(task, "black")
        axis.plot(rows.position, rows.value, dash, color=colour, label=task.replace("_", " "))
        axis.fill_between(rows.position, rows.low, rows.high, color=colour, alpha=0.2, linewidth=0)
    axis.set(
        xlabel="position in the answer (0 = first token, 1 = last)",
        ylabel="image share of attention\nnot on the response",
        xlim=(0, 1),
    )
    axis.set_ylim(bottom=0)
    if len(course):
        axis.legend(loc="best")
    else:
        axis.text(0.5, 0.5, "no answer is long enough to have a course", ha="center", transform=axis.transAxes)
    return figure


def layer_step_heat(rows: pd.DataFrame) -> Figure:
    """Image share in every layer and step: of all attention, and of the attention not on the response."""
    figure, axes = axes_of(8.6, 3.0, 2, sharey=True)
    every = max(1, rows.step.nunique() // 8)
    for axis, title in zip(axes, ("raw", "undiluted"), strict=True):
        table = rows.pivot(index="layer", columns="step", values=title)
        seaborn.heatmap(
            table, ax=axis, vmin=0, vmax=1, cmap="viridis", xticklabels=every, cbar=title == "undiluted",
            cbar_kws={"label": "image share"},
        )  # fmt: skip
        axis.invert_yaxis()
        axis.set(title=title, xlabel="generation step (token)", ylabel="decoder layer" if title == "raw" else "")
        axis.tick_params(rotation=0)
    return figure


def head_heat(shares: pd.DataFrame) -> Figure:
    """Mean image share of each head (a column) in each layer (a row)."""
    width = min(9.0, 2.6 + 0.28 * shares.shape[1])
    figure, axis = axes_of(width, min(8.0, 1.6 + 0.24 * shares.shape[0]))
    label = {"label": "image share (mean over steps)"}
    seaborn.heatmap(shares, ax=axis, vmin=0, vmax=1, cmap="viridis", annot=shares.size <= 100, fmt=".2f", cbar_kws=label)
    axis.invert_yaxis()
    axis.set(xlabel="attention head", ylabel="decoder layer")
    return figure


def token_kinds(kinds: pd.DataFrame) -> Figure:
    """Undiluted image share and attention per image token while each kind of token is generated."""
    figure, axes = axes_of(8.2, 3.0, 2, sharey=True)
    for axis, measure in zip(axes, ("undiluted", "per_token"), strict=True):
        names = sorted(kinds.kind.unique(), reverse=True)
        for j, (depth, colour) in enumerate(DEPTH_COLOURS.items()):
            rows = kinds[(kinds.depth == depth) & (kinds.measure == measure)].set_index("kind").loc[names]
            axis.errorbar(
                rows.value, np.arange(len(names)) + 0.16 * (1 - 2 * j),
                xerr=np.stack([rows.value - rows.low, rows.high - rows.value]),
                fmt="os"[j], color=colour, capsize=2.5, label=f"{depth} layers",
            )  # fmt: skip
        axis.set_yticks(range(len(names)), names)
        axis.set(title=measure.replace("_", " "), xlabel=f"image: {MEASURE_LABELS[measure]}".replace("\n", " "))
        axis.set_xlim(left=0)
    axes[0].set_ylabel("kind of token being generated")
    axes[1].legend(loc="best")
    return figure


def focus(density: pd.DataFrame) -> Figure:
    """Attention per patch on the named object, the other objects and the rest, per layer, while an object is named."""
    figure, axis = axes_of(7.2, 3.2)
    for (part, colour), mark in zip(PATCH_COLOURS.items(), "osD", strict=True):
        rows = density[density.patches == part]
        axis.plot(rows.layer, rows.value, f"{mark}-", color=colour, label=part)
        axis.fill_between(rows.layer, rows.low, rows.high, color=colour, alpha=0.2, linewidth=0)
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set(xlabel="decoder layer (0 = first)", ylabel="attention per patch\n(1 = mean over the image)", yscale="log")
    axis.legend(title="patches of")
    return figure


def tokens_on_image(picture, grids: list[np.ndarray], tokens: list[str]) -> Figure:
    """One picture, and where the attention lies in it while each of some tokens is generated. grids: (rows, columns)."""
    columns = len(tokens) + 1
    figure, axes = axes_of(1.75 * columns, 2.1, columns)
    axes = np.atleast_1d(axes)
    axes[0].imshow(picture)
    axes[0].set_title("picture", fontsize=10)
    side = picture.size[0]
    for axis, grid, token in zip(axes[1:], grids, tokens, strict=True):
        axis.imshow(picture.convert("L"), cmap="gray", alpha=0.55)
        axis.imshow(grid / grid.max(), cmap="magma", alpha=0.62, extent=(0, side, picture.size[1], 0), vmin=0, vmax=1)
        axis.set_title(f"“{token}”", fontsize=10)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.grid(False)
        axis.spines[:].set_visible(False)
    return figure
