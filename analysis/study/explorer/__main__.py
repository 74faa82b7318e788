"""Measure the explorer's traces of one laboratory: python -m study.explorer --model smol --out data/explorer

With `--methods FastV DyRate` those alone, beside what was measured before.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import dyrate
from dyrate.models import describe
from study.examples import examples
from study.explorer.measure import MAX_NEW_TOKENS, METHODS, TASK, conditions, explored
from study.explorer.stored import write_laboratory
from study.profiles import ROOT

ALL = ("Full", *METHODS, "DyRate", "DyRate, curves", "DyRate, curves at every step")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a laboratory: pocket-plain, pocket-dropped, smol")
    parser.add_argument("--out", type=Path, required=True, help="folder of all laboratories")
    parser.add_argument("--n", type=int, default=12, help="scenes: the first of the test split")
    parser.add_argument("--methods", nargs="+", default=ALL, choices=ALL, help="only these; default: all")
    given = parser.parse_args(argv)
    asked = examples("laboratories", given.n, tasks=[TASK])
    model, processor = dyrate.load(given.model, dtype=torch.float32)
    about = describe(model)
    chosen = [c for c in conditions(about["layers"], ROOT / "data" / given.model / "dyrate") if c.method in given.methods]
    about |= {"torch": torch.__version__, "prompt": asked[0].prompt, "max_new_tokens": MAX_NEW_TOKENS}
    write_laboratory(given.out, given.model, about, asked, explored(model, processor, chosen, asked))


if __name__ == "__main__":
    main()
