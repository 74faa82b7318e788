"""Each equation on numbers made by hand, and training that equals what is deployed."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LogitsProcessor

from dyrate import Example, Examples, diagnostics
from dyrate.cost import UNITS
from dyrate.predictor import (
    RatePredictor,
    chosen_mask,
    gumbel_noise,
    gumbel_one_hot,
    kept_counts,
    query_bias,
    rate_grid,
    rate_masks,
)
from dyrate.strategies.dyrate import DyRate
from dyrate.teacher_forcing import frozen, masked_logits, masks_over_steps, prepare_tokens, without_unseen
from dyrate.training import Settings, Trainer
from dyrate.training.__main__ import main, split_validation
from laws import long_images


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
    predictor.rate_bias.fill_(4.0)
    assert predictor(features)[0].tolist() == pytest.approx([0.0, -(0.5**0.5) + 4 * 0.5])


def test_eq_3_masks_keep_the_best_candidates():
    score = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    candidates = torch.tensor([[True, True, True, True]])
    counts = torch.tensor([[4, 3, 2, 1]])
    assert rate_masks(score, candidates, counts)[0].int().tolist() == [[1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 0, 0]]
    without_one = torch.tensor([[True, False, True, True]])
    assert rate_masks(score, without_one, counts)[0].int().tolist() == [[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 0]]


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
    """Makes generate choose given tokens."""

    def __init__(self, answers, n_prompt):
        self.answers, self.n_prompt = answers, n_prompt

    def __call__(self, ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, self.answers[:, ids.shape[1] - self.n_prompt, None], 0.0)


def random_predictor(model, residency, **fields):
    text = model.config.get_text_config()
    if model.config.model_type == "qwen3_vl":
        fields = {"first_pruned_layer": 3} | fields  # its decoder adds visual features after the first three layers
    torch.manual_seed(5)
    return RatePredictor(
        text.num_attention_heads, text.num_hidden_layers, model.config.model_type, n_rates=8, residency=residency, **fields
    )


ANSWERS = [[5, 9, 11, 30, 7, 2], [8, 40, 2]]


def test_training_below_the_added_features_is_refused():
    import families

    model, inputs = families.ready(families.qwen_3)
    predictor = random_predictor(model, "evict", first_pruned_layer=2)
    with pytest.raises(ValueError, match="train a predictor with first_pruned_layer=3 or more"):
        prepare_tokens(model, predictor, inputs, ANSWERS)


@pytest.mark.parametrize("residency", ["evict", "mask"])
@pytest.mark.parametrize("fields", [{}, {"with_step": True, "observed_layers": [0, 1]}], ids=["plain", "more-features"])
def test_training_equals_dropped_decoding(family, residency, fields):
    model, inputs = family
    predictor = random_predictor(model, residency, **fields)
    prepared = prepare_tokens(model, predictor, inputs, ANSWERS)
    predictor.start_at(0.6, prepared.features.flatten(0, 1))
    torch.nn.init.normal_(predictor.linear.weight, std=0.1 if predictor.with_step else 1.0)  # rates that differ from step to step
    if predictor.with_step:
        predictor.linear.weight.data[:, -1] += torch.linspace(-9, 9, 8)  # and rise
    choice = torch.nn.functional.one_hot(predictor(prepared.features).argmax(-1), 8).float()
    masks = masks_over_steps(choice, prepared, residency)
    with torch.no_grad():
        logits = masked_logits(model, predictor, prepared, masks)
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
            assert (out.logits[step][i] - logits[i, step]).abs().max() < 1e-4
    assert max(len(set(row.tolist())) for row in trace.retention().T) > 1  # the rates do change


def test_the_comparison_can_fail(family):
    model, inputs = family
    predictor = random_predictor(model, "evict")
    prepared = prepare_tokens(model, predictor, inputs, ANSWERS)
    steps = prepared.labels.shape[1]
    one = torch.nn.functional.one_hot(torch.full((2, steps), 6), 8).float()
    other = torch.nn.functional.one_hot(torch.full((2, steps), 1), 8).float()
    with torch.no_grad():
        a, b = (masked_logits(model, predictor, prepared, masks_over_steps(c, prepared, "evict"))
                for c in (one, other))  # fmt: skip
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("residency", ["evict", "mask"])
def test_gradients_reach_every_row_and_no_base_weight(family, residency):
    model, inputs = family
    predictor = random_predictor(model, residency)
    torch.nn.init.normal_(predictor.linear.weight, std=0.1)
    prepared = prepare_tokens(model, predictor, inputs, ANSWERS)
    noise = gumbel_noise((2, 6, 8), torch.Generator().manual_seed(0))
    masks = masks_over_steps(gumbel_one_hot(predictor(prepared.features), noise, 1.0), prepared, residency)
    with frozen(model):
        logits = masked_logits(model, predictor, prepared, masks, checkpointing=True)
        torch.nn.functional.cross_entropy(logits[prepared.valid], prepared.labels[prepared.valid]).backward()
    assert (predictor.linear.weight.grad.abs().sum(1) > 0).all() and (predictor.linear.bias.grad != 0).all()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def trainer_of(model, inputs, settings, start=None):
    """A trainer on the two answers, starting at the retention `start`."""
    predictor = RatePredictor(4, 5, "llava", n_rates=settings.n_rates, first_pruned_layer=settings.first_pruned_layer)
    batch = prepare_tokens(model, predictor, inputs, ANSWERS)
    batch.tasks = ["one", "other"]
    trainer = Trainer(model, predictor, [batch], settings, progress=False)
    if start is not None:
        predictor.start_at(start, batch.features.flatten(0, 1))
    return trainer


@pytest.mark.parametrize("unit", UNITS)
def test_the_budget_alone_drives_the_rate_to_the_budget(unit, monkeypatch):
    settings = Settings(budget=0.625, unit=unit, steps=150, n_rates=16, first_pruned_layer=1)
    trainer = trainer_of(*long_images(4), settings, start=0.9)
    monkeypatch.setattr(trainer, "task_loss", lambda draw: draw.masks.sum() * 0)
    history = trainer.run()
    assert abs(sum(row["cost"] for row in history[-20:]) / 20 - 0.625) <= 1 / 16  # one step of the grid


def test_the_budget_holds_for_the_mean_of_all_or_for_every_task(monkeypatch):
    """To one answer every token is worth the same, to the other none: alone each meets the budget, together their mean does."""
    found = {}
    for per_task in (False, True):
        settings = Settings(budget=0.5, steps=300, n_rates=16, first_pruned_layer=1, per_task=per_task)
        trainer = trainer_of(*long_images(4), settings, start=0.5)
        monkeypatch.setattr(trainer, "task_loss", lambda draw: -draw.masks[0].mean())
        trainer.run()
        draw = trainer.draw(trainer.batches[0], torch.Generator().manual_seed(0))
        found[per_task] = draw.cost.sum(-1).tolist()
        assert sorted(trainer.multipliers) == (["one", "other"] if per_task else [""])
    assert found[True] == pytest.approx([0.5, 0.5], abs=1 / 16)
    assert sum(found[False]) == pytest.approx(1, abs=1 / 8) and found[False][0] > 0.7


def test_a_constant_feature_yields_a_constant_rate():
    predictor = random_predictor(long_images(4)[0], "evict")
    torch.nn.init.normal_(predictor.linear.weight)
    features = torch.randn(16).expand(5, 7, 16)
    assert len(predictor(features).argmax(-1).unique()) == 1


def test_five_seeds_are_usable():
    """None is locked in: the first step keeps about the budget, and no seed ends far from it."""
    model, inputs = long_images(6)
    ends = []
    for seed in range(5):
        history = trainer_of(model, inputs, Settings(budget=0.5, steps=80, n_rates=16, seed=seed), start=0.5).run()
        assert abs(history[0]["retention"] - 0.5) < 0.3
        ends.append(sum(row["cost"] for row in history[-10:]) / 10)
    assert all(abs(end - 0.5) < 0.1 for end in ends), ends


def test_accumulated_batches_are_one_large_batch(monkeypatch):
    monkeypatch.setattr("dyrate.training.trainer.gumbel_noise", lambda shape, generator: torch.zeros(shape))
    model, inputs = long_images(4)
    answers = [[5, 9, 11, 30, 7, 2], [8, 40, 9, 3, 6, 2]]
    found = []
    for parts in ([[0, 1]], [[0], [1]]):
        predictor = RatePredictor(4, 5, "llava", n_rates=16)
        batches = [prepare_tokens(model, predictor, {k: v[rows] for k, v in inputs.items()}, [answers[i] for i in rows])
                   for rows in parts]  # fmt: skip
        settings = Settings(budget=0.5, steps=8, n_rates=16, accumulate=len(parts))
        trainer = Trainer(model, predictor, batches, settings, progress=False)
        predictor.start_at(0.9, torch.cat([b.features for b in batches]).flatten(0, 1))
        found.append(trainer.run())
    whole, parts = ([[row[k] for k in ("loss", "cost", "gradient", "multiplier")] for row in history] for history in found)
    assert parts == [pytest.approx(row, rel=1e-3, abs=1e-5) for row in whole]
    assert whole[0][2] > 1e-3 and whole[-1][1] < whole[0][1]  # it does learn


def test_no_step_of_a_training_reads_counts_from_the_device(monkeypatch):
    trainer = trainer_of(*long_images(4), Settings(steps=3, n_rates=4))
    trainer.train_step()
    monkeypatch.setattr("dyrate.teacher_forcing.kept_counts", lambda *_: pytest.fail("computed again"))
    trainer.train_step()


def test_saved_and_loaded(tmp_path):
    model, inputs = long_images(4)
    predictor = random_predictor(model, "mask", observed_layers=[0, 1])
    predictor.rate_bias.fill_(1.5)
    predictor.about["calibration"] = {"retention": 0.5}
    DyRate.of(predictor).save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".md") == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text())["residency"] == "mask"
    loaded = DyRate.from_pretrained(tmp_path)
    assert loaded.residency == "mask" and loaded.predictor.observed_layers == [0, 1]
    assert loaded.predictor.about == predictor.about
    assert all(torch.equal(value, loaded.predictor.state_dict()[name]) for name, value in predictor.state_dict().items())
    with loaded(model) as trace:
        model.generate(**inputs, max_new_tokens=3)
    assert len(trace.steps) == 3


def test_a_predictor_saved_under_the_old_names_loads(tmp_path):
    predictor = random_predictor(long_images(4)[0], "mask")
    predictor.rate_bias.fill_(1.5)
    torch.nn.init.normal_(predictor.linear.weight)
    predictor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"residency": "hide"}))
    weights = load_file(tmp_path / "model.safetensors")
    weights["tilt"] = weights.pop("rate_bias")
    save_file(weights, tmp_path / "model.safetensors")
    loaded = DyRate.from_pretrained(tmp_path)
    assert loaded.residency == loaded.predictor.residency == "mask"
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["residency"] == "mask"
    assert all(torch.equal(value, loaded.predictor.state_dict()[name]) for name, value in predictor.state_dict().items())
    assert Settings(residency="hide", unit="kept") == Settings(residency="mask", unit="retention")
    del weights["mean"]  # what is missing is not made up
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="mean"):
        DyRate.from_pretrained(tmp_path)


def test_the_model_card_says_what_the_folder_holds(tmp_path):
    about = {"settings": {"unit": "retention", "budget": 0.33, "steps": 5, "seed": 0}, "calibration": {"retention": 0.325},
             "model": "owner/model", "examples": "train.jsonl"}  # fmt: skip
    for retention in ("0.900", "0.325"):  # a second training writes a new card
        about["calibration"]["retention"] = float(retention)
        RatePredictor(4, 5, "llava", about=about).save_pretrained(tmp_path)
        card = (tmp_path / "README.md").read_text()
        assert retention in card and "owner/model" in card and "budget 0.33" in card and "pushed to the Hub" not in card
    RatePredictor(4, 5, "llava").save_pretrained(tmp_path)
    assert "None" not in (tmp_path / "README.md").read_text()


def test_a_predictor_that_is_nowhere_is_named_at_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("dyrate.strategies.dyrate.snapshot_download", lambda name, **_: calls.append(name) or str(tmp_path))
    for name in ("nowhere", "./nowhere", str(tmp_path / "nowhere"), f"{tmp_path.name}/a/b"):
        with pytest.raises(FileNotFoundError, match=f"there is no folder {re.escape(name)}: .*python -m dyrate.training"):
            DyRate.from_pretrained(name)
    assert not calls
    with pytest.raises(FileNotFoundError, match=r"holds no predictor \(config.json and model.safetensors missing\).*train"):
        DyRate.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="owner/name holds no predictor"):
        DyRate.from_pretrained("owner/name")
    assert calls == ["owner/name"]  # one question to the hub

    def offline(name, **_):
        raise ConnectionError("no network")

    monkeypatch.setattr("dyrate.strategies.dyrate.snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"neither a folder nor the hub has owner/name \(ConnectionError\)"):
        DyRate.from_pretrained("owner/name")


def test_a_predictor_of_another_model_is_named():
    model, _ = long_images(4)
    with pytest.raises(ValueError, match=r"attention heads: 7 against the model's 4.*train"):
        DyRate.of(RatePredictor(7, 5, "llava"))(model)


GRID = [0.0, 0.25, 0.5, 0.75]


def test_entropy_and_information_by_hand():
    assert diagnostics.entropy([0.5] * 9) == 0
    assert diagnostics.entropy([0.0, 0.25, 0.5, 0.75]) == pytest.approx(2)
    rates, tasks = [0.0] * 40 + [0.5] * 40, ["a"] * 40 + ["b"] * 40
    assert diagnostics.mutual_information(rates, tasks) == pytest.approx(1, abs=0.05)
    assert abs(diagnostics.mutual_information([0.0, 0.5] * 40, tasks)) < 0.05


def warning(signs):
    return {sign.name for sign in signs if sign.warns}


def test_stagnation_and_collapse_are_not_taken_for_health():
    assert warning(diagnostics.of_rates([[0.5] * 6, [0.5] * 4], ["a", "b"], GRID)) == {"rates stagnate"}
    assert warning(diagnostics.of_rates([[0.75] * 6], ["a"], GRID)) == {"rates stagnate", "rates collapse"}
    assert warning(diagnostics.of_rates([[0.0] * 6], ["a"], GRID)) == {"rates stagnate", "rates collapse"}
    assert not warning(diagnostics.of_rates([[0.0, 0.25, 0.75], [0.75, 0.0]], ["a", "b"], GRID))
    (stagnant,) = (s for s in diagnostics.of_rates([[0.5] * 6], ["a"], GRID) if s.name == "rates stagnate")
    assert "with_step" in str(stagnant)


def test_an_unstable_training_is_not_taken_for_a_steady_one():
    assert diagnostics.of_training([{"loss": 0.1 + 0.01 * i} for i in range(60)]).warns
    assert diagnostics.of_training([{"loss": float("nan")}] * 60).warns
    assert not diagnostics.of_training([{"loss": 0.4 - 0.001 * i} for i in range(60)]).warns


def test_the_task_that_degrades_is_named():
    tasks = ["a", "a", "b", "b"]
    found = diagnostics.of_tasks([0.1, 0.1, 1.4, 1.2], [0.1, 0.1, 0.2, 0.2], tasks)
    assert found.warns and "by b" in str(found) and found.measured == pytest.approx(1.1)
    assert not diagnostics.of_tasks([0.2, 0.2, 0.3, 0.3], [0.1, 0.1, 0.2, 0.2], tasks).warns


def test_warnings_come_while_training():
    trainer = trainer_of(*long_images(4), Settings(budget=0.5, steps=60, n_rates=4, noise_until=0.1), start=0.5)
    trainer.predictor.deviation.fill_(1e9)  # features that carry nothing
    course = trainer.run()
    assert "rates stagnate" in warning(diagnostics.while_training(course, 1 / 4))
    assert "rates stagnate" in trainer.warned


@pytest.mark.parametrize(("fields", "message"), [
    ({"unit": "joules"}, "unit is one of"), ({"budget": 0}, "budget is the share"), ({"first_pruned_layer": 0}, "at least 1"),
])  # fmt: skip
def test_bad_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Settings(**fields)


def test_every_setting_has_an_option_with_a_help_text(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for setting in fields(Settings):
        assert f"--{setting.name.replace('_', '-')}" in text and setting.metadata["help"]
    with pytest.raises(SystemExit) as stopped:
        main(["--model", "pocket", "--data", "nowhere.jsonl", "--out", "x"])
    assert stopped.value.code == 2 and "no such file: nowhere.jsonl" in capsys.readouterr().err


def test_no_image_is_both_trained_on_and_validated_on():
    examples = Examples([Example(f"{i}", "t", "", ("a",), path=Path(f"{i // 3}.png")) for i in range(60)], "mine")
    learn, validation = split_validation(examples)
    assert len(validation) == 6 and len(learn) == 54
    assert not {e.path for e in learn} & {e.path for e in validation}
    assert split_validation(Examples(examples[::-1], "mine"))[1].items[::-1] == validation.items  # by name, not by order
    with pytest.raises(ValueError, match="one image cannot be split"):
        split_validation(Examples(examples[:3], "mine"))


def test_image_tokens_that_no_step_sees_may_be_left_out(family):
    model, inputs = family
    predictor = random_predictor(model, "evict")
    prepared = prepare_tokens(model, predictor, inputs, ANSWERS)
    masks = (torch.rand(*prepared.valid.shape, prepared.image.shape[1], generator=torch.Generator().manual_seed(0)) > 0.5).float()
    masks = masks * prepared.image[:, None]
    masks[:, :, 1:] = 0
    masks[0] = 0  # a row that sees none beside one that sees one
    shorter, left = without_unseen(prepared, masks)
    assert shorter.hidden.shape[1] < prepared.hidden.shape[1] and left[0].sum() == 0
    whole = masked_logits(model, predictor, prepared, masks.clone().requires_grad_())
    with torch.no_grad():
        found = masked_logits(model, predictor, prepared, masks)
    assert (found - whole)[prepared.valid].abs().max() < 1e-4
