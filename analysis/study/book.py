"""From measured numbers to the book: the only file that knows MyST.

A notebook opens one `Chapter`, hands it its numbers, tables and finding, and closes it. Numbers are glued, so that prose on
any page can cite them without typing them, and written to `NN_name.json` with their intervals.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from typing import TypeVar, get_type_hints

import numpy as np
import pandas as pd
from IPython import get_ipython
from IPython.display import Markdown
from matplotlib.figure import Figure
from myst_nb import glue

from dyrate.atomic import write_whole
from dyrate.data import Examples, one_line
from study.figures import phone
from study.profiles import ROOT, rows_of
from study.protocol import protocol_rows
from study.rows import keep, kept

T = TypeVar("T")
NUMBER = ("value", "low", "high", "n")  # what is recorded of a number with its interval


class Chapter:
    """What one notebook measured. results: folder of the profile's results, relative to the repository unless absolute."""

    def __init__(self, name: str, results: str):
        self.name = name
        self.folder = ROOT / results
        self.folder.mkdir(parents=True, exist_ok=True)
        self.numbers: dict[str, dict] = {}
        self.texts: dict[str, str] = {}
        self.protocols: list[dict] = []
        self.left_out: list[str] = []
        warnings.formatwarning = one_line  # for the runner to repeat
        if notebook := get_ipython():  # which then stores each figure in a phone's shape too
            notebook.display_formatter.mimebundle_formatter.for_type(Figure, phone.bundle)

    def number(self, key: str, value: float | Mapping | pd.Series) -> None:
        """Record and glue a headline number: a plain value, or one with its interval, of which `NUMBER` is kept.

        Prose cites `key`, and of an interval `key_low` and `key_high`.
        """
        number = {k: value[k] for k in NUMBER if k in value} if isinstance(value, Mapping | pd.Series) else {"value": value}
        self.numbers[key] = {k: int(v) if k == "n" else float(v) for k, v in number.items()}
        glue(key, float(number["value"]), display=False)
        for end in ("low", "high"):
            if end in number:
                glue(f"{key}_{end}", float(number[end]), display=False)

    def text(self, key: str, text: str) -> None:
        """Record and glue a computed sentence, in Markdown."""
        glue(key, Markdown(text), display=False)
        self.texts[key] = text

    def measured(self, measure: Callable[..., T], *, draw: bool, **parameters) -> T:
        """What `measure(**parameters)` returns, kept as rows beside its results; draw: what an earlier run kept there.

        Both are read from the files, so that a page drawn later shows the same. Raises FileNotFoundError where there are none.
        """
        folder = rows_of(self.folder, self.name)
        if not draw:
            keep(measure(**parameters), folder)
        return kept(get_type_hints(measure)["return"], folder)

    def table(self, file: str, frame: pd.DataFrame) -> None:
        """Write the rows behind a figure as CSV."""
        path = self.folder / file
        write_whole(path, frame.to_csv(index=False, float_format="%.6g", lineterminator="\n"))

    def protocol(
        self, examples: Examples | str, *, metric: str | None = None, max_new_tokens: int | None = None, decoding: str = "greedy"
    ) -> None:
        """Record under which protocol the chapter's numbers were made (`study.protocol.protocol_rows`), and what was left out."""
        if isinstance(examples, Examples):
            self.left_out += [*examples.problems, *examples.unreadable]
        decoded = f"{decoding}, at most {max_new_tokens} tokens" if max_new_tokens else "none"
        self.protocols += protocol_rows(examples, metric=metric, decoding=decoded)

    def close(self) -> None:
        """Write headline numbers, sentences, protocols and what was left out: only now does the chapter count as measured.

        Raises ValueError if no protocol was stated.
        """
        if not self.protocols:
            raise ValueError(f"chapter {self.name} states no protocol: call chapter.protocol(examples, ...) before close()")
        content = {"numbers": self.numbers, "texts": self.texts, "protocol": self.protocols, "left_out": self.left_out}
        write_whole(self.folder / f"{self.name}.json", json.dumps(content, indent=1) + "\n")


def shown_table(frame: pd.DataFrame, caption: str, name: str) -> Markdown:
    """A table for the page, to be cited by `name`; blank where nothing is known. Needs the cell's markdown_format `myst`.

    The numbers of a column have the same decimals, four digits in the largest; text that reads as a number is shown as it is.
    """
    columns = [_as_shown(frame.iloc[:, i]) for i in range(frame.shape[1])]
    head = "| " + " | ".join(str(c).replace("_", " ") for c in frame.columns) + " |"
    rule = "|" + "|".join("--:" if numbers else "---" for _, numbers in columns) + "|"
    body = ["| " + " | ".join(row) + " |" for row in zip(*(cells for cells, _ in columns), strict=True)]
    return Markdown("\n".join([f":::{{table}} {caption}", f":name: {name}", "", head, rule, *body, ":::"]))


def _as_shown(column: pd.Series) -> tuple[list[str], bool]:
    """The cells of a column as text, and whether they are numbers."""
    known = pd.to_numeric(column, errors="coerce")
    numbers = bool(known.notna().sum() == column.notna().sum() > 0)
    form = "{}"
    if pd.api.types.is_float_dtype(column) and numbers:
        largest = known[np.isfinite(known)].abs().max()
        most = min(3, max(0, 3 - int(np.floor(np.log10(largest))))) if largest > 0 else 0
        decimals = next((d for d in range(most) if np.allclose(known.dropna(), known.dropna().round(d), atol=1e-9)), most)
        form, column = f"{{:.{decimals}f}}", known.round(decimals) + 0.0  # no negative zero
    elif column.dtype == object:
        form = "{:.4g}" if numbers else "{}"  # measured beside reported
    cells = ["" if pd.isna(value) else str(value) if isinstance(value, str) else form.format(value) for value in column]
    return [f"[{text}]{{.sentence}}" if len(text) > 30 else text for text in cells], numbers  # study.css gives sentences room
