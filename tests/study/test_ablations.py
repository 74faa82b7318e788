"""Chapter 4: ablations written as YAML, what is wrong with them, and what is said of their results."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

import dyrate
from study.answers import weights_digest
from study.chapters import ablations
from study.examples import examples as study_examples

SIZES = {"n": 2, "n_train": 2, "n_validation": 2, "max_new_tokens": 6, "batch_size": 2, "seed": 0}
MEASURE = {"model": "pocket", "source": "pocket", "tasks": ["qa_colour"], "learn_tasks": ["qa_colour"], "constant_retentions": []}


def test_the_extend_pages_ablations_run_as_written(tmp_path):
    text = Path("book/extend.md").read_text()
    lines = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S).group(1))["04_ablations"]["ablations"]
    ablations.check(lines)
    quick = [line for line in lines if "train" not in line]
    measured = ablations.measure(**MEASURE, **SIZES, ablations=quick, trained=tmp_path / "trained", store=tmp_path)
    table = ablations.summary(measured.rows)
    assert list(table.label) == [line["label"] for line in quick]
    assert table.retention[1] > table.retention[0]  # the slower annealing keeps more
    assert measured.rows[measured.rows.group == "beams"].score.notna().all()


@pytest.mark.parametrize(("line", "message"), [
    ({"label": "x", "strategy": "FastV"}, "a group and a label"),
    ({"group": "a", "label": "x"}, "one of strategy, predictor and train"),
    ({"group": "a", "label": "x", "strategy": "FastW"}, "no strategy is called FastW"),
    ({"group": "a", "label": "x", "strategy": "FastV", "feilds": {}}, "unknown \\['feilds'\\]"),
    ({"group": "a", "label": "x", "strategy": "FastV", "fields": {"share": 0.5}}, "FastV has no field share; it has .*rate"),
    ({"group": "a", "label": "x", "strategy": "FastV", "fields": {"rate": 1.5}}, "rate is the share .* not 1.5"),
    ({"group": "a", "label": "x", "strategy": "DyRate"}, "predictor"),
    ({"group": "a", "label": "x", "train": {"n_ratse": 4}}, "Settings has no field n_ratse; it has .*n_rates"),
    ({"group": "a", "label": "x", "train": {"budget": 33}}, "not 33"),
    ({"group": "a", "label": "y", "strategy": "Full"}, "another line with this group and label"),
])  # fmt: skip
def test_a_bad_ablation_is_named_before_anything_runs(line, message):
    with pytest.raises(ValueError, match=f"ablation {re.escape(str(line))}: .*{message}"):
        ablations.check([{"group": "a", "label": "y", "strategy": "Full"}, line])


def test_equal_lines_are_measured_once_and_groups_may_share_a_label(tmp_path):
    of_predictor = {"label": "greedy", "predictor": "data/pocket/dyrate/evict-0.33-seed0"}
    lines = [
        {"group": "decoding", **of_predictor},
        {"group": "once dropped", **of_predictor},
        {"group": "score", "label": "greedy", "strategy": "FastV", "fields": {"rate": 0.67}},
        {"group": "first pruned layer K", "label": "2", "strategy": "FastV", "fields": {"rate": 0.67, "first_pruned_layer": 2}},
    ]
    measured = ablations.measure(**MEASURE, **SIZES, ablations=lines, trained=tmp_path / "trained", store=tmp_path)
    assert len(list(tmp_path.glob("*/*.json"))) == 2
    assert list(measured.rows.groupby(["group", "label"], sort=False).size().index) == [(x["group"], x["label"]) for x in lines]
    one, two = (measured.rows[measured.rows.group == group] for group in ("decoding", "once dropped"))
    assert one.drop(columns="group").to_csv(index=False) == two.drop(columns="group").to_csv(index=False)
    assert set(one.method) == {"DyRate"} and set(one.budget) == {0.33} and set(one.seed) == {0}


def test_a_line_that_trains_is_trained_once(tmp_path, monkeypatch):
    model, processor = dyrate.load("pocket")
    learn = study_examples("pocket", 4, tasks=["qa_colour"], split="train")
    line = {"group": "number of rates", "label": "4", "train": {"n_rates": 4, "steps": 2, "batch": 2}}

    def predictor(line):
        return ablations.condition(line, model, processor, learn, learn, tmp_path).strategy.predictor

    first = predictor(line)
    monkeypatch.setattr(ablations, "train", lambda *a, **k: pytest.fail("trained again"))
    again = predictor(line)
    assert len(first.rates) == 4 and weights_digest(first) == weights_digest(again) and first.about == again.about
    monkeypatch.undo()
    other = predictor({**line, "train": {**line["train"], "seed": 1}})
    assert other.about["settings"]["seed"] == 1 and len(list(tmp_path.iterdir())) == 2


def test_a_line_is_compared_with_a_constant_at_the_same_retention():
    def line(group, label, retention, score):
        return [
            {"group": group, "label": label, "method": "X", "task": "t", "sample": f"s{i}", "score": score + i,
             "retention": retention, "prefill": 1, "decode": 1, "tokens": 1} for i in range(6)
        ]  # fmt: skip

    constants = [*line(ablations.CONSTANT, "0.5", 0.5, 0.8), *line(ablations.CONSTANT, "0.2", 0.2, 0.2)]
    others = [*line("a", "same", 0.2, 0.3), *line("a", "between", 0.3, 0.3), *line("b", "too few", 0.1, 0.9)]
    table = ablations.summary(pd.DataFrame(constants + others))
    over = table.set_index("label").over
    assert over[["0.5", "0.2"]].tolist() == pytest.approx([0, 0], abs=1e-12)  # a constant is as good as itself
    assert over[["same", "between"]].tolist() == pytest.approx([0.1, 0.3 - 0.4])
    assert np.isnan(over["too few"]) and table.over_low.notna().sum() == 4
    shown = ablations.shown(table, "slots").set_index("label")
    assert shown["over a constant"]["same"] == "+0.100 (+0.100 to +0.100)" and shown["over a constant"]["too few"] == ""
    assert (table.over_all_low.dropna() <= table.over_low[table.over_all_low.notna()]).all()  # correcting widens
    text = ablations.finding(table, "`m`", dropped=True)
    assert "*a* matters most (95 % intervals): +0.100 (+0.100 to +0.100) with *same* against -0.100" in text
    assert "**With `m`, of 2 lines 1 score higher and 1 lower than a constant rate at equal retention" in text
    assert "favours random pruning" in text and "favours" not in ablations.finding(table, "`m`", dropped=False)
    assert "b" not in text.split("spread: ")[1]


def test_a_line_is_compared_with_a_constant_of_the_same_computation():
    def line(group, label, retention, macs, scores):
        return [
            {"group": group, "label": label, "method": "X", "task": "t", "sample": f"s{i}", "score": score,
             "retention": retention, "prefill": macs - 1, "decode": 1, "tokens": 1} for i, score in enumerate(scores)
        ]  # fmt: skip

    constants = [*line(ablations.CONSTANT, "0.5", 0.5, 60, (0.8, 0.6)), *line(ablations.CONSTANT, "1", 1.0, 100, (1.0, 1.0))]
    dear = line("a", "keeps little, costs much", 0.5, 80, (0.85, 0.75))
    table = ablations.summary(pd.DataFrame(constants + dear)).set_index("label")
    assert table.over["keeps little, costs much"] == pytest.approx(0.1)  # more than what keeps as much
    assert table.at_cost["keeps little, costs much"] == pytest.approx(-0.05)  # less than what costs as much
    assert (table.at_cost_all_low.dropna() <= table.at_cost_low[table.at_cost_all_low.notna()]).all()
    assert len(ablations.once(pd.concat([table, table]))) == len(table)


def test_the_finding_says_what_dyrate_costs():
    def line(group, label, retention, macs, score, method="X"):
        return [
            {"group": group, "label": label, "method": method, "task": "t", "sample": f"s{i}", "score": score,
             "retention": retention, "prefill": macs - 1, "decode": 1, "tokens": 1} for i in range(4)
        ]  # fmt: skip

    constants = [*line(ablations.CONSTANT, "0.2", 0.2, 40, 0.6), *line(ablations.CONSTANT, "0.6", 0.6, 80, 0.8)]
    unpruned, learned = line(ablations.CONSTANT, "1", 1.0, 100, 1.0), line("a", "greedy", 0.4, 80, 0.75, "DyRate")
    text = ablations.finding(ablations.summary(pd.DataFrame([*constants, *unpruned, *learned])), "`m`", dropped=False)
    assert (
        "DyRate (*greedy*) keeps 0.40 of the image tokens at 80 % of the unpruned multiply-accumulates, where a constant rate "
        "that keeps as much needs 60 %; its score differs from a constant's by +0.050 (+0.050 to +0.050) at equal retention and "
        "-0.050 (-0.050 to -0.050) at equal computation.**"
    ) in text
    assert "of 1 lines 1 score higher and 0 lower than a constant rate at equal retention; at equal computation, of 1, 0" in text
    dear = ablations.summary(pd.DataFrame([*constants, *unpruned, *line("a", "beams", 0.4, 300, 0.75, "DyRate")]))
    assert "to +0.050) at equal retention.**" in ablations.finding(dear, "`m`", dropped=False)
    for rows in ([*constants, *learned], [*constants, *unpruned, *line("a", "greedy", 0.4, 80, 0.75)]):
        assert "DyRate" not in ablations.finding(ablations.summary(pd.DataFrame(rows)), "`m`", dropped=False)
    nothing = ablations.summary(pd.DataFrame([*unpruned, *line("a", "x", 0.4, 80, 0.75)]))
    assert "no line has a retention" in ablations.finding(nothing, "`m`", dropped=False)


def test_two_lines_are_compared_sample_by_sample():
    rows = pd.DataFrame({"label": list("aabb"), "sample": [1, 2, 2, 1], "score": [1.0, 0.5, 0.5, 0.6]})
    assert ablations.difference(rows, "a", "b")["value"] == pytest.approx(0.2)
    assert ablations.difference(rows, "a", "c") is None


def test_the_papers_table_has_this_runs_lines_beside_it_where_there_are_some():
    line = {"task": "description", "low": 0.8, "high": 1.0}
    table = pd.DataFrame([
        line | {"group": "constant rate", "label": "1", "value": 0.9, "retention": 1.0, "macs": 10.0},
        line | {"group": "which layers", "label": "FixedPrune", "value": 0.85, "retention": 0.33, "macs": 6.0},
    ])  # fmt: skip
    shown = ablations.beside_reported("table4b_pruning_strategy", table, "right slots").set_index("strategy")
    assert shown.loc["DyRate (FP)"].tolist() == ["107.00", "28.80", "0.85 (0.80 to 1.00)", 0.33, pytest.approx(0.6)]
    assert shown["here: right slots"]["FastV"] == "" and shown["here: computation"].isna().to_dict()["DyRate (DP)"]
    assert set(ablations.beside_reported("table4a_decoding", table.iloc[:0], "right slots")["here: right slots"]) == {""}
