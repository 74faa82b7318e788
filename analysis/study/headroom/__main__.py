"""python -m study.headroom measure --model pocket-plain --n 200 --out data/results/pocket-plain   # a GPU: a minute or two"""

from __future__ import annotations

import argparse
from pathlib import Path

from study.headroom.measure import TASKS, measure
from study.headroom.rankings import RANKINGS
from study.profiles import ROOT


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m study.headroom", description="What could a perfect controller gain?")
    verbs = parser.add_subparsers(dest="verb", required=True)
    measuring = verbs.add_parser("measure", help="teacher-forced losses of the library on every answer")
    measuring.add_argument("--model", required=True, help="a laboratory: pocket-plain, pocket-dropped, smol, or a folder")
    measuring.add_argument("--n", type=int, default=100, help="answers a task")
    measuring.add_argument("--out", type=Path, required=True)
    measuring.add_argument("--layer", type=int, default=2, help="first pruned layer")
    measuring.add_argument("--source", default="laboratories", help="of scenes: laboratories, or pocket for its model")
    measuring.add_argument("--tasks", nargs="+", default=TASKS)
    measuring.add_argument("--rankings", nargs="+", default=RANKINGS, choices=RANKINGS)
    measuring.add_argument("--predictors", type=Path, help="trained ones (default: the model's own, if it has some)")
    measuring.add_argument("--store", type=Path, default=Path("build/headroom"), help="finished parts")
    measuring.add_argument("--batch-size", type=int, default=100)
    given = vars(parser.parse_args(argv))
    {"measure": _measure}[given.pop("verb")](**given)


def _measure(model: str, predictors: Path | None, **given) -> None:
    own = ROOT / "data" / model / "dyrate"
    measure(model, predictors=predictors or (own if own.is_dir() else None), **given)


if __name__ == "__main__":
    main()
