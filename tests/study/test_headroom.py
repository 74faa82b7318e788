"""What a perfect controller could gain: trajectories and their costs, rankings, stored losses, and choices at equal cost."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from dyrate.cost import ledger, shape_of
from dyrate.generation import answer_batch, encode
from dyrate.predictor import rate_grid
from dyrate.strategies.controls import Constant, RandomPrune
from dyrate.strategies.full import Full
from dyrate.teacher_forcing import prepare, teacher_forced, unpruned_logits
from study.examples import examples
from study.headroom import library, measure, rankings
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
    none = measure.masked_logits(lab.model, lab.place, prepared, torch.zeros_like(prepared.score)).detach()
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
    how = {"n": 3, "tasks": ["caption", "qa_place"], "store": folder / "store", "batch_size": 2, "rankings": ["FastV", "random"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "LIBRARIES", {"evict": CONSTANTS[::4], "mask": CONSTANTS[::4]})
        measure.measure("pocket-plain", out=folder / "out", predictors=measure.ROOT / "data/pocket-plain/dyrate", **how)
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
    assert len(dynamic) == 2 * 3 * len(answers) and set(dynamic.residency) == {"evict"}
    assert dynamic.retention.between(0, 1).all() and dynamic.macs.between(0, 1).all()


def test_what_is_stored_is_not_measured_again(measured, monkeypatch):
    folder, how = measured
    monkeypatch.setattr(measure, "LIBRARIES", {"evict": CONSTANTS[::4], "mask": CONSTANTS[::4]})
    for name in ("library_losses", "predictor_rows", "answer_rows"):
        monkeypatch.setattr(measure, name, lambda *_: pytest.fail("measured again"))
    measure.measure("pocket-plain", out=folder / "again", predictors=measure.ROOT / "data/pocket-plain/dyrate", **how)
    for path in (folder / "out").glob("*.csv.gz"):
        pd.testing.assert_frame_equal(pd.read_csv(path), pd.read_csv(folder / "again" / path.name))


def test_predictors_of_another_layer_are_left_out():
    folder = measure.ROOT / "data" / "pocket-plain" / "dyrate"
    assert len(measure.trained_here(folder, 2)) == 3 and measure.trained_here(folder, 6) == measure.trained_here(None, 2) == {}
