"""Tables read alike: one number of decimals a column, and what a paper printed as it printed it."""

import numpy as np
import pandas as pd

from study.book import shown_table


def columns_of(frame):
    lines = [line for line in shown_table(frame, "c", "tab-x").data.split("\n") if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {head: (rule, rows) for head, rule, *rows in zip(*cells, strict=True)}


def test_a_columns_numbers_have_the_same_decimals():
    frame = pd.DataFrame({
        "share": [0.9, 0.88612, 1 / 3], "ms": [320.42, 80.53, np.nan],
        "small": [1.2344, -0.0001, 0.5], "CIDEr": [7.15432, 0.5024, -1.0], "n": [24, 24, 3],
        "K": [3.0, 2.0, np.nan], "bar": [0.9, 0.75, 1.05], "none": [np.nan] * 3, "printed": ["75.00", "105.57", np.nan],
        "beside": ["75.00", 61.93333, None], "name": ["a", "b", "12"], "zero": [0.0, -0.0, 0.0],
    })  # fmt: skip
    assert columns_of(frame) == {
        "share": ("--:", ["0.900", "0.886", "0.333"]), "ms": ("--:", ["320.4", "80.5", ""]),
        "small": ("--:", ["1.234", "0.000", "0.500"]),
        "CIDEr": ("--:", ["7.154", "0.502", "-1.000"]), "n": ("--:", ["24", "24", "3"]), "K": ("--:", ["3", "2", ""]),
        "bar": ("--:", ["0.90", "0.75", "1.05"]), "none": ("---", ["", "", ""]), "printed": ("--:", ["75.00", "105.57", ""]),
        "beside": ("--:", ["75.00", "61.93", ""]), "name": ("---", ["a", "b", "12"]), "zero": ("--:", ["0", "0", "0"]),
    }  # fmt: skip
