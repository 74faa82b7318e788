"""Chapter 3: which conditions are compared, and what it says of them."""

import pandas as pd
import pytest

import dyrate
from study.chapters.comparison import Comparison, finding, lineup, measure, relevance_sentence, short_answers


def test_the_lineup_has_every_strategy_at_every_retention():
    conditions = lineup([0.5, 0.1], 8)
    assert len({c.label for c in conditions}) == len(conditions)
    assert (conditions[0].label, conditions[0].budget) == ("Full", None)
    methods = {c.method for c in conditions}
    assert {"FastV", "VisionZip", "Oracle", "RandomPrune"} <= methods and not {"DyRate", "Constant", "TaskConstant"} & methods
    assert all(type(c.strategy).__name__ == c.method for c in conditions)
    assert [(c.budget, round(c.strategy.rate, 6)) for c in conditions if c.method == "FastV"] == [(0.5, 0.5), (0.1, 0.9)]
    assert "Oracle" not in {c.method for c in lineup([0.5], 8, scenes=False)}
    assert [c.label for c in lineup([0.25], 8, ["VTW"])] == ["Full", "VTW 0.25"]
    with pytest.raises(ValueError, match=r"no strategy is called \['FastW'\]; there are \['AllWords'"):
        lineup([0.5], 8, ["FastV", "FastW"])


def test_a_trained_predictor_joins_with_its_own_budget_and_seed(tmp_path):
    measured = measure(
        model="pocket", source="pocket", tasks=["qa_colour"], n=2, retentions=[0.5], strategies=["FastV"],
        predictors="data/pocket/dyrate", pattern="evict-0.33-seed[13]", max_new_tokens=4, batch_size=2, seed=0, store=tmp_path,
    )  # fmt: skip
    assert list(measured.by_task.label) == ["Full", "FastV 0.5", "DyRate evict-0.33-seed1", "DyRate evict-0.33-seed3"]
    learned = measured.by_task[measured.by_task.method == "DyRate"]
    assert learned.budget.tolist() == [0.33, 0.33] and learned.seed.tolist() == [1, 3]
    assert measured.units == {"questions": "right answers (share)"} and set(measured.by_group.task) == {"questions"}


def test_a_budget_in_tokens_is_measured_as_its_share(tmp_path):
    settings = dict(
        model="pocket", source="pocket", tasks=["qa_colour"], n=1, strategies=["FastV"], predictors="", pattern="",
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


def test_the_finding_compares_with_random_pruning():
    text = finding(comparison(Full=0.2, FastV=0.05, RandomPrune=0.1, VTW=-0.3, WorstFirst=-0.4, Oracle=0.15), "description", 0.25)
    assert text == (
        "**At a retention ratio of 25 % RandomPrune scores highest on descriptions: 0.80 against 0.90 unpruned (lowest: "
        "WorstFirst, 0.30). Over all retention ratios FastV's ranking scores lower than random pruning (-0.050, 95 % interval "
        "-0.050 to -0.050); 2 of 2 published methods score below random pruning (FastV, VTW), each at its own computation.**"
    )
    text = finding(comparison(Full=0.2, FastV=0.1, VTW=0.0), "description", 0.25)
    assert text.endswith("FastV scores highest on descriptions: 0.80 against 0.90 unpruned (lowest: VTW, 0.70).**")


def test_without_a_run_of_lmms_eval_only_what_was_reported_is_shown():
    table, measured, caption = short_answers("")
    assert measured is None and "measured" not in caption and "DyRate" in set(table.model)


def test_what_cdpruners_relevance_is_worth_is_said_where_it_was_measured():
    text = relevance_sentence(comparison(Full=0.2, CDPruner=0.05, DiversityAlone=-0.1), "description")
    assert "scores higher than the same selection without relevance (+0.150, +0.150 to +0.150)" in text
    assert "not measured" in relevance_sentence(comparison(Full=0.2, CDPruner=0.05), "description")
