"""What chapter 2 concludes from its rows, on rows made by hand."""

from dataclasses import fields

import pandas as pd
import pytest

from study.chapters import predictor
from study.chapters.predictor import Predictors


class Glued(dict):
    """Takes what a chapter records."""

    number = text = dict.__setitem__


def measured_with(**tables):
    """The chapter's measurements with these tables in place of measured ones."""
    unseen = [type("Example", (), {"task": "description"})]
    known = {field.name: None for field in fields(Predictors)} | {"unseen": unseen, "budget": 0.5, "place": "`a`"}
    measured = Predictors(**known)
    vars(measured).update(tables)
    return measured


def test_the_loss_is_compared_with_a_constant_at_the_same_retention():
    constant = pd.DataFrame([
        {"rate": rate, "sequence": i, "retention": 1 - rate, "loss": loss + i}
        for rate, loss in ((0.0, 1.0), (0.5, 2.0), (0.75, 4.0)) for i in range(2)
    ])  # fmt: skip
    forced = pd.DataFrame({
        "budget": [0.375, 0.375, 0.75, 0.75], "sequence": [0, 1, 0, 1], "retention": [0.5, 0.25, 0.75, 0.75],
        "loss": [2.0, 3.5, 2.0, 3.0],  # a constant that keeps .375: 3 and 4; one that keeps .75: 1.5 and 2.5
    })  # fmt: skip
    versus = measured_with(constant_answers=constant, answers=forced).minus_constant
    assert versus.budget.tolist() == [0.375, 0.75] and versus.n.tolist() == [2, 2]
    assert versus.value.tolist() == pytest.approx([(2 - 3 + 3.5 - 4) / 2, 0.5])
    table = measured_with(constant_answers=constant).constant
    assert table.retention.tolist() == [1, 0.5, 0.25] and table.loss.tolist() == [1.5, 2.5, 4.5]


def test_the_finding_has_every_budget():
    def rates(**of):
        """Three answers under each budget, with these rates at their steps."""
        steps = [(float(b), i, t, rate) for b, path in of.items() for i in range(3) for t, rate in enumerate(path)]
        return pd.DataFrame(steps, columns=["budget", "sequence", "step", "rate"]).assign(task="description")

    versus = pd.DataFrame({"budget": [0.25, 0.5, 0.75], "value": [0.1, 0.0, -0.1], "low": [0.05, -0.1, -0.2],
                           "high": [0.2, 0.1, -0.05], "n": 8})  # fmt: skip
    courses = rates(**{"0.25": [0.1] * 6 + [0.9] * 3, "0.5": [0.5] * 9, "0.75": [0.9] * 3 + [0.1] * 6})
    retention = pd.DataFrame({"budget": versus.budget, "value": [0.25, 0.48, 0.76]})
    text = predictor.finding(measured_with(minus_constant=versus, rates=courses, retention=retention))
    assert text == (
        "**With `a`, a linear predictor meets its 3 budgets within 2.0 points of retention. At equal retention its loss is lower "
        "than a constant rate's at 1 and higher at 1 of 3: +0.100 (+0.050 to +0.200) at 0.25, +0.000 (-0.100 to +0.100) at 0.5, "
        "-0.100 (-0.200 to -0.050) at 0.75 (predictor minus constant, nats a token).** Its rates rise over a description at 1 "
        "and fall at 1 of them. 95 % intervals, n = 8 unseen answers, one seed of training for each budget. Equal retention is "
        "not equal computation."
    )
    short = rates(**{"0.25": [0.1, 0.9]})
    text = predictor.finding(measured_with(minus_constant=versus[:1], rates=short, retention=retention[:1]))
    assert "meets its budget within 0.0 points" in text and "rates rise" not in text


def test_the_rates_shown_are_those_of_one_budget():
    rates = pd.DataFrame({"budget": [0.25, 0.5], "task": "a", "sequence": 0, "step": 0, "rate": [0.9, 0.4]})
    assert measured_with(rates=rates).shown_rates.to_dict("list") == {"task": ["a"], "sequence": [0], "step": [0], "rate": [0.4]}


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
