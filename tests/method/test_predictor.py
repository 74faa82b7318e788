"""Each equation on numbers made by hand, and training that equals what is deployed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_engine import long_images
from transformers import LogitsProcessor

import dyrate
from dyrate import budget, diagnostics, forcing, training
from dyrate.budget import UNITS, cost
from dyrate.cost import Shape
from dyrate.teacher_forcing import IGNORE, masks_over_steps, prepare_tokens, pruned_logits
from dyrate.predictor import (
    DyRate,
    RatePredictor,
    chosen_mask,
    gumbel_noise,
    gumbel_one_hot,
    kept_counts,
    query_bias,
    rate_grid,
    rate_masks,
)
from dyrate.training import Settings


def test_eq_1_rates():
    assert rate_grid(4).tolist() == [0, 0.25, 0.5, 0.75]
    assert kept_counts(torch.tensor([10, 7]), rate_grid(4)).tolist() == [[10, 8, 5, 3], [7, 6, 4, 2]]


def test_eq_2_predictor_is_linear_in_standardised_shares():
    predictor = RatePredictor(2, 4, "llava", n_rates=2)
    features = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0], [3.0, 0, 0, 0, 0, 0, 0, 0]])
    predictor.start_at(0.5, features)
    with torch.no_grad():
        predictor.linear.bias.zero_()
        predictor.linear.weight[1, 0] = 1.0
    # mean 2, deviation sqrt(2): (1 - 2) / 1.414
    assert predictor(features)[:, 1].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])
    predictor.tilt.fill_(4.0)
    assert predictor(features)[0].tolist() == pytest.approx([0.0, -(0.5**0.5) + 4 * 0.5])


def test_eq_3_masks_keep_the_best_candidates():
    score = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    there = torch.tensor([[True, True, True, True]])
    counts = torch.tensor([[4, 3, 2, 1]])
    assert rate_masks(score, there, counts)[0].int().tolist() == [[1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 0, 0]]
    gone = torch.tensor([[True, False, True, True]])
    assert rate_masks(score, gone, counts)[0].int().tolist() == [[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 0]]


def test_eqs_4_and_5_straight_through():
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]])).requires_grad_()
    choice = gumbel_one_hot(logits, torch.tensor([[2.0, 0.0, 0.0]]), 1.0)
    # log .2 + 2 = .39, log .5 = -.69, log .3 = -1.2
    assert choice[0].tolist() == pytest.approx([1, 0, 0], abs=1e-6)
    masks = torch.tensor([[[1, 1], [1, 0], [0, 1]]]).bool()
    mask = chosen_mask(choice, masks)
    assert mask[0].tolist() == pytest.approx([1, 1], abs=1e-6)
    mask[0, 1].backward()
    soft = torch.softmax(torch.tensor([0.2, 0.5, 0.3]).log() + torch.tensor([2.0, 0, 0]), 0)
    # d(soft_1 + soft_3) / d logit_2 = -soft_2 (soft_1 + soft_3)
    assert logits.grad[0, 1].item() == pytest.approx(-(soft[1] * (soft[0] + soft[2])).item(), rel=1e-5)


def test_gumbel_samples_follow_the_distribution():
    generator = torch.Generator().manual_seed(0)
    logits = torch.log(torch.tensor([0.2, 0.5, 0.3])).expand(20000, 3)
    share = gumbel_one_hot(logits, gumbel_noise((20000, 3), generator), 1.0).mean(0)
    assert (share - torch.tensor([0.2, 0.5, 0.3])).abs().max() < 0.012


def test_the_gradient_agrees_with_the_expected_loss():
    """A toy case: loss of a choice is its number; the straight-through gradient points as the expected loss's, within noise."""
    logits = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)
    values = torch.tensor([0.0, 1.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    noise = gumbel_noise((200_000, 3), generator)
    (gumbel_one_hot(logits.expand(len(noise), 3), noise, 1.0) * values).sum(-1).mean().backward()

    def expected(x):
        return float((x.softmax(0) * values).sum())

    step = 1e-3
    finite = torch.tensor([(expected(logits.detach() + step * e) - expected(logits.detach() - step * e)) / (2 * step)
                           for e in torch.eye(3)])  # fmt: skip
    assert torch.cosine_similarity(logits.grad, finite, 0) > 0.99
    assert 0.5 < logits.grad.norm() / finite.norm() < 1.5  # biased at temperature 1, as the estimator is known to be


def test_eq_6_bias_by_hand():
    # one text token, two image tokens, one text token (chooses step 0), one answer token (chooses step 1)
    kept = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    bias = query_bias(kept, torch.tensor([[1, 2]]), torch.ones(1, 2).bool(), torch.ones(1, 5).bool(), n_prompt=4)
    seen = (bias[0, 0] > -50).int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 0, 1, 1]]
    bias.softmax(-1)[0, 0, 3, 1].backward()
    assert kept.grad[0, 0, 0] > 0


class Forced(LogitsProcessor):
    """Lets generate say given tokens."""

    def __init__(self, answers, n_prompt):
        self.answers, self.n_prompt = answers, n_prompt

    def __call__(self, ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, self.answers[:, ids.shape[1] - self.n_prompt, None], 0.0)


def random_predictor(model, residency, **fields):
    text = model.config.get_text_config()
    torch.manual_seed(5)
    predictor = RatePredictor(
        text.num_attention_heads, text.num_hidden_layers, model.config.model_type, n_rates=8, residency=residency, **fields
    )
    return predictor


ANSWERS = [[5, 9, 11, 30, 7, 2], [8, 40, 2]]


@pytest.mark.parametrize("residency", ["evict", "hide"])
@pytest.mark.parametrize("fields", [{}, {"with_step": True, "observed_layers": [0, 1]}], ids=["plain", "more-features"])
def test_training_equals_dropped_decoding(family, residency, fields):
    model, inputs = family
    predictor = random_predictor(model, residency, **fields)
    prepared = prepare_tokens(model, inputs, ANSWERS, predictor)
    predictor.start_at(0.6, prepared.features.flatten(0, 1))
    torch.nn.init.normal_(predictor.linear.weight, std=0.1 if predictor.with_step else 1.0)  # rates that differ from step to step
    if predictor.with_step:
        predictor.linear.weight.data[:, -1] += torch.linspace(-9, 9, 8)  # and rise
    choice = torch.nn.functional.one_hot(predictor(prepared.features).argmax(-1), 8).float()
    masks = masks_over_steps(choice, prepared, predictor.rates, residency)
    with torch.no_grad():
        taught = pruned_logits(model, predictor, prepared, masks)
    forced = torch.tensor([a + [0] * (6 - len(a)) for a in ANSWERS])
    n_prompt = inputs["input_ids"].shape[1]
    with DyRate.of(predictor)(model) as trace:
        out = model.generate(
            **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True,
            logits_processor=[Forced(forced, n_prompt)],
        )  # fmt: skip
    for i, answer in enumerate(ANSWERS):
        for step in range(len(answer)):
            assert torch.equal(trace.steps[step].stages[0].kept[i], masks[i, step].bool())
            assert (out.logits[step][i] - taught[i, step]).abs().max() < 1e-4
    assert max(len(set(row.tolist())) for row in trace.kept_share().T) > 1  # the rates do change


def test_the_comparison_can_fail(family):
    model, inputs = family
    predictor = random_predictor(model, "evict")
    prepared = prepare_tokens(model, inputs, ANSWERS, predictor)
    steps = prepared.labels.shape[1]
    one = torch.nn.functional.one_hot(torch.full((2, steps), 6), 8).float()
    other = torch.nn.functional.one_hot(torch.full((2, steps), 1), 8).float()
    with torch.no_grad():
        a, b = (pruned_logits(model, predictor, prepared, masks_over_steps(c, prepared, predictor.rates, "evict"))
                for c in (one, other))  # fmt: skip
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("residency", ["evict", "hide"])
def test_gradients_reach_every_row_and_no_base_weight(family, residency):
    model, inputs = family
    predictor = random_predictor(model, residency)
    torch.nn.init.normal_(predictor.linear.weight, std=0.1)
    prepared = prepare_tokens(model, inputs, ANSWERS, predictor)
    noise = gumbel_noise((2, 6, 8), torch.Generator().manual_seed(0))
    masks = masks_over_steps(gumbel_one_hot(predictor(prepared.features), noise, 1.0), prepared, predictor.rates, residency)
    with forcing.frozen(model):
        words = pruned_logits(model, predictor, prepared, masks, checkpointing=True)
        valid = prepared.labels != IGNORE
        torch.nn.functional.cross_entropy(words[valid], prepared.labels[valid]).backward()
    assert (predictor.linear.weight.grad.abs().sum(1) > 0).all() and (predictor.linear.bias.grad != 0).all()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def batches_of(model, inputs, predictor):
    return [prepare_tokens(model, inputs, ANSWERS, predictor)]


@pytest.mark.parametrize("unit", UNITS)
def test_the_budget_alone_drives_the_rate_to_the_budget(unit, monkeypatch):
    model, inputs = long_images(4)
    settings = Settings(budget=0.625, unit=unit, steps=150, n_rates=16, first_pruned_layer=1)
    predictor = RatePredictor(4, 5, "llava", n_rates=16, first_pruned_layer=1)
    batches = batches_of(model, inputs, predictor)
    predictor.start_at(0.9, batches[0].features.flatten(0, 1))
    monkeypatch.setattr(training, "_task_loss", lambda words, prepared, valid: words.sum() * 0)
    trained = training._descend(model, predictor, batches, settings, None, False)
    assert abs(sum(row["cost"] for row in trained.history[-20:]) / 20 - 0.625) <= 1 / 16  # one step of the grid


def test_a_constant_feature_yields_a_constant_rate():
    predictor = random_predictor(long_images(4)[0], "evict")
    torch.nn.init.normal_(predictor.linear.weight)
    features = torch.randn(16).expand(5, 7, 16)
    assert len(predictor(features).argmax(-1).unique()) == 1


def test_five_seeds_are_usable(monkeypatch):
    """None is locked in: the first step keeps about the budget, and no seed ends far from it."""
    model, inputs = long_images(6)
    ends = []
    for seed in range(5):
        settings = Settings(budget=0.5, steps=80, n_rates=16, seed=seed)
        predictor = RatePredictor(4, 5, "llava", n_rates=16)
        batches = batches_of(model, inputs, predictor)
        predictor.start_at(0.5, batches[0].features.flatten(0, 1))
        history = training._descend(model, predictor, batches, settings, None, False).history
        assert abs(history[0]["kept"] - 0.5) < 0.3
        ends.append(sum(row["cost"] for row in history[-10:]) / 10)
    assert all(abs(end - 0.5) < 0.1 for end in ends), ends


def test_accumulated_batches_are_one_large_batch(monkeypatch):
    monkeypatch.setattr(training, "gumbel_noise", lambda shape, generator: torch.zeros(shape))
    model, inputs = long_images(4)
    answers = [[5, 9, 11, 30, 7, 2], [8, 40, 9, 3, 6, 2]]
    found = []
    for parts in ([[0, 1]], [[0], [1]]):
        predictor = RatePredictor(4, 5, "llava", n_rates=16)
        batches = [prepare_tokens(model, {k: v[rows] for k, v in inputs.items()}, [answers[i] for i in rows], predictor)
                   for rows in parts]  # fmt: skip
        predictor.start_at(0.9, torch.cat([b.features for b in batches]).flatten(0, 1))
        settings = Settings(budget=0.5, steps=8, n_rates=16, accumulate=len(parts))
        found.append(training._descend(model, predictor, batches, settings, None, False).history)
    whole, parts = ([[row[k] for k in ("task", "cost", "gradient", "multiplier")] for row in history] for history in found)
    assert parts == [pytest.approx(row, rel=1e-3, abs=1e-5) for row in whole]
    assert whole[0][2] > 1e-3 and whole[-1][1] < whole[0][1]  # it does learn


def test_cost_by_hand():
    shape = Shape(layers=4, width=8, heads=2, kv_heads=2, inner=16, vocabulary=10)
    kept, n, text = torch.tensor([[8.0, 4.0, 0.0]]), torch.tensor([8]), torch.tensor([2])
    valid = torch.tensor([[True, True, False]])
    assert cost("kept", shape, kept, n, text, valid, 1).item() == pytest.approx((1 + 0.5) / 2)
    # cache bytes read: layer 0 whole, three layers pruned: step 0 holds 10 and 10, step 1 holds 11 and 7
    assert cost("kv_bytes", shape, kept, n, text, valid, 1).item() == pytest.approx((10 + 30 + 11 + 21) / (40 + 44))
    assert cost("macs", shape, n.float()[None].expand(1, 3), n, text, valid, 1).item() == pytest.approx(1)
    assert cost("macs_uncached", shape, kept, n, text, valid, 1) < 1


def test_saved_and_loaded(tmp_path):
    model, inputs = long_images(4)
    predictor = random_predictor(model, "hide", observed_layers=[0, 1])
    predictor.tilt.fill_(1.5)
    DyRate.of(predictor).save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".md") == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text())["residency"] == "hide"
    loaded = DyRate.from_pretrained(tmp_path)
    assert loaded.residency == "hide" and loaded.predictor.observed_layers == [0, 1]
    assert all(torch.equal(value, loaded.predictor.state_dict()[name]) for name, value in predictor.state_dict().items())
    with loaded(model) as trace:
        model.generate(**inputs, max_new_tokens=3)
    assert len(trace.steps) == 3


def test_a_predictor_of_another_model_is_named():
    model, _ = long_images(4)
    with pytest.raises(ValueError, match=r"attention heads: 7 against the model's 4.*train"):
        DyRate.of(RatePredictor(7, 5, "llava"))(model)


def test_training_on_pocket_resumes(tmp_path, monkeypatch):
    model, processor = dyrate.load("pocket")
    examples = study.examples.examples("pocket", 8, tasks=["description", "qa_colour"], split="train")
    settings = Settings(budget=0.5, steps=6, batch=4)
    whole = training.train(model, processor, examples, settings, work=tmp_path / "a", progress=False)
    upper, calls = training.pruned_logits, []

    def stops(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return upper(*arguments)

    monkeypatch.setattr(training, "pruned_logits", stops)
    with pytest.raises(KeyboardInterrupt):
        training.train(model, processor, examples, settings, work=tmp_path / "b", progress=False)
    again = training.train(model, processor, examples, settings, work=tmp_path / "b", progress=False)
    assert torch.allclose(whole.predictor.linear.weight, again.predictor.linear.weight, atol=1e-6)
    with pytest.raises(ValueError, match="other settings"):
        training.train(model, processor, examples, Settings(budget=0.4, steps=6), work=tmp_path / "b", progress=False)


def test_two_processes_train_one_predictor(tmp_path):
    script = tmp_path / "shared.py"
    script.write_text(f"""
import os
import dyrate
from dyrate import budget, diagnostics, forcing, training
examples = study.examples.examples("pocket", 8, tasks=["qa_colour"], split="train")
found = training.train(*dyrate.load("pocket"), examples, budget=0.5, steps=5, batch=4, progress=False)
found.predictor.save_pretrained("{tmp_path}/" + os.environ["RANK"])
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (DyRate.from_pretrained(tmp_path / rank).predictor.state_dict() for rank in "01")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one["linear.weight"].abs().max() > 0


def test_calibration_meets_the_budget_from_a_bad_start():
    model, processor = dyrate.load("pocket")
    check = study.examples.examples("pocket", 6, tasks=["qa_colour", "qa_place"], split="validation")
    predictor = RatePredictor(6, 8, "llava")
    predictor.start_at(0.9, torch.zeros(2, 24))
    found = budget.calibrate(model, processor, predictor, check, 0.33, progress=False)
    assert abs(found["share"] - 0.33) <= 1 / 32
    paths = budget.trajectories(model, processor, DyRate.of(predictor), check)
    assert sum(sum(p) / len(p) for p in paths.values()) / len(paths) == pytest.approx(found["share"])


GRID = [0.0, 0.25, 0.5, 0.75]


def test_entropy_and_information_by_hand():
    assert diagnostics.entropy([0.5] * 9) == 0
    assert diagnostics.entropy([0.0, 0.25, 0.5, 0.75]) == pytest.approx(2)
    rates, tasks = [0.0] * 40 + [0.5] * 40, ["a"] * 40 + ["b"] * 40
    assert diagnostics.mutual_information(rates, tasks) == pytest.approx(1, abs=0.05)
    assert abs(diagnostics.mutual_information([0.0, 0.5] * 40, tasks)) < 0.05


def warning(signs):
    return {sign.name for sign in signs if sign.warns}


def test_stagnation_and_collapse_are_told_from_health():
    assert warning(diagnostics.of_rates([[0.5] * 6, [0.5] * 4], ["a", "b"], GRID)) == {"rates stagnate"}
    assert warning(diagnostics.of_rates([[0.75] * 6], ["a"], GRID)) == {"rates stagnate", "rates collapse"}
    assert warning(diagnostics.of_rates([[0.0] * 6], ["a"], GRID)) == {"rates stagnate", "rates collapse"}
    assert not warning(diagnostics.of_rates([[0.0, 0.25, 0.75], [0.75, 0.0]], ["a", "b"], GRID))
    (stagnant,) = (s for s in diagnostics.of_rates([[0.5] * 6], ["a"], GRID) if s.name == "rates stagnate")
    assert "with_step" in str(stagnant)


def test_an_unstable_training_is_told_from_a_steady_one():
    assert diagnostics.of_training([{"task": 0.1 + 0.01 * i} for i in range(60)]).warns
    assert diagnostics.of_training([{"task": float("nan")}] * 60).warns
    assert not diagnostics.of_training([{"task": 0.4 - 0.001 * i} for i in range(60)]).warns


def test_the_task_that_pays_is_named():
    tasks = ["a", "a", "b", "b"]
    found = diagnostics.of_tasks([0.1, 0.1, 1.4, 1.2], [0.1, 0.1, 0.2, 0.2], tasks)
    assert found.warns and "by b" in str(found) and found.measured == pytest.approx(1.1)
    assert not diagnostics.of_tasks([0.2, 0.2, 0.3, 0.3], [0.1, 0.1, 0.2, 0.2], tasks).warns


def test_warnings_come_while_training():
    model, inputs = long_images(4)
    predictor = RatePredictor(4, 5, "llava", n_rates=4)
    batches = batches_of(model, inputs, predictor)
    predictor.start_at(0.5, batches[0].features.flatten(0, 1))
    predictor.deviation.fill_(1e9)  # features that say nothing
    settings = Settings(budget=0.5, steps=60, n_rates=4, quiet=0.1)
    course = training._descend(model, predictor, batches, settings, None, False).history
    assert "rates stagnate" in warning(diagnostics.while_training(course, 1 / 4))


def test_speed_is_measured():
    model, processor = dyrate.load("pocket")
    predictor = RatePredictor(6, 8, "llava")
    found = diagnostics.of_speed(model, processor, predictor, study.examples.examples("pocket", 2, tasks=["qa_colour"]), repeats=1)
    assert 0.2 < found.measured < 20


@pytest.mark.parametrize(("fields", "message"), [
    ({"unit": "joules"}, "unit is one of"), ({"budget": 0}, "budget is the share"), ({"first_pruned_layer": 0}, "at least 1"),
])  # fmt: skip
def test_bad_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Settings(**fields)


def test_what_a_gradient_foretells_starts_at_the_measured_loss():
    model, processor = dyrate.load("pocket")
    predictor = RatePredictor(6, 8, "llava", n_rates=8)
    batch = forcing.prepare(model, processor, *next(study.examples.examples("pocket", 2, tasks=["caption"]).batches(2)), predictor)
    rows = forcing.foretold(model, predictor, [batch], 0.5, shown=8)
    here = [row for row in rows if row["rate"] == 0.5]
    assert len(rows) == 16 and all(row["loss"] == pytest.approx(row["foretold"], abs=1e-5) for row in here)
    assert [row["loss"] for row in here] == pytest.approx(
        [row["loss"] for row in forcing.taught(model, predictor, [batch], 0.5)], abs=1e-4
    )
    assert any(abs(row["loss"] - row["foretold"]) > 1e-3 for row in rows)


def test_training_in_bfloat16_with_checkpointing():
    model, processor = dyrate.load("pocket", dtype=torch.bfloat16)
    examples = study.examples.examples("pocket", 2, tasks=["description", "qa_colour"], split="train")
    trained = training.train(model, processor, examples, budget=0.5, steps=3, batch=4, checkpointing=True, progress=False)
    assert trained.predictor.linear.weight.dtype == torch.float32
    assert all(row["gradient"] > 0 and row["task"] == row["task"] for row in trained.history)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
