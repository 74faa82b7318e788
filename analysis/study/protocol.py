"""The protocol ledger: under which conditions each number of the book was made, measured here or reported elsewhere."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pandas as pd

from dyrate.data import Examples
from study.scores import metric_of

REPORTED = Path(__file__).resolve().parents[2] / "data" / "reported"


def protocol_rows(examples: Examples | str, *, metric: str | None = None, decoding: str = "none") -> list[dict]:
    """One row for each task of `examples`, or one row where a text stands in their place and says what was computed.

    metric: where a chapter measures something else than the task's score.
    """
    harness = f"dyrate {version('dyrate')}, papermill {version('papermill')}"
    if isinstance(examples, str):
        nothing = dict.fromkeys(("split", "n", "prompt", "ocr"), "none")
        return [{"task": "none", "source": examples} | nothing | _end(metric, decoding, harness, "computed")]
    rows = []
    for task in dict.fromkeys(e.task for e in examples):
        prompts = [e.prompt for e in examples if e.task == task]
        kinds = list(dict.fromkeys(prompts))
        others = f" (and {len(kinds) - 1} like it)" if len(kinds) > 1 else ""
        rows.append({
            "task": task, "source": examples.source, "split": examples.split, "n": len(prompts),
            "prompt": f"“{kinds[0]}”{others}", "ocr": "yes" if any("OCR token" in p for p in kinds) else "no",
        } | _end(metric or metric_of(task), decoding, harness, "measured"))  # fmt: skip
    return rows


def _end(metric: str, decoding: str, harness: str, basis: str) -> dict:
    return {"metric": metric, "decoding": decoding, "harness": harness, "basis": basis}


def reported(name: str) -> pd.DataFrame:
    """A table of `data/reported` by its file's name without the ending."""
    return pd.read_csv(REPORTED / f"{name}.csv", keep_default_na=name != "protocols")


def figures_of(protocol, frame: pd.DataFrame) -> set[tuple]:
    """The figures, as (row, column) of a reported table, that a line of `protocols.csv` speaks of; its `rows` is a query."""
    rows = frame.query(protocol.rows).index if protocol.rows else frame.index
    return {(row, column) for column in protocol.columns.split("; ") for row in rows if pd.notna(frame.loc[row, column])}


def protocol_of(name: str, column: str, field: str) -> pd.Series:
    """What the ledger states about each figure in one column of a reported table: its `field`, by row."""
    frame, ledger = reported(name), reported("protocols")
    lines = [line for line in ledger[ledger.file == name].itertuples() if column in line.columns.split("; ")]
    values = {row: getattr(line, field) for line in lines for row, of in figures_of(line, frame) if of == column}
    return pd.Series(values).sort_index()
