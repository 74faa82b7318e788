"""Recipes of training: gradients against exact ones, what a library holds, what a delay keeps, and resuming to the same bits."""

import itertools
import json
from dataclasses import asdict, fields, replace

import pytest
import torch

from dyrate.features import FEATURES
from dyrate.predictor import RatePredictor
from dyrate.strategies.dyrate import DyRate
from dyrate.teacher_forcing import masks_over_steps, prepare_tokens
from dyrate.training import TRAINERS, Settings, checkpoint
from dyrate.training.library import best_within, constants, interpolated, trajectories
from dyrate.training.recipes import Anneal, sample, score_function
from dyrate.training.settings import RECIPES
from laws import long_images

ANSWERS = [[5, 9, 11, 30, 7, 2], [8, 40, 2]]


def recipe(name, predictor=None, **fields):
    """A training of this recipe on two answers of a tiny model."""
    model, inputs = long_images(4)
    settings = Settings(**{"recipe": name, "budget": 0.5, "steps": 6, "n_rates": 8, "samples": 2} | fields)
    predictor = RatePredictor(4, 5, "llava", n_rates=8, delay=settings.delay, ordered=settings.ordered)
    batch = prepare_tokens(model, predictor, inputs, ANSWERS)
    batch.tasks = ["one", "other"]
    if settings.imitates:
        batch.teacher = torch.zeros(2, 6, model.config.get_text_config().vocab_size)
    return TRAINERS[name](model, predictor, [batch], settings, progress=False)


def test_the_score_function_has_the_gradient_of_the_expected_penalty():
    """Two steps with three choices each; all pairs of trajectories, each as often as it is drawn."""
    torch.manual_seed(0)
    weights = torch.randn(2, 3, dtype=torch.double, requires_grad=True)
    penalty = torch.randn(3, 3, 2).double()
    penalty[..., 0] = penalty[:, :1, 0]  # what the first step costs is decided by its choice alone
    log_pi = weights.log_softmax(-1)
    probability = (log_pi[0][:, None] + log_pi[1]).exp()
    (exact,) = torch.autograd.grad((probability * penalty.sum(-1)).sum(), weights, retain_graph=True)
    paths = list(itertools.product(range(3), repeat=2))
    total = 0
    for pair in itertools.product(paths, repeat=2):
        log_prob = torch.stack([log_pi[[0, 1], path] for path in pair])[:, None]
        total = total + log_prob.sum().exp().detach() * score_function(log_prob, torch.stack([penalty[p] for p in pair])[:, None])
    (found,) = torch.autograd.grad(total, weights)
    assert torch.allclose(found, exact) and exact.abs().max() > 0.1


def test_sampled_rates_hold_until_one_is_drawn_anew():
    log_pi = torch.zeros(2, 400, 8).log_softmax(-1)
    chosen, fresh = sample(log_pi, 3, torch.Generator().manual_seed(0))
    assert fresh[..., 0].all() and 0.2 < fresh.float().mean() < 0.3
    assert ((chosen[..., 1:] == chosen[..., :-1]) | fresh[..., 1:]).all()
    assert len(chosen.unique()) == 8


def test_the_library_holds_constants_ramps_and_drops():
    library = trajectories(40, 32)
    constant = (library == library[:, :1]).all(1)
    assert set(library[constant][:, 0].tolist()) == set(constants(40, 32)[:, 0].tolist())
    assert (library[:, 1:] >= library[:, :-1]).all()  # rates rise: evicted tokens do not return
    assert [0] * 4 + [31] * 36 in library.tolist()  # all for four tokens, then the least
    assert len(trajectories(2, 32)) < len(library)
    assert constants(3, 4).tolist() == [[3] * 3, [2] * 3, [1] * 3, [0] * 3]


def test_the_best_within_a_budget_spends_where_it_helps():
    losses = [torch.tensor([[0.0, 0.0], [1.0, 0.1]])]  # all or little of the image, for two answers
    costs = [torch.tensor([[1.0, 1.0], [0.2, 0.2]])]
    (best,), price = best_within(0.6, losses, costs)
    assert best.tolist() == [0, 1] and 0.1 < price * 0.8 < 1
    assert best_within(1.0, losses, costs)[0][0].tolist() == [0, 0]
    assert best_within(0.2, losses, costs)[0][0].tolist() == [1, 1]


def test_losses_are_interpolated_between_known_numbers_of_tokens():
    known = torch.tensor([[2.0], [4.0], [8.0]])
    losses = torch.tensor([[[3.0, 30.0]], [[1.0, 10.0]], [[0.0, 0.0]]])
    kept = torch.tensor([[3.0, 6.0]], requires_grad=True)
    found = interpolated(known, losses, kept)
    assert found.tolist() == [[2.0, 5.0]]
    assert torch.autograd.grad(found.sum(), kept)[0].tolist() == [[-1.0, -2.5]]
    assert interpolated(known, losses, torch.tensor([[1.0, 9.0]])).tolist() == [[3.0, 0.0]]


@pytest.mark.parametrize("residency", ["evict", "mask"])
def test_a_delay_keeps_everything_for_so_many_tokens(residency):
    model, inputs = long_images(4)
    predictor = RatePredictor(4, 5, "llava", n_rates=8, residency=residency, delay=3)
    predictor.linear.bias.data[5] = 9
    prepared = prepare_tokens(model, predictor, inputs, ANSWERS)
    choice = torch.nn.functional.one_hot(predictor(prepared.features).argmax(-1), 8).float()
    counts = masks_over_steps(choice, prepared, residency, predictor.delay).sum(-1)
    n = prepared.image.sum(1, keepdim=True)
    assert (counts[:, :3] == n).all() and (counts[:, 3:] == prepared.counts(8)[:, 5:6]).all()
    with DyRate.of(predictor)(model) as trace:
        model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert [list(step.stages[0].counts) for step in trace.steps] == counts[:, :6].long().T.tolist()


def test_annealing_begins_with_everything_and_ends_at_the_budget():
    trainer = recipe("anneal", steps=40, budget=0.4)
    assert isinstance(trainer, Anneal) and trainer.target == 1
    assert trainer.predictor(trainer.batches[0].features).argmax(-1).max() == 0
    trainer.step = 15
    assert trainer.target == pytest.approx(0.7)
    trainer.step = 30
    assert trainer.target == pytest.approx(0.4)


@pytest.mark.parametrize("name", TRAINERS)
def test_every_recipe_resumes_from_its_checkpoint_to_the_same_bits(name, tmp_path):
    whole = recipe(name)
    whole.run()
    first, then = recipe(name), recipe(name)
    for _ in range(4):
        first.train_step()
        first.step += 1
    checkpoint.save(first, tmp_path / "state")
    checkpoint.load(then, tmp_path / "state")
    then.run()
    assert then.history == whole.history and json.dumps(then.history)
    for one, other in zip(then.predictor.state_dict().values(), whole.predictor.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert whole.predictor.linear.weight.abs().max() > 0


@pytest.mark.parametrize("fields", [{}, {"ordered": True}, {"per_task": True}], ids=["plain", "ordered", "per-task"])
@pytest.mark.parametrize("name", ["rloo", "curves"])
def test_recipes_meet_a_budget_when_nothing_else_matters(name, fields, monkeypatch):
    trainer = recipe(name, steps=120, budget=0.6, **fields)
    trainer.predictor.start_at(0.9, trainer.batches[0].features.flatten(0, 1))
    monkeypatch.setattr(trainer, "losses", lambda prepared, masks: masks.sum(-1) * 0)
    history = trainer.run()
    assert abs(sum(row["cost"] for row in history[-20:]) / 20 - 0.6) < 1 / 8


def test_an_ordered_predictor_is_linear_in_its_rate_and_its_bias_shifts_it():
    predictor = RatePredictor(2, 4, "llava", n_rates=32, ordered=True)
    features = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    predictor.start_at(0.5, features)
    predictor.linear.weight.data[0, 0] = 0.05 / 0.15
    rates = predictor.rates[predictor(features).argmax(-1)]
    wanted = 0.5 + 0.05 * (features[:, 0] - features[:, 0].mean()) / features[:, 0].std()
    assert (rates - wanted).abs().max() <= 1 / 64 + 1e-6
    predictor.rate_bias.fill_(10.0)
    assert (predictor.rates[predictor(features).argmax(-1)] - rates - 10 * 0.15**2 / 2).abs().max() <= 1 / 32 + 1e-6


def test_settings_without_later_fields_are_what_they_were():
    """Stored predictors are found by a hash of their settings."""
    later = {"recipe", "features", "ordered", "samples", "delay", "once", "per_task"}
    assert {f.name for f in fields(Settings)} - set(Settings().decisive()) == later
    changed = replace(Settings(), recipe="rloo")
    assert changed.decisive() == Settings().decisive() | {"recipe": "rloo"} and set(asdict(changed)) > later
    assert set(RECIPES) == set(TRAINERS)
    for wrong in ({"recipe": "grpo"}, {"features": "colour"}, {"samples": 1}, {"once": True, "delay": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Settings(**wrong)


@pytest.mark.parametrize("kind", FEATURES)
def test_what_is_read_in_training_is_read_in_generation(kind):
    """The rates of generated tokens, with the answer that was generated as the reference."""
    model, inputs = long_images(4)
    predictor = RatePredictor(
        4, 5, "llava", n_rates=8, residency="mask", features=kind, width=model.config.get_text_config().hidden_size
    )
    first = prepare_tokens(model, predictor, inputs, ANSWERS)
    predictor.start_at(0.6, first.features.flatten(0, 1))
    torch.nn.init.normal_(predictor.linear.weight, std=3, generator=torch.Generator().manual_seed(1))
    with DyRate.of(predictor)(model) as trace:
        tokens = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    answers = tokens[:, inputs["input_ids"].shape[1] :].tolist()
    prepared = prepare_tokens(model, predictor, inputs, answers)
    choice = torch.nn.functional.one_hot(predictor(prepared.features).argmax(-1), 8).float()
    counts = masks_over_steps(choice, prepared, "mask").sum(-1).long()
    assert [list(step.stages[0].counts) for step in trace.steps] == counts.T.tolist()
    assert len(counts.unique()) > 1


def test_a_rate_decided_once_holds_in_training_and_in_generation():
    model, inputs = long_images(4)
    predictor = RatePredictor(4, 5, "llava", n_rates=8, once=True)
    predictor.start_at(0.6, prepare_tokens(model, predictor, inputs, ANSWERS).features[:, 0])
    torch.nn.init.normal_(predictor.linear.weight, std=3, generator=torch.Generator().manual_seed(1))
    prepared = prepare_tokens(model, predictor, inputs, ANSWERS)
    indices = predictor(prepared.features).argmax(-1)
    assert (indices == indices[:, :1]).all() and indices[0, 0] != indices[1, 0]
    counts = prepared.counts(8).gather(1, indices)
    with DyRate.of(predictor)(model) as trace:
        model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert [list(step.stages[0].counts) for step in trace.steps] == counts.T.tolist()
