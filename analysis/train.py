"""Train a rate predictor on the study's images: `python analysis/train.py --out predictor`, see --help.

As `python -m dyrate.training`, which trains on a file of your own, but examples come from the pocket laboratory, from a folder of
photographs with captions, or from a caption set of the hub.
"""

from __future__ import annotations

import argparse
import subprocess
import warnings
from pathlib import Path

from dyrate.data import one_line
from dyrate.training.options import add_arguments, train_and_save
from study.examples import examples


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", metavar="NAME", default="pocket", help='"pocket", a folder of photographs with captions, or '
                        "a caption set of the hub: nocaps, flickr30k, coco2017 (default: pocket)")  # fmt: skip
    parser.add_argument("--tasks", metavar="TASK", nargs="+", default=["description", "caption", "qa_count", "qa_place"],
                        help="what to train on; photographs have captions only (default: description caption qa_count "
                        "qa_place)")  # fmt: skip
    parser.add_argument("--n-train", metavar="N", type=int, default=48, help="examples a task to train on (default: 48)")
    parser.add_argument("--n-validation", metavar="N", type=int, default=16,
                        help="examples a task to calibrate the budget on (default: 16)")  # fmt: skip
    add_arguments(parser, model="pocket")
    given = parser.parse_args(argv)
    warnings.formatwarning = one_line
    command = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    try:
        learn = examples(given.source, given.n_train, tasks=given.tasks, split="train")
        check = examples(given.source, given.n_validation, tasks=given.tasks, split="validation")
        train_and_save(given, learn, check, tasks=given.tasks, commit=commit or None)
    except (FileNotFoundError, ValueError, ImportError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
