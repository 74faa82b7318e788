"""Prefill at batch 1 and decode at batch 8 on any machine: plain, pruned and native in turn, against bars set beforehand."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch

import dyrate
from dyrate.atomic import write_whole
from dyrate.cost import Shape
from dyrate.seen import kept_count
from dyrate.strategy import Strategy
from study.bench import results
from study.bench.machine import name_of_device
from study.bench.results import SMALL_BARS
from study.bench.runs import Timing, build, forced, in_turn, timed

BUDGET = 0.33
STEPS = 17  # new tokens of the answers whose decode steps are timed


def prune(shape: Shape, new_tokens: int, repeats: int, out: Path | None = None) -> None:
    """Measure and print all cases, and what deciding costs; out: also write them there, as JSON.

    new_tokens: of the answers by which keeping every token is compared with plain `generate`.
    """
    model = build(shape)
    rows, ratios = [], {}
    for name, (batch, length, retention, strategy) in cases(shape, new_tokens).items():
        ways = {"plain": partial(timed, model, batch), "strategy": partial(timed, model, batch, strategy=strategy)}
        if retention < 1:
            ways["limit"] = partial(timed, model, batch, native=kept_count(shape.patches - 1, retention))
        runs = in_turn(ways, length, repeats * (3 if batch == 1 else 1))  # short runs are noisier
        ratios[name] = headline(runs, name.startswith("prefill"), length)
        rows += [{"case": name, "way": way} | medians(timings) for way, timings in runs.items()]
    decided = [timed(model, 8, STEPS, forced(shape, BUDGET, STEPS), deciding=True) for _ in range(repeats)]
    ratios["deciding_share"] = results.deciding_share(decided)
    about = {
        "device": name_of_device(), "image_tokens": shape.patches - 1, "layers": shape.layers, "width": shape.width,
        "torch": torch.__version__, "budget": BUDGET, "retention": decided[0].retention,
    }  # fmt: skip
    show(about, rows, ratios)
    if out:
        content = {"about": about, "bars": SMALL_BARS, "results": ratios, "table": rows}
        write_whole(out, json.dumps(content, indent=1) + "\n")


def cases(shape: Shape, new_tokens: int) -> dict[str, tuple[int, int, float, Strategy]]:
    """By the name of the result: batch, new tokens, retention, strategy."""
    return {
        "keep1_over_plain": (1, new_tokens, 1.0, dyrate.FastV(rate=0.0)),
        "prefill_realised_r50": (1, 1, 0.5, dyrate.FastV(rate=0.5)),
        "prefill_realised_r90": (1, 1, 0.1, dyrate.FastV(rate=0.9)),
        "decode_b8_r90_realised": (8, STEPS, 0.1, dyrate.FastV(rate=0.9)),
        "decode_b8_r90_each_step_realised": (8, STEPS, 0.1, dyrate.LinearAnneal(start=0.9, end=0.95, steps=100)),
        "decode_b8_r90_mask_realised": (8, STEPS, 0.1, dyrate.Constant(rate=0.9, residency="mask")),
        "decode_b8_dyrate_realised": (8, STEPS, BUDGET, forced(shape, BUDGET, STEPS)),
    }


def headline(runs: dict[str, list[Timing]], prefill: bool, new_tokens: int) -> dict:
    """The realised share of the saving in the prefill or a decode step; without a limit, whole answers' time over plain."""
    if "limit" in runs:
        return results.realised(*([t.prefill if prefill else t.step for t in runs[w]] for w in ("plain", "strategy", "limit")))
    return results.ratio(*([t.prefill + t.step * (new_tokens - 1) for t in runs[way]] for way in ("strategy", "plain")))


def medians(timings: list[Timing]) -> dict[str, float]:
    """Of the times and the cache of one way to run a case."""
    values = np.median([(1000 * t.prefill, 1000 * t.step, t.cache / 2**20) for t in timings], axis=0)
    return dict(zip(("prefill_ms", "ms_per_token", "cache_mib"), values, strict=True))


def show(about: dict, rows: list[dict], ratios: dict[str, dict]) -> None:
    """Print the times behind the ratios, and the ratios beside their bars."""
    print("{image_tokens} image tokens, {layers} layers x {width}, first pruned layer 2, {device}".format(**about))
    print(f"{'case':34}{'way':10}{'prefill ms':>12}{'ms / token':>12}{'cache MiB':>12}")
    for row in rows:
        print("{case:34}{way:10}{prefill_ms:12.1f}{ms_per_token:12.2f}{cache_mib:12.1f}".format(**row))
    results.show(ratios, SMALL_BARS)
