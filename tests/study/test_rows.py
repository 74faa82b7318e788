"""Tables of rows as files."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest

from dyrate.data import Examples
from study.book import Chapter
from study.examples import examples
from study.rows import keep, kept, read_answers, write_rows


@dataclass
class Found:
    """What a chapter may measure."""

    about: dict
    examples: Examples
    rows: pd.DataFrame
    nothing: pd.DataFrame
    mean: float


def test_rows_come_back_as_they_were(tmp_path):
    rows = pd.DataFrame({"sample": ["007", "8"], "scene": ["1", "2"], "answer": ["", "nan"], "score": [1 / 3, 2.0]})
    write_rows(tmp_path / "all.csv.gz", rows)
    pd.testing.assert_frame_equal(read_answers(tmp_path / "all.csv.gz"), rows)
    write_rows(tmp_path / "short.csv.gz", rows, digits=2)
    assert read_answers(tmp_path / "short.csv.gz").score.tolist() == [0.33, 2.0]
    assert {path.name for path in tmp_path.iterdir()} == {"all.csv.gz", "short.csv.gz"}  # no part of one is left
    write_rows(tmp_path / "again.csv.gz", rows, digits=2)
    assert (tmp_path / "again.csv.gz").read_bytes() == (tmp_path / "short.csv.gz").read_bytes()


def found(**rows):
    table = pd.DataFrame({
        "sample": ["007", "8"], "answer": ["", "nan"], "score": [1 / 3, np.nan], "tokens": [3, 4], "right": [True, False],
        "seed": pd.array([0, None], "Int64"), **rows,
    })  # fmt: skip
    asked = examples("pocket", 2, tasks=["caption", "qa_reading"])
    return Found({"layers": 8}, asked, table, pd.DataFrame(columns=["layer", "value"]), 0.1 + 0.2)


def test_what_a_chapter_measured_is_drawn_from_its_rows_alone(tmp_path):
    measured = found()
    keep(measured, tmp_path)
    again = kept(Found, tmp_path)
    pd.testing.assert_frame_equal(again.rows, measured.rows, check_exact=True)
    assert again.nothing.empty and list(again.nothing) == ["layer", "value"]
    assert again.mean == measured.mean and again.about == measured.about
    assert again.examples == measured.examples and again.examples[0].image() == measured.examples[0].image()


def test_photographs_come_back_with_what_was_left_out(tmp_path):
    photographs = Examples([], "photos", problems=["two captions of a.jpg"], missing=["b.jpg"], unreadable=["c.jpg: cut"])
    keep(Found({}, photographs, pd.DataFrame(), pd.DataFrame(), 0.0), tmp_path)
    assert kept(Found, tmp_path).examples == photographs


def test_a_column_that_would_not_come_back_is_named(tmp_path):
    with pytest.raises(TypeError, match="not all of the column 'paths' is text"):
        keep(found(paths=[[1], [2]]), tmp_path)
    with pytest.raises(FileNotFoundError):
        kept(Found, tmp_path)
    keep(found(), tmp_path)
    with pytest.raises(TypeError):
        keep(found(paths=[[1], [2]]), tmp_path)
    assert kept(Found, tmp_path).mean == found().mean  # what was there stays


def test_rows_do_not_keep_the_provenance_of_another_run(tmp_path):
    (tmp_path / "provenance.json").write_text("{}")
    keep(found(), tmp_path)
    assert not (tmp_path / "provenance.json").exists()


def test_a_chapter_draws_what_it_measured_before(tmp_path):
    def measure(*, n: int) -> Found:
        calls.append(n)
        return found()

    calls: list[int] = []
    with pytest.raises(FileNotFoundError, match="no rows to draw from: measure them first"):
        Chapter("01_x", str(tmp_path)).measured(measure, draw=True, n=3)
    first = Chapter("01_x", str(tmp_path)).measured(measure, draw=False, n=3)
    drawn = Chapter("01_x", str(tmp_path)).measured(measure, draw=True, n=3)
    assert calls == [3] and first.mean == drawn.mean and first.rows.equals(drawn.rows)
