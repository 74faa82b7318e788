"""What a perfect controller could gain: trajectories and their costs, rankings, stored losses, and choices at equal cost."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from dyrate.cost import LLAVA_7B, ledger, shape_of
from dyrate.generation import answer_batch, encode
from dyrate.predictor import rate_grid
from dyrate.strategies.controls import Constant, RandomPrune
from dyrate.strategies.full import Full
from dyrate.teacher_forcing import masked_logits, prepare, teacher_forced, unpruned_logits
from study import intervals
from study.chapters import headroom as chapter
from study.examples import examples
from study.headroom import confirm, frontier, library, measure, rankings, report
from study.headroom.frontier import Library
from study.headroom.library import CONSTANTS, FALLING, LIBRARIES, N_RATES, Trajectory


@pytest.fixture(scope="module")
def lab():
    return measure.Laboratory.load("pocket-plain", 2)


@pytest.fixture(scope="module")
def asked():
    return examples("laboratories", 3, tasks=["caption"], split="test")


@pytest.fixture(scope="module")
def prepared(lab, asked):
    return prepare(lab.model, lab.processor, lab.place, list(asked), [e.image() for e in asked])


# -- trajectories and what they cost ---------------------------------------------------------------------------------------


def test_trajectories_hold_fall_and_drop():
    retention = {t.name: [1 - r for r in t.rates(9)] for t in (Trajectory(1, 0, over=4), Trajectory(1, 0.25, at=6), CONSTANTS[2])}
    assert retention["1 to 0 over 4"] == [1, 0.75, 0.5, 0.25] + 5 * [1 / N_RATES]  # no rate of the grid drops all
    assert retention["1 to 0.25 at 6"] == 6 * [1] + 3 * [0.25]
    assert retention["0.5"] == 9 * [0.5]


def test_a_library_for_eviction_brings_nothing_back():
    assert all((np.diff(t.rate_indices(100)) >= 0).all() for t in FALLING)
    assert any((np.diff(t.rate_indices(100)) < 0).any() for t in LIBRARIES["mask"])
    assert len({t.name for t in LIBRARIES["mask"]}) == len(LIBRARIES["mask"])


@pytest.mark.parametrize("residency", ["evict", "mask"])
def test_costs_are_the_ledgers(lab, asked, residency):
    inputs = encode(lab.processor, [e.image() for e in asked], [e.prompt for e in asked])
    spent, traces = [], []
    for strategy in (Full(), Constant(rate=0.75, residency=residency)):
        answers = answer_batch(lab.model, lab.processor, inputs, strategy, list(asked), min_new_tokens=9, max_new_tokens=9)
        traces.append(answers.trace)
        spent.append(ledger(shape_of(lab.model), answers.trace, strategy))
    full, pruned = ((s.prefill + s.decode).to_numpy() for s in spent)
    n_image = torch.tensor(traces[0].n_image)
    text = torch.as_tensor(inputs["attention_mask"]).sum(1) - n_image
    kept = library.kept_tokens(torch.full((3, 9), 24), n_image, residency)
    here = library.costs(kept, torch.ones(3, 9, dtype=torch.bool), n_image, text, shape_of(lab.model), 2, residency)
    assert np.allclose(here["macs"], pruned / full, rtol=1e-6) and np.allclose(here["retention"], 0.25)


def test_evicted_tokens_cost_nothing_later():
    n_image, falls_then_rises = torch.tensor([144]), torch.tensor([[0, 24, 8]])
    assert library.kept_tokens(falls_then_rises, n_image, "evict").tolist() == [[144, 36, 36]]
    assert library.kept_tokens(falls_then_rises, n_image, "mask").tolist() == [[144, 36, 108]]


# -- rankings --------------------------------------------------------------------------------------------------------------


def test_true_importance_sums_to_what_the_image_is_worth(lab, prepared):
    scores = rankings.importance_scores(lab.model, lab.place, prepared, nodes=24)
    whole = unpruned_logits(lab.model, lab.place, prepared)
    none = masked_logits(lab.model, lab.place, prepared, torch.zeros_like(prepared.score)).detach()
    worth = [_likelihood(logits, prepared) for logits in (whole, none)]
    assert torch.allclose(scores.sum(1), worth[0] - worth[1], rtol=0.05)
    assert (worth[0] - worth[1] > 1).all()


def _likelihood(logits, prepared):
    chosen = logits.log_softmax(-1).gather(2, prepared.labels.clamp(min=0)[..., None])[..., 0]
    return (chosen * prepared.valid).sum(1)


def test_random_ranking_is_random_prunings(lab, asked, prepared):
    ranked = rankings.ranked(lab.model, lab.place, prepared, "random", [e.name for e in asked])
    inputs = encode(lab.processor, [e.image() for e in asked], [e.prompt for e in asked])
    strategy = RandomPrune(rate=0.75)
    scores = {}

    class Spy(RandomPrune, registered=False):
        def score(self, seen):
            scores[seen.step] = RandomPrune.score(self, seen)
            return scores[seen.step]

    answer_batch(lab.model, lab.processor, inputs, Spy(rate=strategy.rate), list(asked), max_new_tokens=1)
    assert torch.equal(ranked.score[:, 0], scores[0]) and torch.equal(ranked.score[:, 0], ranked.score[:, -1])


# -- losses ----------------------------------------------------------------------------------------------------------------


def test_losses_are_those_of_teacher_forcing(lab, prepared):
    for index in (0, 20, 31):
        constant = torch.full_like(prepared.labels, index)
        expected = [r["loss"] for r in teacher_forced(lab.model, lab.place, [prepared], rate=float(rate_grid(N_RATES)[index]))]
        with torch.no_grad():
            assert np.allclose(measure.losses(lab, prepared, constant, "evict"), expected, atol=1e-5)


def test_under_a_fixed_ranking_evicting_is_masking(lab, asked, prepared):
    fixed = rankings.ranked(lab.model, lab.place, prepared, "random", [e.name for e in asked])
    falls = torch.from_numpy(Trajectory(0.5, 0.125, at=3).rate_indices(prepared.labels.shape[1])).expand_as(prepared.labels)
    with torch.no_grad():
        evicted, masked = (measure.losses(lab, fixed, falls, residency) for residency in ("evict", "mask"))
        other = measure.losses(lab, prepared, falls, "evict")
    assert evicted == masked and not np.allclose(evicted, other)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run on a small library and two tasks, and the arguments that make it."""
    folder = tmp_path_factory.mktemp("headroom")
    for name in ("evict-0.33-seed0", "evict-0.33-seed1"):
        (folder / "predictors").mkdir(exist_ok=True)
        (folder / "predictors" / name).symlink_to(measure.ROOT / "data/pocket-plain/dyrate" / name)
    how = {"n": 3, "tasks": ["caption", "qa_place"], "store": folder / "store", "batch_size": 2, "rankings": ["FastV", "random"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "LIBRARIES", {"evict": CONSTANTS[::4], "mask": CONSTANTS[::4]})
        measure.measure("pocket-plain", out=folder / "out", predictors=folder / "predictors", **how)
    return folder, how


def test_tables_have_every_answer_and_condition(measured):
    out = measured[0] / "out"
    answers, losses, dynamic = (pd.read_csv(out / f"headroom_layer2_{name}.csv.gz") for name in ("answers", "losses", "dyrate"))
    assert list(answers["sample"]) == list(losses["sample"]) and answers.task.value_counts().to_dict() == {
        "caption": 3,
        "qa_place": 3,
    }
    assert [c for c in losses if c.startswith("random evict")] == [] and losses.notna().all(axis=None)
    assert np.allclose(losses["FastV evict 1"], losses["random mask 1"], atol=1e-4)
    assert len(dynamic) == 2 * 2 * len(answers) and set(dynamic.residency) == {"evict"}
    assert dynamic.retention.between(0, 1).all() and dynamic.macs.between(0, 1).all()


def test_what_is_stored_is_not_measured_again(measured, monkeypatch):
    folder, how = measured
    monkeypatch.setattr(measure, "LIBRARIES", {"evict": CONSTANTS[::4], "mask": CONSTANTS[::4]})
    for name in ("library_losses", "predictor_rows", "answer_rows"):
        monkeypatch.setattr(measure, name, lambda *_: pytest.fail("measured again"))
    measure.measure("pocket-plain", out=folder / "again", predictors=folder / "predictors", **how)
    for path in (folder / "out").glob("*.csv.gz"):
        pd.testing.assert_frame_equal(pd.read_csv(path), pd.read_csv(folder / "again" / path.name))


def test_predictors_may_be_added_to_a_measured_library(measured, monkeypatch):
    folder, how = measured
    monkeypatch.setattr(measure, "library_losses", lambda *_: pytest.fail("the library was measured again"))
    shutil.copytree(folder / "out", folder / "later")
    path = folder / "later" / "headroom_layer2_dyrate.csv.gz"
    whole = pd.read_csv(path)
    for earlier in (whole[whole.predictor == "evict-0.33-seed0"], whole.iloc[:0, :0]):  # one of two, and none
        earlier.to_csv(path, index=False)
        measure.measure_predictors(folder / "later", folder / "predictors", store=how["store"], batch_size=2)
        keys = ["predictor", "ranking", "task", "sample"]
        tables = [table.sort_values(keys).reset_index(drop=True) for table in (pd.read_csv(path), whole)]
        pd.testing.assert_frame_equal(*tables)
    answers = pd.read_csv(folder / "later" / "headroom_layer2_answers.csv.gz")
    answers.iloc[::-1].to_csv(folder / "later" / "headroom_layer2_answers.csv.gz", index=False)
    with pytest.raises(ValueError, match="other answers"):
        measure.measure_predictors(folder / "later", folder / "predictors", store=how["store"], batch_size=2)


def test_predictors_of_another_layer_are_left_out(lab):
    folder = measure.ROOT / "data" / "pocket-plain" / "dyrate"
    assert measure.trained_here(folder, 2, lab.model)
    assert measure.trained_here(folder, 6, lab.model) == measure.trained_here(None, 2, lab.model) == {}


# -- choices at equal cost -------------------------------------------------------------------------------------------------


def chosen_among(loss: np.ndarray, task: np.ndarray, features: np.ndarray | None = None) -> Library:
    """A library that keeps everything, or (columns 1 and 2, of which the first is a constant) a quarter of it."""
    cost = np.broadcast_to([1, 0.25, 0.25], loss.shape)
    features = np.zeros((len(loss), 1)) if features is None else features
    return Library(loss, cost, np.array([True, True, False]), task, features)


def reached(asked: Library, budget: float) -> dict[str, float]:
    return {name: float(curve.at(budget)[0]) for name, curve in frontier.curves(asked).items()}


def test_a_task_is_known_or_not():
    task = np.repeat([0, 1], 20)
    loss = np.where(task[:, None] == 0, [[0.0, 1.0, 0.2]], [[0.0, 0.4, 0.6]])
    at = reached(chosen_among(loss, task), 0.25)
    assert at["constant"] == pytest.approx(0.7) and at["schedule"] == pytest.approx(0.4)
    assert at["schedule by task"] == at["best for each answer"] == pytest.approx(0.3)


def test_between_two_points_of_a_frontier_answers_are_mixed():
    loss = np.tile([[0.0, 0.8, 0.4]], (20, 1))
    asked = chosen_among(loss, np.zeros(20, int))
    assert reached(asked, 0.625)["constant"] == pytest.approx(0.4) and reached(asked, 0.625)["schedule"] == pytest.approx(0.2)
    assert np.isnan(reached(asked, 0.2)["constant"])  # nothing is so cheap


def test_luck_is_no_gain_but_for_the_upper_bound():
    """Losses that nothing explains: who chooses on one half gains nothing on the other."""
    rng = np.random.default_rng(0)
    loss = np.hstack([np.zeros((400, 1)), rng.normal(1, 0.3, (400, 2))])
    asked = chosen_among(loss, np.arange(400) % 4, rng.normal(size=(400, 5)))
    gains = {name: 1 - loss for name, loss in reached(asked, 0.25).items()}
    assert all(abs(gain) < 0.06 for name, gain in gains.items() if name != "best for each answer")
    assert gains["best for each answer"] > 0.12


def test_features_that_tell_the_answers_apart_capture_the_headroom():
    rng = np.random.default_rng(0)
    feature = rng.choice([-1.0, 1.0], 200)
    loss = np.stack([np.zeros(200), 1 + feature / 2, 1 - feature / 2], 1)
    found = frontier.at_budget(chosen_among(loss, np.arange(200) % 2, feature[:, None]), 0.25)
    assert found["by features: captured"]["value"] == pytest.approx(1)
    assert found["schedule: captured"]["value"] < 0.2 and found["best for each answer: share"]["value"] == pytest.approx(
        0.5, abs=0.1
    )


def test_a_controller_is_held_to_the_constant_and_the_best():
    rng = np.random.default_rng(0)
    loss = np.hstack([np.zeros((60, 1)), rng.uniform(0.5, 1.5, (60, 2))])
    asked = chosen_among(loss, np.arange(60) % 3)
    cost = np.full((60, 2), 0.25)
    for controller, share in ((loss[:, [1, 1]], 0), (loss[:, 1:].min(1, keepdims=True).repeat(2, 1), 1)):
        found = frontier.against_constant(asked, controller, cost)
        assert found["captured"]["value"] == pytest.approx(share) and found["captured"]["seeds"] == 2
    assert found["gain"]["low"] > 0


def test_the_best_controller_is_not_scored_where_it_was_chosen():
    """Of controllers that differ by luck alone the best captures nothing; one that is truly good is found."""
    rng = np.random.default_rng(0)
    loss = np.hstack([np.zeros((80, 1)), rng.uniform(0.5, 1.5, (80, 2))])
    asked, cost = chosen_among(loss, np.arange(80) % 2), np.full((80, 1), 0.25)
    lucky = {str(i): (rng.permuted(loss[:, 1:2], axis=0), cost) for i in range(20)}
    assert frontier.best_of(asked, lucky)["captured"]["value"] < 0.3
    good = lucky | {"good": (loss[:, 1:].min(1, keepdims=True), cost)}
    assert frontier.best_of(asked, good)["captured"]["value"] == pytest.approx(1)


def test_resamples_weigh_tasks_alike():
    task = np.array([0] * 10 + [1] * 2)
    weights = frontier.resampled(task, 50)
    assert np.allclose(weights[:, task == 0].sum(1), 0.5) and np.allclose(weights.sum(1), 1)
    assert np.allclose(weights[0], np.where(task == 0, 1 / 20, 1 / 4)) and len(np.unique(weights[1:, 0])) > 1


# -- from tables to pages --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Tables as a measurement writes them, of losses made up: a sixteenth of the image is enough for task a, b needs all."""
    rng, n = np.random.default_rng(0), 30
    folder = tmp_path_factory.mktemp("results") / "made-up"
    folder.mkdir()
    answers = pd.DataFrame({"sample": [f"{task}-{i}" for task in "ab" for i in range(n)], "task": ["a"] * n + ["b"] * n})
    answers = answers.assign(tokens=[2] * n + [30] * n, text=20, image=144, feature0=rng.normal(size=2 * n))
    need = np.repeat([0.0625, 1.0], n)
    columns = {
        f"{ranking} {residency} {t.name}": np.maximum(0, need - (t.start + t.end) / 2) + rng.uniform(0, 0.01, 2 * n)
        for ranking in rankings.RANKINGS for residency in LIBRARIES for t in LIBRARIES[residency]
    }  # fmt: skip
    losses = pd.concat([answers[["sample"]], pd.DataFrame(columns)], axis=1)
    trained = answers[["sample", "task"]].assign(
        predictor="evict-0.33-seed0", ranking="FastV", residency="evict", loss=0.4, retention=0.4, macs=0.7, kv_bytes=0.6
    )
    for name, table in (("answers", answers), ("losses", losses), ("dyrate", trained)):
        table.to_csv(folder / f"headroom_layer2_{name}.csv.gz", index=False)
    about = {"model": "made-up", "layer": 2, "n": n, "device": "none", "source": "laboratories", "tasks": ["a", "b"]}
    about |= {"rankings": list(rankings.RANKINGS), "shape": vars(LLAVA_7B)}
    (folder / "headroom_layer2_about.json").write_text(json.dumps(about))
    return folder


def test_costs_of_the_library_follow_from_the_lengths(tables):
    measured = report.Measured(tables)
    assert np.allclose(measured.costs["evict", "0.25", "retention"], 0.25)
    assert np.allclose(measured.costs["evict", "1 to 0.25 at 1", "retention"], np.repeat([0.625, (1 + 29 * 0.25) / 30], 30))
    assert (measured.costs["mask", "0.25", "macs"] > measured.costs["evict", "0.25", "macs"]).all()  # a whole prefill
    assert report.cost_of_constant(measured, "evict", 0.25, "retention") == pytest.approx(0.25)


def test_a_task_that_needs_less_leaves_more_to_others(tables):
    written = report.report(tables)["layer 2"]
    found = written["FastV, evict"]
    at = found["budgets"]["0.5"]
    assert at["constant by task: gain"]["low"] > 0.15 and at["constant by task: share"]["value"] > 0.8
    assert found["DyRate"]["evict-0.33"]["gain"]["n"] == 60
    assert json.loads((tables / "headroom.json").read_text())["layer 2"].keys() == written.keys()


@pytest.mark.parametrize("method", confirm.METHODS)
def test_schedules_to_be_answered_lie_on_both_sides_of_the_budget(tables, method):
    asked = report.library(report.Measured(tables), "FastV", "evict")
    below, above = confirm.bracket(asked, method, 0.33)
    mean_cost = [np.mean([asked.cost[asked.task == task, i].mean() for task, i in enumerate(side)]) for side in (below, above)]
    assert mean_cost[0] <= 0.33 <= mean_cost[1] < 1 and (method == "schedule") == (len({*below}) == len({*above}) == 1)
    with pytest.raises(ValueError, match="as cheap as"):
        confirm.bracket(asked, method, 0.01)


def test_scores_are_read_between_two_schedules():
    rows = [
        {"label": label, "method": method, "budget": budget, "task": "qa_place", "sample": i, "retention": kept, "score": score,
         "prefill": kept, "decode": kept}
        for label, method, budget, kept, score in (
            ("Full", "Full", np.nan, 1.0, 1.0), ("constant", "constant", 0.25, 0.3, 0.5),
            ("low", "schedule", 0.25, 0.2, 0.6), ("high", "schedule", 0.25, 0.4, 0.8),
        )
        for i in range(4)
    ]  # fmt: skip
    found = confirm.confirmed(pd.DataFrame(rows)).set_index("method")
    assert found.score["schedule"] == pytest.approx(0.7) and found.value["schedule"] == pytest.approx(0.2)
    assert found.unpruned["constant"] == 1 and found.value["constant"] == 0


def test_what_is_answered_has_constants_schedules_and_the_predictors_of_its_residency(tables, lab):
    trained = measure.trained_here(measure.ROOT / "data" / "pocket-plain" / "dyrate", 2, lab.model)
    asked = confirm.conditions(report.Measured(tables), "evict", [0.4], trained)
    labels = [c.label for c in asked]
    evicting = sum(strategy.residency == "evict" for strategy in trained.values())
    assert 0 < evicting < len(trained)
    assert len(set(labels)) == len(labels) == 1 + 6 + 2 * 2 + evicting and {c.method for c in asked} >= {"DyRate evict-0.33"}
    masking = confirm.conditions(report.Measured(tables), "mask", [], trained)
    assert {c.method for c in masking if c.method.startswith("DyRate")} == {"DyRate curves_mask-0.25"}


def test_scored_answers_stay_and_only_what_they_lack_is_asked(tables, tmp_path, monkeypatch):
    folder, out = shutil.copytree(tables, tmp_path / "laboratory"), tmp_path / "answers"
    asked = []

    def answered(model, processor, wanted, *_, **__):
        asked.append([c.label for c in wanted])
        rows = pd.DataFrame([{"label": c.label, "method": c.method, "budget": c.budget} for c in wanted])
        return rows.assign(sample="0", task="caption", tokens=len(asked), retention=1.0, prefill=1, decode=1, score=1.0)

    monkeypatch.setattr(confirm.dyrate, "load", lambda *_, **__: (None, None))
    monkeypatch.setattr(confirm, "answer_all", answered)
    monkeypatch.setattr(confirm, "questions", lambda *_: None)
    monkeypatch.setattr(confirm, "scored", lambda rows, _: rows)
    for constants, add in (((0.25,), False), ((0.25, 0.4), True)):
        monkeypatch.setattr(confirm, "CONSTANTS", constants)
        confirm.confirm(folder, 1, out, budgets=[], add=add)
        confirm.score(out, folder, add=add)
    assert asked == [["Full", "constant 0.25"], ["constant 0.4"]]
    found = confirm.generated(folder).set_index("label").tokens.to_dict()
    assert found == {"Full": 1, "constant 0.25": 1, "constant 0.4": 2}
    with pytest.raises(ValueError, match="answers to 1 questions a task: give --n 1"):
        confirm.confirm(folder, 2, out, budgets=[], add=True)


def test_a_predictor_is_held_against_a_constant_of_its_own_retention():
    lines = [("Full", "Full", np.nan, 1.0, 1.0)]
    lines += [(f"constant {kept:g}", "constant", kept, kept, score) for kept, score in ((0.2, 0.4), (0.4, 0.6))]
    lines += [(f"curves-0.3-seed{i}", "DyRate curves-0.3", np.nan, kept, 0.7) for i, kept in enumerate((0.25, 0.35))]
    rows = pd.DataFrame([
        {"label": label, "method": method, "budget": budget, "task": task, "sample": i, "retention": kept, "score": score,
         "prefill": 8 * kept + 0.4 * (label == "curves-0.3-seed1"), "decode": 2 * kept}
        for label, method, budget, kept, score in lines for task in ("qa_place", "qa_count") for i in range(4)
    ])  # fmt: skip
    found, as_dear = confirm.controllers(rows).to_dict("records")
    assert [as_dear[k] for k in ("equal", "computation", "constant")] == ["computation", pytest.approx(0.32), pytest.approx(0.52)]
    assert [found[k] for k in ("constant", "value", "retention")] == pytest.approx([0.5, 0.2, 0.3])
    assert found["low"] < 0.2 < found["high"] and (found["n"], found["seeds"]) == (8, 2)  # the trainings' own retentions differ
    dearer = confirm.controllers(rows.assign(retention=rows.retention.where(rows.method != "DyRate curves-0.3", 0.7)))
    assert dearer.constant[0] == pytest.approx(0.8)  # half way to no pruning
    with pytest.raises(ValueError, match="below the constants"):
        confirm.controllers(rows.assign(retention=rows.retention.where(rows.method != "DyRate curves-0.3", 0.1)))


def test_the_chapter_says_what_is_there(tables):
    with pytest.raises(FileNotFoundError, match=r"study\.headroom measure"):
        chapter.read(str(tables))
    laboratories = chapter.read(str(tables.parent))
    said = chapter.finding(laboratories)
    assert "made-up" in said and "(at its own mean retention" in said and "No answers have been generated" in said
    assert len(chapter.gains_shown(chapter.gains(laboratories))) == 3 and len(chapter.units_shown(laboratories)) == 3


def test_a_bound_that_was_set_before_decides():
    ends = {"better": (0.02, 0.05), "worse": (-0.05, -0.02), "equivalent": (-0.005, 0.009), "undecided": (-0.02, 0.03)}
    for verdict, (low, high) in ends.items():
        assert intervals.against_bound({"low": low, "high": high}) == verdict
