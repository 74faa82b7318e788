"""Tables of rows as files: committed ones, which pages are drawn from, and answers with their texts, to be scored."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import TypeVar, get_type_hints

import pandas as pd

from dyrate.atomic import write_whole
from dyrate.data import Examples
from study.examples import as_rows, from_rows

T = TypeVar("T")
ABOUT = "about.json"  # written last: with it the rows of a chapter are whole
TEXT = ("object", "str")  # kinds of columns


def write_rows(path: Path, table: pd.DataFrame, digits: int | None = None) -> None:
    """Write a table whole, as CSV in gzip. digits: significant ones of its floats; None: all."""
    form = None if digits is None else f"%.{digits}g"

    def write(part: Path) -> None:
        with part.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:  # equal rows, equal bytes
            table.to_csv(packed, index=False, float_format=form)

    write_whole(path, write)


def read_answers(path: Path) -> pd.DataFrame:
    """Rows of `study.answers.answer_all` that were written: an empty answer stays one, and names of digits stay names."""
    return pd.read_csv(path, keep_default_na=False, dtype={"sample": str, "scene": str})


def keep(found, folder: Path) -> None:
    """Write a dataclass in place of what the folder holds: tables as CSV, the rest in one file of JSON, with the tables' columns.

    Raises TypeError for a column of objects that are no text, before anything is replaced.
    """
    tables, columns, about = {}, {}, {}
    for name in (field.name for field in fields(found)):
        value = getattr(found, name)
        if isinstance(value, Examples):
            value, about[name] = as_rows(value)
        if not isinstance(value, pd.DataFrame):
            about[name] = value
            continue
        tables[name], columns[name] = value, {str(column): str(kind) for column, kind in value.dtypes.items()}
        for column in (c for c, kind in columns[name].items() if kind in TEXT):
            if not value[column].map(lambda x: isinstance(x, str)).all():
                raise TypeError(f"{type(found).__name__}.{name}: not all of the column {column!r} is text")
    shutil.rmtree(folder, ignore_errors=True)  # with the provenance of the run that left it
    for name, table in tables.items():
        write_rows(folder / f"{name}.csv.gz", table)
    write_whole(folder / ABOUT, json.dumps({"columns": columns, "about": about}, indent=1) + "\n")


def kept(kind: type[T], folder: Path) -> T:
    """The dataclass that `keep` wrote. Raises FileNotFoundError where there is none."""
    if not (folder / ABOUT).exists():
        raise FileNotFoundError(f"{folder} holds no rows to draw from: measure them first, with draw = False")
    content = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    values, hints = content["about"], get_type_hints(kind)
    for name, columns in content["columns"].items():
        blank = {column: [] if kind in TEXT else [""] for column, kind in columns.items()}
        form = {"dtype": columns, "keep_default_na": False, "na_values": blank, "float_precision": "round_trip"}
        table = pd.read_csv(folder / f"{name}.csv.gz", **form) if columns else pd.DataFrame()
        values[name] = from_rows(table, values[name]) if hints[name] is Examples else table
    return kind(**values)
