"""Chapter 13: what recipes gain, and why the paper's gains nothing."""

from types import SimpleNamespace

import pandas as pd
import pytest

from study.chapters import recipes

NUMBER = {"n": 20, "seeds": 3}


@pytest.fixture
def lab(tmp_path):
    """Two answers of two steps to task a, one of four to b; slopes of one task whose sign is right and of one where it is not."""
    inert = pd.DataFrame({
        "answer": [0, 0, 1, 1, 2, 2, 2, 2], "task": ["a"] * 4 + ["b"] * 4, "inert": [0, 1, 0, 0, 0, 1, 1, 1],
        "lower": [0.4, 0, 0.3, 0.2, 0.1, 0, 0, 1e-9], "predictor": "evict-0.33-seed0",
    }).assign(inert=lambda rows: rows.inert.astype(bool))  # fmt: skip
    slopes = pd.DataFrame([
        {"task": task, "kind": kind, "size": size, "slope": slope}
        for task, truth, hot in (("a", 2.0, -1.0), ("b", -2.0, -1.0))
        for kind, size, slope in (("measured", 4, truth), ("measured", 1, 9), ("backward", 0.25, truth / 2), ("backward", 8, hot))
        for _ in range(3)
    ])  # fmt: skip
    for name, rows in (("inert", inert), ("slopes", slopes)):
        rows.to_csv(tmp_path / f"gradients_{name}.csv.gz", index=False)
    return SimpleNamespace(name="made-up", folder=tmp_path, layer=2)


def test_an_answer_counts_once_however_long_it_is(lab):
    shares = recipes.inert(lab).set_index("task")
    assert shares.value.to_dict() == pytest.approx({"a": 0.25, "b": 0.75, "all": (0.5 + 0 + 0.75) / 3})
    assert shares.n.to_dict() == {"a": 2, "b": 1, "all": 3}


def test_a_sign_is_wrong_where_it_is_not_the_measured_one(lab):
    table = recipes.slopes(lab)
    assert set(table[table.kind == "measured"]["size"]) == {recipes.DISTANCE}
    assert recipes.wrong_signs(table) == {0.25: [], 8: ["a"]}
    said = recipes.reasons(lab)
    assert "42 % (" in said and "at temperature 0.25 in 0 of 2 tasks, at temperature 8 in 1 of 2 tasks" in said


def test_gradients_that_were_not_measured_are_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"study\.gradients --model made-up"):
        recipes.gradients(SimpleNamespace(name="made-up", folder=tmp_path), "inert")


@pytest.mark.parametrize(("low", "high", "loss", "score"), [
    (0.1, 0.3, "lowers", "is higher"), (-0.3, -0.1, "raises", "is lower"),
    (-0.1, 0.1, "does not significantly change", "is not significantly different"),
])  # fmt: skip
def test_the_finding_follows_the_intervals(monkeypatch, low, high, loss, score):
    row = {"laboratory": "made-up", "recipe": "curves-0.25", "retention": 0.25, "value": 0.0, "low": low, "high": high}
    row |= NUMBER | {"captured": 0.5, "captured_low": 0.4, "captured_high": 0.6, "constant": 0.7, "controller": 0.5, "score": 0.9}
    paper = row | {"recipe": "evict-0.33", "value": -0.2, "low": -0.3, "high": -0.1}
    monkeypatch.setattr(recipes, "losses", lambda _: pd.DataFrame([paper, row]))
    monkeypatch.setattr(recipes, "answers", lambda _: pd.DataFrame([row]))
    said = recipes.finding(())
    assert f"`curves-0.25` {loss} the loss" in said and f"the score of `curves-0.25` {score}" in said
    assert "the paper's recipe (`evict-0.33`) raises the loss" in said
    assert "score of generated answers" in recipes.front_page(()) and "(20 answers, 3 trainings)" in recipes.front_page(())
    monkeypatch.setattr(recipes, "answers", lambda _: pd.DataFrame())
    assert "gain in teacher-forced loss" in recipes.front_page(())
    monkeypatch.setattr(recipes, "answers", lambda _: pd.DataFrame([row]))
    assert len(recipes.losses_shown(recipes.losses(()))) == 2 and len(recipes.answers_shown(recipes.answers(()))) == 1


def test_without_predictors_the_pages_say_so(monkeypatch):
    monkeypatch.setattr(recipes, "at_hand", lambda _: pd.DataFrame(columns=["laboratory", "recipe"]))
    assert "nothing has been trained" in recipes.finding(()) and "have not been compared" in recipes.front_page(())
    assert "no predictor" in recipes.losses_shown(recipes.losses(())).laboratory[0]
    assert "no answers" in recipes.answers_shown(recipes.answers(())).laboratory[0]
