"""The profiles of the paper's scale, on a tiny random LLaVA saved in the real format: they run, alone and shared, and what
would stop them is reported before they begin.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from dyrate.cost import LLAVA_7B, LLAVA_13B
from study import hardware, planning, runner
from study.profiles import NOTEBOOKS, ROOT, defaults, parameters_of, read_plan, read_profile
from tiny_llava import WORDS, save_tiny_llava

SMALL = {
    "n": 4, "n_train": 6, "n_validation": 2, "n_test": 3, "steps": 6, "batch": 2, "batch_size": 4, "max_new_tokens": 12,
    "budgets": [0.33, 0.75], "others": {"budget .75": "evict-0.75"}, "retentions": [0.5], "n_rates": 4,
    "seeds": 2,
}  # fmt: skip


MEASURING = [notebook for notebook in NOTEBOOKS if "model" in defaults(notebook)]  # the others draw from committed rows


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Forty photographs with two captions each, in nocaps' own form."""
    folder = tmp_path_factory.mktemp("photographs")
    draw = random.Random(0)
    content = {"images": [], "annotations": []}
    for i in range(40):
        Image.effect_noise((40 + i, 60), 10 + i).convert("RGB").save(folder / f"{i:04}.jpg")
        content["images"].append({"id": i, "file_name": f"{i:04}.jpg"})
        for _ in range(2):
            content["annotations"].append({"image_id": i, "caption": " ".join(draw.choices(WORDS[:17], k=9))})
    (folder / "nocaps_val_4500_captions.json").write_text(json.dumps(content))
    return folder


def small(profile: str, model: Path, photographs: Path, results: str, predictors: str) -> dict:
    """A committed profile with its model, data and sizes replaced, and nothing else."""
    _, sections = read_profile(profile)
    old = sections["02_predictor"]["predictors"]
    there = json.loads(json.dumps(sections).replace(old, predictors))
    there = {notebook.stem: there[notebook.stem] for notebook in MEASURING}
    there["04_ablations"]["trained"] = f"{predictors}-of-ablations"
    for line in there["04_ablations"]["ablations"]:
        line |= {"train": line["train"] | {"steps": 4, "batch": 2}} if "train" in line else {}
    for notebook in MEASURING:
        values, known = there[notebook.stem], defaults(notebook)
        values |= {key: value for key, value in SMALL.items() if key in known}
        values |= {"results": results, "model": str(model), "source": str(photographs)}
    return there


@pytest.fixture(scope="module")
def sections(photographs, tmp_path_factory):
    """llava-7b on the tiny model."""
    folder = tmp_path_factory.mktemp("tiny")
    model = save_tiny_llava(folder / "model")
    found = small("llava-7b", model, photographs, "build/results/tiny", str(folder / "predictors"))
    for notebook in MEASURING:
        if "store" in defaults(notebook):
            found[notebook.stem]["store"] = str(folder / "answers" / notebook.stem)
    return found


def write(sections: dict, path: Path) -> list[str]:
    path.write_text(yaml.safe_dump(sections))
    return ["--profile", str(path)]


def launch(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def whole(sections, tmp_path_factory):
    """Every notebook that measures a model, in one process."""
    done = launch("analysis/run.py", *write(sections, tmp_path_factory.mktemp("whole") / "tiny.yaml"), "--force")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    yield done.stdout
    shutil.rmtree(ROOT / "build" / "analysis" / "tiny")


def test_every_notebook_runs_on_a_tiny_llava(whole):
    for notebook in MEASURING:
        content = json.loads((ROOT / "build" / "results" / "tiny" / f"{notebook.stem}.json").read_text())
        assert content["numbers"] and content["provenance"]["seconds"] > 0


def test_the_estimate_counts_what_is_done(whole, sections):
    """Answers by the ledger against answers stored, chapter by chapter."""
    assert "measured: " in whole and "07_dynamics: about 1 min" in whole and "s were estimated" in whole
    for name in ("03_comparison", "04_ablations", "07_dynamics"):
        (notebook,) = (n for n in NOTEBOOKS if n.stem == name)
        values = {**defaults(notebook), **sections[name]}
        stored = sum(len(json.loads(path.read_text())) for path in Path(values["store"]).glob("*/*.json"))
        values["ablations"] = [alike(line) for line in values.get("ablations", [])]
        trained = [f"evict-{budget}{seed}" for budget in ("0.33", "0.75") for seed in ("", "-seed1")]
        counted = planning.work(name, values, trained).answers
        unstored = len(trained) * values["n_validation"] if name == "07_dynamics" else 0  # which each predictor answers
        assert counted - unstored == stored, name


def alike(line: dict) -> dict:
    """A line whose answers are counted as they are stored: without beams, and without those that calibrate what it trains."""
    if "train" in line:
        return {"strategy": "Full", "generate": {"of": line["train"]}}
    return line | ({"generate": {"of": line["generate"]}} if "generate" in line else {})


def test_two_processes_share_a_chapter(whole, sections, tmp_path):
    """Two store all, the notebook generates nothing more, and its table is that of one process."""
    values = {
        "strategies": ["FastV", "FastVRerank", "RandomPrune", "WorstFirst"],
        "predictors": "",
        "store": str(tmp_path / "answers"),
    }
    chapter = sections["03_comparison"] | values | {"results": "build/results/shared"}
    profile = write({"03_comparison": chapter}, tmp_path / "shared.yaml")
    shared = launch("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "analysis/share.py", *profile)
    assert shared.returncode == 0, shared.stderr[-3000:]
    assert {f"03_comparison: process {i} of 2" for i in (1, 2)} <= set(shared.stdout.splitlines())
    stored = {path: path.stat().st_mtime_ns for path in (tmp_path / "answers").glob("*/*.json")}
    assert len(stored) == 5
    done = launch("analysis/run.py", *profile, "--force")
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "answers").glob("*/*.json")} == stored
    one, two = (ROOT / "build" / "results" / name / "03_comparison_by_task.csv" for name in ("tiny", "shared"))
    lines = two.read_text().splitlines()
    assert len(lines) == 6 and set(lines) <= set(one.read_text().splitlines())


@pytest.mark.parametrize(("chapter", "change", "message"), [
    ("01_attention", {"source": "no/photographs"}, "no such folder of photographs: no/photographs"),
    ("01_attention", {"model": "no/such/model"}, "no such folder: no/such/model"),
    ("06_masks", {"predictor": "nowhere/evict-0.33"}, "no predictor nowhere/evict-0.33: run chapter 02 first"),
    ("07_dynamics", {"predictors": "nowhere"}, r"no predictor nowhere/evict-0.33\*: run chapter 02 first"),
])  # fmt: skip
def test_what_is_missing_is_named_before_anything_runs(sections, chapter, change, message):
    (notebook,) = (n for n in NOTEBOOKS if n.stem == chapter)
    with pytest.raises(FileNotFoundError, match=message):
        runner.before([(notebook, sections[chapter] | change)])


def test_a_machine_that_is_too_small_is_refused():
    work = planning.Work(answers=100, batch=8)
    with pytest.raises(ValueError, match=r"7\.1 billion parameters and needs a GPU, and none is found"):
        planning.check_fits(work, LLAVA_7B, planning.Machine("CPU", 1e9, 1e9, 1e-4), "m")
    card = planning.Machine("card", 1e14, 1e12, 1e-4, 24e9)
    planning.check_fits(work, LLAVA_7B, card, "m")
    with pytest.raises(ValueError, match=r"m needs about 31 GiB here, 25 of them for .*, and card has 22: lower batch_size"):
        planning.check_fits(work, LLAVA_13B, card, "m")


def test_long_work_is_asked_for(sections, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "before", lambda plan: {n.stem: 13200.0 for n, _ in plan})
    monkeypatch.setattr(runner, "run", lambda *arguments: pytest.fail("it began"))
    profile = write({"01_attention": sections["01_attention"]}, tmp_path / "long.yaml")
    assert runner.main([*profile, "--force"]) == 3
    assert re.search(r"about 3 h 40 on this .*; continue with --yes", capsys.readouterr().out)


def test_pocket_is_not_probed(monkeypatch):
    monkeypatch.setattr(runner, "probe", lambda: pytest.fail("probed"))
    assert runner.before(read_plan("pocket")[1]) == {}


def test_seconds_are_those_of_the_bound():
    """By hand: decoding at batch 1 reads the weights and the cache at every step; Python takes its time for every layer."""
    reads = planning.Machine("slow memory", 1e30, 1e9, 0.0)
    found = planning.seconds(planning.Work(answers=1, longest=2), LLAVA_7B, reads)
    assert found == pytest.approx(13.5, rel=0.03)  # 6.6e9 weights of 2 bytes, and the cache
    python = planning.Machine("slow Python", 1e30, 1e30, 1e-3)
    assert planning.seconds(planning.Work(answers=16, batch=8, longest=64), LLAVA_7B, python) == pytest.approx(2 * 64 * 0.032)


def test_the_readmes_table_is_what_the_command_writes():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert hardware.readme(text) == text
    assert hardware.table().filter(like="GiB").max().max() > 20


@pytest.mark.parametrize(("chapter", "values", "message"), [
    ("01_attention", {"n": 0}, "01_attention: n is a whole number of at least 1, not 0"),
    ("03_comparison", {"n": -2}, "n is a whole number of at least 1, not -2"),
    ("03_comparison", {"batch_size": 0}, "batch_size is a whole number of at least 1"),
    ("03_comparison", {"n": "many"}, "n is a whole number of at least 1, not 'many'"),
    ("03_comparison", {"tasks": []}, "tasks is empty; the notebook's own is"),
    ("03_comparison", {"tasks": "caption"}, "tasks is a list such as"),
    ("03_comparison", {"retentions": [0.5, 33.5]}, "in (0, 1], or whole numbers of tokens, not [0.5, 33.5]"),
    ("04_ablations", {"constant_retentions": [64]}, "shares of image tokens in (0, 1], not [64]"),
    ("02_predictor", {"checkpointing": "yes"}, "checkpointing is a bool such as False"),
])  # fmt: skip
def test_values_that_no_chapter_can_run_with_are_named(chapter, values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parameters_of(ROOT / "analysis" / f"{chapter}.ipynb", {chapter: values})
    assert parameters_of(ROOT / "analysis" / f"{chapter}.ipynb", {chapter: {"seed": 0}}) == {"seed": 0}
