"""Which patches of an image are kept while an answer grows."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure


def kept_patches(answers: list, most: int = 5) -> Figure:
    """The paper's Fig. 4 for several answers: which patches are kept at some steps, and the retention ratio over all.

    answers: of `study.chapters.masks.Answer`, a row each. most: steps whose patches are drawn.
    """
    figure = Figure(figsize=(9.8, 1.75 * len(answers)))
    axes = figure.subplots(len(answers), most + 1, squeeze=False, width_ratios=[1] * most + [1.7])
    for row, answer in zip(axes, answers, strict=True):
        side = round(answer.kept.shape[1] ** 0.5)
        steps = np.unique(np.linspace(0, len(answer.kept) - 1, most).round().astype(int))
        for axis, step in zip(row[:-1], steps, strict=False):
            axis.imshow(dimmed(answer.picture, answer.kept[step].reshape(side, side)))
            axis.set_title(f"step {step}: {answer.tokens[step]}", fontsize=8)
        for axis in row[:-1]:
            axis.set_axis_off()
        retention = answer.kept.mean(1)
        row[-1].step(range(len(retention)), retention, where="mid", color="#D55E00")
        row[-1].plot(steps, retention[steps], "o", color="#D55E00", markersize=4)
        row[-1].set(ylabel="retention ratio", ylim=(-0.02, 1.02))
    axes[-1, -1].set_xlabel("generation step (token)")
    return figure


def dimmed(picture, kept: np.ndarray) -> np.ndarray:
    """A picture whose dropped patches are almost white; kept: (row, column)."""
    pixels = np.asarray(picture.convert("RGB"), float) / 255
    height, width = pixels.shape[:2]
    rows = np.arange(height) * kept.shape[0] // height
    columns = np.arange(width) * kept.shape[1] // width
    return np.where(kept[rows][:, columns][..., None], pixels, 0.12 * pixels + 0.88)
