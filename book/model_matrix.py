"""The page "Which model, which method", from the matrix of the tests: what is tried there on a tiny model of each family.

A cell says yes where the strategy can be applied to the family's model; the laws' tests then hold it (`tests/method`).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pandas as pd

import dyrate
from study.book import shown_table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from families import FAMILIES, ready
from laws import make


def works(name: str, model) -> bool:
    """Whether a strategy can be applied to a model."""
    try:
        with make(name)(model):
            return True
    except ValueError:
        return False


def matrix() -> pd.DataFrame:
    """One row a strategy: its source, where its tokens stay and how they are numbered, and yes or no for each family."""
    models = [ready(family)[0] for family in FAMILIES]
    rows = []
    for name, cls in sorted(dyrate.STRATEGIES.items(), key=lambda item: (item[1].control, item[0])):
        source = re.search(r"arXiv:[\d.]+", f"{cls.__doc__}")
        strategy = make(name)
        row = {"strategy": name, "source": source.group() if source and not cls.control else "control" if cls.control else ""}
        row |= {"residency": strategy.residency, "positions": strategy.positions}
        rows.append(row | {model.config.model_type: "yes" if works(name, model) else "no" for model in models})
    return pd.DataFrame(rows)


def page() -> str:
    """The page as Markdown."""
    table = matrix()
    return "\n".join([
        "(models)=", "# Which model, which method", "",
        "Every *yes* is a pair that the tests hold to the laws of {ref}`extend`, on a tiny random model of the real class:",
        "keeping all is plain `generate`, dropping equals masking, with greedy decoding, beams and sampling, on ragged batches.",
        "*No*: the method reads a tower with one [CLS] an image, which the family lacks; applying it says so. Models with layers",
        "that attend in sliding windows, such as Gemma 3 and Mistral's first, are refused with an error that names the layers.",
        "",
        shown_table(table, "Strategies and families of `transformers`, by their `model_type`.", "tab-models").data, "",
    ])  # fmt: skip
