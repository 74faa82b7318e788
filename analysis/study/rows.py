"""Tables of rows as files: committed ones, which pages are drawn from, and answers with their texts, to be scored."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from dyrate.atomic import write_whole


def write_rows(path: Path, table: pd.DataFrame, digits: int | None = None) -> None:
    """Write a table whole, as CSV in gzip. digits: significant ones of its floats; None: all."""
    form = None if digits is None else f"%.{digits}g"
    write_whole(path, lambda part: table.to_csv(part, index=False, compression="gzip", float_format=form))


def read_answers(path: Path) -> pd.DataFrame:
    """Rows of `study.answers.answer_all` that were written: an empty answer stays one, and names of digits stay names."""
    return pd.read_csv(path, keep_default_na=False, dtype={"sample": str, "scene": str})
