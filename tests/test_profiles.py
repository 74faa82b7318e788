"""The profiles of the paper's scale: the notebooks run under them, on a tiny random LLaVA saved in the real format."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from tiny_llava import WORDS, save_tiny_llava

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "analysis"))
import run as runner  # noqa: E402

SMALL = {
    "n": 4, "n_train": 6, "n_validation": 2, "n_test": 3, "steps": 6, "batch": 2, "batch_size": 4, "max_new_tokens": 12,
    "budgets": [0.33, 0.75], "shares": [0.5], "n_rates": 4,
}  # fmt: skip


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
    _, sections = runner.read_profile(profile)
    old = sections["02_predictor"]["predictors"]
    there = json.loads(json.dumps(sections).replace(old, predictors))
    for notebook in runner.NOTEBOOKS:
        values, known = there[notebook.stem], runner.papermill.inspect_notebook(str(notebook))
        values |= {key: value for key, value in SMALL.items() if key in known}
        values |= {"results": results}
        values |= {"model": str(model), "source": str(photographs)} if "model" in known else {}
    return there


@pytest.mark.parametrize("profile", ["llava-7b"])
def test_every_notebook_runs_on_a_tiny_llava(profile, photographs, tmp_path):
    model = save_tiny_llava(tmp_path / "model")
    results = f"build/results/tiny-{profile}"
    sections = small(profile, model, photographs, results, str(tmp_path / "predictors"))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(sections))
    done = subprocess.run(
        [sys.executable, "analysis/run.py", "--profile", str(tmp_path / "tiny.yaml"), "--force"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for notebook in runner.NOTEBOOKS:
        content = json.loads((ROOT / results / f"{notebook.stem}.json").read_text())
        assert content["numbers"] and content["provenance"]["seconds"] > 0
    shutil.rmtree(ROOT / "build" / "analysis" / "tiny")
