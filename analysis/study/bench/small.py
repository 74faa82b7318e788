"""Prefill at batch 1 and decode at batch 8 on any machine: plain, pruned and native in turn, against bars set beforehand."""

from __future__ import annotations

import json

import numpy as np
import torch

import dyrate
from study.bench.runs import Timing, build, deciding_share, device_name, forced, plain_numbers, realised, small_shape, timed
from dyrate.atomic import write_whole
from study.intervals import bootstrap
from dyrate.seen import kept_count

BARS = {"keep1_over_plain": 1.05, "prefill_realised_r50": 0.9, "prefill_realised_r90": 0.9, "decode_b8_r90_realised": 0.75}
BUDGET = 0.33


def prune(given) -> None:
    shape = small_shape(given.layers, given.width, given.heads, given.side)
    model, n = build(shape), given.side**2
    cases = {  # result: batch, new tokens, dropped share, strategy
        "keep1_over_plain": (1, given.new_tokens, 0.0, dyrate.FastV(rate=0.0)),
        "prefill_realised_r50": (1, 1, 0.5, dyrate.FastV(rate=0.5)),
        "prefill_realised_r90": (1, 1, 0.9, dyrate.FastV(rate=0.9)),
        "decode_b8_r90_realised": (8, 17, 0.9, dyrate.FastV(rate=0.9)),
        "decode_b8_r90_each_step_realised": (8, 17, 0.9, dyrate.LinearAnneal(start=0.9, end=0.95, steps=100)),
        "decode_b8_r90_hide_realised": (8, 17, 0.9, dyrate.Constant(rate=0.9, residency="hide")),
        "decode_b8_dyrate_realised": (8, 17, 1 - BUDGET, forced(shape, BUDGET, 17)),
    }
    rows, results = [], {}
    for name, (batch, new_tokens, rate, strategy) in cases.items():
        ways = {"plain": {}, "strategy": {"strategy": strategy}}
        if rate:
            ways["limit"] = {"native": kept_count(n, 1 - rate)}
        runs = in_turn(model, batch, new_tokens, ways, given.repeats * (3 if batch == 1 else 1))  # short runs are noisier
        results[name] = ratio(runs, new_tokens) if rate == 0 else saving(runs, name.startswith("prefill"))
        for way, found in runs.items():
            values = [(1000 * t.prefill, 1000 * t.step, t.cache / 2**20) for t in found]
            rows.append(dict(zip(("prefill_ms", "ms_per_token", "cache_mib"), np.median(values, axis=0), strict=True))
                        | {"case": name, "way": way})  # fmt: skip
    deciding = [timed(model, 8, 17, forced(shape, BUDGET, 17), deciding=True) for _ in range(given.repeats)]
    results["deciding_share"] = deciding_share(deciding)
    about = {
        "device": device_name(), "image_tokens": n, "layers": given.layers, "width": given.width, "torch": torch.__version__,
        "budget": BUDGET, "mean_kept": deciding[0].kept,
    }  # fmt: skip
    show(about, rows, results)
    if given.out:
        write_whole(given.out, json.dumps({"about": about, "bars": BARS, "results": results, "table": rows}, indent=1) + "\n")


def in_turn(model, batch: int, new_tokens: int, ways: dict[str, dict], repeats: int) -> dict[str, list[Timing]]:
    """Each way once to warm up, then all of them `repeats` times, so that the machine's moods meet every way."""
    for how in ways.values():
        timed(model, batch, min(4, new_tokens), **how)
    runs: dict[str, list[Timing]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, how in ways.items():
            runs[way].append(timed(model, batch, new_tokens, **how))
    return runs


def ratio(runs: dict[str, list[Timing]], new_tokens: int) -> dict:
    """Time of a whole answer with the strategy over that without."""
    whole = [[t.prefill + t.step * (new_tokens - 1) for t in runs[way]] for way in ("strategy", "plain")]
    return plain_numbers(bootstrap(np.array(whole).T, lambda x, axis: np.divide(*np.median(x, axis=axis)), resamples=1000))


def saving(runs: dict[str, list[Timing]], prefill: bool) -> dict:
    return realised(*([t.prefill if prefill else t.step for t in runs[way]] for way in ("plain", "strategy", "limit")))


def show(about: dict, rows: list[dict], results: dict) -> None:
    print("{image_tokens} image tokens, {layers} layers x {width}, first pruned layer 2, {device}".format(**about))
    print(f"{'case':34}{'way':10}{'prefill ms':>12}{'ms / token':>12}{'cache MiB':>12}")
    for row in rows:
        print("{case:34}{way:10}{prefill_ms:12.1f}{ms_per_token:12.2f}{cache_mib:12.1f}".format(**row))
    for name, found in results.items():
        verdict = f"  bar {BARS[name]}: {'met' if met(name, found['value']) else 'missed'}" if name in BARS else ""
        print(f"{name:36}" + "{value:7.3f}  ({low:.3f} to {high:.3f}, n = {n})".format(**found) + verdict)


def met(name: str, value: float) -> bool:
    return value <= BARS[name] if name == "keep1_over_plain" else value >= BARS[name]
