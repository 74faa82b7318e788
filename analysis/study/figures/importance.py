"""Importance beside attention: as maps, by layer and by ranking, and what scores lose when a ranking is made worse."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from study.figures.style import axes_of
from study.pocket.scenes import GRID, SIDE, compose, render

RANKING_COLOURS = {"FastV": "#0072B2", "[CLS] attention": "#CC79A7", "importance": "#009E73"}
REVERSED = 1.25  # where on the axis of exchanged tokens the reversed ranking stands
ATTENTION_LINES = {"prefill": ("#0072B2", "o", "-"), "each step": ("#D55E00", "s", "--"), "one step": ("#E69F00", "^", ":")}


def importance_maps(table: pd.DataFrame, columns: dict[str, str]) -> Figure:
    """Scenes, and what each image token is worth or scores, a row a scene. table: rows of `study.chapters.importance.maps`.

    columns: those of the table to show, and their titles.
    """
    samples = list(dict.fromkeys(table["sample"]))
    figure = Figure(figsize=(8.2, 0.5 + 1.7 * len(samples)))
    axes = figure.subplots(len(samples), 1 + len(columns), squeeze=False)
    for row, sample in zip(axes, samples, strict=True):
        picture = render(compose(int(sample.rpartition("-")[2]), long_words=True)).image
        row[0].imshow(picture)
        of = table[table["sample"] == sample].sort_values("token")
        for axis, column in zip(row[1:], columns, strict=True):
            axis.imshow(picture.convert("L"), cmap="gray", alpha=0.35)
            score = of[column].to_numpy().reshape(GRID, GRID)
            axis.imshow(
                score,
                cmap="Blues",
                alpha=0.75,
                extent=(0, SIDE, SIDE, 0),
                vmin=np.quantile(score, 0.05),
                vmax=np.quantile(score, 0.99),
            )
        for axis in row:
            axis.set_axis_off()
    for axis, title in zip(axes[0], ["scene", *columns.values()], strict=True):
        axis.set_title(title, fontsize=10)
    return figure


def agreement_by_layer(table: pd.DataFrame, names: dict[str, str], hoped_for: str) -> Figure:
    """Rank correlation of attention with importance against the first pruned layer, a panel a laboratory.

    table: rows of `study.chapters.importance.agreement`. names: of the kinds of attention; hoped_for: the ranking whose
    agreement is a dotted line.
    """
    table = table[table.part == "all"]
    laboratories = list(dict.fromkeys(table.laboratory))
    figure, axes = axes_of(8.2, 3.2, len(laboratories), sharey=True)
    for axis, laboratory in zip(np.atleast_1d(axes), laboratories, strict=True):
        rows = table[table.laboratory == laboratory]
        axis.axhline(0, color="black", linewidth=0.9)
        axis.axhline(
            rows[rows.ranking == hoped_for].value.item(), color="#777777", linestyle=":", label=f"importance, {hoped_for}"
        )
        for ranking, (colour, mark, dashes) in ATTENTION_LINES.items():
            line = rows[rows.ranking == ranking].sort_values("layer")
            error = np.stack([line.value - line.low, line.high - line.value])
            style = {"color": colour, "marker": mark, "linestyle": dashes, "markersize": 5, "linewidth": 1.3, "elinewidth": 0.8}
            axis.errorbar(line.layer, line.value, error, label=names[ranking], **style)
        axis.set(title=laboratory, xlabel="first pruned layer", ylim=(-0.2, 1))
        axis.xaxis.get_major_locator().set_params(integer=True)
    np.atleast_1d(axes)[0].set_ylabel("rank correlation\nwith importance")
    return _with_legend(figure, np.atleast_1d(axes)[0])


def agreement_of_rankings(table: pd.DataFrame) -> Figure:
    """Rank correlation of every ranking with importance, a panel a laboratory; rows of `study.chapters.importance.rankings`."""
    laboratories = list(dict.fromkeys(table.laboratory))
    last = table[table.laboratory == laboratories[-1]].sort_values("value")
    order = {ranking: i for i, ranking in enumerate(last.ranking)}
    figure, axes = axes_of(8.2, 0.9 + 0.28 * len(order), len(laboratories), sharey=True, sharex=True)
    for axis, laboratory in zip(np.atleast_1d(axes), laboratories, strict=True):
        axis.axvline(0, color="black", linewidth=0.9)
        rows = table[table.laboratory == laboratory]
        error = np.stack([rows.value - rows.low, rows.high - rows.value])
        axis.errorbar(rows.value, rows.ranking.map(order), xerr=error, fmt="o", color="#0072B2", markersize=5, elinewidth=1.2)
        axis.set(title=laboratory, xlabel="rank correlation\nwith importance")
        axis.set_yticks(range(len(order)), list(order))
        axis.grid(axis="y", alpha=0.3)
    return figure


def score_under_noise(table: pd.DataFrame, retention: float, early: int) -> Figure:
    """Score against the share of image tokens that exchanged ranks, and reversed, a panel a laboratory.

    table: rows of `study.chapters.importance.noise`. Solid lines prune from layer `early` or before the decoder, dashed ones
    where FastV is worth most. The band is the interval of random pruning from layer `early`.
    """
    laboratories = list(dict.fromkeys(table.laboratory))
    figure, axes = axes_of(8.2, 4.2, len(laboratories), sharey=True)
    for axis, laboratory in zip(np.atleast_1d(axes), laboratories, strict=True):
        rows = table[table.laboratory == laboratory]
        axis.axhline(rows[rows.method == "Full"].value.item(), color="black", linewidth=0.9, label="not pruned")
        rows = rows[rows.budget == retention]
        random = rows[(rows.method == "FastV") & (rows.layer == early) & (rows.order == "1.0")].iloc[0]
        axis.axhspan(random.low, random.high, color="#999999", alpha=0.3, linewidth=0, label=f"random pruning, layer {early}")
        for (method, layer), line in rows.groupby(["method", "layer"], sort=False):
            where = "before the decoder" if layer == 0 else f"layer {early}" if layer == early else "where FastV is worth most"
            at = line.order.replace("reversed", str(REVERSED)).astype(float)
            _line(axis, at, line, f"{method}, {where}", RANKING_COLOURS[method], layer > 0 and layer != early)
        axis.set(title=laboratory, xlabel="tokens exchanged (share)")
        axis.set_xticks([0, 0.5, 1, REVERSED], ["0", ".5", "1", "rev."])
    np.atleast_1d(axes)[0].set_ylabel("right slots (share)")
    return _with_legend(figure, np.atleast_1d(axes)[0])


def score_by_agreement(table: pd.DataFrame, early: int) -> Figure:
    """Score against rank correlation with importance, a panel a laboratory; rows of `study.chapters.importance.by_agreement`.

    Solid lines prune from layer `early`, dashed ones where FastV is worth most.
    """
    laboratories = list(dict.fromkeys(table.laboratory))
    figure, axes = axes_of(8.2, 3.8, len(laboratories), sharey=True)
    for axis, laboratory in zip(np.atleast_1d(axes), laboratories, strict=True):
        for (ranking, layer), line in table[table.laboratory == laboratory].groupby(["ranking", "layer"], sort=False):
            where = f"layer {early}" if layer == early else "where FastV is worth most"
            line = line.sort_values("rho")
            _line(axis, line.rho, line, f"{ranking}, {where}", RANKING_COLOURS[ranking], layer != early)
        axis.set(title=laboratory, xlabel="rank correlation\nwith importance")
    np.atleast_1d(axes)[0].set_ylabel("right slots (share)")
    return _with_legend(figure, np.atleast_1d(axes)[0])


def _line(axis, at, line: pd.DataFrame, label: str, colour: str, dashed: bool) -> None:
    error = np.stack([line.value - line.low, line.high - line.value])
    axis.errorbar(
        at, line.value, error, label=label, color=colour, marker="s" if dashed else "o", linestyle="--" if dashed else "-",
        markersize=4.5, linewidth=1.3, elinewidth=0.8,
    )  # fmt: skip


def _with_legend(figure: Figure, axis) -> Figure:
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    return figure
