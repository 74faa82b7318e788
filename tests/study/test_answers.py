"""A run that is interrupted, repeated or shared by processes ends with the same table, byte for byte, and nothing is reused
that would have been measured differently.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import dyrate
from dyrate.atomic import write_whole
from dyrate.data import Example, Examples
from dyrate.generation import answer_examples
from dyrate.models import POCKET
from dyrate.strategies import STRATEGIES
from study import answers
from study.answers import Condition, answer_all, described, weights_digest
from study.examples import examples

TASKS = ["qa_colour", "caption"]
CONDITIONS = [
    Condition("Full", dyrate.Full(), "Full"),
    Condition("FastV .5", dyrate.FastV(rate=0.5), "FastV", 0.5),
    Condition("random .5", dyrate.RandomPrune(rate=0.5), "RandomPrune", 0.5),
]
SETTINGS = {"max_new_tokens": 24, "batch_size": 4, "progress": False}


@pytest.fixture(scope="module")
def pocket():
    return dyrate.load("pocket")


@pytest.fixture
def calls(monkeypatch):
    """The batches that are measured, not read."""
    measure, found = answers._measure, []
    monkeypatch.setattr(answers, "_measure", lambda *arguments: found.append(arguments) or measure(*arguments))
    return found


def rows(pocket, store, conditions=CONDITIONS, n=6, tasks=TASKS, **settings):
    return answer_all(*pocket, conditions, examples("pocket", n, tasks=tasks), store, **SETTINGS | settings)


def table(*arguments, **settings):
    return rows(*arguments, **settings).to_csv(index=False)


def stored(store: Path) -> list[Path]:
    return sorted(store.glob("*/*.json"))


def test_the_columns(pocket, tmp_path):
    found = rows(pocket, tmp_path, n=2)
    assert list(found) == [
        "label", "method", "budget", "seed", "sample", "scene", "task", "answer", "tokens", "retention", "tower", "prefill",
        "decode", "lm_head", "selector", "kv_bytes", "kv_read_bytes", "macs",
    ]  # fmt: skip
    assert list(found.label.unique()) == ["Full", "FastV .5", "random .5"] and len(found) == 3 * 2 * 2
    assert found.budget.isna().tolist() == 4 * [True] + 8 * [False] and found.seed.isna().all()
    assert (found["sample"] == found.task + "-" + found.scene).all()
    assert (found[found.method == "Full"].retention == 1).all() and (found[found.budget == 0.5].retention == 0.5).all()


@pytest.mark.parametrize("beams", [1, 2])
def test_the_tower_runs_once_and_answers_stay_the_same(pocket, tmp_path, beams):
    """Under every strategy the answers are those of the library's own loop, which runs the tower for each."""
    model, processor = pocket
    asked = examples("pocket", 3, tasks=["qa_place", "caption"])
    tried = [cls.at(0.4, 8) for cls in STRATEGIES.values() if cls.compared]
    conditions = [Condition(type(s).__name__, s, type(s).__name__, settings={"num_beams": beams}) for s in tried]
    runs = []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    found = answer_all(*pocket, conditions, asked, tmp_path, max_new_tokens=5, batch_size=3, progress=False).set_index("label")
    handle.remove()
    assert len(runs) == 2 * (1 + sum("vision" in s.needs for s in tried))
    for strategy in tried:
        loop = answer_examples(model, processor, asked, strategy, batch_size=3, max_new_tokens=5, num_beams=beams)
        expected = [(text, float(r.mean())) for _, _, a in loop for text, r in zip(a.texts, a.retention(), strict=True)]
        rows = found.loc[type(strategy).__name__]
        assert list(zip(rows.answer, rows.retention, strict=True)) == expected


def test_an_interrupted_run_ends_with_the_same_table(pocket, tmp_path, monkeypatch):
    whole = table(pocket, tmp_path / "whole")
    measure, calls = answers._measure, []

    def stops(*arguments):
        calls.append(arguments)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(answers, "_measure", stops)
    with pytest.raises(KeyboardInterrupt):
        table(pocket, tmp_path / "cut")
    whole_files = stored(tmp_path / "cut")
    assert len(whole_files) == 5
    whole_files[0].with_name("half.json.1.part").write_text('[{"answer": "half a li')  # as a kill in the middle leaves it
    assert table(pocket, tmp_path / "cut") == whole
    assert len(calls) == 6 + 12 - 5  # finished batches were not repeated
    assert table(pocket, tmp_path / "cut") == whole and len(calls) == 13
    assert all(json.loads(path.read_text()) for path in stored(tmp_path / "cut"))


def test_another_setting_is_another_measurement(pocket, tmp_path, calls):
    fast = [Condition("x", dyrate.FastV(rate=0.5), "FastV")]
    a = table(pocket, tmp_path, fast, 2)
    assert table(pocket, tmp_path, fast, 2) == a and len(calls) == 2
    assert table(pocket, tmp_path, [Condition("x", dyrate.FastV(rate=0.9), "FastV")], 2) != a and len(calls) == 4
    assert table(pocket, tmp_path, fast, 2, max_new_tokens=3) != a and len(calls) == 6
    table(pocket, tmp_path, fast, 2, batch_size=1)  # padding may change the last digits
    assert len(calls) == 10 and len(stored(tmp_path)) == 10


def test_sampling_is_seeded_by_the_batch(pocket, tmp_path, calls):
    drawn = [Condition("x", dyrate.Full(), "Full", settings={"do_sample": True, "temperature": 2.0})]
    first = table(pocket, tmp_path / "a", drawn, 4)
    torch.manual_seed(5)
    assert table(pocket, tmp_path / "b", drawn, 4) == first and len(calls) == 4
    assert table(pocket, tmp_path / "b", drawn, 4, seed=1) != first and len(calls) == 6
    assert table(pocket, tmp_path / "b", drawn, 4) == first and len(calls) == 6


def test_equal_conditions_are_measured_once(pocket, tmp_path, calls):
    equal = [Condition("a", dyrate.FastV(rate=0.5), "FastV"), Condition("b", dyrate.FastV(rate=np.float64(0.5)), "FastV", seed=3)]
    found = rows(pocket, tmp_path, equal, 2)
    assert len(calls) == 2 and len(found) == 8
    one, other = (found[found.label == label].drop(columns=["label", "seed"]).to_csv(index=False) for label in "ab")
    assert one == other
    equal[1] = Condition("b", dyrate.MaxHead(rate=0.5), "MaxHead")  # the control: as many fields, another class
    rows(pocket, tmp_path, equal, 2)
    assert len(calls) == 4


def test_two_chapters_share_batches(pocket, tmp_path, calls):
    """A second run with further tasks, conditions and examples measures only what the first has not."""
    first = rows(pocket, tmp_path, CONDITIONS[:2], 4, ["caption"])
    assert len(calls) == 2
    second = rows(pocket, tmp_path, CONDITIONS, 6, ["qa_colour", "caption"])
    assert len(calls) == 2 + 3 * 4 - 2  # whole batches of captions under two conditions are there
    shared = second[second["sample"].isin(first["sample"]) & second.label.isin(first.label)]
    assert shared.to_csv(index=False) == first.to_csv(index=False)


def test_altered_weights_another_version_and_altered_code_are_measured_anew(pocket, tmp_path, calls, monkeypatch):
    one = CONDITIONS[:1]
    table(pocket, tmp_path, one, 2)
    table(dyrate.load("pocket"), tmp_path, one, 2)  # the control: the same weights, loaded again
    assert len(calls) == 2
    model, processor = dyrate.load("pocket")
    before = weights_digest(model)
    with torch.no_grad():
        next(model.model.vision_tower.parameters()).view(-1)[0] += 1e-3
    assert weights_digest(model) != before
    table((model, processor), tmp_path, one, 2)
    assert len(calls) == 4
    monkeypatch.setattr(answers, "version", lambda package: "2.99.0" if package == "torch" else "5.23.0")
    table(pocket, tmp_path, one, 2)
    assert len(calls) == 6
    monkeypatch.setattr(answers, "_code", lambda: "another line")
    table(pocket, tmp_path, one, 2)
    assert len(calls) == 8
    pocket[0].generation_config.repetition_penalty, kept = 1.2, pocket[0].generation_config.repetition_penalty
    table(pocket, tmp_path, one, 2)
    pocket[0].generation_config.repetition_penalty = kept
    assert len(calls) == 10


def test_the_code_that_decides_is_read_in_full(tmp_path, monkeypatch):
    copy = shutil.copytree(Path(dyrate.__file__).parent, tmp_path / "dyrate")
    here = answers._code()
    monkeypatch.setattr(dyrate, "__file__", str(copy / "__init__.py"))
    assert answers._code.__wrapped__() == here
    with (copy / "engine" / "cache.py").open("a") as file:
        file.write("# another line\n")
    assert answers._code.__wrapped__() != here
    (copy / "engine" / "pruning.py").unlink()
    with pytest.raises(FileNotFoundError, match="does not hold the library's source"):
        answers._code.__wrapped__()


def test_what_describes_a_strategy():
    """Every field, weights, the predictor's own layers, and the source of a class that lies anywhere."""
    read = [dyrate.DyRate.from_pretrained(POCKET / "dyrate" / "evict-0.33-seed0") for _ in range(5)]
    read[1].predictor.observed_layers = [0]  # as many features
    with torch.no_grad():
        read[2].predictor.rate_bias += 0.5
    read[3].residency = "mask"
    read[4].predictor.about = {"trained": "elsewhere"}  # decides nothing
    assert len({described(strategy) for strategy in read}) == 4 and described(read[4]) == described(read[0])

    def made(text):
        @dataclass(kw_only=True)
        class Own(dyrate.Strategy):
            rates: np.ndarray

            def keep(self, seen):
                return text

        return Own(rates=np.linspace(0, 1, 5000))

    one, other = made(""), made("")
    other.rates[2500] += 0.1  # which numpy's repr leaves out
    assert described(one) != described(other)
    dyrate.strategy.STRATEGIES.pop("Own")


def test_altered_pixels_are_measured_anew(pocket, tmp_path, calls):
    """A photograph that is changed under its name; and one that cannot be read has no rows, in the second run too."""
    for i in range(3):
        Image.effect_noise((60, 60), 40 + i).convert("RGB").save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:200])

    def photographs(order=(0, 1, 2)):
        items = [Example(f"{i}.png", "caption", "Caption.", ("a",), path=tmp_path / f"{i}.png") for i in order]
        return Examples(items, "photographs")

    def answered(found):
        return answer_all(*pocket, CONDITIONS[:1], found, tmp_path / "store", **SETTINGS)

    for _ in range(2):
        found = photographs()
        assert answered(found)["sample"].tolist() == ["0.png", "1.png"]
        assert len(found) == 2 and len(found.unreadable) == 1 and "2.png" in found.unreadable[0]
    assert len(calls) == 1
    Image.effect_noise((60, 60), 90).convert("RGB").save(tmp_path / "1.png")
    answered(photographs())
    assert len(calls) == 2
    answered(photographs((1, 0)))  # another batch
    assert len(calls) == 3
    with pytest.raises(ValueError, match=r"no example has an image that can be used: .*2\.png"):
        answered(photographs((2,)))


def launch(tmp_path: Path, lines: str) -> subprocess.CompletedProcess:
    """Run `lines` in two processes; they find this file's conditions under the same names."""
    script = tmp_path / "shared.py"
    script.write_text(f"""
import os, signal
import dyrate
from study import answers
from study.answers import Condition
from study.examples import examples
conditions = {[(c.label, type(c.strategy).__name__, vars(c.strategy), c.method, c.budget) for c in CONDITIONS]}
conditions = [Condition(label, getattr(dyrate, name)(**fields), *rest) for label, name, fields, *rest in conditions]
{lines}
four = examples("pocket", 4, tasks={TASKS})
found = answers.answer_all(*dyrate.load("pocket"), conditions, four, "{tmp_path}/two", **{SETTINGS})
open(f"{tmp_path}/table-" + os.environ["RANK"], "w").write(found.to_csv(index=False))
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_two_processes_share_the_work(pocket, tmp_path):
    one = table(pocket, tmp_path / "one", n=4)
    done = launch(tmp_path, f"""
write = answers.write_whole
def noted(path, content):
    open(f"{tmp_path}/wrote-" + os.environ["RANK"], "a").write(path.name + "\\n")
    write(path, content)
answers.write_whole = noted
""")  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    wrote = [(tmp_path / f"wrote-{rank}").read_text().split() for rank in range(2)]
    assert [len(names) for names in wrote] == [3, 3]  # of six batches
    assert sorted(wrote[0] + wrote[1]) == sorted(path.name for path in stored(tmp_path / "two"))
    assert (tmp_path / "table-0").read_text() == (tmp_path / "table-1").read_text() == one


def test_a_lost_process_costs_only_its_unfinished_batch(pocket, tmp_path, calls):
    """One of two processes is killed in the middle; a single one goes on, and measures only what is missing."""
    one = table(pocket, tmp_path / "one", n=4)
    calls.clear()
    lost = launch(tmp_path, """
measure, calls = answers._measure, []
def dies(*arguments):
    calls.append(arguments)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(*arguments)
answers._measure = dies
""")  # fmt: skip
    assert lost.returncode != 0
    there = len(stored(tmp_path / "two"))
    assert 1 <= there <= 4  # the first batch of the lost process, and those of the other until the launcher ended it
    assert table(pocket, tmp_path / "two", n=4) == one
    assert len(calls) == len(CONDITIONS) * len(TASKS) - there


def test_processes_that_disagree_stop(pocket, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "gather_object", lambda names: [*names, "another"])
    with pytest.raises(RuntimeError, match="disagree on what to measure"):
        table(pocket, tmp_path, n=1)
    assert not stored(tmp_path)


def test_files_are_whole_or_absent(tmp_path):
    path = tmp_path / "sub" / "a.txt"
    write_whole(path, "one")

    def fails(part):
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fails)
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_table_survives_its_file(pocket, tmp_path):
    """What is read from the store is what was measured, number for number."""
    measured, read = (rows(pocket, tmp_path, n=3) for _ in range(2))
    pd.testing.assert_frame_equal(measured, read, check_exact=True)
