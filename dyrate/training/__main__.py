"""Train a predictor on a file of images, prompts and answers: `python -m dyrate.training --help`."""

from __future__ import annotations

import argparse
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

from dyrate.data import Examples, one_line, read_examples
from dyrate.training.options import add_arguments, train_and_save

ABOUT = """\
Train a rate predictor for a vision-language model: a linear layer that chooses, token by token,
which share of the image tokens the model keeps, such that a budget is met. The model itself is
not changed. The predictor is saved as safetensors and JSON; to use it:

  with dyrate.DyRate.from_pretrained("FOLDER")(model, processor):
      model.generate(...)
"""


def split_validation(examples: Examples) -> tuple[Examples, Examples]:
    """Nine tenths to train on and a tenth to validate, split by the names of the image files, so that no image is in both.

    Raises ValueError if all examples have the same image.
    """
    images = sorted({e.path.name for e in examples}, key=lambda name: (zlib.crc32(name.encode()), name))
    if len(images) < 2:
        raise ValueError(f"{examples.source}: one image cannot be split into training and validation; give more, or --validation")
    held_out = set(images[: max(1, len(images) // 10)])
    parts = [[e for e in examples if (e.path.name in held_out) == held] for held in (False, True)]
    return tuple(replace(examples, items=part, unreadable=[]) for part in parts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dyrate.training", usage="%(prog)s --model NAME --data FILE --out FOLDER [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter, description=ABOUT,
    )  # fmt: skip
    parser.add_argument(
        "--data", metavar="FILE", type=Path, required=True,
        help='JSON lines to train on, each {"image": file, "prompt": text, "answer": text or list of texts, "task": name}; the '
        "image is found relative to FILE, the task may be left out",
    )  # fmt: skip
    parser.add_argument(
        "--validation", metavar="FILE", type=Path,
        help="JSON lines of the same form, on whose prompts the budget is calibrated (default: a tenth of the images of --data, "
        "which are then not trained on)",
    )  # fmt: skip
    add_arguments(parser)
    given = parser.parse_args(argv)
    warnings.formatwarning = one_line
    try:
        examples = read_examples(given.data)
        parts = (examples, read_examples(given.validation)) if given.validation else split_validation(examples)
        train_and_save(given, *parts)
    except (FileNotFoundError, ValueError, ImportError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
