"""What chapter 2 concludes from its rows, on rows made by hand."""

from dataclasses import fields

import pandas as pd
import pytest
import torch

import dyrate
from dyrate.training import Settings, trainer
from study.chapters import predictor
from study.chapters.predictor import Predictors
from study.examples import examples


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


def test_interrupted_trainings_go_on(tmp_path, monkeypatch):
    """Nothing is trained or calibrated twice, and what is left is what an uninterrupted run leaves; not with other weights."""
    learn, check = (examples("pocket", n, tasks=["qa_place"], split=split) for n, split in ((8, "train"), (2, "validation")))
    asked = [Settings(budget=0.5, steps=2, batch=4, n_rates=8, seed=seed) for seed in (3, 4)]
    step, calibrate, done, stop = trainer.Trainer.train_step, predictor.calibrate, [], []

    def calibrated(*arguments, **more):
        done.append("calibrated")
        if stop and done.count("calibrated") == 2:
            raise KeyboardInterrupt
        return calibrate(*arguments, **more)

    monkeypatch.setattr(trainer.Trainer, "train_step", lambda self: done.append("step") or step(self))
    monkeypatch.setattr(predictor, "calibrate", calibrated)
    monkeypatch.setattr(predictor.diagnostics, "signs", lambda *_: [])
    given = (*dyrate.load("pocket"), asked, learn, check, 2)
    whole = predictor.train_all(*given, tmp_path / "whole")
    assert done == ["step", "step", "calibrated"] * 2
    done.clear()
    stop.append(True)
    with pytest.raises(KeyboardInterrupt):
        predictor.train_all(*given, tmp_path / "stopped")
    assert done == ["step", "step", "calibrated"] * 2
    done.clear()
    again = predictor.train_all(*given, tmp_path / "stopped")
    assert done == ["calibrated"]  # the second, whose calibration was cut short
    for one, other in zip(whole, again, strict=True):
        assert one.history == other.history and one.calibration == other.calibration
        assert torch.equal(one.predictor.linear.weight, other.predictor.linear.weight)
    assert not torch.equal(whole[0].predictor.linear.weight, whole[1].predictor.linear.weight)
    done.clear()
    stop.clear()
    with torch.no_grad():
        next(given[0].parameters()).add_(1e-3)
    predictor.train_all(*given, tmp_path / "stopped")
    assert done == ["step", "step", "calibrated"] * 2  # of other weights nothing is gone on from


def test_the_loss_is_compared_with_a_constant_at_the_same_retention():
    constant = pd.DataFrame([
        {"rate": rate, "sequence": i, "retention": 1 - rate, "loss": loss + i}
        for rate, loss in ((0.0, 1.0), (0.5, 2.0), (0.75, 4.0)) for i in range(2)
    ])  # fmt: skip
    forced = pd.DataFrame({  # the second training for the lower budget keeps more than the first
        "budget": [0.375] * 4 + [0.75] * 4, "seed": [0, 0, 1, 1] * 2, "sequence": [0, 1] * 4,
        "retention": [0.5, 0.25, 0.5, 0.5, 0.75, 0.75, 0.75, 0.75],
        "loss": [2.0, 3.5, 2.5, 3.0, 2.0, 3.0, 1.0, 2.0],  # a constant that keeps .375: 3 and 4; .5: 2 and 3; .75: 1.5 and 2.5
    })  # fmt: skip
    measured = measured_with(constant_answers=constant, answers=forced)
    versus = measured.minus_constant
    assert versus.budget.tolist() == [0.375, 0.75] and versus.n.tolist() == [2, 2] and versus.seeds.tolist() == [2, 2]
    assert versus.value.tolist() == pytest.approx([(2 - 3 + 3.5 - 4 + 2.5 - 2 + 0) / 4, 0])
    assert versus.retention.tolist() == pytest.approx([0.4375, 0.75])
    assert measured.learned.loss.tolist() == pytest.approx([11 / 4, 2])
    table = measured_with(constant_answers=constant).constant
    assert table.retention.tolist() == [1, 0.5, 0.25] and table.loss.tolist() == [1.5, 2.5, 4.5]


def test_the_finding_has_every_budget():
    def answers(**changes):
        """Three answers of two trainings for each budget, whose rates change by so much."""
        rows = [(float(b), seed, i, change) for b, change in changes.items() for seed in range(2) for i in range(3)]
        return pd.DataFrame(rows, columns=["budget", "seed", "sequence", "rate_change"]).assign(task="description")

    versus = pd.DataFrame({"budget": [0.25, 0.5, 0.75], "value": [0.1, 0.0, -0.1], "low": [0.05, -0.1, -0.2],
                           "high": [0.2, 0.1, -0.05], "n": 8})  # fmt: skip
    generated = pd.DataFrame({"budget": [0.25, 0.25, 0.5, 0.75], "seed": [0, 1, 0, 0], "retention": [0.26, 0.25, 0.48, 0.76]})
    changes = answers(**{"0.25": 0.8, "0.5": 0.0, "0.75": -0.8})
    text = predictor.finding(measured_with(minus_constant=versus, answers=changes, generated=generated))
    assert text == (
        "**With `a`, a linear predictor meets its 3 budgets within 2.0 points of retention. At equal retention its loss is lower "
        "than a constant rate's at 1 and higher at 1 of 3: +0.100 (+0.050 to +0.200) at 0.25, +0.000 (-0.100 to +0.100) at 0.5, "
        "-0.100 (-0.200 to -0.050) at 0.75 (predictor minus constant, nats a token).** Its rates rise over a description at 1 "
        "and fall at 1 of them. 95 % intervals, n = 8 unseen answers, 2 trainings for each budget. Equal retention is not equal "
        "computation."
    )
    short = answers(**{"0.25": float("nan")}).query("seed == 0")
    text = predictor.finding(measured_with(minus_constant=versus[:1], answers=short, generated=generated[:1]))
    assert "meets its budget within 1.0 points" in text and "rates rise" not in text and "one training" in text


def test_signs_that_warn_are_told_with_budget_and_remedy():
    signs = pd.DataFrame({
        "budget": [0.25, 0.5] * 3, "seed": [0, 0, 1, 1, 0, 0], "sign": ["slow"] * 4 + ["odd"] * 2,
        "measured": [1.2, 1.1, 1.4, 0.9, 0.0, 0.2], "limit": [1.0] * 4 + [0.1] * 2, "above": [True] * 4 + [False] * 2,
        "warns": [True, True, True, False, True, False], "unit": "units", "remedy": "do something",
    })  # fmt: skip
    assert predictor.diagnosis(signs) == (
        "It warns: slow at budget 0.25 (2 of 2 trainings), 0.5 (1 of 2 trainings): 1.1 to 1.4 units, above 1; do something. "
        "odd at budget 0.25 (1 of 2 trainings): 0 units, below 0.1; do something."
    )
    assert predictor.diagnosis(signs[signs.seed == 0].assign(warns=False)) == "None warns here."


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
