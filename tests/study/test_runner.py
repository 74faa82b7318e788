"""The runner on a small study of its own: what runs when, what is told of failures, what counts as changed."""

import ast
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook

from study import lock, profiles, provenance, runner
from study.provenance import fingerprint

CHAPTERS = {  # parameters, and what is done before the numbers are written
    "01_sleeps": (
        "seconds = 1.0\nfails = False\ndraw = False",
        "time.sleep(seconds)\nif fails:\n    raise OverflowError('on purpose')\n"
        "rows = Path(results, 'rows', name, 'about.json')\nif not draw:\n    rows.parent.mkdir(parents=True, exist_ok=True)\n"
        "    rows.write_text('5')\nvalue = int(rows.read_text())",
    ),
    "02_trains": (
        'residency = "evict"\nbudgets = [0.33]\nseeds = 1\npredictors = "build/predictors"\nfails = False\nseconds = 1.0',
        "time.sleep(seconds)\nassert not fails\nfolder = Path(predictors) / 'evict-0.33'\n"
        "folder.mkdir(parents=True, exist_ok=True)\n(folder / 'model.safetensors').write_text('weights')",
    ),
    "03_reads": (
        'predictors = "build/predictors"\npatterns = ["evict-*"]\nstore = "build/answers"',
        "weights = (Path(predictors) / 'evict-0.33' / 'model.safetensors').read_text()\n"
        "stored = Path(store) / 'answer'\nstored.parent.mkdir(parents=True, exist_ok=True)\n"
        "if not stored.exists():\n    stored.write_text('7')\nvalue = int(stored.read_text())",
    ),
    "04_sleeps": ("seconds = 1.0", "time.sleep(seconds)"),
}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A repository with four short chapters, in which the runner works."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for folder in ("dyrate", "analysis/study", "analysis/params", "data/reported", "data/results"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("dyrate/engine.py", "analysis/study/slider.html", "analysis/study/study.mplstyle", "data/reported/table.csv"):
        (tmp_path / file).write_text("one")
    for name, (parameters, code) in CHAPTERS.items():
        head = f'import json, os, time\nfrom pathlib import Path\nname, value, begun = "{name}", 1, time.time()\n'
        tail = (
            'about = {"begun": begun, "ended": time.time(), "threads": os.environ["OMP_NUM_THREADS"], "pid": os.getpid()}\n'
            'content = {"numbers": {"found": {"value": value}}, "about": about}\n'
            "Path(results).mkdir(parents=True, exist_ok=True)\n"
            'Path(results, name + ".json").write_text(json.dumps(content))'
        )
        cells = [new_code_cell(f'{parameters}\nresults = "data/results/tiny"', metadata={"tags": ["parameters"]})]
        cells += [new_code_cell(f"{head}{code}\n{tail}")]
        metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(new_notebook(cells=cells, metadata=metadata), tmp_path / "analysis" / f"{name}.ipynb")
    (tmp_path / "analysis" / "params" / "tiny.yaml").write_text(yaml.safe_dump({name: {} for name in CHAPTERS}))
    for module in (profiles, provenance, runner, lock):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(profiles, "NOTEBOOKS", sorted((tmp_path / "analysis").glob("*.ipynb")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(study, name, results="data/results/tiny"):
    return json.loads((study / results / f"{name}.json").read_text())


def parameters(study, **sections):
    """Write the profile anew: sections by the first two digits of the notebook's name."""
    content = {name: sections.get(f"c{name[:2]}", {}) for name in CHAPTERS}
    (study / "analysis" / "params" / "tiny.yaml").write_text(yaml.safe_dump(content))


def test_two_jobs_run_at_once_and_in_order(study, capfd):
    parameters(study, c02={"seconds": 5.0})  # so that the others, but for what reads its predictors, end before
    assert runner.main(["--profile", "tiny", "--jobs", "2"]) == 0
    about = {name: found(study, name)["about"] for name in CHAPTERS}
    assert about["03_reads"]["begun"] > about["02_trains"]["ended"]
    spans = sorted((a["begun"], a["ended"]) for a in about.values())
    assert spans[1][0] < spans[0][1]  # the first two overlap
    open_at = [sum(a["begun"] <= b["begun"] < a["ended"] for a in about.values()) for b in about.values()]
    assert max(open_at) == 2
    assert {a["threads"] for a in about.values()} == {str(max(1, os.cpu_count() // 2))}
    for name in CHAPTERS:
        assert found(study, name)["provenance"]["jobs"] == 2 and found(study, name)["provenance"]["seconds"] >= 0.1
    out, err = capfd.readouterr()
    assert all(line[:2].isdigit() for line in out.splitlines()) and err == ""  # every line names its chapter; no bars


def test_one_job_has_all_cores_and_a_progress_bar(study, capfd):
    assert runner.main(["--profile", "tiny", "--jobs", "1", "--only", "01", "04"]) == 0
    one, other = (found(study, name)["about"] for name in ("01_sleeps", "04_sleeps"))
    assert one["ended"] < other["begun"] or other["ended"] < one["begun"]
    assert one["threads"] == str(os.cpu_count())
    assert "Executing: 100%" in capfd.readouterr().err


def test_the_longest_is_first(study, monkeypatch):
    begun, seconds = [], {"01": 1.0, "02": 5.0, "03": 8.0, "04": 9.0}
    monkeypatch.setattr(runner, "recorded_seconds", lambda notebook, values, profile: seconds[notebook.stem[:2]])
    start = runner.start
    monkeypatch.setattr(runner, "start", lambda notebook, *rest: begun.append(notebook.stem[:2]) or start(notebook, *rest))
    assert runner.main(["--profile", "tiny", "--jobs", "1"]) == 0
    assert begun == ["04", "02", "01", "03"]


def test_a_failure_is_named_and_the_others_finish(study, capfd):
    parameters(study, c01={"fails": True}, c02={"fails": True})
    assert runner.main(["--profile", "tiny", "--jobs", "2"]) == 1
    err = capfd.readouterr().err
    assert "error: cell 2 of 01_sleeps.ipynb failed: OverflowError: on purpose" in err
    assert "cell 2 of 02_trains.ipynb failed: AssertionError" in err
    assert "error: 03_reads needs the predictors that 02_trains trains: not run" in err and "Traceback" not in err
    executed = sorted(path.name for path in (study / "build" / "analysis" / "tiny").glob("*.ipynb"))
    assert executed == ["01_sleeps.failed.ipynb", "02_trains.failed.ipynb", "04_sleeps.ipynb"]
    assert found(study, "04_sleeps")["provenance"]
    parameters(study)
    assert runner.main(["--profile", "tiny", "--jobs", "2"]) == 0  # what failed and what waited; not what is up to date
    out = capfd.readouterr().out
    assert "04_sleeps: up to date" in out and "03_reads: done" in out
    assert not list((study / "build" / "analysis" / "tiny").glob("*.failed.ipynb"))


def test_a_chapter_that_does_not_close_is_not_taken_for_its_last_run(study, capfd):
    assert runner.main(["--profile", "tiny", "--only", "01"]) == 0
    path = study / "analysis" / "01_sleeps.ipynb"
    path.write_text(path.read_text().replace("Path(results", "Path('elsewhere'"))
    assert runner.main(["--profile", "tiny", "--only", "01"]) == 1
    assert "01_sleeps.ipynb does not close its chapter" in capfd.readouterr().err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_an_interrupt_ends_quietly_and_keeps_what_is_finished(study, how):
    """Ctrl-C reaches the runner and all that it started, kill -9 the runner alone: the kernels end too."""
    parameters(study, c01={"seconds": 60.0}, c04={"seconds": 0.0})
    path = study / "analysis" / "01_sleeps.ipynb"
    path.write_text(path.read_text().replace("time.sleep(", "Path('pid').write_text(str(os.getpid())); time.sleep("))
    script = study / "build" / "script.py"
    script.parent.mkdir()
    script.write_text(textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from study import lock, profiles, provenance, runner
        for module in (profiles, provenance, runner, lock):
            module.ROOT = Path("{study}")
        profiles.NOTEBOOKS = sorted((profiles.ROOT / "analysis").glob("*.ipynb"))
        sys.exit(runner.main(["--profile", "tiny", "--only", "01", "04", "--jobs", "2"]))
    """))
    run = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True, process_group=0)
    headline = study / "data" / "results" / "tiny" / "04_sleeps.json"
    deadline = time.time() + 90
    while not ((study / "pid").exists() and headline.exists() and "provenance" in headline.read_text()):
        assert time.time() < deadline and run.poll() is None
        time.sleep(0.1)
    kernel = psutil.Process(int((study / "pid").read_text()))
    (chapter,) = psutil.Process(run.pid).children()
    assert os.getsid(chapter.pid) != os.getsid(run.pid)  # Ctrl-C must not reach it, whatever it is doing
    if how == signal.SIGINT:
        os.killpg(run.pid, how)
    else:
        run.kill()
    _, err = run.communicate(timeout=30)
    assert "Traceback" not in err, err
    if how == signal.SIGINT:
        assert run.returncode == 130 and err.strip() == "interrupted: finished chapters and finished answers are kept"
    assert psutil.wait_procs([kernel], timeout=10)[1] == []
    assert (study / "build" / "analysis" / "tiny" / "04_sleeps.ipynb").exists()
    assert not (study / "build" / "analysis" / "tiny" / "01_sleeps.ipynb").exists()
    runner.locked("tiny", "runs the profile tiny").close()


def test_two_runs_of_a_profile_do_not_meet(study, capfd):
    held = runner.locked("tiny", "runs the profile tiny")
    assert runner.main(["--profile", "tiny", "--only", "01"]) == 2
    assert f"process {os.getpid()} runs the profile tiny in this checkout" in capfd.readouterr().err
    runner.locked("another", "runs the profile another").close()
    held.close()
    dead = subprocess.Popen(["true"])
    dead.wait()
    (study / "build" / "tiny.lock").write_text(str(dead.pid))  # as a process that was killed leaves it
    taken = runner.locked("tiny", "runs the profile tiny")
    assert (study / "build" / "tiny.lock").read_text() == str(os.getpid())
    taken.close()


def test_what_has_changed_is_measured_anew(study, capfd):
    assert runner.main(["--profile", "tiny", "--jobs", "2"]) == 0
    capfd.readouterr()
    assert runner.main(["--profile", "tiny"]) == 0
    assert capfd.readouterr().out.splitlines() == [f"{name}: up to date" for name in CHAPTERS]
    (study / "build" / "predictors" / "evict-0.33" / "model.safetensors").write_text("altered")
    assert runner.main(["--profile", "tiny"]) == 0
    out = capfd.readouterr().out
    assert "03_reads: changed since it was measured: predictors" in out and out.count("up to date") == 3
    parameters(study, c02={"budgets": [0.33, 0.5]})
    assert runner.main(["--profile", "tiny"]) == 0  # trained anew, as it was first
    out = capfd.readouterr().out
    assert "02_trains: changed since it was measured: parameters" in out and "03_reads: done" in out


def test_results_that_came_with_git_do_not_make_an_older_notebook_new(study, capfd):
    assert runner.main(["--profile", "tiny", "--only", "04"]) == 0
    made = study / "build" / "analysis" / "tiny" / "04_sleeps.made.json"
    made.write_text(made.read_text().replace('"code": "', '"code": "older '))  # the results beside it are of the code of today
    capfd.readouterr()
    assert runner.main(["--profile", "tiny", "--only", "04"]) == 0
    assert "04_sleeps: changed since it was measured: code" in capfd.readouterr().out


def test_the_fingerprint_covers_contents(study, monkeypatch):
    """Each thing changes its own part, also where size and date stay as they were."""
    weights = study / "build" / "predictors" / "evict-0.33" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_text("one")
    notebook = study / "analysis" / "03_reads.ipynb"

    def state(values=None):
        return fingerprint(notebook, values or {})

    before = state()
    assert state() == before
    for path, part in {
        "dyrate/engine.py": "code", "analysis/study/slider.html": "code", "analysis/study/study.mplstyle": "code",
        "data/reported/table.csv": "reported tables", "build/predictors/evict-0.33/model.safetensors": "predictors",
    }.items():  # fmt: skip
        about, text = (study / path).stat(), (study / path).read_text()
        (study / path).write_text("two")
        os.utime(study / path, ns=(about.st_atime_ns, about.st_mtime_ns))
        assert [name for name, value in state().items() if value != before[name]] == [part], path
        (study / path).write_text(text)
    assert state() == before
    (study / "dyrate" / "new.py").write_text("")
    assert state()["code"] != before["code"]
    (study / "dyrate" / "new.py").unlink()
    assert state({"store": "elsewhere"})["parameters"] != before["parameters"]
    text = notebook.read_text()
    notebook.write_text(text.replace("weights", "values"))
    assert state()["notebook"] != before["notebook"]
    notebook.write_text(text)
    version = importlib.metadata.version
    for package in ("torch", "transformers"):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.metadata, "version", lambda name: "2.99" if name == package else version(name))
            assert [name for name, value in state().items() if value != before[name]] == ["packages"]


def named(study, name, text):
    """A notebook with these parameters."""
    cell = new_code_cell(f'{text}\nresults = "data/results/tiny"', metadata={"tags": ["parameters"]})
    path = study / "analysis" / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=[cell]), path)
    return path


@pytest.mark.parametrize(("parameter", "part", "file"), [
    ('model = "my/models/here"', "model", "my/models/here/config.json"),
    ('source = "photographs"', "source", "photographs/below/1.jpg"),
    ('lmms_results = "lmms"', "lmms_results", "lmms/2026/results.json"),
    ('bench = "data/bench.json"', "bench", "data/bench.json"),
    ('reference = "data/results"', "reference rows", "data/results/plain/methods.csv.gz"),
    ('predictor = "trained/evict-0.33"', "predictors", "trained/evict-0.33/model.safetensors"),
    ('predictors = "trained"\nprefix = "evict-0.33"\nothers = {}', "predictors", "trained/evict-0.33-seed1/model.safetensors"),
    ('ablations = [{"predictor": "trained/evict-0.5"}]', "predictors", "trained/evict-0.5/config.json"),
])  # fmt: skip
def test_what_a_parameter_names_is_there_and_counts(study, parameter, part, file):
    notebook = named(study, "04_sleeps", parameter)
    with pytest.raises(FileNotFoundError, match=r"no such f|no predictor"):
        fingerprint(notebook, {})
    (study / file).parent.mkdir(parents=True, exist_ok=True)
    (study / file).write_text("one")
    before = fingerprint(notebook, {})
    (study / file).write_text("two")
    assert [name for name, value in fingerprint(notebook, {}).items() if value != before[name]] == [part]


def test_predictors_that_a_chapter_trains_once_count(study):
    """They are there only after the first run, and a chapter is up to date then."""
    notebook = named(study, "04_sleeps", 'trained = "build/ablations"')
    before = fingerprint(notebook, {})
    (study / "build" / "ablations" / "n-1234").mkdir(parents=True)
    (study / "build" / "ablations" / "n-1234" / "config.json").write_text("{}")
    after = fingerprint(notebook, {})
    assert [name for name in after if after[name] != before[name]] == ["trained"]
    assert before | provenance.trained_here(notebook, {}) == after


def test_checking_measures_anew(study, capfd):
    """An altered stored answer and altered trained predictors do not reach a check; an altered reference does."""
    assert runner.main(["--profile", "tiny", "--jobs", "2"]) == 0
    assert found(study, "03_reads")["numbers"]["found"]["value"] == 7
    (study / "build" / "answers" / "answer").write_text("8")
    (study / "build" / "predictors" / "evict-0.33" / "model.safetensors").write_text("altered")
    (study / "build" / "check" / "tiny" / "answers").mkdir(parents=True)
    (study / "build" / "check" / "tiny" / "answers" / "answer").write_text("9")  # of an earlier check
    before = {path: path.read_bytes() for path in (study / "data").rglob("*") if path.is_file()}
    assert runner.main(["--profile", "tiny", "--check", "--jobs", "2"]) == 0
    assert "agrees  03_reads found: 7, reference 7 [7, 7]" in capfd.readouterr().out
    assert (study / "build" / "check" / "tiny" / "predictors" / "evict-0.33" / "model.safetensors").read_text() == "weights"
    assert {path: path.read_bytes() for path in (study / "data").rglob("*") if path.is_file()} == before
    assert runner.main(["--profile", "tiny", "--force", "--only", "03"]) == 0  # the control: it does reach a plain run
    assert found(study, "03_reads")["numbers"]["found"]["value"] == 8
    capfd.readouterr()
    assert runner.main(["--profile", "tiny", "--check", "--only", "03"]) == 1  # so the results are now wrong
    assert "DIFFERS 03_reads found: 7, reference 8 [8, 8]" in capfd.readouterr().out
    assert runner.main(["--profile", "tiny", "--check", "--only", "03", "--reference", str(study)]) == 2
    assert "no reference 03_reads.json" in capfd.readouterr().err


def test_drawing_measures_nothing_and_keeps_where_the_rows_come_from(study, capfd):
    assert runner.main(["--profile", "tiny", "--only", "01", "--draw"]) == 2
    err = capfd.readouterr().err
    assert "01_sleeps has no rows in data/results/tiny to draw from: measure them with `python analysis/run.py" in err
    assert runner.main(["--profile", "tiny", "--only", "01"]) == 0
    measured = found(study, "01_sleeps")
    rows = study / "data" / "results" / "tiny" / "rows" / "01_sleeps" / "about.json"
    rows.write_text("6")
    assert runner.main(["--profile", "tiny", "--only", "01", "--draw"]) == 0
    drawn = found(study, "01_sleeps")
    assert drawn["numbers"]["found"]["value"] == 6 and drawn["provenance"] == measured["provenance"]
    capfd.readouterr()
    assert runner.main(["--profile", "tiny", "--only", "01", "--draw"]) == 0
    assert capfd.readouterr().out == "01_sleeps: up to date\n"
    rows.write_text("7")
    assert runner.main(["--profile", "tiny", "--only", "01", "--draw"]) == 0
    assert "01_sleeps: changed since it was measured: rows" in capfd.readouterr().out
    with pytest.raises(SystemExit):
        runner.main(["--profile", "tiny", "--draw", "--check"])


def test_the_programs_are_thin():
    """And say how they are used."""
    for name in ("run", "share"):
        text = (Path(__file__).resolve().parents[2] / "analysis" / f"{name}.py").read_text()
        assert f" analysis/{name}.py --profile" in ast.get_docstring(ast.parse(text)) and len(text.splitlines()) < 60
