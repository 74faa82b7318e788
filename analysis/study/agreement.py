"""How well a ranking of image tokens agrees with what they are worth: over a whole answer, and in each third of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from dyrate.seen import kept_count

RETENTION = 0.25  # of `captured`
PARTS = ("all", "first third", "second third", "last third")


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's correlation of the rows of two arrays (n, token), (n,); equals share a mean rank. NaN where all are equal."""
    a, b = (pd.DataFrame(x).rank(axis=1).to_numpy() for x in (a, b))
    a, b = (x - x.mean(1, keepdims=True) for x in (a, b))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))


def captured(score: np.ndarray, worth: np.ndarray, retention: float = RETENTION) -> np.ndarray:
    """Of the worth (n, token) of all tokens the share that those have which the score ranks first, (n,); of equals the first."""
    kept = np.argsort(-score, axis=1, kind="stable")[:, : kept_count(score.shape[1], retention)]
    return np.take_along_axis(worth, kept, 1).sum(1) / worth.sum(1)


def parts_of(n_steps: int) -> list[np.ndarray]:
    """The steps of each of PARTS in an answer of so many tokens."""
    steps = np.arange(n_steps)
    return [steps, *np.array_split(steps, 3)]


def once(score: np.ndarray, worth: np.ndarray) -> Iterator[dict]:
    """A ranking made once, (token,), against the worth (step, token) in each part of an answer."""
    for part, steps in zip(PARTS, parts_of(len(worth)), strict=True):
        yield {"part": part} | _agreement(score[None], worth[steps].sum(0)[None])


def each_step(score: np.ndarray, worth: np.ndarray) -> Iterator[dict]:
    """Rankings made at every step, (step, token), each against the worth (step, token) at its own step; mean over a part's steps.

    What one step reads is worth little at most steps, so `captured` is of the part's worth, by the mean score of its steps.
    """
    correlation = spearman(score, worth)
    for part, steps in zip(PARTS, parts_of(len(worth)), strict=True):
        summed = score[steps].sum(0)[None], worth[steps].sum(0)[None]
        yield {"part": part} | _agreement(*summed) | {"rho_step": np.nanmean(correlation[steps])}


def _agreement(score: np.ndarray, worth: np.ndarray) -> dict:
    return {"rho": spearman(score, worth)[0], "captured": captured(score, worth)[0]}


def rows(samples: Sequence[str], found: Sequence[Iterator[dict]], **columns) -> list[dict]:
    """One row for each sample and part."""
    return [{"sample": sample} | columns | row for sample, of in zip(samples, found, strict=True) for row in of]
