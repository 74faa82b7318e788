"""What chapter 2 concludes from its rows, on rows made by hand."""

import pandas as pd
import pytest

from dyrate.training import Settings
from study.chapters import predictor
from study.chapters.predictor import Predictors


class Glued(dict):
    """Takes what a chapter records."""

    number = text = dict.__setitem__


def measured_with(**tables):
    """The chapter's measurements with these tables in place of measured ones."""
    measured = Predictors(None, None, [type("Example", (), {"task": "description"})], [], Settings(budget=0.5), {}, None, "", {})
    vars(measured).update(tables)
    return measured


def test_the_loss_is_compared_with_a_constant_at_the_same_retention():
    constant = pd.DataFrame([
        {"rate": rate, "sequence": i, "retention": 1 - rate, "loss": loss + i}
        for rate, loss in ((0.0, 1.0), (0.5, 2.0), (0.75, 4.0)) for i in range(2)
    ])  # fmt: skip
    answers = pd.DataFrame({"retention": [0.5, 0.25], "loss": [2.0, 3.5]})  # a constant that keeps .375: 3 and 4
    versus = measured_with(constant_answers=constant, answers=answers).minus_constant()
    assert versus["value"] == pytest.approx((2 - 3 + 3.5 - 4) / 2) and versus["n"] == 2
    table = measured_with(constant_answers=constant).constant
    assert table.retention.tolist() == [1, 0.5, 0.25] and table.loss.tolist() == [1.5, 2.5, 4.5]


def test_rates_are_rows_of_sequence_and_step():
    answers = pd.DataFrame({"task": ["a", "b"], "rates": [[0.0, 0.5], [0.25]], "loss": 0.0})
    rows = measured_with(answers=answers).rates
    assert rows.to_dict("list") == {
        "task": ["a", "a", "b"], "sequence": [0, 0, 1], "step": [0, 1, 0], "rate": [0.0, 0.5, 0.25]
    }  # fmt: skip


@pytest.mark.parametrize(("predicted", "verdict"), [
    ([1.9, 2.0, 2.2], "Its signs are right."), ([1.9, 2.0, 1.8], "For dropping it has the wrong sign"),
    ([2.1, 2.0, 1.8], "For dropping and keeping it has the wrong sign"),
])  # fmt: skip
def test_the_gradient_is_judged_at_both_ends(predicted, verdict):
    rows = pd.DataFrame({"task": "description", "rate": [0.0, 0.5, 0.9], "loss": [1.0, 2.0, 3.0], "predicted": predicted})
    glued = Glued()
    predictor.record_gradient(glued, measured_with(gradient=rows))
    assert glued["really_dropping"] == 1 and glued["really_keeping"] == -1 and glued["gradient_rate"] == 0.5
    assert glued["predicted_dropping"] == pytest.approx(predicted[2] - 2)
    assert glued["gradient_verdict"].startswith(verdict)
