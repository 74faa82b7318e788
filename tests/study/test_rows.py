"""Tables of rows as files."""

import pandas as pd

from study.rows import read_answers, write_rows


def test_rows_come_back_as_they_were(tmp_path):
    rows = pd.DataFrame({"sample": ["007", "8"], "scene": ["1", "2"], "answer": ["", "nan"], "score": [1 / 3, 2.0]})
    write_rows(tmp_path / "all.csv.gz", rows)
    pd.testing.assert_frame_equal(read_answers(tmp_path / "all.csv.gz"), rows)
    write_rows(tmp_path / "short.csv.gz", rows, digits=2)
    assert read_answers(tmp_path / "short.csv.gz").score.tolist() == [0.33, 2.0]
    assert {path.name for path in tmp_path.iterdir()} == {"all.csv.gz", "short.csv.gz"}  # no part of one is left
