"""Ratios of times with intervals over repeats, and the bars that were set for them before anything was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from study.bench.runs import Timing
from study.intervals import bootstrap

SMALL_BARS = {
    "keep1_over_plain": 1.03, "prefill_realised_r50": 0.95, "prefill_realised_r90": 0.95, "decode_b8_r90_realised": 0.92,
    "decode_b8_r90_each_step_realised": 0.92, "decode_b8_dyrate_realised": 0.9, "decode_b8_r90_mask_realised": 0.5,
    "deciding_share": 0.03, "pocket_step_over_plain": 1.05,
}  # fmt: skip
TABLE3_BARS = {"prefill_realised_r50": 0.9, "prefill_realised_r90": 0.9, "decode_b64_r90_realised": 0.75, "deciding_share": 0.03}
AT_MOST = {"keep1_over_plain", "deciding_share", "pocket_step_over_plain"}  # the others are lower bounds


def verdict(results: dict[str, dict], name: str, bar: float) -> str:
    """Whether a result meets its bar: "met", "missed" or "not measured"."""
    if name not in results:
        return "not measured"
    value = results[name]["value"]
    return "met" if (value <= bar if name in AT_MOST else value >= bar) else "missed"


def realised(plain: Sequence[float], pruned: Sequence[float], limit: Sequence[float], whole: float = 0.0) -> dict:
    """The share of the ideal saving, (plain - pruned) / (plain - ideal), of medians over repeats.

    whole: the share of layers that see every token and lie in both: the ideal is plain in them, and the limit in the rest.
    """

    def share(x, axis):
        full, mine, best = np.median(x, axis=axis)
        return (full - mine) / ((full - best) * (1 - whole))

    return _interval(np.array([plain, pruned, limit]).T, share)


def ratio(over: Sequence[float], under: Sequence[float]) -> dict:
    """One median over another."""
    return _interval(np.array([over, under]).T, lambda x, axis: np.divide(*np.median(x, axis=axis)))


def deciding_share(timings: Sequence[Timing]) -> dict:
    """Observation, predictor and dropping as a share of decode time, median over repeats."""
    return _interval([t.deciding.sum() / t.steps.sum() for t in timings], np.median)


def _interval(values, statistic: Callable) -> dict:
    """With the bootstrap interval over repeats, whose runs are drawn together; plain numbers, for a file."""
    interval = bootstrap(values, statistic, resamples=1000)
    return {k: float(v) for k, v in interval.items() if k != "n"} | {"n": int(interval["n"])}


def show(results: dict[str, dict], bars: dict[str, float]) -> None:
    """Print every result with its interval and its bar, and the bars whose result is missing."""
    for name in results | bars:
        line = f"{name:34}"
        if name in results:
            line += "{value:7.3f}  ({low:.3f} to {high:.3f}, n = {n})".format(**results[name])
        print(line + (f"  bar {bars[name]:g}: {verdict(results, name, bars[name])}" if name in bars else ""))
