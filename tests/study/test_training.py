"""Training on the pocket model: resumed, shared by processes, calibrated, from the command line."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import dyrate
from dyrate import diagnostics, training
from dyrate.predictor import RatePredictor
from dyrate.strategies.dyrate import DyRate
from dyrate.teacher_forcing import predicted_by_gradient, prepare_examples, teacher_forced
from dyrate.training import Settings, trainer
from dyrate.training.__main__ import main
from study.examples import examples

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pocket():
    return dyrate.load("pocket")


def test_training_resumes(pocket, tmp_path, monkeypatch):
    learn = examples("pocket", 8, tasks=["description", "qa_colour"], split="train")
    settings = Settings(budget=0.5, steps=6, batch=4)
    monkeypatch.setattr(trainer, "SAVE_EVERY", 2)
    whole = training.train(*pocket, learn, settings, work=tmp_path / "a", progress=False)
    original, calls = trainer.masked_logits, []

    def stops(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(trainer, "masked_logits", stops)
    with pytest.raises(KeyboardInterrupt):
        training.train(*pocket, learn, settings, work=tmp_path / "b", progress=False)
    again = training.train(*pocket, learn, settings, work=tmp_path / "b", progress=False)
    assert len(calls) == 4 + 4  # two of six steps were not repeated
    assert torch.allclose(whole.predictor.linear.weight, again.predictor.linear.weight, atol=1e-6)
    assert again.history == whole.history
    with pytest.raises(ValueError, match=r"other settings \(budget, batch\)"):
        training.train(*pocket, learn, Settings(budget=0.4, steps=6), work=tmp_path / "b", progress=False)


def test_two_processes_train_one_predictor(tmp_path):
    script = tmp_path / "shared.py"
    script.write_text(f"""
import os
import dyrate
from dyrate import training
from study.examples import examples
learn = examples("pocket", 8, tasks=["qa_colour"], split="train")
found = training.train(*dyrate.load("pocket"), learn, budget=0.5, steps=5, batch=4, progress=False)
found.predictor.save_pretrained("{tmp_path}/" + os.environ["RANK"])
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'analysis'}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (DyRate.from_pretrained(tmp_path / rank).predictor.state_dict() for rank in "01")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one["linear.weight"].abs().max() > 0


def test_calibration_meets_the_budget_from_a_bad_start(pocket):
    check = examples("pocket", 6, tasks=["qa_colour", "qa_place"], split="validation")
    predictor = RatePredictor(6, 8, "llava")
    predictor.start_at(0.9, torch.zeros(2, 24))
    only_measured = training.calibrate(*pocket, predictor, check, None, progress=False)
    assert only_measured["rate_bias"] == 0 and only_measured["retention"] == pytest.approx(0.9, abs=1 / 32)
    found = training.calibrate(*pocket, predictor, check, 0.33, progress=False)
    assert abs(found["retention"] - 0.33) <= 1 / 32
    assert predictor.about["calibration"] == found and float(predictor.rate_bias) == found["rate_bias"]
    paths = training.trajectories(*pocket, DyRate.of(predictor), check)
    assert sum(sum(p) / len(p) for p in paths.values()) / len(paths) == pytest.approx(found["retention"])


def test_speed_is_measured(pocket):
    predictor = RatePredictor(6, 8, "llava")
    found = diagnostics.of_speed(*pocket, predictor, examples("pocket", 2, tasks=["qa_colour"]), repeats=1)
    assert 0.2 < found.measured < 20


def test_what_a_gradient_predicts_starts_at_the_measured_loss(pocket):
    model, processor = pocket
    predictor = RatePredictor(6, 8, "llava", n_rates=8)
    batches = prepare_examples(model, processor, predictor, examples("pocket", 2, tasks=["caption"]), 2)
    rows = predicted_by_gradient(model, predictor, batches, 0.5, n_shown=8)
    here = [row for row in rows if row["rate"] == 0.5]
    assert len(rows) == 16 and all(row["loss"] == pytest.approx(row["predicted"], abs=1e-5) for row in here)
    constant = teacher_forced(model, predictor, batches, 0.5)
    assert [row["loss"] for row in here] == pytest.approx([row["loss"] for row in constant], abs=1e-4)
    assert any(abs(row["loss"] - row["predicted"]) > 1e-3 for row in rows)


def test_training_in_bfloat16_with_checkpointing():
    model, processor = dyrate.load("pocket", dtype=torch.bfloat16)
    learn = examples("pocket", 2, tasks=["description", "qa_colour"], split="train")
    trained = training.train(model, processor, learn, budget=0.5, steps=3, batch=4, checkpointing=True, progress=False)
    assert trained.predictor.linear.weight.dtype == torch.float32
    assert all(row["gradient"] > 0 and row["loss"] == row["loss"] for row in trained.history)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_imitating_the_unpruned_model_starts_near_it(pocket):
    learn = examples("pocket", 2, tasks=["qa_colour"], split="train")
    trained = training.train(*pocket, learn, budget=1.0, steps=2, batch=2, noise_until=0, distill=True, progress=False)
    assert trained.history[0]["loss"] < 0.1  # with all tokens kept there is nothing to imitate


def test_a_file_of_ones_own_is_trained_on_from_the_command_line(tmp_path, capsys):
    lines = []
    for i, example in enumerate(examples("pocket", 5, tasks=["qa_colour"], split="train")):
        example.image().save(tmp_path / f"{i}.png")
        lines.append({"image": f"{i}.png", "prompt": example.prompt, "answer": example.references[0], "task": example.task})
    (tmp_path / "broken.png").write_bytes((tmp_path / "0.png").read_bytes()[:200])
    lines.append(lines[0] | {"image": "broken.png"})
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "predictor"
    with pytest.warns(UserWarning, match=r"1 images left out: .*broken.png cannot be read"):
        main(["--model", "pocket", "--data", str(tmp_path / "train.jsonl"), "--out", str(out), "--steps", "2", "--budget", "0.5",
              "--n-rates", "8", "--unit", "macs"])  # fmt: skip
    assert warnings.formatwarning("text", UserWarning, "file", 1) == "warning: text\n"
    printed = capsys.readouterr().out
    predictor = DyRate.from_pretrained(out).predictor
    measured = predictor.about["calibration"]["retention"]
    assert f"retention {measured:.3f} in answers to 1 validation prompts" in printed and f"the predictor is in {out}" in printed
    assert predictor.about["n_train"] == 4 and len(predictor.rates) == 8
    card = (out / "README.md").read_text()
    assert f"{measured:.3f}" in card and "steps 2" in card and "pushed" not in card


def test_the_studys_images_are_trained_on_from_the_command_line(tmp_path):
    options = ["--tasks", "qa_colour", "--n-train", "2", "--n-validation", "2", "--steps", "1", "--out", str(tmp_path)]
    command = [sys.executable, "analysis/train.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and f"the predictor is in {tmp_path}" in done.stdout, done.stderr
    about = DyRate.from_pretrained(tmp_path).predictor.about
    assert about["tasks"] == ["qa_colour"] and about["model"] == "pocket" and len(about["commit"]) == 40
