"""Where a chapter's numbers come from: what they depend on, by content, and how they were measured."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

from dyrate.models import origin
from study.examples import SCENES
from study.hub_sets import SETS
from study.profiles import PROVENANCE, ROOT, defaults, predictors_of, rows_of

PACKAGES = ("torch", "transformers", "numpy", "pandas", "matplotlib", "pillow", "papermill", "pycocoevalcap")


def fingerprint(notebook: Path, values: dict) -> dict[str, str]:
    """A hash of each thing that a chapter's results depend on: of files their whole content.

    Raises FileNotFoundError if a file or folder that a parameter names is missing.
    """
    about = {"parameters": values, "packages": {name: importlib.metadata.version(name) for name in PACKAGES}}
    found = {name: hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest() for name, what in about.items()}
    return found | {name: digest(files) for name, files in inputs(notebook, values).items()} | trained_here(notebook, values)


def inputs(notebook: Path, values: dict) -> dict[str, list[Path]]:
    """The files that a chapter reads, by what they are."""
    v = {**defaults(notebook), **values}
    found = {"notebook": [notebook], "code": [*files(ROOT / "dyrate"), *files(ROOT / "analysis" / "study")]}
    found["reported tables"] = files(ROOT / "data" / "reported")
    if v.get("latency") and (ROOT / v["latency"]).exists():  # else the page says that it was not measured
        found["latency"] = files(ROOT / v["latency"])
    if v.get("draw"):
        return found | {"rows": [path for path in files(rows_of(v["results"], notebook.stem)) if path.name != PROVENANCE]}
    if "model" in v and isinstance(folder := origin(v["model"])["pretrained_model_name_or_path"], Path):
        found["model"] = [path for path in files(folder) if path.parent == folder]
    if v.get("source", "pocket") not in (*SCENES, *SETS):
        found["source"] = files(ROOT / v["source"])
    found["predictors"] = [path for folder in predictors_of(notebook, values) for path in files(folder)]
    if v.get("lmms_results"):
        found["lmms_results"] = files(ROOT / v["lmms_results"])
    if v.get("reference"):
        found["reference rows"] = sorted((ROOT / v["reference"]).glob("*/*.csv.gz"))
        if not found["reference rows"]:
            raise FileNotFoundError(f"no such file or folder: {v['reference']}/*/*.csv.gz")
    if v.get("bench"):
        found["bench"] = [*files(ROOT / v["bench"]), *sorted((ROOT / "data" / "results").glob("*/bench.json"))]
    return found


def trained_here(notebook: Path, values: dict) -> dict[str, str]:
    """The hash of predictors that a chapter trains once and then reads."""
    v = {**defaults(notebook), **values}
    if not (folder := v.get("trained")) or v.get("draw"):
        return {}
    return {"trained": digest(files(ROOT / folder) if (ROOT / folder).exists() else [])}


def files(path: Path) -> list[Path]:
    """A file, or those in a folder, but for descriptions and what Python compiles. Raises FileNotFoundError if it is missing."""
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [p for p in found if p.is_file() and p.suffix != ".md" and "__pycache__" not in p.parts]


def digest(paths: Iterable[Path]) -> str:
    """A hash of files' names and contents."""
    found = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            found.update(os.path.relpath(path, ROOT).encode() + hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def provenance(profile: str, values: dict, state: dict[str, str], seconds: float, jobs: int) -> dict:
    """Where a result comes from: enough to make it again."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "profile": profile, "parameters": values, "commit": git("rev-parse", "HEAD") or None,
        "uncommitted_changes": bool(git("status", "--porcelain", "--", "dyrate", "analysis", "data/pocket")),
        "inputs": state, "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": gpu or f"{platform.machine()} CPU, {os.cpu_count()} cores", "seconds": round(seconds, 1), "jobs": jobs,
    }  # fmt: skip


def recorded(headline: Path) -> dict:
    """The provenance of a result; empty where there is no finished one."""
    return json.loads(headline.read_text()).get("provenance", {}) if headline.exists() else {}
