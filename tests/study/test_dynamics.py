"""Chapter 7: controls made from a predictor's rates, and what is said of the differences."""

import numpy as np
import pandas as pd
import pytest

from dyrate.predictor import RatePredictor
from dyrate.strategies.dyrate import DyRate
from study.chapters import dynamics
from study.chapters.dynamics import controls, explained, finding, verdicts


def frame(paths, tasks="abc"):
    return pd.DataFrame([
        {"label": "DyRate 0", "sample": f"s{i}", "task": tasks[i], "step": t, "retention": retention}
        for i, path in enumerate(paths) for t, retention in enumerate(path)
    ])  # fmt: skip


def test_controls_have_the_predictors_budget():
    paths = frame([[1.0, 0.5, 0.0], [0.8, 0.4, 0.3], [0.5, 0.5, 0.5]])
    like = DyRate.of(RatePredictor(6, 8, "llava"))
    made = controls(paths, like, 8, oracle=True)
    assert made["constant"].rate == pytest.approx(0.5)
    assert made["mean trajectory"].rates == pytest.approx((1 - 2.3 / 3, 1 - 1.4 / 3, 1 - 0.8 / 3), abs=1e-6)
    assert made["constant by task"].rates == pytest.approx({"a": 0.5, "b": 0.5, "c": 0.5})
    assert len(made["others' rates"].rates) == 3
    assert "constant, oracle" in made and "constant, oracle" not in controls(paths, like, 8, oracle=False)
    assert explained(paths)["task"] == pytest.approx(0, abs=1e-12) and 0.4 < explained(paths)["step"] < 0.9


class Step:
    def __init__(self, step):
        self.step = step


@pytest.mark.parametrize("residency", ["evict", "mask"])
@pytest.mark.parametrize("budget", [0.1, 0.33, 0.75])
def test_a_schedule_has_the_budget_on_short_and_long_answers_together(residency, budget):
    rng = np.random.default_rng(0)
    lengths = [2, 2, 3, 11, 12, 40, 55, 90]
    paths = frame([np.sort(rng.uniform(0, 1, n))[::-1] ** (1 / budget - 1) for n in lengths], "aaabbccc")
    wanted = paths.groupby("sample").retention.mean().mean()
    made = controls(paths, DyRate.of(RatePredictor(6, 8, "llava", residency=residency)), 8, oracle=False)
    assert {made[name].residency for name in ("constant", "mean trajectory", "annealing", "others' rates")} == {residency}

    def retention(strategy):
        return np.mean([np.mean([strategy.keep(Step(t)) for t in range(n)]) for n in lengths])

    assert retention(made["annealing"]) == pytest.approx(wanted, abs=1e-4)
    assert retention(made["mean trajectory"]) == pytest.approx(wanted, abs=1e-4)
    others = made["others' rates"].rates
    means = [1 - np.mean([path[min(t, len(path) - 1)] for t in range(n)]) for path in others for n in lengths]
    assert np.mean(means) == pytest.approx(wanted, abs=1e-4)  # over all inputs that another's rates may meet


def test_schedules_are_those_that_the_controls_apply():
    paths = frame([[1.0, 0.5], [0.8, 0.3]])
    made = controls(paths, DyRate.of(RatePredictor(6, 8, "llava")), 8, oracle=False)
    rows = dynamics.schedules(paths, made).set_index(["method", "step"]).retention
    assert rows["DyRate"].tolist() == pytest.approx([0.9, 0.4])
    assert rows["mean trajectory"].tolist() == pytest.approx([0.9, 0.4], abs=1e-4)
    assert rows["constant"].tolist() == pytest.approx([0.65, 0.65])


def scores(score, lengths):
    """Rows of descriptions: by method its scores as a function of the sample's number; "DyRate 0" is a seed of DyRate."""
    return pd.DataFrame([
        {"label": label, "method": label.split()[0] if label.startswith("DyRate") else label, "sample": f"d{i}", "scene": str(i),
         "task": "description", "score": of(i), "retention": 1.0 if label == "Full" else 0.3, "tokens": length,
         "prefill": 90 if label == "Full" else 60 if label.startswith("DyRate") else 40, "decode": 10}
        for label, of in score.items() for i, length in enumerate(lengths)
    ])  # fmt: skip


def test_a_scene_that_many_tasks_ask_about_counts_once():
    hard = np.random.default_rng(0).normal(0, 1, 30)  # the difference belongs to the scene, not to the task
    rows = pd.DataFrame([
        {"label": s, "method": s, "sample": f"{task}-{i}", "scene": str(i), "task": task,
         "score": hard[i] * (s == "mean trajectory")}
        for s in ("constant", "mean trajectory") for task in "abcd" for i in range(30)
    ])  # fmt: skip
    table = verdicts(rows, list("abcd")).set_index("task")
    assert table.n.to_dict() == dict.fromkeys([*"abcd", "all but captions"], 30)
    assert table.high["all but captions"] == pytest.approx(table.high["a"])


def test_verdicts_are_paired_and_said_plainly():
    score = {"Full": 1.0, "constant": 0.5, "mean trajectory": 0.7, "annealing": 0.6, "DyRate 0": 0.65, "DyRate 1": 0.75}
    rows = scores({name: lambda i, value=value: value + 0.01 * i for name, value in score.items()}, [10] * 8)
    rows = pd.concat([rows, rows.assign(task="caption")])
    table = verdicts(rows, ["description", "caption"])
    value = table[table.task == "all but captions"].set_index("question").value
    assert value["a schedule against a constant"] == pytest.approx(0.2)
    assert value["adapting against its mean schedule"] == pytest.approx(0.0, abs=1e-12)
    assert value["learning against annealing"] == pytest.approx(0.1)
    assert table[table.question.str.startswith("DyRate")].seeds.eq(2).all()
    text = finding(table, rows, "`m`")
    assert text.startswith("**With `m`, at an equal mean retention of 0.30, a schedule scores higher")
    assert "95 % intervals over 8 scenes and 2 training seeds, on 1 task (captions, on another scale, apart)" in text
    assert "of the unpruned multiply-accumulates: DyRate 70 %, constant 50 %, mean trajectory 50 %, annealing 50 %." in text
    alone = rows[rows.label.ne("DyRate 1") & (rows.task == "description")]
    text_alone = finding(verdicts(alone, ["description"]), alone, "`m`")
    assert "8 scenes and 1 training seed, on 1 task. Equal" in text_alone
    assert "a schedule scores higher than a constant rate (+0.200" in text
    assert "learning scores higher than a straight line" in text
    assert "DyRate as a whole scores higher than a constant rate (+0.200" in text
    assert "each kind of task" not in text  # not measured here


def test_conditions_say_where_dynamics_help():
    rows = scores({
        "Full": lambda i: 1.0, "constant": lambda i: 0.5, "annealing": lambda i: 0.5,
        "mean trajectory": lambda i: 0.7 if i < 4 else 0.3, "DyRate 0": lambda i: 0.7 if i < 4 else 0.3,
    }, [10, 10, 10, 10, 50, 50, 50, 50])  # fmt: skip
    halves = dynamics.by_length(rows, "description")
    assert [set(half.tokens) for half in halves.values()] == [{10}, {50}]
    table = dynamics.conditions(halves)
    text = dynamics.helps(table, "a schedule against a constant")
    assert text == "helps with short descriptions; harms with long descriptions"
    assert dynamics.helps(table, "adapting against its mean schedule") == "has no significant effect anywhere"


def test_a_bar_is_missed_only_where_the_whole_interval_is_below():
    same = {"Full": 1.0, "constant": 0.5, "constant by task": 0.5, "DyRate 0": 0.4, "DyRate 1": 0.45}
    rows = scores({name: lambda i, value=value: value for name, value in same.items()}, [10] * 20)
    held = dynamics.bars(verdicts(rows, ["description"]), rows, ["description"])
    assert set(held.bar) == {"missed"} and set(held.bound) == {0.01}
    assert dynamics.by_seed(rows).score.to_dict() == pytest.approx({"DyRate 0": 0.4, "DyRate 1": 0.45})
    assert dynamics.budgets(rows, ["description"]).set_index("label").description.to_dict() == pytest.approx(same)
    noisy = rows.assign(score=[(i % 3) / 3 for i in range(len(rows))])  # too few to say
    assert set(dynamics.bars(verdicts(noisy, ["description"]), noisy, ["description"]).bar) == {"undecided"}
    level = rows.assign(score=0.5)
    assert set(dynamics.bars(verdicts(level, ["description"]), level, ["description"]).bar) == {"met"}


def test_a_missing_predictor_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no predictor .*evict-\*: train one"):
        dynamics.seeds(tmp_path, "evict-")
