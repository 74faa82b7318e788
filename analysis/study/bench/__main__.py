"""The command line: `python -m study.bench prune|growth|latency|observe|memory`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import study.bench
from dyrate.cost import Shape
from study.bench.growth import growth
from study.bench.latency import latency
from study.bench.observing import observing
from study.bench.runs import small_shape
from study.bench.small import prune
from study.bench.table3 import QUICK, SHAPES, Grid, show, table3
from study.compared import RETENTIONS
from study.memory import overview

DEFAULTS = {
    "prune": {"layers": 32, "width": 256}, "observe": {"layers": 8, "width": 512},
    "growth": {"layers": 8, "width": 128, "side": 12, "repeats": 2},
}  # fmt: skip
COMMON = {"heads": 8, "side": 24, "new_tokens": 64, "repeats": 5}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=study.bench.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prune", "growth", "latency", "observe", "memory"))
    parser.add_argument("--shape", choices=SHAPES, help="measure the paper's Table III with these sizes")
    parser.add_argument("--quick", action="store_true", help="with --shape: only what the bars need, a minute on an H100")
    parser.add_argument("--layers", type=int, help="default: 32 for prune, as LLaVA-1.5-7B has; 8 for the others")
    parser.add_argument("--width", type=int, help="default: 256 for prune, 128 for growth, 512 for observe")
    for name, value in COMMON.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default: {value}, or the shape's")
    parser.add_argument("--model", default="pocket", help="of latency: a laboratory, a folder or a hub name")
    parser.add_argument("--batch", type=int, default=8, help="of latency: answers generated together")
    parser.add_argument("--source", default="pocket", help="of latency: the images that are described")
    parser.add_argument("--retentions", type=float, nargs="+", default=RETENTIONS, help="of latency: retention ratios")
    parser.add_argument("--predictors", type=Path, nargs="*", default=[], help="of latency: trained predictors to compare")
    parser.add_argument("--out", type=Path, help="also write the results of prune, growth or latency as JSON")
    given = parser.parse_args(argv)
    if given.what == "memory":
        shapes = {given.shape: SHAPES[given.shape]} if given.shape else SHAPES
        return print(overview(shapes).round(2).to_string(index=False, na_rep=""))
    if given.what == "prune" and given.shape:
        grid = QUICK if given.quick else Grid()
        try:
            return show(table3(*sized(given), replace(grid, repeats=given.repeats or grid.repeats), given.out))
        except ValueError as error:
            parser.error(str(error))
    if given.what == "latency":
        sizes = {"new_tokens": given.new_tokens or 48, "repeats": given.repeats or COMMON["repeats"], "batch": given.batch}
        sizes |= {"retentions": given.retentions, "source": given.source, "trained": given.predictors}
        latency(given.model, **sizes, out=given.out)
        return None
    for name, value in (COMMON | DEFAULTS[given.what]).items():
        setattr(given, name, getattr(given, name) or value)
    shape = small_shape(given.layers, given.width, given.heads, given.side)
    if given.what == "prune":
        return prune(shape, given.new_tokens, given.repeats, given.out)
    if given.what == "growth":
        return growth(shape, given.repeats, given.out)
    observing(shape, given.new_tokens, given.repeats)


def sized(given: argparse.Namespace) -> tuple[str, Shape]:
    """The named shape, with the sizes that were given; the MLP and the tower shrink with the width."""
    shape, name = SHAPES[given.shape], given.shape
    sizes = {key: value for key in ("layers", "width", "heads", "side") if (value := getattr(given, key))}
    if sizes:
        name += " with " + ", ".join(f"{key} {value}" for key, value in sizes.items())
    scale = sizes.get("width", shape.width) / shape.width
    heads = sizes.get("heads", shape.heads)
    shape = replace(
        shape, layers=sizes.get("layers", shape.layers), width=sizes.get("width", shape.width), heads=heads, kv_heads=heads,
        inner=round(shape.inner * scale), tower_layers=max(2, round(shape.tower_layers * min(1, scale))),
        tower_width=64 * max(1, round(shape.tower_width * scale / 64)), tower_inner=max(128, round(shape.tower_inner * scale)),
        patches=sizes["side"] ** 2 + 1 if "side" in sizes else shape.patches,
    )  # fmt: skip
    return name, shape


if __name__ == "__main__":
    main()
