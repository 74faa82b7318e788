"""The page "Which model, which method", from the matrix of the tests: what is tried there on a tiny model of each family.

A strategy's families are those that it can be applied to; the laws' tests then hold it there (`tests/method`).
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
    """One row a strategy: its source, whether it renumbers what follows dropped tokens, and the families."""
    models = [ready(family)[0] for family in FAMILIES]
    rows = []
    for name, cls in sorted(dyrate.STRATEGIES.items(), key=lambda item: (item[1].control, item[0])):
        source = re.search(r"arXiv:[\d.]+", f"{cls.__doc__}")
        strategy = make(name)
        row = {"strategy": name, "source": "control" if cls.control else source.group() if source else "–"}
        row["dropped"] = strategy.residency + (", renumbered" if strategy.positions == "compact" else "")
        can = [model.config.model_type for model in models if works(name, model)]
        rows.append(row | {"families": "all" if len(can) == len(models) else ", ".join(can)})
    return pd.DataFrame(rows)


def page() -> str:
    """The page as Markdown."""
    names = ", ".join(f"`{ready(family)[0].config.model_type}`" for family in FAMILIES)
    caption = f"The families of each strategy, by their `model_type` in `transformers`. All: {names}."
    return "\n".join([
        "(models)=", "# Which model, which method", "",
        "Every strategy and family named here is a pair that the tests hold to the laws of {ref}`extend`, on a tiny random",
        "model of the real class: keeping all is plain `generate`, dropping equals masking, with greedy decoding, beams and",
        "sampling, on ragged batches. Where a family is missing, the method reads a tower with one [CLS] an image, which the",
        "family lacks; applying it says so. Models with layers that attend in sliding windows, such as Gemma 3 and Mistral's",
        "first, are refused with an error that names the layers.", "",
        shown_table(matrix(), caption, "tab-models").data, "",
    ])  # fmt: skip
