"""The runner on profiles of a user's own: checking, bad input, a failing cell, photographs, and a book of two chapters."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from running import run
from study import runner
from study.profiles import ROOT, read_profile


def test_checking_measures_a_chapter_anew(tmp_path):
    """A stored answer that was altered does not reach a check, and a number that was altered in the reference does."""
    values = read_profile("smoke")[1]["03_comparison"] | {"tasks": ["qa_colour"], "strategies": ["FastV"], "max_new_tokens": 8}
    values |= {"predictors": "", "store": str(tmp_path / "answers"), "results": "build/results/checked"}
    profile = ["--profile", str(tmp_path / "checked.yaml")]
    (tmp_path / "checked.yaml").write_text(yaml.safe_dump({"03_comparison": values}))
    measured = ROOT / "build" / "results" / "checked" / "03_comparison.json"
    check = [*profile, "--check", "--reference", str(tmp_path / "reference")]

    def full_score() -> float:
        return json.loads(measured.read_text())["numbers"]["full_score"]["value"]

    done = run(*profile, "--force")
    assert done.returncode == 0, done.stderr
    true = full_score()
    shutil.copytree(measured.parent, tmp_path / "reference")
    for path in (tmp_path / "answers").glob("*/*.json"):
        path.write_text(json.dumps([row | {"answer": "nothing"} for row in json.loads(path.read_text())]))
    done = run(*check)
    assert done.returncode == 0 and "every headline number agrees" in done.stdout, done.stdout + done.stderr
    assert run(*profile, "--force").returncode == 0 and full_score() != true  # the control: an altered answer changes the score
    reference = tmp_path / "reference" / "03_comparison.json"
    content = json.loads(reference.read_text())
    content["numbers"]["full_score"] = {"value": true + 0.01}
    reference.write_text(json.dumps(content))
    done = run(*check)
    assert done.returncode == 1 and "DIFFERS 03_comparison full_score" in done.stdout
    assert "1 of the headline numbers differ from the reference" in done.stdout


@pytest.mark.parametrize(("content", "arguments", "message"), [
    ("01_attention: {max_new_token: 3}", [], "01_attention.ipynb has no parameter ['max_new_token']"),
    ("01_atention: {n: 3}", [], "no notebook is called ['01_atention']"),
    (None, ["--profile", "pockets"], "no profile 'pockets'"),
    (None, ["--only", "77"], "no notebook begins with ['77']"),
])  # fmt: skip
def test_what_is_unknown_is_an_error(tmp_path, capsys, content, arguments, message):
    (tmp_path / "typo.yaml").write_text(f"{content}\n")
    assert runner.main(arguments or ["--profile", str(tmp_path / "typo.yaml")]) == 2
    assert message in capsys.readouterr().err


def test_a_failing_cell_is_named_and_kept(tmp_path):
    (tmp_path / "bad.yaml").write_text("01_attention: {tasks: [poem], results: build/results/bad}\n")
    done = run("--profile", str(tmp_path / "bad.yaml"))
    assert done.returncode == 1
    assert re.search(r"cell \d+ of 01_attention.ipynb failed: ValueError: unknown pocket task \['poem'\]", done.stderr)
    left = ROOT / "build" / "analysis" / "bad"
    assert (left / "01_attention.failed.ipynb").exists()
    assert not (left / "01_attention.ipynb").exists()
    done = subprocess.run([sys.executable, "book/build.py", "--profile", "bad"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    shutil.rmtree(left)


def test_photographs_go_through_the_notebook(tmp_path):
    """A folder with a truncated image and a caption without its image: both reported, the rest measured."""
    names = [f"photo{i}.jpg" for i in range(5)]
    for i, name in enumerate(names):
        Image.effect_noise((100 + 30 * i, 120), 50 + i).convert("RGB").save(tmp_path / name)
    (tmp_path / names[1]).write_bytes((tmp_path / names[1]).read_bytes()[:300])
    rows = [f"{name},a caption of {name}" for name in [*names, "missing.jpg"]]
    (tmp_path / "captions.txt").write_text("image,caption\n" + "\n".join(rows) + "\n")
    values = {"source": str(tmp_path), "tasks": ["caption"], "n": 10, "results": "build/results/photos"}
    (tmp_path / "photos.yaml").write_text(yaml.safe_dump({"01_attention": values}))
    done = run("--profile", str(tmp_path / "photos.yaml"), "--force")
    assert done.returncode == 0, done.stderr
    content = json.loads((ROOT / "build" / "results" / "photos" / "01_attention.json").read_text())
    assert {key: content["numbers"][key]["value"] for key in ("n_answers", "n_unreadable", "n_missing")} == {
        "n_answers": 4, "n_unreadable": 1, "n_missing": 1,
    }  # fmt: skip
    assert "4 answers (caption) to photographs of" in content["texts"]["measured_on"]
    assert "(1 unreadable and 1 missing left out)" in content["texts"]["measured_on"] and content["protocol"][0]["n"] == 4
    assert len(content["left_out"]) == 2 and names[1] in content["left_out"][1]
    said = [line for line in done.stderr.splitlines() if line.startswith("01_attention: warning: ")]
    assert len(said) == 2 and "missing.jpg" in said[0] and f"1 images left out: {tmp_path / names[1]} cannot be read" in said[1]


def test_short_answers_alone_and_one_strategy_make_a_book(tmp_path):
    """No answer names an object, none is a caption, nothing stands beside FastV, two chapters of all, and results elsewhere."""
    common = {"tasks": ["qa_colour"], "max_new_tokens": 8, "results": str(tmp_path / "results")}
    alone = {"strategies": ["FastV"], "retentions": [0.5], "predictors": "", "store": str(tmp_path / "answers"), "n": 1}
    sections = {"01_attention": common | {"n": 2}, "03_comparison": common | alone}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(sections))
    done = run("--profile", str(tmp_path / "few.yaml"), "--force")
    assert done.returncode == 0, done.stderr
    texts = json.loads((tmp_path / "results" / "01_attention.json").read_text())["texts"]
    assert texts["where_finding"] == "No answer names an object: there is nothing to measure here."
    texts = json.loads((tmp_path / "results" / "03_comparison.json").read_text())["texts"]
    assert "not measured here" in texts["fastv_ranking"]
    out = tmp_path / "book" / "_build"
    command = [sys.executable, "book/build.py", "--profile", "few", "--out", str(out), "--repository", "", "--site", ""]
    alone = os.environ | {"PATH": str(Path(sys.executable).parent)}  # where no browser is
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no PDF of the whole book" in done.stdout and not (out / "singlehtml").exists()
    page = (out / "html" / "intro.html").read_text(encoding="utf-8")
    assert "One of the images, and the model’s answer" in page and "scene of the pocket" not in page
    assert "Not run with this profile" in (out / "html" / "made.html").read_text(encoding="utf-8")
    assert "og:url" not in page and not list(out.glob("*/sitemap.xml")) and not (out / "colab").exists()  # published nowhere
    shutil.rmtree(ROOT / "build" / "analysis" / "few")
