"""Run the study's notebooks with papermill: measure, record where each number comes from, skip what is up to date.

python analysis/run.py --profile pocket                 # every chapter
python analysis/run.py --profile smoke --only 01 --force
python analysis/run.py --profile my_photos.yaml         # a parameter file of your own
python analysis/run.py --profile pocket --check         # rerun, compare with the committed results
python analysis/run.py --profile llava-7b --yes         # do not ask before hours of work
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import torch
import yaml
from jupyter_client.kernelspec import KernelSpecManager

import dyrate
from dyrate import estimate
from dyrate.cost import shape_of
from dyrate.atomic import write_whole
from dyrate.models import read_config

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "analysis").glob("[0-9][0-9]_*.ipynb"))
BAD_INPUT = (ValueError, FileNotFoundError, ImportError)
LONG = 20 * 60  # seconds of work that are asked for first
PACKAGES = ("torch", "transformers", "numpy", "pandas", "matplotlib", "pillow", "papermill", "pycocoevalcap")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="pocket", help="a name in analysis/params, or a YAML file")
    parser.add_argument("--only", nargs="+", default=[], help="numbers of chapters, such as 01")
    parser.add_argument("--force", action="store_true", help="run also what is up to date")
    parser.add_argument("--check", action="store_true", help="measure anew elsewhere and compare with the committed results")
    parser.add_argument("--yes", action="store_true", help="begin long work without asking")
    given = parser.parse_args(argv)
    expected: dict[str, float] = {}
    try:
        profile, plan = read_plan(given.profile, given.only)
        check_kernel()
        if not given.check:
            plan = [(n, v) for n, v in plan if given.force or not up_to_date(n, profile, v)]
            expected = before(plan)
    except BAD_INPUT as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.check:
        return check(profile, plan)
    if sum(expected.values()) > LONG and not given.yes:
        print(f"about {spoken(sum(expected.values()))} on this {estimate.name_of_device()}; continue with --yes")
        return 3
    for notebook, values in plan:
        if not run(notebook, profile, values, expected.get(notebook.stem)):
            return 1
    return 0


def read_plan(name: str, only: list[str] = ()) -> tuple[str, list[tuple[Path, dict]]]:
    """A profile's name, and the notebooks that it runs with their parameters."""
    profile, parameters = read_profile(name)
    chosen = choose(only)
    if not only and profile_is_partial(parameters):
        chosen = [notebook for notebook in chosen if notebook.stem in parameters]
    return profile, [(notebook, parameters_of(notebook, parameters)) for notebook in chosen]


def before(plan: list[tuple[Path, dict]]) -> dict[str, float]:
    """Look for what would stop the work later, and print how long it takes: seconds by chapter. Nothing of it for pocket.

    Raises what is wrong: a checkpoint, data, predictors or a package that is missing, no GPU, or too little memory.
    """
    plan = [(n, v) for n, v in plan if v.get("model", "pocket") != "pocket"]
    if not plan:
        return {}
    machine = estimate.probe()
    speeds = f"{machine.macs_per_second:.3g} multiply-accumulates and {machine.bytes_per_second:.3g} bytes a second"
    print(f"{machine.name}, measured: {speeds}, {1e3 * machine.seconds_per_layer:.2g} ms of Python a layer")
    found = {}
    for notebook, values in plan:
        values = {**defaults(notebook), **values}
        shape = shape_of(SimpleNamespace(config=read_config(values["model"])))
        study.examples.examples(values["source"], 1, tasks=values.get("tasks") or [values["task"]])
        predictors = check_predictors(notebook, values, planned(plan))
        work = estimate.work(notebook.stem, values, shape.layers, predictors)
        spread = machine if not values["device_map"] else replace(machine, memory=machine.memory * torch.cuda.device_count())
        estimate.check_fits(work, shape, spread, values["model"])
        found[notebook.stem] = estimate.seconds(work, shape, machine)
        print(f"{notebook.stem}: about {spoken(found[notebook.stem])}")
    return found


def planned(plan: list[tuple[Path, dict]]) -> dict[str, list[str]]:
    """The predictors that chapter 2 will have trained when later chapters want them: folder -> names."""
    found = {}
    for notebook, values in plan:
        if notebook.stem.startswith("02"):
            v = {**defaults(notebook), **values}
            found[v["predictors"]] = [f"{v['residency']}-{budget:g}" for budget in v["budgets"]]
    return found


def check_predictors(notebook: Path, values: dict, coming: dict[str, list[str]]) -> list[str]:
    """Predictors in a chapter's folder, or `coming`. Raises FileNotFoundError if one is wanted and not among them."""

    def there(folder: str) -> list[str]:
        return sorted({p.name for p in (ROOT / folder).glob("*")} | set(coming.get(folder, [])))

    wanted = [line["predictor"] for line in values.get("ablations", []) if "predictor" in line]
    wanted += [values["predictor"]] if "predictor" in values else []
    if "prefix" in values:
        wanted += [f"{values['predictors']}/{start}*" for start in (values["prefix"], *values["others"].values())]
    for path in map(Path, wanted):
        if not fnmatch.filter(there(str(path.parent)), path.name):
            raise FileNotFoundError(f"{notebook.stem}: no predictor {path}: run chapter 02 first, with the same profile")
    return there(values.get("predictors", ""))


def defaults(notebook: Path) -> dict:
    """A notebook's parameters as it stands."""
    cell = next(c for c in nbformat.read(notebook, 4).cells if "parameters" in c.metadata.get("tags", []))
    return {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(cell.source).body}


def spoken(seconds: float) -> str:
    """Hours and minutes: "3 h 40", "12 min"."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60:02}" if minutes >= 60 else f"{minutes} min"


def read_profile(name: str) -> tuple[str, dict[str, dict]]:
    """A profile's name and its parameters: a mapping from "all" or a notebook's name to values."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else ROOT / "analysis" / "params" / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in (ROOT / "analysis" / "params").glob("*.yaml")))
        raise FileNotFoundError(f"no profile {name!r}: name a YAML file or one of {known}")
    content = yaml.safe_load(path.read_text()) or {}
    stems = {notebook.stem for notebook in NOTEBOOKS}
    if not isinstance(content, dict) or any(not isinstance(v, dict) for v in content.values()):
        raise ValueError(f"{path}: expected sections ('all' or a notebook's name) of parameters")
    if unknown := set(content) - stems - {"all"}:
        raise ValueError(f"{path}: no notebook is called {sorted(unknown)}; there are {sorted(stems)}")
    return path.stem, content


def profile_is_partial(parameters: dict[str, dict]) -> bool:
    """A profile that names some notebooks, and has no section "all", means those."""
    return bool(parameters) and "all" not in parameters


def choose(only: list[str]) -> list[Path]:
    """The notebooks whose names begin with one of `only`; all of them without any."""
    chosen = [n for n in NOTEBOOKS if not only or any(n.name.startswith(o) for o in only)]
    missing = [o for o in only if not any(n.name.startswith(o) for n in NOTEBOOKS)]
    if missing:
        raise ValueError(f"no notebook begins with {missing}; there are {[n.stem for n in NOTEBOOKS]}")
    return chosen


def parameters_of(notebook: Path, profile: dict[str, dict]) -> dict:
    """The profile's values for one notebook; an unknown parameter is an error (papermill would only warn)."""
    values = {**profile.get("all", {}), **profile.get(notebook.stem, {})}
    known = papermill.inspect_notebook(str(notebook))
    if unknown := set(values) - set(known):
        raise ValueError(f"{notebook.name} has no parameter {sorted(unknown)}; it has {sorted(known)}")
    return values


def check_kernel() -> None:
    """The notebooks must run in this interpreter, not in a kernel that some other installation left behind."""
    command = Path(KernelSpecManager().get_kernel_spec("python3").argv[0])
    if command.is_absolute() and not command.samefile(sys.executable):
        raise ValueError(
            f"the Jupyter kernel 'python3' starts {command}, not {sys.executable}: unset JUPYTER_PATH or remove that kernel "
            "with `jupyter kernelspec remove python3`"
        )


def where(notebook: Path, profile: str, values: dict) -> tuple[Path, Path]:
    """The executed notebook, and the folder of its results."""
    return ROOT / "build" / "analysis" / profile / notebook.name, ROOT / values.get("results", f"data/results/{profile}")


def up_to_date(notebook: Path, profile: str, values: dict) -> bool:
    """Whether the chapter stands as it would be measured now; says so."""
    executed, results = where(notebook, profile, values)
    found = executed.exists() and fingerprint_of(results / f"{notebook.stem}.json") == fingerprint(notebook, values)
    if found:
        print(f"{notebook.stem}: up to date")
    return found


def run(notebook: Path, profile: str, values: dict, expected: float | None = None) -> bool:
    """Execute one notebook into build/analysis/<profile>; False if a cell failed. expected: seconds, to compare with."""
    executed, results = where(notebook, profile, values)
    headline = results / f"{notebook.stem}.json"
    state = fingerprint(notebook, values)
    executed.parent.mkdir(parents=True, exist_ok=True)
    part = executed.with_suffix(".part.ipynb")
    failed = executed.with_suffix(".failed.ipynb")
    failed.unlink(missing_ok=True)
    print(f"{notebook.stem}: running with profile {profile}", flush=True)
    begun = time.monotonic()
    try:
        papermill.execute_notebook(
            str(notebook), str(part), {**values, "results": str(results.relative_to(ROOT))},
            kernel_name="python3", cwd=str(ROOT), progress_bar=True,
        )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        part.replace(failed)
        print(f"error: cell {error.cell_index} of {notebook.name} failed: {error.ename}: {error.evalue}", file=sys.stderr)
        print(f"the notebook as it stood: {failed.relative_to(ROOT)}", file=sys.stderr)
        return False
    content = json.loads(headline.read_text())
    content["provenance"] = provenance(profile, values, state, time.monotonic() - begun)
    write_whole(headline, json.dumps(content, indent=1) + "\n")
    part.replace(executed)
    seconds = content["provenance"]["seconds"]
    print(f"{notebook.stem}: done in {seconds} s" + (f", {expected:.0f} s were estimated" if expected is not None else ""))
    return True


def fingerprint_of(headline: Path) -> str | None:
    """The fingerprint under which a result was measured; None where there is no finished result."""
    return json.loads(headline.read_text()).get("provenance", {}).get("fingerprint") if headline.exists() else None


def fingerprint(notebook: Path, values: dict) -> str:
    """A hash of all that a result depends on: notebook, parameters, library, reported tables, local folders of model and data."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    pocket = ROOT / "data" / "pocket"
    files = [notebook, *sorted((ROOT / "dyrate").rglob("*.py")), ROOT / "dyrate" / "study.mplstyle"]
    files += sorted((ROOT / "data" / "reported").glob("*.csv"))
    for name in (values.get("model", "pocket"), values.get("source", "pocket"), values.get("lmms_results") or "no folder"):
        folder = pocket if name == "pocket" else ROOT / str(name)
        if folder.is_dir():
            files += [p for p in sorted(folder.rglob("*")) if p.is_file()]
    own = {ROOT / "analysis", ROOT / "dyrate", pocket}
    for path in files:  # of large weights and thousands of photographs, size and date: reading them takes minutes
        digest.update(path.name.encode())
        about = path.stat()
        digest.update(path.read_bytes() if own & set(path.parents) else f"{about.st_size} {about.st_mtime_ns}".encode())
    return digest.hexdigest()


def provenance(profile: str, values: dict, state: str, seconds: float) -> dict:
    """Where a result comes from: enough to make it again."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "profile": profile, "parameters": values, "commit": git("rev-parse", "HEAD") or None,
        "uncommitted_changes": bool(git("status", "--porcelain", "--", "dyrate", "analysis", "data/pocket")),
        "fingerprint": state, "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": gpu or f"{platform.machine()} CPU, {os.cpu_count()} cores", "seconds": round(seconds, 1),
    }  # fmt: skip


def check(profile: str, plan: list[tuple[Path, dict]]) -> int:
    """Measure into build/check and compare each headline number with the committed reference and its interval."""
    elsewhere = ROOT / "build" / "check" / profile
    shutil.rmtree(elsewhere, ignore_errors=True)
    differing = 0
    for notebook, values in plan:
        reference = ROOT / "data" / "results" / profile / f"{notebook.stem}.json"
        if not reference.exists():
            print(f"error: no committed reference {reference.relative_to(ROOT)}", file=sys.stderr)
            return 2
        if not run(notebook, f"check-{profile}", {**values, "results": str(elsewhere.relative_to(ROOT))}):
            return 1
        measured = json.loads((elsewhere / f"{notebook.stem}.json").read_text())["numbers"]
        for key, expected in json.loads(reference.read_text())["numbers"].items():
            found = measured.get(key, {}).get("value")
            low, high = expected.get("low", expected["value"]), expected.get("high", expected["value"])
            slack = 1e-6 * max(1.0, abs(expected["value"]))
            agrees = found is not None and low - slack <= found <= high + slack
            differing += not agrees
            shown = "missing" if found is None else f"{found:.4g}"
            verdict = "agrees " if agrees else "DIFFERS"
            print(f"{verdict} {notebook.stem} {key}: {shown}, reference {expected['value']:.4g} [{low:.4g}, {high:.4g}]")
    print(f"{differing} of the headline numbers differ from the reference" if differing else "every headline number agrees")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
