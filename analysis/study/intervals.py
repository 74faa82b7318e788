"""Means with bootstrap intervals over samples and seeds, and what an interval says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import pandas as pd

MATTERS = 0.01  # of the unpruned score: a smaller difference counts as none, said before anything was measured


def bootstrap(
    values: Sequence[float], statistic: Callable | None = None, *, of_means: Callable | None = None, resamples: int = 2000,
    seed: int = 0, level: float = 0.95,
) -> dict:  # fmt: skip
    """A statistic over samples with its percentile bootstrap interval: {"value", "low", "high", "n"}.

    values: one number, or one row of numbers, per sample; samples (not their parts) are resampled, single NaN numbers left
    out. statistic: called with `axis=0`; without one the mean, or of_means of it: a function of mean rows, along the last axis,
    such as a ratio of sums. The interval of a single sample is unbounded, for it says nothing of others.
    """
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)] if values.ndim == 1 else values
    n = len(values)
    if n == 0:
        return {"value": float("nan"), "low": float("nan"), "high": float("nan"), "n": 0}
    if statistic is None:
        of_means = of_means or np.asarray
        value, resampled = of_means(values.mean(0)), of_means(_resampled_means(values, resamples, seed))
    else:
        rng = np.random.default_rng(seed)
        value = statistic(values, axis=0)
        resampled = [statistic(values[rng.integers(0, n, n)], axis=0) for _ in range(resamples)]
    tail = (1 - level) / 2
    low, high = np.nanquantile(resampled, [tail, 1 - tail], axis=0) if n > 1 else (-np.inf, np.inf)
    if values.ndim == 1:
        return {"value": float(value), "low": float(low), "high": float(high), "n": n}
    return {"value": value, "low": low, "high": high, "n": n}


def bootstrap_crossed(values: np.ndarray, *, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> dict:
    """The mean over samples and seeds with a percentile interval over both: {"value", "low", "high", "n", "seeds"}.

    values: (sample, seed), each seed measured on every sample. Samples and seeds are resampled independently, so that the
    interval covers other samples and other trainings alike; with one seed, or one sample, it is `bootstrap`'s.
    """
    values = np.asarray(values, dtype=float)
    n, seeds = values.shape
    if n == 0:
        return {"value": float("nan"), "low": float("nan"), "high": float("nan"), "n": 0, "seeds": seeds}
    rng = np.random.default_rng(seed)
    samples, trainings = (_counts(rng.integers(0, size, (resamples, size)), size) for size in (n, seeds))
    resampled = ((samples @ values) * trainings).sum(1) / (n * seeds)
    tail = (1 - level) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail]) if n > 1 else (-np.inf, np.inf)
    return {"value": float(values.mean()), "low": float(low), "high": float(high), "n": n, "seeds": seeds}


def _resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """The mean in each resample: one number, or one row, each."""
    n = len(values)
    if n < 5000:
        return _drawn(n, resamples, seed) @ values / n
    rng = np.random.default_rng(seed)
    return np.stack([values[rng.integers(0, n, n)].mean(0) for _ in range(resamples)])


@lru_cache(maxsize=4)
def _drawn(n: int, resamples: int, seed: int) -> np.ndarray:
    """How often each sample was drawn in each resample, (resample, sample): whole numbers, for products of floats."""
    return _counts(np.random.default_rng(seed).integers(0, n, (resamples, n)), n).astype(float)


def _counts(drawn: np.ndarray, size: int) -> np.ndarray:
    """How often each of `size` things was drawn, (resample, thing). drawn: (resample, draw)."""
    offset = size * np.arange(len(drawn))[:, None]
    return np.bincount((drawn + offset).ravel(), minlength=size * len(drawn)).reshape(len(drawn), size)


def interpolated(costs: pd.Series, scores: pd.DataFrame, cost: float) -> pd.Series:
    """Each sample's score at a cost, on the line between the two nearest measured ones; NaN outside of all.

    costs: of what was measured, by name; scores: (sample, name).
    """
    costs = costs.sort_values()
    above = int(np.searchsorted(costs, cost - 1e-6))
    if above < len(costs) and np.isclose(costs.iloc[above], cost):
        return scores[costs.index[above]]
    if above in (0, len(costs)):
        return pd.Series(np.nan, index=scores.index)
    low, high = (scores[costs.index[i]] for i in (above - 1, above))
    part = (cost - costs.iloc[above - 1]) / (costs.iloc[above] - costs.iloc[above - 1])
    return (1 - part) * low + part * high


def in_words(number, form: str = ".2f") -> str:
    """A number with its interval; it and its ends in one format."""
    return f"{number['value']:{form}} ({number['low']:{form}} to {number['high']:{form}})"


def verdict(difference: Mapping) -> str:
    """What the interval of a paired difference says, as words to stand between the names of its two sides."""
    if difference["low"] > 0:
        return "scores higher than"
    return "scores lower than" if difference["high"] < 0 else "shows no significant difference from"


def against_bound(difference: Mapping, bound: float = MATTERS) -> str:
    """What an interval says about differences of at least a bound: a small sample's wide interval leaves it undecided."""
    low, high = difference["low"], difference["high"]
    if low > bound or high < -bound:
        return "better" if low > bound else "worse"
    return "equivalent" if low > -bound and high < bound else "undecided"
