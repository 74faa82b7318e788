"""A run that is interrupted, repeated or shared by processes ends with the same table, byte for byte."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import dyrate
from dyrate import evaluate, metrics
from dyrate.atomic import append_lines, write_whole

TASKS = ["qa_colour", "caption"]
STRATEGIES = {"Full": dyrate.Full(), "FastV .5": dyrate.FastV(rate=0.5), "random .5": dyrate.RandomPrune(rate=0.5)}


@pytest.fixture(scope="module")
def pocket():
    return dyrate.load("pocket")


def table(pocket, store, strategies=STRATEGIES, n=6):
    examples = study.examples.examples("pocket", n, tasks=TASKS)
    found = evaluate.run(*pocket, strategies, examples, store, max_new_tokens=24, batch_size=4, progress=False)
    return found.to_csv(index=False)


def test_an_interrupted_run_ends_with_the_same_table(pocket, tmp_path, monkeypatch):
    whole = table(pocket, tmp_path / "whole")
    measure, calls = evaluate._measure, []

    def stops(*arguments):
        calls.append(arguments)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(evaluate, "_measure", stops)
    with pytest.raises(KeyboardInterrupt):
        table(pocket, tmp_path / "cut")
    (part,) = (tmp_path / "cut").glob("*/part-*.jsonl")
    with part.open("ab") as file:
        file.write(b'{"strategy": "half a li')  # as a kill in the middle of writing leaves it
    assert table(pocket, tmp_path / "cut") == whole
    assert len(calls) == 6 + 12 - 5  # finished batches were not repeated
    assert table(pocket, tmp_path / "cut") == whole and len(calls) == 13
    assert all(json.loads(line) for line in part.read_text().splitlines())


def test_another_setting_is_another_measurement(pocket, tmp_path):
    a = table(pocket, tmp_path, {"x": dyrate.FastV(rate=0.5)}, 2)
    b = table(pocket, tmp_path, {"x": dyrate.FastV(rate=0.9)}, 2)
    assert a != b and len(list(tmp_path.iterdir())) == 2


def test_two_processes_share_the_work(pocket, tmp_path):
    one = table(pocket, tmp_path / "one", {"Full": dyrate.Full(), "FastV": dyrate.FastV()}, 4)
    script = tmp_path / "shared.py"
    script.write_text(f"""
import dyrate
from dyrate import evaluate, metrics
examples = study.examples.examples("pocket", 4, tasks={TASKS})
strategies = {{"Full": dyrate.Full(), "FastV": dyrate.FastV()}}
found = evaluate.run(*dyrate.load("pocket"), strategies, examples, "{tmp_path}/two", max_new_tokens=24, batch_size=4)
open(f"{tmp_path}/table-" + __import__("os").environ["RANK"], "w").write(found.to_csv(index=False))
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "two").glob("*/part-*.jsonl"))) == 2
    assert (tmp_path / "table-0").read_text() == (tmp_path / "table-1").read_text() == one


def test_a_lost_process_costs_only_its_unfinished_batch(pocket, tmp_path, monkeypatch):
    """One of two processes is killed in the middle; a single one goes on, and measures only what is missing."""
    one = table(pocket, tmp_path / "one", n=4)
    script = tmp_path / "shared.py"
    script.write_text(f"""
import os, signal, sys
sys.path.insert(0, "{Path(__file__).parent}")
import dyrate, test_evaluate
from dyrate import evaluate
measure, calls = evaluate._measure, []
def dies(*arguments):
    calls.append(arguments)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(*arguments)
evaluate._measure = dies
test_evaluate.table(dyrate.load("pocket"), "{tmp_path}/two", n=4)
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    assert subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300).returncode != 0
    stored = {path.name: path.read_text().count("\n") for path in (tmp_path / "two").glob("*/part-*.jsonl")}
    assert stored["part-001-of-002.jsonl"] == 4  # its first batch
    measure, calls = evaluate._measure, []
    monkeypatch.setattr(evaluate, "_measure", lambda *arguments: calls.append(arguments) or measure(*arguments))
    assert table(pocket, tmp_path / "two", n=4) == one
    assert 4 * len(calls) == len(STRATEGIES) * len(TASKS) * 4 - sum(stored.values())


def test_processes_that_disagree_stop(pocket, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "gather_object", lambda names: [*names, "another"])
    with pytest.raises(RuntimeError, match="disagree on what to measure"):
        table(pocket, tmp_path, n=1)


def test_scores_and_differences(pocket, tmp_path):
    examples = study.examples.examples("pocket", 4, tasks=["description", "qa_colour", "caption"])
    found = evaluate.run(*pocket, {"Full": dyrate.Full(), "blind": dyrate.VTW(first_pruned_layer=1)}, examples, tmp_path,
                         max_new_tokens=60, batch_size=4, progress=False)  # fmt: skip
    scored = evaluate.scored(found, examples)
    assert scored.score.notna().all() and scored.invented.notna().sum() > 0
    alone = evaluate.scored(found[found.strategy == "blind"], examples)
    assert alone.score.tolist() == pytest.approx(scored[scored.strategy == "blind"].score.tolist())
    summary = evaluate.compare(scored).set_index(["strategy", "task"])
    full, blind = summary.loc["Full"], summary.loc["blind"]
    assert (full.difference_value == 0).all() and (full.macs_share == 1).all()
    assert (blind.macs_share < 0.6).all() and blind.loc["description", "difference_value"] < -0.1
    assert (blind.kv_share < 0.6).all() and blind.loc["description", "invented"] > full.loc["description", "invented"]


def test_scores_are_right_for_right_answers():
    examples = study.examples.examples("pocket", 3, tasks=["description", "qa_place"])
    rows = [{"strategy": "x", "sample": e.name, "task": e.task, "answer": e.references[0]} for e in examples]
    scored = evaluate.scored(pd.DataFrame(rows), examples)
    assert (scored.score == 1).all() and (scored[scored.task == "description"].invented == 0).all()


def test_files_are_whole_or_absent(tmp_path):
    path = tmp_path / "sub" / "a.txt"
    write_whole(path, "one")

    def fails(part):
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fails)
    assert path.read_text() == "one"
    append_lines(tmp_path / "b", ["x", "y"])
    with (tmp_path / "b").open("a") as file:
        file.write("z")
    append_lines(tmp_path / "b", ["w"])
    assert (tmp_path / "b").read_text() == "x\ny\nw\n"


def test_caption_measures_by_hand():
    examples = study.examples.examples("pocket", 3, tasks=["caption"])
    said = {"right": lambda e: e.references[0], "wrong": lambda e: "zebra", "half": lambda e: f"{e.references[0]} and no zebra"}
    rows = [
        {"strategy": name, "sample": e.name, "task": "caption", "answer": say(e)} for name, say in said.items() for e in examples
    ]
    found = evaluate.caption_measures(evaluate.scored(pd.DataFrame(rows), examples), examples).set_index("strategy")
    assert (found.loc["right", ["BLEU-4", "ROUGE-L", "METEOR"]] > 0.9).all() and found.loc["right", "CIDEr"] > 1
    assert (found.loc["wrong"] < 0.1).all()
    for (
        name,
        say,
    ) in said.items():  # among others, but scored as if alone: unseen words too
        alone = metrics.cider([say(e) for e in examples], [e.references for e in examples])
        assert found.loc[name, "CIDEr"] == pytest.approx(alone.mean())
