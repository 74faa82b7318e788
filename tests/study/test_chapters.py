"""What chapters lean on: ablations written as YAML, and the figure to play with, tried in a browser."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import dyrate
from dyrate import ablations, dynamics
from study.chapters.dynamics import controls, explained, sentence, verdicts
from dyrate.predictor import RatePredictor
from dyrate.strategies.dyrate import DyRate
from study.figures.slider import kept_slider

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_the_extend_pages_ablations_run_as_written(tmp_path):
    text = Path("book/extend.md").read_text()
    lines = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S).group(1))["04_ablations"]["ablations"]
    ablations.check(lines)
    model, processor = dyrate.load("pocket")
    examples = study.examples.examples("pocket", 2, tasks=["qa_colour"])
    quick = [line for line in lines if "train" not in line]
    rows = ablations.run(model, processor, quick, examples, examples, examples, root=Path(),
                         trained=tmp_path, store=tmp_path, max_new_tokens=6, batch_size=2)  # fmt: skip
    table = ablations.summary(rows)
    assert list(table.label) == [line["label"] for line in quick]
    assert table.kept[1] > table.kept[0]  # the slower annealing keeps more
    assert rows[rows.group == "beams"].score.notna().all()


@pytest.mark.parametrize(("line", "message"), [
    ({"label": "x", "strategy": "FastV"}, "a group and a label"),
    ({"group": "a", "label": "x"}, "one of strategy, predictor and train"),
    ({"group": "a", "label": "x", "strategy": "FastW"}, "no strategy is called FastW"),
    ({"group": "a", "label": "x", "strategy": "FastV", "feilds": {}}, "unknown \\['feilds'\\]"),
])  # fmt: skip
def test_a_bad_ablation_is_named_before_anything_runs(line, message):
    with pytest.raises(ValueError, match=message):
        ablations.check([line])


@pytest.mark.skipif(BROWSER is None, reason="no browser")
def test_the_slider_shows_what_is_left(tmp_path):
    masks = np.zeros((3, 16), bool)
    masks[0], masks[1, :8], masks[2, :3] = True, True, True
    figure = kept_slider("kept", Image.new("RGB", (32, 32), "red"), masks, ["a", "</script>", "cat"]).data
    move = "<script>const r = document.querySelector('input'); r.value = 2; r.dispatchEvent(new Event('input'));</script>"
    (tmp_path / "page.html").write_text(f"<!doctype html><body>{figure}{move}</body>")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/browser",
               "--virtual-time-budget=3000", "--dump-dom", f"file://{tmp_path}/page.html"]  # fmt: skip
    page = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert 'data-left="3"' in page
    assert "word 2: 3 of 16 image tokens left" in page
    assert re.search(r'<span style="font-weight: bold; opacity: 1;">cat ', page)
    assert "http" not in figure.replace("http-equiv", "")


def frame(paths, tasks="abc"):
    import pandas as pd

    rows = [
        {"strategy": "DyRate 0", "sample": f"s{i}", "task": tasks[i], "step": t, "kept": share}
        for i, path in enumerate(paths) for t, share in enumerate(path)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_controls_have_the_predictors_budget():
    paths = frame([[1.0, 0.5, 0.0], [0.8, 0.4, 0.3], [0.5, 0.5, 0.5]])
    like = DyRate.of(RatePredictor(6, 8, "llava"))
    made = controls(paths, like, 8, oracle=True)
    assert made["constant"].rate == pytest.approx(0.5)
    assert made["mean trajectory"].rates == pytest.approx((1 - 2.3 / 3, 1 - 1.4 / 3, 1 - 0.8 / 3), abs=1e-6)
    assert made["constant by task"].rates == pytest.approx({"a": 0.5, "b": 0.5, "c": 0.5})
    assert len(made["others' rates"].rates) == 3
    assert explained(paths)["task"] == pytest.approx(0, abs=1e-12) and 0.4 < explained(paths)["step"] < 0.9


class Step:
    def __init__(self, step):
        self.step = step


@pytest.mark.parametrize("residency", ["evict", "hide"])
@pytest.mark.parametrize("budget", [0.1, 0.33, 0.75])
def test_a_schedule_has_the_budget_on_short_and_long_answers_together(residency, budget):
    rng = np.random.default_rng(0)
    lengths = [2, 2, 3, 11, 12, 40, 55, 90]
    paths = frame([np.sort(rng.uniform(0, 1, n))[::-1] ** (1 / budget - 1) for n in lengths], "aaabbccc")
    wanted = paths.groupby("sample").kept.mean().mean()
    made = controls(paths, DyRate.of(RatePredictor(6, 8, "llava", residency=residency)), 8, oracle=False)

    def kept(strategy):
        return np.mean([np.mean([strategy.keep(Step(t)) for t in range(n)]) for n in lengths])

    assert kept(made["annealing"]) == pytest.approx(wanted, abs=1e-4)
    assert kept(made["mean trajectory"]) == pytest.approx(wanted, abs=1e-4)
    others = made["others' rates"].rates
    shares = [1 - np.mean([path[min(t, len(path) - 1)] for t in range(n)]) for path in others for n in lengths]
    assert np.mean(shares) == pytest.approx(wanted, abs=1e-4)  # over all inputs that another's rates may meet


def test_a_scene_that_many_tasks_ask_about_counts_once():
    import pandas as pd

    rng = np.random.default_rng(0)
    hard = rng.normal(0, 1, 30)  # the difference belongs to the scene, not to the task
    rows = pd.DataFrame([
        {"strategy": s, "sample": f"{task}-{i}", "task": task, "score": hard[i] * (s == "mean trajectory")}
        for s in ("constant", "mean trajectory") for task in "abcd" for i in range(30)
    ])  # fmt: skip
    found = verdicts(rows, [], list("abcd")).set_index("task")
    assert found.n.to_dict() == dict.fromkeys([*"abcd", "all but captions"], 30)
    assert found.high["all but captions"] == pytest.approx(found.high["a"])


def test_verdicts_are_paired_and_said_plainly():
    import pandas as pd

    score = {"Full": 1.0, "constant": 0.5, "mean trajectory": 0.7, "annealing": 0.6, "DyRate 0": 0.65, "DyRate 1": 0.75}
    rows = [
        {"strategy": s, "sample": f"{task}{i}", "task": task, "score": v + 0.01 * i}
        for s, v in score.items() for task in ("description", "caption") for i in range(8)
    ]  # fmt: skip
    found = verdicts(pd.DataFrame(rows), ["DyRate 0", "DyRate 1"], ["description", "caption"])
    value = found[found.task == "all but captions"].set_index("question").value
    assert value["a schedule against a constant"] == pytest.approx(0.2)
    assert value["adapting against its mean schedule"] == pytest.approx(0.0, abs=1e-12)
    assert value["learning against annealing"] == pytest.approx(0.1)
    said = sentence(found)
    assert "a schedule beats a constant rate (+0.200" in said and "learning beats a straight line" in said
    assert "DyRate as a whole beats a constant rate (+0.200" in said and "each kind of task" not in said  # not measured here


def test_a_line_that_trains_is_trained_once(tmp_path, monkeypatch):
    model, processor = dyrate.load("pocket")
    learn = study.examples.examples("pocket", 4, tasks=["qa_colour"], split="train")
    line = {"group": "number of rates", "label": "4", "train": {"n_rates": 4, "steps": 2, "batch": 2}}
    how = dict(root=Path(), trained=tmp_path)
    first = ablations.strategy_of(line, model, processor, learn, learn, **how)
    monkeypatch.setattr(ablations, "train", lambda *a, **k: pytest.fail("trained again"))
    again = ablations.strategy_of(line, model, processor, learn, learn, **how)
    assert len(first.predictor.rates) == 4 and str(first.predictor) == str(again.predictor)
    monkeypatch.undo()
    other = ablations.strategy_of({**line, "train": {**line["train"], "seed": 1}}, model, processor, learn, learn, **how)
    assert str(other.predictor) != str(first.predictor) and len(list(tmp_path.iterdir())) == 2


def test_a_line_is_set_against_a_constant_that_keeps_as_much():
    import pandas as pd

    def line(group, label, kept, score):
        return [
            {"group": group, "label": label, "task": "t", "sample": f"s{i}", "score": score + i, "kept": kept, "prefill": 1,
             "decode": 1, "tokens": 1} for i in range(6)
        ]  # fmt: skip

    constants = [*line(ablations.CONSTANT, "0.5", 0.5, 0.8), *line(ablations.CONSTANT, "0.2", 0.2, 0.2)]
    others = [*line("a", "same share", 0.2, 0.3), *line("a", "between", 0.3, 0.3), *line("b", "too few", 0.1, 0.9)]
    table = ablations.summary(pd.DataFrame(constants + others))
    over = table.set_index("label").over
    assert over[["0.5", "0.2"]].tolist() == pytest.approx([0, 0], abs=1e-12)  # a constant is as good as itself
    assert over[["same share", "between"]].tolist() == pytest.approx([0.1, 0.3 - 0.4])
    assert np.isnan(over["too few"]) and table.over_low.notna().sum() == 4
    said = ablations.finding(table)
    assert "*a* matters most: +0.100 (+0.100 to +0.100) with *same share* against -0.100" in said
    assert "of 2 lines 1 are better than the constant and 1 worse" in said and "b" not in said.split("spread: ")[1]


def scores(score, lengths):
    import pandas as pd

    return pd.DataFrame([
        {"strategy": s, "sample": f"d{i}", "task": "description", "score": v(i), "kept": 0.3, "tokens": length}
        for s, v in score.items() for i, length in enumerate(lengths)
    ])  # fmt: skip


def test_conditions_say_where_dynamics_help():
    lengths = [10, 10, 10, 10, 50, 50, 50, 50]
    rows = scores({
        "Full": lambda i: 1.0, "constant": lambda i: 0.5, "annealing": lambda i: 0.5,
        "mean trajectory": lambda i: 0.7 if i < 4 else 0.3, "DyRate 0": lambda i: 0.7 if i < 4 else 0.3,
    }, lengths)  # fmt: skip
    halves = dynamics.by_length(rows, "description")
    assert [set(half.tokens) for half in halves.values()] == [{10}, {50}]
    found = dynamics.conditions({name: (half, ["DyRate 0"]) for name, half in halves.items()})
    said = dynamics.helps(found, "a schedule against a constant")
    assert said == "helps with short descriptions; harms with long descriptions"
    assert dynamics.helps(found, "adapting against its mean schedule") == "cannot be told to help or harm anywhere"


def test_a_bar_is_missed_only_where_the_whole_interval_is_below():
    same = {"constant": 0.5, "constant by task": 0.5, "DyRate 0": 0.4, "DyRate 1": 0.45}
    rows = scores({name: lambda i, value=value: value for name, value in same.items()}, [10] * 20)
    seeds = ["DyRate 0", "DyRate 1"]
    assert set(dynamics.bars(dynamics.verdicts(rows, seeds, ["description"]), ["description"]).bar) == {"missed"}
    assert dynamics.by_seed(rows, seeds).score.to_dict() == pytest.approx({"DyRate 0": 0.4, "DyRate 1": 0.45})
    noisy = rows.assign(score=[(i % 3) / 3 for i in range(len(rows))])
    assert set(dynamics.bars(dynamics.verdicts(noisy, seeds, ["description"]), ["description"]).bar) == {"met"}
