"""Prefill at batch 1 and decode at batch 8 on any machine: plain, pruned and native in turn, against bars set beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

import dyrate
from dyrate.atomic import write_whole
from dyrate.cost import Shape
from dyrate.seen import kept_count
from study.bench import results
from study.bench.machine import name_of_device
from study.bench.profile import where_time_goes
from study.bench.results import SMALL_BARS
from study.bench.runs import Timing, build, forced, in_turn, timed

BATCH, BUDGET, FIRST = 8, 0.33, 2
STEPS = 17  # new tokens of the answers whose decode steps are timed
POCKET = "evict-0.33-seed0"  # the predictor for the pocket LLaVA
DECODED = {  # result: way, and which share of the image tokens its limit has
    "decode_b8_r90_realised": ("fixed", 0.1),
    "decode_b8_r90_each_step_realised": ("each step", 0.1),
    "decode_b8_r90_mask_realised": ("mask", 0.1),
    "decode_b8_dyrate_realised": ("DyRate", BUDGET),
}


def prune(shape: Shape, new_tokens: int, repeats: int, out: Path | None = None) -> None:
    """Measure and print all ratios, and where a step's time goes; out: also write them there, as JSON.

    new_tokens: of the answers by which keeping every token is compared with plain `generate`.
    """
    model = build(shape)
    measured = {
        "whole": in_turn(whole(model), new_tokens, 3 * repeats),  # short runs are noisier
        "prefill": in_turn(prefills(model), 1, 3 * repeats),
        "decode": in_turn(decodes(model, shape), STEPS, repeats),
        "pocket": in_turn(pocket(), STEPS, 3 * repeats),
    }
    decided = [timed(model, BATCH, STEPS, forced(shape, BUDGET, STEPS), deciding=True) for _ in range(repeats)]
    ratios = headlines(measured, shape.layers) | {"deciding_share": results.deciding_share(decided)}
    about = {
        "device": name_of_device(), "image_tokens": shape.patches - 1, "layers": shape.layers, "width": shape.width,
        "torch": torch.__version__, "batch": BATCH, "budget": BUDGET, "retention": decided[0].retention,
    }  # fmt: skip
    rows = [{"case": case, "way": way} | medians(t) for case, ways in measured.items() for way, t in ways.items()]
    spent = {
        way: where_time_goes(model, BATCH, STEPS, strategy)
        for way, strategy in (("plain", None), ("DyRate", forced(shape, BUDGET, STEPS)))
    }
    show(about, rows, ratios)
    if out:
        content = {"about": about, "bars": SMALL_BARS, "results": ratios, "table": rows, "profile": spent}
        write_whole(out, json.dumps(content, indent=1) + "\n")


def whole(model) -> dict[str, Callable]:
    """Whole answers, plain and with a strategy that keeps all."""
    return {"plain": partial(timed, model, 1), "all kept": partial(timed, model, 1, strategy=dyrate.FastV(rate=0.0))}


def prefills(model) -> dict[str, Callable]:
    """Prefill alone at batch 1."""
    ways = {"plain": partial(timed, model, 1)}
    for rate in (0.5, 0.9):
        ways[f"R = {rate:g}"] = partial(timed, model, 1, strategy=dyrate.FastV(rate=rate))
        ways[f"limit, R = {rate:g}"] = partial(timed, model, 1, native=_native(model, 1 - rate))
    return ways


def decodes(model, shape: Shape) -> dict[str, Callable]:
    """Answers at batch 8; the limits and plain `generate` also with a cache that adds in place, as strategies have it."""
    strategies = {
        "all kept": dyrate.FastV(rate=0.0), "fixed": dyrate.FastV(rate=0.9),
        "each step": dyrate.LinearAnneal(start=0.9, end=0.95, steps=100),
        "mask": dyrate.Constant(rate=0.9, residency="mask"), "DyRate": forced(shape, BUDGET, STEPS),
    }  # fmt: skip
    ways = {way: partial(timed, model, BATCH, strategy=strategy) for way, strategy in strategies.items()}
    for suffix, in_place in (("", False), (", in place", True)):
        ways[f"plain{suffix}"] = partial(timed, model, BATCH, in_place=in_place)
        for retention in (0.1, BUDGET):
            native = _native(model, retention)
            ways[f"limit, {retention:g}{suffix}"] = partial(timed, model, BATCH, native=native, in_place=in_place)
    return ways


def pocket() -> dict[str, Callable]:
    """Answers of the pocket LLaVA at batch 1, plain and with a trained predictor."""
    model, _ = dyrate.load("pocket", device="cpu")
    strategy = dyrate.DyRate.from_pretrained(Path(dyrate.__file__).parents[1] / "data/pocket/dyrate" / POCKET)
    return {"plain": partial(timed, model, 1), "DyRate": partial(timed, model, 1, strategy=strategy)}


def _native(model, retention: float) -> int:
    return kept_count(model.config.image_seq_length, retention)


def headlines(measured: dict[str, dict[str, list[Timing]]], layers: int) -> dict[str, dict]:
    """The ratios that have bars, and beside each decode's the same with the same cache on all sides."""

    def steps(case: str, way: str) -> list[float]:
        return [t.step for t in measured[case][way]]

    def answers(way: str) -> list[float]:
        return [t.prefill + float(t.steps.sum()) for t in measured["whole"][way]]

    ratios = {"keep1_over_plain": results.ratio(answers("all kept"), answers("plain"))}
    for name, rate in (("prefill_realised_r50", "0.5"), ("prefill_realised_r90", "0.9")):
        ways = ("plain", f"R = {rate}", f"limit, R = {rate}")
        ratios[name] = results.realised(*([t.prefill for t in measured["prefill"][way]] for way in ways), FIRST / layers)
    for name, (way, retention) in DECODED.items():
        for key, suffix in ((name, ""), (f"{name}_in_place", ", in place")):
            ways = (f"plain{suffix}", way, f"limit, {retention:g}{suffix}")
            ratios[key] = results.realised(*(steps("decode", w) for w in ways), FIRST / layers)
    ratios["in_place_over_plain"] = results.ratio(steps("decode", "plain, in place"), steps("decode", "plain"))
    return ratios | {"pocket_step_over_plain": results.ratio(steps("pocket", "DyRate"), steps("pocket", "plain"))}


def medians(timings: list[Timing]) -> dict[str, float]:
    """Of the times and the cache of one way to run a case."""
    values = np.median([(1000 * t.prefill, 1000 * t.step, t.cache / 2**20) for t in timings], axis=0)
    return dict(zip(("prefill_ms", "ms_per_token", "cache_mib"), values, strict=True))


def show(about: dict, rows: list[dict], ratios: dict[str, dict]) -> None:
    """Print the times behind the ratios, and the ratios beside their bars."""
    print("{image_tokens} image tokens, {layers} layers x {width}, first pruned layer 2, {device}".format(**about))
    print(f"{'case':12}{'way':24}{'prefill ms':>12}{'ms / token':>12}{'cache MiB':>12}")
    for row in rows:
        print("{case:12}{way:24}{prefill_ms:12.1f}{ms_per_token:12.2f}{cache_mib:12.1f}".format(**row))
    results.show(ratios, SMALL_BARS)
