"""Scores of answers, and differences between conditions on the same samples."""

import pandas as pd
import pytest

import dyrate
from study.answers import Condition, answer_all
from study.caption_metrics import cider
from study.examples import examples as study_examples
from study.scores import caption_measures, compare, exact_match, method_scores, metric_of, scored, slot_scores


def rows(examples, **answer_of):
    """Rows as `answer_all` makes them, by label a function from the example to its answer."""
    return pd.DataFrame([
        {"label": label, "method": label, "budget": None, "seed": None, "sample": e.name, "task": e.task, "answer": answer(e)}
        for label, answer in answer_of.items() for e in examples
    ])  # fmt: skip


def test_scores_and_differences(tmp_path):
    examples = study_examples("pocket", 4, tasks=["description", "qa_colour", "caption"])
    conditions = [
        Condition("unpruned", dyrate.Full(), "Full"), Condition("blind", dyrate.VTW(first_pruned_layer=1), "VTW", 0.1, 3)
    ]  # fmt: skip
    answers = answer_all(*dyrate.load("pocket"), conditions, examples, tmp_path, max_new_tokens=60, batch_size=4, progress=False)
    table = scored(answers, examples)
    assert table.score.notna().all() and table.invented.notna().sum() > 0
    alone = scored(answers[answers.label == "blind"], examples)
    assert alone.score.tolist() == pytest.approx(table[table.label == "blind"].score.tolist())
    summary = compare(table).set_index(["label", "task"])
    full, blind = summary.loc["unpruned"], summary.loc["blind"]
    assert (full.difference_value == 0).all() and (full.macs_share == 1).all()
    assert (blind.macs_share < 0.6).all() and blind.loc["description", "difference_value"] < -0.1
    assert (blind.kv_share < 0.6).all() and blind.loc["description", "invented"] > full.loc["description", "invented"]
    assert (blind.method == "VTW").all() and (blind.budget == 0.1).all() and (blind.seed == 3).all()
    assert (blind.retention < 0.01).all() and (full.retention == 1).all() and full.budget.isna().all()


def test_scores_are_right_for_right_answers():
    examples = study_examples("pocket", 3, tasks=["description", "qa_place"])
    table = scored(rows(examples, x=lambda e: e.references[0]), examples)
    assert (table.score == 1).all() and (table[table.task == "description"].invented == 0).all()


def test_a_description_of_no_scene_has_no_score():
    photograph = dyrate.Examples([dyrate.Example("a.jpg", "description", "", ("a red cup",))], "photographs")
    with pytest.raises(ValueError, match=r"a.jpg: the task 'description' is scored by what a scene"):
        scored(rows(photograph, x=lambda e: "a red cup"), photograph)


def test_slots_of_a_description_by_hand():
    (example,) = study_examples("pocket", 1, tasks=["description"])
    n = len(example.scene.groups)
    assert slot_scores(example.scene, example.references[0]).shape == (n, 4)
    assert slot_scores(example.scene, example.references[0]).all()
    assert not slot_scores(example.scene, "nothing at all").any()


def test_caption_measures_by_hand():
    examples = study_examples("pocket", 3, tasks=["caption"])
    answers = {
        "right": lambda e: e.references[0], "wrong": lambda e: "zebra", "half": lambda e: f"{e.references[0]} and no zebra",
    }  # fmt: skip
    measures = caption_measures(scored(rows(examples, **answers), examples), examples).set_index("label")
    assert (measures.loc["right", ["BLEU-4", "ROUGE-L", "METEOR"]] > 0.9).all() and measures.loc["right", "CIDEr"] > 1
    assert (measures.loc["wrong"] < 0.1).all()
    for name, answer in answers.items():  # among others, but scored as if alone: unseen words too
        alone = cider([answer(e) for e in examples], [e.references for e in examples])
        assert measures.loc[name, "CIDEr"] == pytest.approx(alone.mean())


def test_a_methods_score_is_its_mean_over_budgets():
    table = pd.DataFrame(
        [("FastV", 0.5, "a", 1.0), ("FastV", 0.1, "a", 0.0), ("FastV", 0.5, "b", 1.0), ("FastVRerank", 0.5, "a", 0.3)],
        columns=["method", "budget", "sample", "score"],
    ).assign(task="caption")
    assert method_scores(table, "FastV", "caption").to_dict() == {"a": 0.5, "b": 1.0}
    assert method_scores(table, "FastV", "qa_count").empty


def test_exact_match():
    assert exact_match(" Left. ", ["left"]) == 1 and exact_match("left side", ["left"]) == 0
    assert metric_of("qa_place") == "exact match (share)" and metric_of("caption").startswith("CIDEr")
