"""Execute notebooks with papermill, each in a process of its own; skip those that stand as they would be measured now.

The program is `analysis/run.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import nbformat
import papermill
import torch
from jupyter_client.kernelspec import KernelSpecManager
from threadpoolctl import threadpool_limits

from dyrate.atomic import write_whole
from dyrate.cost import shape_of
from dyrate.models import read_config
from study import kernels, planning
from study.bench.machine import name_of_device, probe
from study.examples import examples
from study.lock import locked
from study.profiles import PROVENANCE, ROOT, Plan, defaults, drawn, planned, predictors_of, read_plan, reads, rows_of
from study.provenance import fingerprint, provenance, recorded, trained_here

BAD_INPUT = (ValueError, FileNotFoundError, ImportError)
LONG = 20 * 60  # seconds of work that are asked for first
CORES = os.cpu_count() or 1


def main(argv: list[str] | None = None, description: str | None = None) -> int:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="pocket", help="a name in analysis/params, or a YAML file")
    parser.add_argument("--only", nargs="+", default=[], help="numbers of chapters, such as 01")
    parser.add_argument("--force", action="store_true", help="run also what is up to date")
    parser.add_argument("--draw", action="store_true", help="measure nothing: draw from the rows of the profile's last run")
    parser.add_argument("--check", action="store_true", help="measure anew elsewhere and compare with the committed results")
    parser.add_argument("--reference", type=Path, help="results to compare with (default: the profile's in data/results)")
    parser.add_argument("--jobs", type=int, metavar="N", help="chapters at a time (default: one; of pocket on a CPU two)")
    parser.add_argument("--yes", action="store_true", help="begin long work without asking")
    given = parser.parse_args(argv)
    if given.draw and given.check:
        parser.error("--check measures, --draw does not: give one of them")
    try:
        name, plan = read_plan(given.profile, given.only)
        plan = drawn(name, plan) if given.draw else plan
        reference = (given.reference or ROOT / "data" / "results" / name).resolve()
        os.chdir(ROOT)  # what parameters name is relative to the repository
        check_kernel()
        lock = locked(name, f"runs the profile {name}")  # noqa: F841  (held until this returns)
        profile = f"check-{name}" if given.check else name
        if given.check:
            check_references(plan, reference)
            plan = elsewhere(plan, Path("build") / "check" / name)
        todo = to_run(plan, profile, given.force or given.check)
        expected = before(todo)
    except BAD_INPUT as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if sum(expected.values()) > LONG and not given.yes:
        print(f"about {spoken(sum(expected.values()))} on this {name_of_device()}; continue with --yes")
        return 3
    try:
        jobs = max(1, given.jobs or default_jobs(todo))
        with kernels.forked() if given.draw and todo else nullcontext(), TemporaryDirectory(prefix="kernels-") as sockets:
            failed = run(todo, profile, jobs, given.force or given.check, expected, sockets)
    except KeyboardInterrupt:
        print("\ninterrupted: finished chapters and finished answers are kept", file=sys.stderr)
        return 130
    if given.check and not failed:
        return compare(plan, profile, reference)
    return 1 if failed else 0


# -- what is to be run -----------------------------------------------------------------------------------------------------


def check_kernel() -> None:
    """The notebooks must run in this interpreter, not in a kernel that some other installation left behind."""
    command = Path(KernelSpecManager().get_kernel_spec("python3").argv[0])
    if command.is_absolute() and not command.samefile(sys.executable):
        raise ValueError(
            f"the Jupyter kernel 'python3' starts {command}, not {sys.executable}: unset JUPYTER_PATH or remove that kernel "
            "with `jupyter kernelspec remove python3`"
        )


def to_run(plan: Plan, profile: str, force: bool) -> Plan:
    """The chapters that do not stand as they would be measured now; of each it says so, or what has changed."""
    found: Plan = []
    for notebook, values in plan:
        waits = reads(notebook, values, planned(found))  # for chapter 2, after which `run` looks again
        changed = [] if waits else changes(notebook, profile, values)
        if not (waits or changed or force):
            print(f"{notebook.stem}: up to date", flush=True)
            continue
        if changed and not force and where(notebook, profile, values)[0].exists():
            print(f"{notebook.stem}: changed since it was measured: {', '.join(changed)}", flush=True)
        found.append((notebook, values))
    return found


def elsewhere(plan: Plan, folder: Path) -> Plan:
    """The plan with results, stored answers and the predictors that chapter 2 trains in a folder of their own, now empty."""
    shutil.rmtree(ROOT / folder, ignore_errors=True)
    moved = []
    for notebook, values in plan:
        text = json.dumps({**defaults(notebook), **values})
        for trained in planned(plan):
            text = re.sub(rf'"{re.escape(trained)}(?=[/"])', f'"{folder}/predictors', text)
        values = json.loads(text) | {"results": f"{folder}/results"}
        moved.append((notebook, values | ({"store": f"{folder}/answers"} if "store" in values else {})))
    return moved


# -- what would stop it, and how long it takes -----------------------------------------------------------------------------


def before(plan: Plan) -> dict[str, float]:
    """Look for what would stop the work later, and print how long it takes: seconds by chapter. Nothing of that for pocket.

    Raises what is wrong: a checkpoint, data, predictors or a package that is missing, no GPU, or too little memory.
    """
    predictors = {notebook: predictors_of(notebook, values, planned(plan)) for notebook, values in plan}
    plan = [(n, v) for n, v in plan if v.get("model", "pocket") != "pocket" and not v.get("draw")]
    if not plan:
        return {}
    machine = probe()
    speeds = f"{machine.macs_per_second:.3g} multiply-accumulates and {machine.bytes_per_second:.3g} bytes a second"
    print(f"{machine.name}, measured: {speeds}, {1e3 * machine.seconds_per_layer:.2g} ms of Python a layer")
    found = {}
    for notebook, values in plan:
        values = {**defaults(notebook), **values}
        shape = shape_of(SimpleNamespace(config=read_config(values["model"])))
        examples(values["source"], 1, tasks=values.get("tasks") or [values["task"]])
        work = planning.work(notebook.stem, values, [folder.name for folder in predictors[notebook]])
        spread = machine if not values["device_map"] else replace(machine, memory=machine.memory * torch.cuda.device_count())
        planning.check_fits(work, shape, spread, values["model"])
        found[notebook.stem] = planning.seconds(work, shape, machine)
        print(f"{notebook.stem}: about {spoken(found[notebook.stem])}", flush=True)
    return found


def spoken(seconds: float) -> str:
    """Hours and minutes: "3 h 40", "12 min"."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60:02}" if minutes >= 60 else f"{minutes} min"


def default_jobs(plan: Plan) -> int:
    """Chapters at a time: two where the pocket model runs on a CPU, which it does not fill."""
    alone = torch.cuda.is_available() or any(values.get("model", "pocket") != "pocket" for _, values in plan)
    return 1 if alone else min(2, CORES)


# -- running ---------------------------------------------------------------------------------------------------------------


@dataclass
class Running:
    """A chapter at work. state: its fingerprint; begun: by `time.monotonic`."""

    notebook: Path
    profile: str
    values: dict
    state: dict[str, str]
    begun: float
    process: multiprocessing.Process


def where(notebook: Path, profile: str, values: dict) -> tuple[Path, Path]:
    """The executed notebook, and the file of its headline numbers."""
    results = values.get("results", f"data/results/{profile}")
    return ROOT / "build" / "analysis" / profile / notebook.name, ROOT / results / f"{notebook.stem}.json"


def made_from(executed: Path) -> Path:
    """The file beside an executed notebook with what it was made from: its results may be another run's, that came with git."""
    return executed.with_suffix(".made.json")


def changes(notebook: Path, profile: str, values: dict) -> list[str]:
    """Which conditions differ from those under which the chapter was last measured."""
    executed, headline = where(notebook, profile, values)
    state = fingerprint(notebook, values)
    written = [made_from(executed)] if values.get("draw") else [made_from(executed), headline]
    known = [recorded(path).get("inputs", {}) if executed.exists() else {} for path in written]
    return [name for name, value in state.items() if any(value != inputs.get(name) for inputs in known)]


def recorded_seconds(notebook: Path, values: dict, profile: str) -> float:
    """How long a chapter took when it was last run; of a profile that never ran, in the reference run."""
    reference = ROOT / "data" / "results" / "pocket-full" / f"{notebook.stem}.json"
    return (recorded(where(notebook, profile, values)[1]) or recorded(reference)).get("seconds", 0.0)


def run(todo: Plan, profile: str, jobs: int, force: bool, expected: dict[str, float], sockets: str) -> list[str]:
    """Execute chapters, `jobs` at a time, the longest first; returns those that failed. The others are run to their end.

    sockets: a folder for files through which kernels are reached.
    """
    coming, failed, running = planned(todo), [], {}
    late = [notebook for notebook, values in todo if reads(notebook, values, coming)]
    waiting = sorted(todo, key=lambda chapter: (chapter[0] in late, -recorded_seconds(*chapter, profile)))
    try:
        while waiting or running:
            ready = [chapter for chapter in waiting if not reads(*chapter, coming)]
            for notebook, values in ready[: jobs - len(running)]:
                waiting.remove((notebook, values))
                if notebook in late and not force and not changes(notebook, profile, values):
                    print(f"{notebook.stem}: up to date", flush=True)
                    continue
                chapter = start(notebook, profile, values, jobs, sockets)
                running[chapter.process.sentinel] = chapter
            for chapter in [running.pop(sentinel) for sentinel in wait(list(running))] if running else []:
                stem = chapter.notebook.stem
                if not finish(chapter, jobs, expected.get(stem)):
                    failed.append(stem)
                if stem.startswith("02"):
                    lost = [c for c in waiting if stem in failed and reads(*c, coming)]
                    for notebook, _ in lost:
                        print(f"error: {notebook.stem} needs the predictors that {stem} trains: not run", file=sys.stderr)
                    waiting, coming = [c for c in waiting if c not in lost], {}
                    failed += [notebook.stem for notebook, _ in lost]
    finally:
        for chapter in running.values():
            chapter.process.kill()
            chapter.process.join()
    return failed


def start(notebook: Path, profile: str, values: dict, jobs: int, sockets: str) -> Running:
    """Begin to execute a notebook into build/analysis/<profile>, with its part of the cores."""
    executed, headline = where(notebook, profile, values)
    executed.with_suffix(".failed.ipynb").unlink(missing_ok=True)
    executed.parent.mkdir(parents=True, exist_ok=True)
    state = fingerprint(notebook, values)
    results = os.path.relpath(headline.parent, ROOT)
    threads = max(1, CORES // jobs)
    parameters, socket = {**values, "results": results}, f"{sockets}/{notebook.stem}"
    arguments = (notebook, executed.with_suffix(".part.ipynb"), parameters, socket, threads, jobs == 1)
    print(f"{notebook.stem}: running with profile {profile}", flush=True)
    process = multiprocessing.Process(target=execute, args=arguments, daemon=True)
    process.start()
    return Running(notebook, profile, values, state, time.monotonic(), process)


def execute(notebook: Path, part: Path, parameters: dict, socket: str, threads: int, progress: bool) -> None:
    """In a process of its own: ends with exit code 1 if a cell failed, and says which."""
    os.setsid()  # Ctrl-C reaches the runner alone, with which this process ends, and with this process its kernel
    runner = multiprocessing.parent_process()
    threading.Thread(target=lambda: (wait([runner.sentinel]), os._exit(1)), daemon=True).start()
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of a kernel that starts anew
    threadpool_limits(threads)  # of one that is forked
    try:
        papermill.execute_notebook(
            str(notebook), str(part), parameters, kernel_name="python3", cwd=str(ROOT), progress_bar=progress,
            extra_arguments=["--log-level=CRITICAL"],  # of the kernel, which else warns when the runner was killed
            config=kernels.reached_through(socket),
        )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        print(f"error: cell {error.cell_index} of {notebook.name} failed: {error.ename}: {error.evalue}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        print(f"error: {notebook.name}: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


def finish(chapter: Running, jobs: int, expected: float | None = None) -> bool:
    """Record where the numbers come from and put the executed notebook in its place; False if a cell failed.

    expected: seconds, to compare with.
    """
    chapter.process.join()
    seconds, notebook = time.monotonic() - chapter.begun, chapter.notebook
    executed, headline = where(notebook, chapter.profile, chapter.values)
    part = executed.with_suffix(".part.ipynb")
    for warning in warned(part):
        print(f"{notebook.stem}: {warning}", file=sys.stderr)
    if chapter.process.exitcode == 0 and recorded(headline):  # what the last run left
        print(f"error: {notebook.name} does not close its chapter", file=sys.stderr)
    elif chapter.process.exitcode == 0:
        content, rows = json.loads(headline.read_text()), rows_of(headline.parent, notebook.stem)
        state = chapter.state
        if chapter.values.get("draw"):
            content |= {"provenance": json.loads((rows / PROVENANCE).read_text()), "drawn": True}
        else:
            state = state | trained_here(notebook, chapter.values)
            content["provenance"] = provenance(chapter.profile, chapter.values, state, seconds, jobs)
            if rows.exists():
                write_whole(rows / PROVENANCE, json.dumps(content["provenance"], indent=1) + "\n")
        write_whole(headline, json.dumps(content, indent=1) + "\n")
        part.replace(executed)
        write_whole(made_from(executed), json.dumps({"provenance": {"inputs": state}}) + "\n")
        estimate = f", {expected:.0f} s were estimated" if expected is not None else ""
        print(f"{notebook.stem}: done in {seconds:.1f} s{estimate}", flush=True)
        return True
    if part.exists():
        failed = part.replace(executed.with_suffix(".failed.ipynb"))
        print(f"{notebook.stem}: the notebook as it stood: {failed.relative_to(ROOT)}", file=sys.stderr)
    return False


def warned(executed: Path) -> list[str]:
    """The warnings in a notebook's outputs, in the form that `study.book.Chapter` gives them."""
    cells = nbformat.read(executed, 4).cells if executed.exists() else []
    lines = [line for cell in cells for output in cell.get("outputs", []) for line in output.get("text", "").splitlines()]
    return list(dict.fromkeys(line for line in lines if line.startswith("warning: ")))


# -- comparing with a reference --------------------------------------------------------------------------------------------


def check_references(plan: Plan, reference: Path) -> None:
    """Raises FileNotFoundError if a chapter has no results to compare with."""
    for notebook, _ in plan:
        if not (reference / f"{notebook.stem}.json").exists():
            raise FileNotFoundError(f"no reference {os.path.relpath(reference / notebook.stem, ROOT)}.json")


def compare(plan: Plan, profile: str, reference: Path) -> int:
    """Print each headline number beside the reference and its interval; returns 1 if one lies outside, else 0."""
    differing = 0
    for notebook, values in plan:
        measured = json.loads(where(notebook, profile, values)[1].read_text())["numbers"]
        for key, expected in json.loads((reference / f"{notebook.stem}.json").read_text())["numbers"].items():
            value, found = expected["value"], measured.get(key, {}).get("value")
            low, high = expected.get("low", value), expected.get("high", value)
            agrees = found is not None and lies_between(found, low, high, 1e-6 * max(1.0, abs(value)))
            differing += not agrees
            shown = "missing" if found is None else f"{found:.4g}"
            verdict = "agrees " if agrees else "DIFFERS"
            print(f"{verdict} {notebook.stem} {key}: {shown}, reference {value:.4g} [{low:.4g}, {high:.4g}]")
    print(f"{differing} of the headline numbers differ from the reference" if differing else "every headline number agrees")
    return 1 if differing else 0


def lies_between(found: float, low: float, high: float, slack: float) -> bool:
    """Whether a number lies in an interval, ends included; what is not defined (NaN) agrees with what is not."""
    return (math.isnan(found) and math.isnan(low)) or low - slack <= found <= high + slack
