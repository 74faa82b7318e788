"""The paper's Table III without its weights: a decoder of the real shape, at forced rates, on the machine at hand.

Every case is measured eagerly and with static steps (on a GPU: CUDA graphs), beside the limit and the roofline. A case that
does not fit in memory is a row that says so. The file is written after each case, and an interrupted bench goes on.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

import dyrate
from study.bench import roofline
from study.bench.runs import TEXT, Timing, build, deciding_share, device_name, forced, realised, timed
from dyrate.cost import LLAVA_7B, LLAVA_13B, Shape
from dyrate.atomic import write_whole
from study.memory import parameters, to_answer
from dyrate.seen import kept_count
from dyrate.strategy import Strategy

SHAPES = {"llava-1.5-7b": LLAVA_7B, "llava-1.5-13b": LLAVA_13B}
BARS = {"prefill_realised_r50": 0.9, "prefill_realised_r90": 0.9, "decode_b64_r90_realised": 0.75, "deciding_share": 0.03}
ON_CPU = 2**28  # parameters that a CPU is asked to carry at most


@dataclass(frozen=True)
class Grid:
    """What is measured. budgets: of DyRate, mean kept shares. lengths: new tokens; one answer of the longest gives all."""

    budgets: Sequence[float] = (0.25, 0.33, 0.5, 0.75)
    batches: Sequence[int] = (1, 8, 32, 64)
    images: Sequence[int] = (1, 4)
    lengths: Sequence[int] = (64, 256, 1024)
    repeats: int = 3


QUICK = Grid(budgets=(0.33,), batches=(1, 64), images=(1,), lengths=(64,))


@dataclass(frozen=True)
class Case:
    """One line of the table. first: first pruned layer, 0 for the limit; share: kept there."""

    method: str
    first: int
    share: float
    batch: int
    images: int
    static: bool

    @property
    def key(self) -> str:
        return f"{self.method}, batch {self.batch}, images {self.images}, {'static' if self.static else 'eager'}"

    def strategy(self, shape: Shape, new_tokens: int) -> Strategy | None:
        if self.method.startswith("DyRate"):
            return forced(shape, self.share, new_tokens)
        kinds = {"FastV": partial(dyrate.FastV, rate=1 - self.share), "VTW": dyrate.VTW}
        kind = kinds.get(self.method.split()[0])
        return kind(first_pruned_layer=self.first) if kind else None

    def native(self, shape: Shape) -> int | None:
        """Plain tokens in place of the images, for the limit."""
        return kept_count(self.images * (shape.patches - 1), self.share) if self.method.startswith("native") else None

    def tokens(self, shape: Shape) -> list[int]:
        """Tokens of the prompt that each layer holds."""
        n = self.images * (shape.patches - 1)
        return [TEXT + n] * self.first + [TEXT + kept_count(n, self.share)] * (shape.layers - self.first)


def cases(shape: Shape, grid: Grid) -> list[Case]:
    """Eager ones first. VTW withdraws in the middle of a decoder that is too shallow for its 16 layers."""
    half = min(16, shape.layers // 2)
    methods = [("Full", 0, 1.0), ("FastV K=3 R=.5", 3, 0.5), ("FastV K=2 R=.5", 2, 0.5), ("FastV K=2 R=.9", 2, 0.1)]
    methods += [(f"VTW K={half}", half, 0.0), *((f"DyRate {budget:g}", 2, budget) for budget in grid.budgets)]
    methods += [(f"native {share:g}", 0, share) for share in sorted({share for _, _, share in methods} - {1.0})]
    return [
        Case(*method, batch, images, static)
        for static, images, batch, method in product((False, True), grid.images, grid.batches, methods)
    ]


def table3(name: str, shape: Shape, grid: Grid, out: Path | None = None) -> dict:
    """Measure what `out` does not hold yet; returns what it then holds of this shape. Raises ValueError before any long work."""
    memory = check_fits(name, shape)
    about = {"device": device_name(), "torch": torch.__version__, "transformers": transformers.__version__}
    content = json.loads(out.read_text()) if out and out.exists() else {"about": about, "bars": BARS, "shapes": {}}
    if content["about"] != about:
        raise ValueError(f"{out} was measured elsewhere ({content['about']}; here: {about}): name another file")
    mine = content["shapes"].setdefault(name, {"sizes": asdict(shape), "text_tokens": TEXT, "rows": {}})
    if mine["sizes"] != asdict(shape):
        raise ValueError(f"{out} holds {name} with other sizes: name another file")
    todo = [c for c in cases(shape, grid) if not _measured(mine["rows"].get(c.key), grid)]
    if todo:
        model = build(shape)
        machine = roofline.measure(model)
        mine |= {"machine": asdict(machine), "dtype": str(model.dtype).removeprefix("torch.")}
    for case in tqdm(todo, desc=name):
        mine["rows"][case.key] = measure(model, shape, machine, case, grid, memory)
        mine["results"] = headlines(mine["rows"])
        if out:
            write_whole(out, json.dumps(content, indent=1) + "\n")
    return mine


def check_fits(name: str, shape: Shape) -> int:
    """Bytes of memory of the device, if the model with one answer fits there."""
    needed = sum(to_answer(shape, [TEXT + shape.patches - 1] * shape.layers, 64).values())
    if torch.cuda.is_available():
        memory, where = torch.cuda.mem_get_info()[1], f"{device_name()} has"
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


def measure(model, shape: Shape, machine: roofline.Machine, case: Case, grid: Grid, memory: int) -> list[dict]:
    """One row for each length."""
    itemsize, longest, tokens = model.dtype.itemsize, max(grid.lengths), case.tokens(shape)
    rows = [
        asdict(case) | {
            "new_tokens": n,
            "roofline_prefill_ms": 1000 * machine.prefill(shape, tokens, case.batch, case.images, itemsize),
            "roofline_ms_per_token": 1000 * machine.step(shape, [t + n // 2 for t in tokens], case.batch, itemsize),
        }
        for n in grid.lengths
    ]  # fmt: skip
    needs = to_answer(shape, tokens, longest, case.batch, itemsize)
    needed = sum(needs.values()) + case.static * needs["cache"]  # a prefill's own cache beside the buffers
    if needed > memory:
        return [row | {"status": f"needs {needed / 1e9:.0f} GB of {memory / 1e9:.0f}"} for row in rows]
    given = {"images": case.images, "native": case.native(shape), "static": case.static}
    try:
        timed(model, case.batch, 4, case.strategy(shape, longest), **given)
        runs = [
            timed(model, case.batch, longest, case.strategy(shape, longest), **given, warm=int(case.static))
            for _ in range(grid.repeats)
        ]
        if case.method.startswith("DyRate"):
            least = min(grid.lengths)
            deciding = [
                timed(model, case.batch, least, case.strategy(shape, least), **given, warm=int(case.static), deciding=True)
                for _ in range(grid.repeats)
            ]
            rows = [row | {"deciding_share": deciding_share(deciding)} for row in rows]
    except torch.cuda.OutOfMemoryError:
        runs = []
    if torch.cuda.is_available():
        gc.collect()  # what a failed run or a trace in a cycle still holds must not count for the next case
        torch.cuda.empty_cache()
    return [row | (_numbers(runs, case.batch, row["new_tokens"]) if runs else {"status": "out of memory"}) for row in rows]


def _numbers(runs: list[Timing], batch: int, new_tokens: int) -> dict:
    prefill, decode = [t.prefill for t in runs], [float(t.steps[: new_tokens - 1].sum()) for t in runs]
    return {
        "status": "measured", "prefill_ms": 1000 * np.median(prefill),
        "ms_per_token": 1000 * np.median(decode) / (new_tokens - 1),
        "tokens_per_s": batch * new_tokens / np.median(np.add(prefill, decode)),
        "peak_gib": max(t.peaks[new_tokens - 1] for t in runs) / 2**30, "kept": runs[0].kept,
        "prefill_seconds": prefill, "decode_seconds": decode,
    }  # fmt: skip


def headlines(rows: dict[str, list[dict]]) -> dict[str, dict]:
    """The results that have bars, as far as what they need was measured, at the shortest length with one image."""

    def seconds(method: str, batch: int, way: str, part: str) -> list[float]:
        found = rows.get(f"{method}, batch {batch}, images 1, {way}", [{}])[0]
        return found.get(f"{part}_seconds", [])

    found = {}
    for name, rate, native, batch, way, part in (
        ("prefill_realised_r50", ".5", "0.5", 1, "eager", "prefill"),
        ("prefill_realised_r90", ".9", "0.1", 1, "eager", "prefill"),
        ("decode_b64_r90_realised", ".9", "0.1", 64, "static", "decode"),
    ):  # fmt: skip
        runs = [seconds(m, batch, way, part) for m in ("Full", f"FastV K=2 R={rate}", f"native {native}")]
        if all(runs):
            found[name] = realised(*runs)
    shares = [row[0]["deciding_share"] for row in rows.values() if row[0]["static"] and "deciding_share" in row[0]]
    if shares:
        found["deciding_share"] = max(shares, key=lambda share: share["value"])
    return found


def show(measured: dict) -> None:
    columns = {"prefill_ms": 1, "ms_per_token": 2, "roofline_ms_per_token": 2, "tokens_per_s": 0, "peak_gib": 1}
    print(f"{'case':44}{'new_tokens':>12}" + "".join(f"{name:>23}" for name in columns))
    for key, rows in measured["rows"].items():
        for row in rows:
            done = row["status"] == "measured"
            values = "".join(f"{row[name]:23.{digits}f}" for name, digits in columns.items()) if done else f"  {row['status']}"
            print(f"{key:44}{row['new_tokens']:12}{values}")
    for name, bar in BARS.items():
        if found := measured["results"].get(name):
            verdict = "met" if met(name, found["value"]) else "missed"
            print(f"{name:28}{found['value']:7.3f}  ({found['low']:.3f} to {found['high']:.3f})  bar {bar}: {verdict}")
        else:
            print(f"{name:28}not measured")


def met(name: str, value: float) -> bool:
    return value <= BARS[name] if name == "deciding_share" else value >= BARS[name]
