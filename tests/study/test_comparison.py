"""Chapter 3: which conditions are compared, and what it says of them."""

import json

import pandas as pd
import pytest

import dyrate
from study.chapters.comparison import (
    Comparison,
    against_random,
    against_random_shown,
    finding,
    measure,
    relevance_sentence,
    short_answers,
    with_latency,
)
from study.compared import lineup, methods
from study.figures.comparison import families, pareto
from study.scores import compare


def test_the_lineup_has_every_strategy_at_every_retention():
    conditions = lineup([0.5, 0.1], 8)
    assert len({c.label for c in conditions}) == len(conditions)
    assert (conditions[0].label, conditions[0].budget) == ("Full", None)
    compared = {c.method for c in conditions}
    assert {"FastV", "VisionZip", "Oracle", "RandomPrune"} <= compared and not {"DyRate", "Constant", "TaskConstant"} & compared
    assert all(type(c.strategy).__name__ == c.method for c in conditions)
    assert [(c.budget, round(c.strategy.rate, 6)) for c in conditions if c.method == "FastV"] == [(0.5, 0.5), (0.1, 0.9)]
    assert "Oracle" not in {c.method for c in lineup([0.5], 8, scenes=False)}
    assert [c.label for c in lineup([0.25], 8, ["VTW"])] == ["Full", "VTW 0.25"]
    with pytest.raises(ValueError, match=r"no strategy is called \['FastW'\]; there are \['AllWords'"):
        lineup([0.5], 8, ["FastV", "FastW"])


def test_a_trained_predictor_joins_with_its_own_budget_and_seed(tmp_path):
    measured = measure(
        model="pocket", source="pocket", tasks=["qa_colour"], n=2, retentions=[0.5], strategies=["FastV"],
        predictors="data/pocket/dyrate", patterns=["evict-0.33-seed[13]", "curves-0.25-seed0"], max_new_tokens=4, batch_size=2,
        seed=0, store=tmp_path,
    )  # fmt: skip
    trained = ["DyRate evict-0.33-seed1", "DyRate evict-0.33-seed3", "DyRate curves-0.25-seed0"]
    assert list(measured.by_task.label) == ["Full", "FastV 0.5", *trained]
    assert list(measured.by_task.method)[-1] == "DyRate, curves"  # trained otherwise: another method
    learned = measured.by_task[measured.by_task.method == "DyRate"]
    assert learned.budget.tolist() == [0.33, 0.33] and learned.seed.tolist() == [1, 3]
    assert measured.units == {"questions": "right answers (share)"} and set(measured.by_group.task) == {"questions"}


def test_a_budget_in_tokens_is_measured_as_its_share(tmp_path):
    settings = dict(
        model="pocket", source="pocket", tasks=["qa_colour"], n=1, strategies=["FastV"], predictors="", patterns=[],
        max_new_tokens=2, batch_size=1, seed=0, store=tmp_path,
    )  # fmt: skip
    measured = measure(retentions=[72, 0.25], **settings)  # of 144
    assert measured.retentions == [0.25, 0.5] and list(measured.by_task.label) == ["Full", "FastV 0.5", "FastV 0.25"]
    with pytest.raises(ValueError, match="a budget of 192 tokens is more than the 144"):
        measure(retentions=[192], **settings)


def comparison(**scores):
    """Three samples under each method, whose scores differ from 0.6, 0.7, 0.8 by the same number."""
    rows = [
        {"label": f"{method} 0.25", "method": method, "budget": None if method == "Full" else 0.25, "seed": None,
         "task": "description", "sample": f"s{i}", "score": 0.6 + i / 10 + more, "invented": 0.0, "prefill": 1, "decode": 1,
         "kv_bytes": 1, "retention": 0.25, "tokens": 5} for method, more in scores.items() for i in range(3)
    ]  # fmt: skip
    return Comparison({}, dyrate.Examples([], "none"), pd.DataFrame(rows))


def conditions(*lines, task="description"):
    """Four scenes under each line: method, label, measured retention, multiply-accumulates, and what its scores add to 0.1 i."""
    return pd.DataFrame([
        {"label": label, "method": method, "budget": retention, "seed": None, "task": task, "sample": f"{task}-{i}",
         "scene": str(i), "score": i / 10 + more, "invented": 0.0, "prefill": macs - 1, "decode": 1, "kv_bytes": 1,
         "retention": retention, "tokens": 5} for method, label, retention, macs, more in lines for i in range(4)
    ])  # fmt: skip


RANDOM = [("Full", "Full", 1.0, 100, 1.0), ("RandomPrune", "r 0.5", 0.5, 60, 0.8), ("RandomPrune", "r 0.1", 0.1, 20, 0.4)]


def test_methods_are_compared_with_random_pruning_of_the_same_measured_cost():
    lines = [
        ("FastV", "f 0.5", 0.5, 60, 0.7),  # as much kept and computed: 0.1 less
        ("FastV", "f 0.3", 0.3, 60, 0.9),  # random pruning gets 0.6 by retention, 0.8 by computation
        ("DART", "d", 0.05, 80, 0.9),  # keeps less than any random pruning; by computation as good as it
        ("FastVRerank", "ours", 0.5, 60, 0.0), ("WorstFirst", "control", 0.5, 60, 0.0),
    ]  # fmt: skip
    table = against_random(conditions(*RANDOM, *lines)).set_index(["cost", "method"])
    assert set(table.index) == {("retention", "FastV"), ("macs", "FastV"), ("macs", "DART")}
    assert table.value["retention", "FastV"] == pytest.approx((-0.1 + 0.3) / 2)
    assert table.value["macs", "FastV"] == pytest.approx((-0.1 + 0.1) / 2, abs=1e-9)
    assert table.value["macs", "DART"] == pytest.approx(0, abs=1e-9)
    assert table.compared["retention", "FastV"] == table.settings["retention", "FastV"] == 2


def test_several_questions_about_one_scene_count_once():
    kinds = [conditions(*RANDOM, ("FastV", "f", 0.5, 60, more), task=task) for task, more in (("qa_a", 0.8), ("qa_b", 0.6))]
    (row,) = [row for row in against_random(pd.concat(kinds)).to_dict("records") if row["cost"] == "macs"]
    assert (row["group"], row["n"]) == ("questions", 4) and row["value"] == pytest.approx(-0.1)


def test_the_finding_counts_methods_at_both_costs_on_every_group_of_tasks():
    rows = [
        conditions(*RANDOM, ("FastV", "f", 0.5, 60, 0.7), ("DyRate", "d", 0.5, 80, 0.85)),
        conditions(*RANDOM, ("FastV", "f", 0.5, 60, 0.8), ("DyRate", "d", 0.5, 80, 0.85), task="caption"),
    ]
    measured = Comparison({}, dyrate.Examples([], "none"), pd.concat(rows))
    text = finding(measured, "`a` (scenes)", dropped=True)
    assert text.startswith(
        "**`a` (scenes) was trained with random dropping, which favours random pruning: the published methods that score lower "
        "than random pruning are 1 of 2 on descriptions, 0 of 2 on captions (higher: 1 on descriptions, 1 on captions) at equal "
        "measured retention; 2 of 2 on descriptions, 1 of 2 on captions (higher: none) at equal multiply-accumulates.** DyRate "
        "minus random pruning on descriptions: +0.05 (+0.05 to +0.05) at equal measured retention, -0.05 (-0.05 to -0.05) at "
        "equal multiply-accumulates. Each method counts by the mean of its settings, which keep 0.50 to 0.50 of the image "
        "tokens, over 4 scenes;"
    )
    assert finding(measured, "`a` (scenes)", dropped=False).startswith("**With `a` (scenes), the published methods that score")
    shown = against_random_shown(measured.against_random)
    assert list(shown)[:2] == ["method", "descriptions, equal measured retention"] and shown.shape == (2, 5)


def test_without_random_pruning_the_finding_compares_with_no_pruning():
    measured = Comparison({}, dyrate.Examples([], "none"), conditions(RANDOM[0], ("FastV", "f", 0.5, 60, 0.7)))
    text = finding(measured, "`a` (scenes)", dropped=True)
    assert text == (
        "**No published method was compared with random pruning on `a` (scenes). Against no pruning 1 of 1 settings score "
        "significantly lower on descriptions (95 % intervals, 4 answers).**"
    )
    assert against_random_shown(measured.against_random).to_dict("list") == {"method": ["none was compared"]}


def test_scores_are_set_beside_times_where_those_were_measured(tmp_path):
    summary = compare(conditions(*RANDOM, ("FastV", "f 0.5", 0.5, 60, 0.7), ("DART", "d", 0.5, 60, 0.7)))
    none, said = with_latency(summary, tmp_path / "latency.json")
    assert none.empty and "not measured" in said
    times = {"Full": (1.0, 0.9, 1.1), "f 0.5": (0.8, 0.7, 0.9), "elsewhere": (1.2, 1.1, 1.3), "r 0.5": (0.7, 0.6, 0.8)}
    methods = {"Full": "Full", "f 0.5": "FastV", "elsewhere": "VTW", "r 0.5": "RandomPrune"}
    table = [
        {"label": k, "method": methods[k]} | dict(zip(("value", "low", "high"), ends, strict=True)) for k, ends in times.items()
    ]
    about = {"repeats": 3, "parameters": 6.1e6, "batch": 8, "new_tokens": 40, "device": "a CPU"}
    (tmp_path / "latency.json").write_text(json.dumps({"about": about, "table": table}))
    timed, said = with_latency(summary, tmp_path / "latency.json")
    assert dict(zip(timed.label, timed.latency, strict=True)) == {"Full": 1.0, "f 0.5": 0.8, "r 0.5": 0.7}  # d was not timed
    assert said.startswith("Of 2 settings of published methods 1 answer faster than the unpruned model and 1 slower")
    assert "The fastest, f 0.5, takes 0.80 (0.70 to 0.90) of the time, where it computes 0.60 of the multiply-acc" in said
    assert len(pareto(timed, {"description": "right slots"}, "latency").axes) == 1


def test_without_a_run_of_lmms_eval_only_what_was_reported_is_shown():
    table, measured, caption = short_answers("")
    assert measured is None and "measured" not in caption and "DyRate" in set(table.model)


def test_what_cdpruners_relevance_is_worth_is_said_where_it_was_measured():
    text = relevance_sentence(comparison(Full=0.2, CDPruner=0.05, DiversityAlone=-0.1), "description")
    assert "scores higher than the same selection without relevance (+0.150, +0.150 to +0.150)" in text
    assert "not measured" in relevance_sentence(comparison(Full=0.2, CDPruner=0.05), "description")


def test_every_compared_method_has_one_panel():
    found = families(["Full", "RandomPrune", *methods(), "DyRate", "ANewOne"])
    drawn = [name for names in found.values() for name in names]
    assert len(set(drawn)) == len(drawn) and set(drawn) == {*methods(), "DyRate", "ANewOne"} - {"RandomPrune"}
    assert "ANewOne" in found["controls"]
    assert max(map(len, families(["Full", "RandomPrune", *methods(), "DyRate", "DyRate, curves"]).values())) <= 6
    assert families(["Full", "RandomPrune"]) == {"controls": []}


def test_table_2_has_this_runs_captions_beside_it():
    lines = [("Full", "Full", 1.0, 10, 0.0), ("FastV", "FastV 0.5", 0.5, 6, -0.1), ("VTW", "VTW 0.25", 0.25, 4, -0.2)]
    measured = Comparison({}, dyrate.Examples([], "none"), conditions(*lines, task="caption"))
    table = measured.beside_reported_captions()
    assert list(table.method) == ["Original", "FastV", "FastV", "VTW", "DyRate"]
    assert table["reported: nocaps (%)"].tolist() == [100.0, 99.8, 100.0, 59.5, 100.1]
    here = table["here: CIDEr (%)"]
    assert here[2].startswith("33.3 (") and table["here: computation"][2] == pytest.approx(0.6) and not any(here.drop(2))
