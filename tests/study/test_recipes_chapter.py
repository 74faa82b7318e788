"""Chapter 13: what recipes gain, and why the paper's gains nothing."""

from types import SimpleNamespace

import pandas as pd
import pytest

from study.chapters import recipes
from study.chapters.headroom import BEST
from study.figures.recipes import variant_gains

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


def row_of(recipe: str, laboratory: str, low: float, high: float, **more) -> dict:
    found = {"laboratory": laboratory, "recipe": recipe, "retention": 0.25, "cost": 0.25, "computation": 0.5}
    found |= {"value": (low + high) / 2, "low": low, "high": high, "captured": 0.5, "captured_low": 0.4, "captured_high": 0.6}
    return found | NUMBER | {"constant": 0.7, "controller": 0.5, "score": 0.9, BEST: 0.3} | more


def test_the_finding_follows_the_intervals(monkeypatch):
    rows = [
        row_of(recipe, laboratory, *ends, equal=equal, trained_on=192)
        for recipe, laboratory, same, as_dear in (
            ("evict-0.33", "first", (0.1, 0.3), (-0.3, -0.1)), ("curves-0.25", "first", (-0.1, 0.1), (0.1, 0.2)),
            ("evict-0.25", "second", (-0.3, -0.1), (-0.3, -0.1)), ("curves-0.25", "second", (0.1, 0.2), (0.1, 0.2)),
        )
        for equal, ends in (("retention", same), ("computation", as_dear))
    ]  # fmt: skip
    monkeypatch.setattr(recipes, "answers", lambda _: pd.DataFrame(rows))
    monkeypatch.setattr(recipes, "losses", lambda _: pd.DataFrame(rows)[::2])
    said = recipes.finding(())
    assert "of 2 settings (model and first pruned layer). The paper's recipe: better in 1 and worse in 1 of 2 at" in said
    assert "measured retention, 0 and 2 at equal computation. Curves once an answer: better in 1 and worse in 0 of 2 at" in said
    assert "+0.200 (+0.100 to +0.300) at equal retention, is that of the paper's recipe on first; at equal" in said
    assert "the paper's recipe captures 50 % (first) to 50 % (first); curves once an answer captures 50 %" in said
    assert "n = 20 to 20 answers a setting, 3 trainings" in said
    shown = recipes.answers_shown(recipes.answers(()))
    assert len(shown) == 4 and shown["gain at equal computation"][0].startswith("-0.200")
    assert recipes.trained_on(SimpleNamespace(name="pocket-plain", layer=2), "curves-0.25") == 3072
    assert recipes.trained_on(SimpleNamespace(name="pocket-plain", layer=6), "curves-0.25") is None


def test_each_variant_is_described(monkeypatch):
    table = pd.DataFrame(
        [row_of(recipe, "first", 0.1, 0.2) for recipe in ("evict-0.33", "curves_hidden-0.25", "best other recipe")]
    )
    dearer = table.assign(value=table.value - 1, low=table.low - 1, high=table.high - 1)
    monkeypatch.setattr(recipes, "dyrate", lambda _, unit, residency: dearer if unit == "macs" else table)
    rows = [
        ("evict-0.33-seed0", "a", 0.1, "FastV"), ("evict-0.33-seed1", "a", 0.3, "FastV"), ("evict-0.33-seed0", "b", 0.6, "FastV"),
        ("evict-0.33-seed1", "b", 0.9, "random"), ("curves_hidden-0.25-seed0", "a", 0.25, "FastV"),
    ]  # fmt: skip
    of_answers = pd.DataFrame(rows, columns=["predictor", "task", "retention", "ranking"]).assign(residency="evict")
    lab = SimpleNamespace(dyrate=of_answers)
    shown = recipes.variants_shown(recipes.variants(lab))
    assert list(shown["retention (tasks)"]) == ["0.25 (0.20 to 0.60)", "0.25 (0.25 to 0.25)"]
    assert list(shown["gain at equal retention"].str[:6]) == ["+0.150"] * 2
    assert list(shown["gain at equal computation"].str[:6]) == ["-0.850"] * 2
    assert len(variant_gains(recipes.variants(lab)).axes) == 1
    assert list(shown["what it is"]) == ["the paper's", "reads the newest token's hidden state"]


def test_re_selectable_tokens_stand_beside_evicted_ones():
    def table(recipe, shift):
        rows = [(recipe, shift, "retention"), ("curves-0.25", 7, "retention"), (recipe, shift - 0.4, "computation")]
        return pd.DataFrame([row_of(name, "first", low, low + 0.2, equal=equal) for name, low, equal in rows])

    evicted = table("curves_each_step-0.25", 0)
    said = recipes.reselectable_said(table("curves_mask-0.25", 0.5), evicted)
    assert said.startswith("On first, where dropped tokens stay in memory")
    assert "re-selectable, one constant rate has a loss of 0.700" in said
    assert "lowers it by 0.600 (0.500 to 0.700), against the constant of equal computation by 0.200 (0.100 to 0.300)" in said
    assert "are evicted, one constant" in said and "by 0.100 (0.000 to 0.200), against the constant of equal" in said
    far = [row_of("curves_each_step-0.5", "first", 5, 6, equal=equal, cost=0.5) for equal in recipes.EQUAL]
    both = pd.concat([pd.DataFrame(far), evicted], ignore_index=True)
    assert recipes.reselectable_said(table("curves_mask-0.25", 0.5), both) == said
    assert recipes.reselectable_said(pd.DataFrame(columns=["recipe", "equal"]), evicted).startswith("No predictor")


def test_the_papers_recipe_is_told_with_each_budget():
    rows = [row_of(recipe, "first", 0.1, 0.2, equal=equal, least=0.2, most=0.4)
            for recipe in ("evict-0.33", "evict_macs-0.65", "rloo-0.25") for equal in ("retention", "computation")]  # fmt: skip
    assert recipes.budget_said(pd.DataFrame(rows)) == (
        "What the paper's recipe gains on the constant of its own computation (nats a token): +0.150 (+0.100 to +0.200) "
        "as the paper says, +0.150 (+0.100 to +0.200) with a budget in multiply-accumulates. What the task that keeps least and "
        "the one that keeps most keep: 0.20 to 0.40 as the paper says, 0.20 to 0.40 with a budget in multiply-accumulates."
    )


def test_recipes_stand_beside_what_they_could_have_learned(monkeypatch):
    share = {"schedule": 0.1, "constant by task": 0.7, "schedule by task": 0.8}
    reached = {f"{policy}: captured": {"value": v, "low": v, "high": v} for policy, v in share.items()}
    far = row_of("evict-0.75", "first", 0.1, 0.2, cost=0.75, captured=0.9)
    monkeypatch.setattr(recipes, "library", lambda *_: None)
    monkeypatch.setattr(recipes, "at_budget", lambda *_: reached)
    monkeypatch.setattr(recipes, "losses", lambda _: pd.DataFrame([far, row_of("evict-0.33", "first", 0.1, 0.2)]))
    labs = tuple(SimpleNamespace(name=name, layer=2) for name in ("first", "without predictors"))
    row, other = recipes.beside_policies(labs).to_dict("records")
    assert other["one schedule for all"] == row["one schedule for all"]
    assert [row[c].split(" (")[0] for c in row if c != "laboratory"] == ["10 %", "70 %", "80 %", "50 %"]  # the nearest budget's


def test_without_predictors_the_pages_say_so(monkeypatch):
    monkeypatch.setattr(recipes, "at_hand", lambda _: pd.DataFrame(columns=["laboratory", "recipe"]))
    assert "have not been compared" in recipes.finding(())
    assert "no answers" in recipes.answers_shown(recipes.answers(())).laboratory[0]
