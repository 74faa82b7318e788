"""One function per figure: rows in, matplotlib figure out. One colour for each token type everywhere.

Colours are Okabe and Ito's, which readers with colour-vision deficiencies tell apart; lines differ in dashes too.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn
from matplotlib.figure import Figure

from dyrate.segments import SEGMENTS
from dyrate.strategies import STRATEGIES

plt.style.use(Path(__file__).with_name("study.mplstyle"))

SEGMENT_COLOURS = dict(zip(SEGMENTS, ("#999999", "#E69F00", "#0072B2", "#009E73"), strict=True))
DEPTH_COLOURS = {"shallow": "#56B4E9", "deep": "#D55E00"}
DASHES = {"shallow": "-", "deep": "--"}
PATCH_COLOURS = {"named object": "#D55E00", "other objects": "#0072B2", "no object": "#999999"}
TASK_COLOURS = {"description": "#0072B2", "recap": "#009E73", "look_late": "#D55E00", "caption": "#CC79A7"}
MEASURE_LABELS = {
    "raw": "share of all attention",
    "undiluted": "share of attention\nnot on the response",
    "per_token": "per token\n(1 = average token)",
}


def _axes(width: float, height: float, columns: int = 1, **shared):
    """A figure that pyplot does not keep, so that a notebook shows it once, and its axes."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(1, columns, **shared)


def attention_stack(curves: pd.DataFrame) -> Figure:
    """The paper's Fig. 2: how one query's attention divides over the four kinds of tokens, per generation step."""
    figure, axes = _axes(8.2, 3.2, 2, sharey=True)
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
    figure, axes = _axes(9.2, 3.1, 3)
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
    figure, axis = _axes(7.2, 3.2)
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
    figure, axis = _axes(7.2, 3.1)
    for task, dash in zip(course.task.unique(), ("-", "--", ":", "-.") * 3, strict=False):
        rows = course[course.task == task]
        colour = TASK_COLOURS.get(task, "black")
        axis.plot(rows.position, rows.value, dash, color=colour, label=task.replace("_", " "))
        axis.fill_between(rows.position, rows.low, rows.high, color=colour, alpha=0.2, linewidth=0)
    axis.set(
        xlabel="position in the answer (0 = first word, 1 = last)",
        ylabel="image share of attention\nnot on the response",
        xlim=(0, 1),
    )
    axis.set_ylim(bottom=0)
    axis.legend(loc="best")
    return figure


def layer_step_heat(shares: np.ndarray, undiluted: np.ndarray) -> Figure:
    """Image share in every layer and step: of all attention, and of the attention not on the response."""
    figure, axes = _axes(8.6, 3.0, 2, sharey=True)
    for axis, values, title in zip(axes, (shares, undiluted), ("raw", "undiluted"), strict=True):
        table = pd.DataFrame(values.T)
        every = max(1, len(values) // 8)
        seaborn.heatmap(
            table, ax=axis, vmin=0, vmax=1, cmap="viridis", xticklabels=every, cbar=title == "undiluted",
            cbar_kws={"label": "image share"},
        )  # fmt: skip
        axis.invert_yaxis()
        axis.set(title=title, xlabel="generation step (token)", ylabel="decoder layer" if title == "raw" else "")
        axis.tick_params(rotation=0)
    return figure


def head_heat(shares: np.ndarray) -> Figure:
    """Mean image share of each head in each layer, (layer, head)."""
    width = min(9.0, 2.6 + 0.28 * shares.shape[1])
    figure, axis = _axes(width, min(8.0, 1.6 + 0.24 * shares.shape[0]))
    label = {"label": "image share (mean over steps)"}
    seaborn.heatmap(shares, ax=axis, vmin=0, vmax=1, cmap="viridis", annot=shares.size <= 100, fmt=".2f", cbar_kws=label)
    axis.invert_yaxis()
    axis.set(xlabel="attention head", ylabel="decoder layer")
    return figure


def word_kinds(kinds: pd.DataFrame) -> Figure:
    """Undiluted image share and attention per image token while each kind of word is generated."""
    figure, axes = _axes(8.2, 3.0, 2, sharey=True)
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
    axes[0].set_ylabel("kind of word being generated")
    axes[1].legend(loc="best")
    return figure


def focus(density: pd.DataFrame) -> Figure:
    """Attention per patch on the named object, the other objects and the rest, per layer, while an object is named."""
    figure, axis = _axes(7.2, 3.2)
    for (part, colour), mark in zip(PATCH_COLOURS.items(), "osD", strict=True):
        rows = density[density.patches == part]
        axis.plot(rows.layer, rows.value, f"{mark}-", color=colour, label=part)
        axis.fill_between(rows.layer, rows.low, rows.high, color=colour, alpha=0.2, linewidth=0)
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set(xlabel="decoder layer (0 = first)", ylabel="attention per patch\n(1 = mean over the image)", yscale="log")
    axis.legend(title="patches of")
    return figure


def words_on_image(picture, grids: list[np.ndarray], words: list[str]) -> Figure:
    """One picture, and where the attention lies in it while each of some words is generated. grids: (rows, columns)."""
    columns = len(words) + 1
    figure, axes = _axes(1.75 * columns, 2.1, columns)
    axes = np.atleast_1d(axes)
    axes[0].imshow(picture)
    axes[0].set_title("picture", fontsize=10)
    side = picture.size[0]
    for axis, grid, word in zip(axes[1:], grids, words, strict=True):
        axis.imshow(picture.convert("L"), cmap="gray", alpha=0.55)
        axis.imshow(grid / grid.max(), cmap="magma", alpha=0.62, extent=(0, side, picture.size[1], 0), vmin=0, vmax=1)
        axis.set_title(f"“{word}”", fontsize=10)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.grid(False)
        axis.spines[:].set_visible(False)
    return figure


def method_styles() -> dict[str, dict]:
    """Colour, mark and dash of each registered strategy: published methods in colour, controls in grey."""
    published = [n for n, cls in STRATEGIES.items() if not cls.__module__.endswith(".controls") and n != "Full"]
    controls = [n for n, cls in STRATEGIES.items() if cls.__module__.endswith(".controls")]
    palette = seaborn.color_palette("colorblind", 10)
    found = {"Full": {"color": "black", "marker": "*", "linestyle": "-"}}
    for i, name in enumerate(published):
        found[name] = {"color": palette[i % 10], "marker": "osD^vPXp<>"[i % 10], "linestyle": "-"}
    for i, name in enumerate(controls):
        found[name] = {"color": "#777777", "marker": "1234+x|_.,"[i % 10], "linestyle": ":"}
    return found


def pareto(summary: pd.DataFrame, groups: dict[str, str]) -> Figure:
    """Score against the decoder's multiply-accumulates, one panel a group of tasks; a line joins one method's budgets.

    summary: rows of `evaluate.compare` with `method`. groups: task -> what its score is.
    """
    figure, axes = _axes(10.5, 4.0, len(groups))
    styles = method_styles()
    for axis, (task, unit) in zip(axes, groups.items(), strict=True):
        rows = summary[summary.task == task]
        full = rows[rows.method == "Full"].iloc[0]
        axis.axhline(full.value, color="black", linewidth=0.9)
        axis.axhspan(full.low, full.high, color="black", alpha=0.08, linewidth=0)
        for method, found in rows[rows.method != "Full"].groupby("method", sort=False):
            found = found.sort_values("macs_share")
            error = np.stack([found.value - found.low, found.high - found.value])
            axis.errorbar(
                100 * found.macs_share, found.value, error, **styles[method], label=method, markersize=5, linewidth=1,
                elinewidth=0.6,
            )  # fmt: skip
        axis.set(title=task, xlabel="decoder multiply-accumulates\n(% of Full)", ylabel=unit)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", fontsize=7)
    return figure


def loss_heat(summary: pd.DataFrame) -> Figure:
    """Change of the score against Full in percent of Full's, strategy by task; rows from gentle to harsh."""
    rows = summary[summary.strategy != "Full"]
    change = rows.assign(change=100 * rows.difference_value / (rows.value - rows.difference_value))
    table = change.pivot(index="strategy", columns="task", values="change")
    table = table.loc[table.mean(axis=1).sort_values(ascending=False).index, list(dict.fromkeys(rows.task))]
    figure, axis = _axes(8.2, 0.6 + 0.27 * len(table))
    seaborn.heatmap(
        table, ax=axis, cmap="RdBu", center=0, vmin=-100, vmax=100, annot=True, fmt=".0f", annot_kws={"fontsize": 7},
        cbar_kws={"label": "change of the score (% of Full's)"},
    )  # fmt: skip
    axis.set(xlabel="", ylabel="")
    axis.tick_params(axis="x", rotation=35)
    axis.tick_params(axis="y", rotation=0)
    return figure


def share_by_text(rows: pd.DataFrame) -> Figure:
    """Prefill of LLaVA-1.5-7B relative to Full, against the number of text tokens; dots: what the paper prints."""
    figure, axis = _axes(7.2, 3.2)
    for (case, found), dash in zip(rows.groupby("case", sort=False), ("-", "--", ":"), strict=True):
        (line,) = axis.plot(found.text, found.percent, dash, label=case)
        reported = found.reported.iloc[0]
        nearest = found.iloc[(found.percent - reported).abs().argmin()]
        axis.plot(nearest.text, reported, "o", color=line.get_color())
        axis.annotate(
            f"{reported:.1f} % at {nearest.text:.0f}", (nearest.text, reported), xytext=(6, -11), textcoords="offset points",
            fontsize=7,
        )  # fmt: skip
    axis.set(
        xlabel="text tokens in the prompt", ylabel="multiply-accumulates\n(% of Full)", xlim=(rows.text.min(), rows.text.max())
    )
    axis.legend(loc="lower right")
    return figure


def decode_reads(rows: pd.DataFrame) -> Figure:
    """Bytes that one decode step reads, against the batch, and by how much less a pruned cache would take at best."""
    figure, axes = _axes(9.2, 3.1, 2)
    for (case, found), dash in zip(rows.groupby("case", sort=False), ("-", "--", ":", "-."), strict=False):
        axes[0].plot(found.batch, found.gib, dash, label=case)
        if case != "Full":
            axes[1].plot(found.batch, found.faster, dash, label=case, color=axes[0].lines[-1].get_color())
    axes[0].set(xlabel="batch (rows)", ylabel="read in a decode step (GiB)", xscale="log", yscale="log")
    axes[1].set(xlabel="batch (rows)", ylabel="decode speed-up at best\n(1 = as Full)", xscale="log", ylim=(0.9, None))
    axes[1].axhline(1, color="black", linewidth=0.8)
    axes[0].legend(loc="upper left")
    return figure


def saving_realised(results: pd.DataFrame) -> Figure:
    """The share of the ideal saving that was measured, with 95 % intervals; ticks: the bars set beforehand."""
    figure, axis = _axes(7.2, 0.9 + 0.35 * len(results))
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


def training_curves(history: pd.DataFrame) -> Figure:
    """Loss, cost and spread of the rates over training, one line a budget; dashed: the budget asked for."""
    figure, axes = _axes(9.6, 3.0, 3)
    labels = {
        "task": "cross-entropy (nats a token)",
        "cost": "kept share of image tokens",
        "spread": "deviation of the kept share",
    }
    palette = seaborn.color_palette("viridis", history.budget.nunique())
    for colour, (budget, rows) in zip(palette, history.groupby("budget"), strict=True):
        for axis, (column, label) in zip(axes, labels.items(), strict=True):
            axis.plot(rows.step, rows[column].rolling(10, min_periods=1).mean(), color=colour, label=f"{budget:g}")
            axis.set(xlabel="training step", ylabel=label)
        axes[1].axhline(budget, color=colour, linestyle="--", linewidth=0.8)
    axes[0].legend(title="budget", loc="best")
    return figure


def signs_of_failure(rows: pd.DataFrame) -> Figure:
    """One panel a sign: what was measured at each budget, and, shaded, where it warns."""
    names = list(dict.fromkeys(rows.sign))
    lines = -(-len(names) // 4)
    figure = Figure(figsize=(10.8, 2.3 * lines))
    axes = figure.subplots(lines, 4, squeeze=False).flatten()
    for axis, name in zip(axes, names, strict=False):
        found = rows[rows.sign == name]
        x = np.arange(len(found))
        axis.scatter(x, found.measured, c=np.where(found.warns, "#D55E00", "#0072B2"), zorder=3)
        limit = found.limit.iloc[0]
        ends = [0, *found.measured, *found.limit.dropna()]
        low, high = min(ends), max(ends)
        edge = 0.12 * (high - low) or 1
        if pd.notna(limit):
            axis.axhline(limit, color="#D55E00", linewidth=0.8)
            axis.axhspan(limit, high + edge if found.above.iloc[0] else low - edge, color="#D55E00", alpha=0.12, linewidth=0)
        axis.set_xticks(x, [f"{b:g}" for b in found.budget])
        axis.set(
            title=name, xlabel="budget", ylabel=found.unit.iloc[0], xlim=(-0.5, len(found) - 0.5), ylim=(low - edge, high + edge)
        )
        axis.title.set_fontsize(9)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    return figure


def gradient_truth(rows: pd.DataFrame, rate: float) -> Figure:
    """Loss at constant rates (line), and the loss that the gradient at one of them foretells (dashed); one panel a task."""
    tasks = list(dict.fromkeys(rows.task))
    figure, axes = _axes(4.4 * len(tasks), 3.0, len(tasks), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        mean = rows[rows.task == task].groupby("rate")[["loss", "foretold"]].mean()
        axis.plot(mean.index, mean.loss, "o-", color="#0072B2", label="measured")
        axis.plot(mean.index, mean.foretold, "--", color="#D55E00", label="foretold by the gradient")
        axis.axvline(rate, color="black", linewidth=0.8)
        low, high = mean.loss.min(), mean.loss.max()
        edge = 0.5 * (high - low) + 0.02
        axis.set(title=task.replace("_", " "), xlabel="constant rate (share dropped)", ylabel="cross-entropy (nats a token)")
        axis.set_ylim(low - edge, high + edge)
        axis.title.set_fontsize(9)
    axes[0, 0].legend(loc="best")
    return figure


def budget_met(rows: pd.DataFrame) -> Figure:
    """The budget asked for and the mean kept share of real generation on unseen data, with 95 % intervals."""
    figure, axis = _axes(4.2, 3.4)
    error = np.stack([rows.value - rows.low, rows.high - rows.value])
    axis.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    axis.errorbar(rows.budget, rows.value, error, fmt="o", color="#0072B2", capsize=3)
    axis.set(xlabel="budget asked for (kept share)", ylabel="measured in generation", xlim=(0, 1), ylim=(0, 1))
    return figure


def rates_over_steps(rows: pd.DataFrame) -> Figure:
    """The predicted rate at each generation step, mean over answers with its 10th to 90th percentile, one line a task."""
    figure, axis = _axes(7.2, 3.1)
    for task, dash in zip(dict.fromkeys(rows.task), ("-", "--", ":", "-.") * 4, strict=False):
        found = rows[rows.task == task].groupby("step").rate
        mean, low, high = found.mean(), found.quantile(0.1), found.quantile(0.9)
        (line,) = axis.plot(mean.index, mean, dash, label=task.replace("_", " "), color=TASK_COLOURS.get(task))
        axis.fill_between(mean.index, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set(xlabel="generation step (token)", ylabel="predicted rate\n(share of image tokens to drop)", ylim=(-0.02, 1.02))
    axis.legend(loc="best", ncols=2)
    return figure


def rates_by_image(rows: pd.DataFrame) -> Figure:
    """The rate at each step, one row a sequence, ordered by mean rate; blank after the end."""
    grid = rows.pivot(index="sequence", columns="step", values="rate")
    grid = grid.loc[grid.mean(axis=1).sort_values().index]
    figure, axis = _axes(7.2, 0.9 + 0.1 * len(grid))
    shown = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="none")
    axis.set(xlabel="generation step (token)", ylabel="image")
    axis.grid(False)
    axis.set_yticks([])
    figure.colorbar(shown, label="predicted rate\n(share to drop)")
    return figure


def predictor_weights(weights: np.ndarray) -> Figure:
    """What each head's attention to each segment does to the rate: (head, 4), change of the mean logit-weighted rate."""
    figure, axis = _axes(5.6, 2.6)
    limit = float(np.abs(weights).max()) or 1.0
    seaborn.heatmap(
        pd.DataFrame(weights.T, index=list(SEGMENTS)), ax=axis, cmap="RdBu_r", center=0, vmin=-limit, vmax=limit,
        cbar_kws={"label": "towards dropping more"},
    )  # fmt: skip
    axis.set(xlabel="attention head of the observed layer", ylabel="")
    axis.tick_params(rotation=0)
    return figure


def loss_by_share(constant: pd.DataFrame, learned: pd.DataFrame) -> Figure:
    """Teacher-forced loss of a constant rate over what it keeps, and of each trained predictor at what it keeps."""
    figure, axis = _axes(7.2, 3.2)
    axis.plot(constant.kept, constant.loss, "-", color="#777777", label="constant rate")
    axis.fill_between(constant.kept, constant.low, constant.high, color="#777777", alpha=0.2, linewidth=0)
    error = np.stack([learned.loss - learned.low, learned.high - learned.loss])
    axis.errorbar(learned.kept, learned.loss, error, fmt="o", color="#D55E00", capsize=3, label="DyRate")
    axis.set(xlabel="mean kept share of image tokens", ylabel="cross-entropy (nats a token)")
    axis.legend(loc="upper right")
    return figure


def forest(rows: pd.DataFrame, xlabel: str) -> Figure:
    """Differences with their intervals: one panel a question, one line a task; zero is no difference. CIDEr is drawn / 10."""
    scale = np.where(rows.task == "caption", 0.1, 1.0)
    rows = rows.assign(**{k: rows[k] * scale for k in ("value", "low", "high")})
    rows["task"] = rows.task.replace("caption", "caption / 10")
    questions = list(dict.fromkeys(rows.question))
    figure, axes = _axes(9.8, 0.8 + 0.34 * rows.task.nunique(), len(questions), sharey=True)
    for axis, question in zip(np.atleast_1d(axes), questions, strict=True):
        found = rows[rows.question == question]
        y = np.arange(len(found))[::-1]
        error = np.stack([found.value - found.low, found.high - found.value])
        axis.errorbar(found.value, y, xerr=error, fmt="o", color="#0072B2", capsize=2.5)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(y, found.task.str.replace("_", " "))
        axis.set_title(question.replace(" against ", "\nagainst "), fontsize=8)
        axis.set_xlabel(xlabel)
    return figure


def mean_schedules(rows: pd.DataFrame) -> Figure:
    """Kept share at each step of generation, mean over answers: what each schedule does over time."""
    figure, axis = _axes(7.2, 3.0)
    for name, dash in zip(dict.fromkeys(rows.strategy), ("-", "--", ":", "-.") * 4, strict=False):
        found = rows[rows.strategy == name].groupby("step").kept.mean()
        axis.plot(found.index, found, dash, label=name)
    axis.set(xlabel="generation step (token)", ylabel="kept share of image tokens", ylim=(0, 1.02))
    axis.legend(loc="upper right", ncols=2, fontsize=7)
    return figure


def ablation_dots(table: pd.DataFrame, unit: str) -> Figure:
    """Mean score of each ablation with its interval, one panel a group; the kept share beside each label."""
    groups = list(dict.fromkeys(table.group))
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(10.2, 2.3 * lines))
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, group in zip(axes, groups, strict=False):
        rows = table[table.group == group]
        y = np.arange(len(rows))[::-1]
        error = np.stack([rows.value - rows.low, rows.high - rows.value])
        axis.errorbar(rows.value, y, xerr=error, fmt="o", color="#0072B2", capsize=2.5)
        axis.set_yticks(
            y, [f"{label} ({100 * kept:.0f} %)" for label, kept in zip(rows.label, rows.kept, strict=True)], fontsize=8
        )
        axis.set_title(group, fontsize=9)
        axis.set(xlabel=unit, ylim=(-0.6, len(rows) - 0.4))
    for axis in axes[len(groups) :]:
        axis.set_visible(False)
    return figure


def kept_patches(picture, masks: np.ndarray, words: list[str], shown: int = 5) -> Figure:
    """The paper's Fig. 4: which patches are left at some steps, and the dropped share over all. masks: (step, patch)."""
    side = round(masks.shape[1] ** 0.5)
    steps = np.unique(np.linspace(0, len(masks) - 1, shown).round().astype(int))
    figure, axes = _axes(11.5, 2.3, len(steps) + 1, width_ratios=[1] * len(steps) + [1.6])
    for axis, step in zip(axes, steps, strict=False):
        axis.imshow(dimmed(picture, masks[step].reshape(side, side)))
        axis.set_title(f"step {step}: {words[step]}", fontsize=8)
        axis.set_axis_off()
    rates = 1 - masks.mean(1)
    axes[-1].step(range(len(rates)), rates, where="mid", color="#D55E00")
    axes[-1].plot(steps, rates[steps], "o", color="#D55E00", markersize=4)
    axes[-1].set(xlabel="generation step (token)", ylabel="dropped share", ylim=(-0.02, 1.02))
    return figure


def dimmed(picture, kept: np.ndarray) -> np.ndarray:
    """A picture whose dropped patches are almost white; kept: (row, column)."""
    pixels = np.asarray(picture.convert("RGB"), float) / 255
    height, width = pixels.shape[:2]
    rows = np.arange(height) * kept.shape[0] // height
    columns = np.arange(width) * kept.shape[1] // width
    return np.where(kept[rows][:, columns][..., None], pixels, 0.12 * pixels + 0.88)


def swapped_columns(rows: pd.DataFrame) -> Figure:
    """What the paper prints and what another report has for the same model and data set, in both readings of its columns."""
    figure, axes = _axes(7.2, 2.6, 2, sharey=True, sharex=True)
    for axis, (reading, found) in zip(axes, rows.groupby("reading", sort=False), strict=True):
        y = np.arange(len(found))[::-1]
        axis.hlines(y, found.paper, found.report, color="#bbbbbb", linewidth=2.5)
        axis.plot(found.report, y, "o", color="#0072B2", markersize=9, markerfacecolor="none", markeredgewidth=1.6,
                  label="FastV's report")  # fmt: skip
        axis.plot(found.paper, y, "o", color="#D55E00", markersize=5, label="the paper")
        axis.set_yticks(y, found.case)
        axis.set(title=reading, xlabel="CIDEr x 100", xlim=(60, 120), ylim=(-0.6, len(found) - 0.4))
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2)
    return figure


def mixed_protocols(panels: dict[str, pd.DataFrame], unpruned: dict[str, dict[str, float]]) -> Figure:
    """One column of a table a panel, its rows told apart by protocol. panels: title -> rows of model, value, protocol.

    unpruned: title -> protocol -> the unpruned model's figure, a line in the protocol's colour; grey: protocol not stated.
    """
    figure, axes = _axes(8.2, 3.4, len(panels))
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        y = pd.Series(np.arange(len(rows))[::-1], index=rows.index)
        known = [name for name in rows.protocol.unique() if not name.endswith("not stated")]
        looks = dict(zip(known, (("#0072B2", "o"), ("#D55E00", "s")), strict=True))
        for name, found in rows.groupby("protocol", sort=False):
            colour, mark = looks.get(name, ("#777777", "^"))
            axis.plot(found.value, y[found.index], mark, color=colour, label=name)
            if name in unpruned[title]:
                axis.axvline(unpruned[title][name], color=colour, linestyle="--", linewidth=1.2)
        axis.set_yticks(y, rows.model)
        axis.set(xlabel=title)
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def share_and_macs(rows: pd.DataFrame, lines: dict[str, float], dots: pd.DataFrame) -> Figure:
    """Prefill cost over the kept share of image tokens. lines: levels by name.

    dots: printed figures, with `kept`, `percent`, `name` and the name's `offset` in points.
    """
    figure, axis = _axes(7.2, 3.6)
    for (case, found), colour, dash in zip(rows.groupby("case", sort=False), ("#0072B2", "#E69F00"), ("-", "--"), strict=True):
        axis.fill_between(found.kept, found.low, found.high, color=colour, alpha=0.35, linewidth=0)
        axis.plot(found.kept, (found.low + found.high) / 2, dash, color=colour, label=case)
    for name, level in lines.items():
        axis.axhline(level, color="black", linewidth=0.9, linestyle=":")
        axis.annotate(name, (1, level), xytext=(0, 3), textcoords="offset points", ha="right", fontsize=9)
    for dot in dots.itertuples():
        axis.plot(dot.kept, dot.percent, "o", color="#D55E00", markersize=6)
        axis.annotate(dot.name, (dot.kept, dot.percent), xytext=dot.offset, textcoords="offset points", fontsize=9)
    axis.set(
        xlabel="share of image tokens kept in the prefill", ylabel="multiply-accumulates left\n(% of no pruning)", xlim=(0, 1),
        ylim=(0, 100),
    )  # fmt: skip
    axis.legend(loc="upper left")
    return figure
