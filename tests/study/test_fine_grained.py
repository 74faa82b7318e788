"""Chapter 10: a constant between two measured ones, and what a task may be held to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from study.chapters import fine_grained as chapter
from study.chapters.laboratories import Laboratory


@pytest.fixture
def lab() -> Laboratory:
    """Two answers, unpruned and under FastV at a half and a tenth, and one method that costs what lies between."""
    rows = []
    for sample, of in {"a": (1.0, 0.6, 0.2, 0.9), "b": (0.8, 0.8, 0.0, 0.5)}.items():
        for method, budget, retention, prefill, score in (
            ("Full", np.nan, 1.0, 90, of[0]), ("FastV", 0.5, 0.5, 50, of[1]), ("FastV", 0.1, 0.1, 20, of[2]),
            ("LinearAnneal", 0.25, 0.3, 70, of[3]), ("LinearAnneal", 0.1, 0.05, 15, of[3]),
        ):  # fmt: skip
            cost = {"retention": retention, "prefill": prefill, "decode": 10}
            rows.append({"task": "look_late", "sample": sample, "method": method, "budget": budget, "score": score, **cost})
    return Laboratory("toy", {"layers": 8}, Path(), {"late": pd.DataFrame(rows)})


def test_a_constant_between_two_measured_ones_is_interpolated_answer_by_answer(lab):
    at = chapter.constant_at(lab, "look_late", "FastV", "retention", 0.3)
    assert at.to_dict() == pytest.approx({"a": 0.4, "b": 0.4})
    shares = chapter.measured(lab, "look_late").groupby("budget", dropna=False).computation.mean()
    assert shares[0.5] == pytest.approx(0.6)
    between = chapter.constant_at(lab, "look_late", "FastV", "computation", 0.8)
    assert between.to_dict() == pytest.approx({"a": 0.8, "b": 0.8})


def test_a_measured_constant_is_itself(lab):
    for cost, score in ((0.1, 0.2), (0.5, 0.6), (1.0, 1.0)):
        assert chapter.constant_at(lab, "look_late", "FastV", "retention", cost)["a"] == pytest.approx(score)


def test_nothing_is_compared_below_the_cheapest_constant(lab):
    assert chapter.constant_at(lab, "look_late", "FastV", "retention", 0.05) is None


def test_curves_have_the_unpruned_model_at_their_end(lab):
    table = chapter.curves((lab,), ("look_late",), ("FastV",))
    assert table.budget.tolist() == [0.1, 0.5, 1.0]
    assert table[table.budget == 1.0].value.item() == pytest.approx(0.9)
