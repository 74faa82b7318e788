"""The paper's Table III without its weights: a decoder of the real shape, at forced rates, on the machine at hand.

Every case is measured eagerly and with static steps (on a GPU: CUDA graphs), beside the limit and the roofline. A case that
does not fit in memory is a row that says so. The file is written after each case, and an interrupted bench goes on.

No GPU has run this yet: the tests run it on a CPU, at sizes of seconds, where static steps are not recorded as graphs.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

import dyrate
from dyrate.atomic import write_whole
from dyrate.cost import LLAVA_7B, LLAVA_13B, Shape
from dyrate.seen import kept_count
from dyrate.strategy import Strategy
from study.bench import results
from study.bench.machine import Machine, name_of_device, probe
from study.bench.results import TABLE3_BARS
from study.bench.runs import TEXT, WARM_UP, Timing, build, forced, timed
from study.memory import parameters, to_answer

SHAPES = {"llava-1.5-7b": LLAVA_7B, "llava-1.5-13b": LLAVA_13B}
ON_CPU = 2**28  # parameters that a CPU is asked to carry at most


@dataclass(frozen=True)
class Grid:
    """What is measured. budgets: of DyRate. lengths: new tokens, ascending; one answer of the longest gives all.

    only_bars: leave out what no bar needs.
    """

    budgets: Sequence[float] = (0.25, 0.33, 0.5, 0.75)
    batches: Sequence[int] = (1, 8, 32, 64)
    images: Sequence[int] = (1, 4)
    lengths: Sequence[int] = (64, 256, 1024)
    repeats: int = 3
    only_bars: bool = False


QUICK = Grid(budgets=(0.33,), batches=(1, 64), images=(1,), lengths=(32,), repeats=2, only_bars=True)  # a minute on an H100
HEADLINES = (  # result, and what it compares with Full and native: method, its budget, batch, static, part of the answer
    ("prefill_realised_r50", "FastV", 0.5, 1, False, "prefill"),
    ("prefill_realised_r90", "FastV", 0.1, 1, False, "prefill"),
    ("decode_b64_r90_realised", "FastV", 0.1, 64, True, "decode"),
    ("decode_b64_dyrate_realised", "DyRate", 0.33, 64, True, "decode"),
)
FIRST = 2  # pruned layer, of those


@dataclass(frozen=True)
class Case:
    """One line of the table. budget: the retention asked for, from layer `first_pruned_layer` on.

    method: Full, FastV, VTW, DyRate, or "native": the limit, so many plain tokens in place of the images.
    """

    method: str
    first_pruned_layer: int
    budget: float
    batch: int
    images: int
    static: bool

    @property
    def key(self) -> str:
        """Names the case in the file and on the screen."""
        what = f"{self.method} K={self.first_pruned_layer} retention {self.budget:g}"
        return f"{what}, batch {self.batch}, images {self.images}, {'static' if self.static else 'eager'}"

    def strategy(self, shape: Shape, new_tokens: int) -> Strategy | None:
        match self.method:
            case "FastV":
                return dyrate.FastV(first_pruned_layer=self.first_pruned_layer, rate=1 - self.budget)
            case "VTW":
                return dyrate.VTW(first_pruned_layer=self.first_pruned_layer)
            case "DyRate":
                return forced(shape, self.budget, new_tokens)

    def native(self, shape: Shape) -> int | None:
        """Plain tokens in place of the images, for the limit."""
        return kept_count(self.images * (shape.patches - 1), self.budget) if self.method == "native" else None

    def tokens(self, shape: Shape) -> list[int]:
        """Tokens of the prompt that each layer holds."""
        n, first = self.images * (shape.patches - 1), self.first_pruned_layer
        return [TEXT + n] * first + [TEXT + kept_count(n, self.budget)] * (shape.layers - first)


def cases(shape: Shape, grid: Grid) -> list[Case]:
    """Eager ones first. VTW withdraws in the middle of a decoder that is too shallow for its 16 layers."""
    half = min(16, shape.layers // 2)
    methods = [("Full", 0, 1.0), ("FastV", 3, 0.5), ("FastV", FIRST, 0.5), ("FastV", FIRST, 0.1), ("VTW", half, 0.0)]
    methods += [("DyRate", FIRST, budget) for budget in grid.budgets]
    methods += [("native", 0, budget) for budget in sorted({budget for _, _, budget in methods} - {1.0})]
    every = [
        Case(*method, batch, images, static)
        for static, images, batch, method in product((False, True), grid.images, grid.batches, methods)
    ]
    return [case for case in every if not grid.only_bars or _has_bar(case)]


def _has_bar(case: Case) -> bool:
    """Whether some headline is computed from this case."""
    return any(
        (case.method, case.first_pruned_layer, case.budget) in (("Full", 0, 1.0), ("native", 0, budget), (method, FIRST, budget))
        for _, method, budget, batch, static, _ in HEADLINES if (case.batch, case.static) == (batch, static)
    )  # fmt: skip


def table3(name: str, shape: Shape, grid: Grid, out: Path | None = None) -> dict:
    """Measure what `out` does not hold yet; returns what it then holds of this shape. Raises ValueError before any long work."""
    memory = check_fits(name, shape)
    about = {"device": name_of_device(), "torch": torch.__version__, "transformers": transformers.__version__}
    content = json.loads(out.read_text()) if out and out.exists() else {"about": about, "bars": TABLE3_BARS, "shapes": {}}
    if content["about"] != about:
        raise ValueError(f"{out} was measured elsewhere ({content['about']}; here: {about}): name another file")
    mine = content["shapes"].setdefault(name, {"sizes": asdict(shape), "text_tokens": TEXT, "rows": {}})
    if mine["sizes"] != asdict(shape):
        raise ValueError(f"{out} holds {name} with other sizes: name another file")
    todo = [c for c in cases(shape, grid) if not _measured(mine["rows"].get(c.key), grid)]
    if todo:
        model, machine = build(shape), probe()
        speeds = {"macs_per_second": machine.macs_per_second, "bytes_per_second": machine.bytes_per_second}
        mine |= {"machine": speeds, "dtype": str(model.dtype).removeprefix("torch.")}
    for case in tqdm(todo, desc=name):
        mine["rows"][case.key] = measure(model, shape, machine, case, grid, memory)
        mine["results"] = headlines([row for rows in mine["rows"].values() for row in rows], shape.layers)
        if out:
            write_whole(out, json.dumps(content, indent=1) + "\n")
    return mine


def check_fits(name: str, shape: Shape) -> int:
    """Bytes of memory of the device. Raises ValueError if the model with one answer does not fit there."""
    needed = sum(to_answer(shape, [TEXT + shape.patches - 1] * shape.layers, 64).values())
    if torch.cuda.is_available():
        memory, where = torch.cuda.mem_get_info()[1], f"{name_of_device()} has"
    else:
        memory, where = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "there is no GPU here; the CPU's memory is"
    if needed > memory or (not torch.cuda.is_available() and parameters(shape) > ON_CPU):
        raise ValueError(
            f"{name} in bfloat16 needs a GPU with at least {needed / 1e9:.1f} GB ({where} {memory / 1e9:.1f} GB). To try "
            "the bench without one, name a tiny size: --layers 4 --width 64 --heads 4 --side 8"
        )
    return memory


def _measured(rows: list[dict] | None, grid: Grid) -> bool:
    return rows is not None and {row["new_tokens"] for row in rows} >= set(grid.lengths)


def measure(model, shape: Shape, machine: Machine, case: Case, grid: Grid, memory: int) -> list[dict]:
    """One row for each length: the case, the roofline, and the numbers or why there are none."""
    tokens = case.tokens(shape)
    rows = [
        asdict(case) | {
            "new_tokens": n,
            "roofline_prefill_ms": 1000 * machine.prefill_seconds(shape, tokens, case.batch, case.images),
            "roofline_ms_per_token": 1000 * machine.step_seconds(shape, [t + n // 2 for t in tokens], case.batch),
        }
        for n in grid.lengths
    ]  # fmt: skip
    needs = to_answer(shape, tokens, max(grid.lengths), case.batch, model.dtype.itemsize)
    needed = sum(needs.values()) + case.static * needs["cache"]  # a prefill's own cache beside the buffers
    if needed > memory:
        return [row | {"status": f"needs {needed / 1e9:.0f} GB of {memory / 1e9:.0f}"} for row in rows]
    try:
        runs, deciding = _runs(model, shape, case, grid)
        rows = [row | deciding | _numbers(runs, case.batch, row["new_tokens"]) for row in rows]
    except torch.cuda.OutOfMemoryError:
        rows = [row | {"status": "out of memory"} for row in rows]
    if torch.cuda.is_available():
        gc.collect()  # what a failed run or a trace in a cycle still holds must not count for the next case
        torch.cuda.empty_cache()
    return rows


def _runs(model, shape: Shape, case: Case, grid: Grid) -> tuple[list[Timing], dict[str, dict]]:
    """Repeated runs of the longest answer; for DyRate also the share of a decode step that deciding takes."""

    def run(new_tokens: int, steps: int, **how) -> Timing:
        given = {"images": case.images, "native": case.native(shape), "static": case.static}
        return timed(model, case.batch, new_tokens, case.strategy(shape, steps), **given, **how)

    longest, shortest, warm = max(grid.lengths), min(grid.lengths), int(case.static)
    run(WARM_UP, longest)
    runs = [run(longest, longest, warm=warm) for _ in range(grid.repeats)]
    if case.method != "DyRate":
        return runs, {}
    decided = [run(shortest, shortest, warm=warm, deciding=True) for _ in range(grid.repeats)]
    return runs, {"deciding_share": results.deciding_share(decided)}


def _numbers(runs: list[Timing], batch: int, new_tokens: int) -> dict:
    prefill, decode = [t.prefill for t in runs], [float(t.steps[: new_tokens - 1].sum()) for t in runs]
    return {
        "status": "measured", "prefill_ms": 1000 * np.median(prefill),
        "ms_per_token": 1000 * np.median(decode) / (new_tokens - 1),
        "tokens_per_s": batch * new_tokens / np.median(np.add(prefill, decode)),
        "peak_gib": max(t.peaks[new_tokens - 1] for t in runs) / 2**30, "retention": runs[0].retention,
        "prefill_seconds": prefill, "decode_seconds": decode,
    }  # fmt: skip


def headlines(rows: list[dict], n_layers: int) -> dict[str, dict]:
    """The results that have bars, as far as what they need was measured, at the shortest length with one image."""

    def seconds(part: str, **wanted) -> list[float]:
        matching = (row for row in rows if wanted.items() <= row.items() and row["images"] == 1)
        return next(matching, {}).get(f"{part}_seconds", [])

    ratios = {}
    for name, method, budget, batch, static, part in HEADLINES:
        how = {"batch": batch, "static": static}
        pruned = seconds(part, method=method, first_pruned_layer=FIRST, budget=budget, **how)
        runs = seconds(part, method="Full", **how), pruned, seconds(part, method="native", budget=budget, **how)
        if all(runs):
            ratios[name] = results.realised(*runs, FIRST / n_layers)
    shares = [row["deciding_share"] for row in rows if row["static"] and "deciding_share" in row]
    if shares:
        ratios["deciding_share"] = max(shares, key=lambda share: share["value"])
    return ratios


def show(measured: dict) -> None:
    """Print every row, and the results beside their bars."""
    columns = {"prefill_ms": 1, "ms_per_token": 2, "roofline_ms_per_token": 2, "tokens_per_s": 0, "peak_gib": 1}
    print(f"{'case':60}{'new_tokens':>12}" + "".join(f"{name:>23}" for name in columns))
    for key, rows in measured["rows"].items():
        for row in rows:
            done = row["status"] == "measured"
            values = "".join(f"{row[name]:23.{digits}f}" for name, digits in columns.items()) if done else f"  {row['status']}"
            print(f"{key:60}{row['new_tokens']:12}{values}")
    results.show(measured["results"], TABLE3_BARS)
