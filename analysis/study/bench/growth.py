"""How the cost of whole answers grows with image tokens, batch and length: plain, pruned, and ideal."""

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
from study.bench.machine import name_of_device
from study.bench.runs import Timing, build, forced, in_turn, timed

FIRST, RETENTION = 2, 0.25
BASE = {"image_tokens": 576, "batch": 8, "new_tokens": 64}
AXES = {"image_tokens": (144, 1440, 2880), "batch": (1, 32), "new_tokens": (16, 512)}  # one at a time, the others as in BASE


def cases() -> list[dict[str, int]]:
    """The base, and each axis's values with the other axes at the base."""
    return [BASE, *(BASE | {axis: value} for axis, values in AXES.items() for value in values)]


def growth(shape: Shape, repeats: int, out: Path | None = None, lines: list[dict[str, int]] | None = None) -> list[dict]:
    """Measure and print one line a case; out: also write them there, as JSON. An image of the shape divides all token counts."""
    model, rows = build(shape), []
    for case in cases() if lines is None else lines:
        n, length = case["image_tokens"], case["new_tokens"]
        run = partial(timed, model, case["batch"], images=n // (shape.patches - 1))
        ways = {
            "plain": run, "FastV": partial(run, strategy=dyrate.FastV(rate=1 - RETENTION)),
            "DyRate": partial(run, strategy=forced(shape, RETENTION, length)),
            "limit": partial(run, native=kept_count(n, RETENTION)),
        }  # fmt: skip
        rows.append(case | line(in_turn(ways, length, repeats), FIRST / shape.layers))
        print("{image_tokens:6} image tokens, batch {batch:3}, {new_tokens:4} new: plain {plain_s:8.2f} s; relative to it "
              "FastV {FastV:.2f}, DyRate {DyRate:.2f}, ideal {ideal:.2f}".format(**rows[-1]))  # fmt: skip
    if out:
        sizes = {"device": name_of_device(), "torch": torch.__version__, "layers": shape.layers, "width": shape.width}
        write_whole(out, json.dumps({"about": sizes | {"retention": RETENTION}, "table": rows}, indent=1) + "\n")
    return rows


def line(runs: dict[str, list[Timing]], whole: float) -> dict[str, float]:
    """Median seconds of a plain answer, and the others relative to it. whole: the share of layers that see every token."""
    seconds = {way: float(np.median([t.prefill + t.steps.sum() for t in timings])) for way, timings in runs.items()}
    plain = seconds["plain"]
    ideal = whole * plain + (1 - whole) * seconds["limit"]
    memory = {f"{way} cache": runs[way][0].cache / runs["plain"][0].cache for way in ("FastV", "DyRate")}
    relative = {"FastV": seconds["FastV"] / plain, "DyRate": seconds["DyRate"] / plain, "ideal": ideal / plain}
    return {"plain_s": plain} | relative | memory
