"""The bench at sizes of seconds: its names, its arithmetic against hand-made numbers, its ledger against tensors counted."""

import json
import re
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch

import dyrate
from dyrate import teacher_forcing
from dyrate.cost import LLAVA_7B, LLAVA_13B, read_bytes
from dyrate.predictor import RatePredictor, gumbel_one_hot
from live_bytes import LiveBytes
from study.bench import growth, latency, results, runs, table3
from study.bench.__main__ import main
from study.bench.machine import Machine, probe
from study.book import ROOT
from study.chapters import efficiency
from study.memory import parameters, to_answer, to_train

SMALL = runs.small_shape(4, 64, 4, 8)
GRID = table3.Grid(budgets=(0.33,), batches=(1,), images=(1,), lengths=(4, 12), repeats=1)
CONTRACT = {"keep1_over_plain", "prefill_realised_r50", "prefill_realised_r90", "decode_b8_r90_realised"}


@pytest.fixture(scope="module")
def small():
    return runs.build(SMALL)


def test_the_small_bench_writes_one_set_of_names(tmp_path):
    main(["prune", "--layers", "3", "--width", "32", "--side", "4", "--heads", "2", "--repeats", "1", "--new-tokens", "4",
          "--out", str(tmp_path / "bench.json")])  # fmt: skip
    content = json.loads((tmp_path / "bench.json").read_text())
    assert CONTRACT <= set(content["bars"]) <= set(content["results"])
    ways = {case: {row["way"] for row in content["table"] if row["case"] == case} for case in ("whole", "decode", "pocket")}
    assert ways["whole"] == {"plain", "all kept"} and ways["pocket"] == {"plain", "DyRate"}
    assert {"mask", "DyRate", "limit, 0.1", "limit, 0.33, in place"} <= ways["decode"]
    caches = {row["way"]: row["cache_mib"] for row in content["table"] if row["case"] == "decode"}
    assert caches["limit, 0.1"] < caches["fixed"] < caches["mask"] == caches["plain"] == caches["plain, in place"]
    for spent in content["profile"].values():
        assert spent["linear layers"] > 0 and spent["attention"] > 0 and spent["all else"] > 0
    assert content["profile"]["plain"]["observation"] == 0 < content["profile"]["DyRate"]["observation"]
    assert "into linear layers" in efficiency.profile_sentence(content)
    assert set(efficiency.savings(content)["case"]) < set(efficiency.LABELS.values())
    assert all(found["low"] <= found["value"] <= found["high"] for found in content["results"].values())
    assert 0 < content["results"]["deciding_share"]["value"] < 1


def test_the_time_of_answers_is_measured_beside_no_pruning_for_every_strategy(tmp_path):
    predictor = ROOT / "data/pocket/dyrate/evict-0.33-seed0"
    given = ["--batch", "1", "--new-tokens", "3", "--repeats", "2", "--retentions", "0.25", "--predictors", str(predictor)]
    main(["latency", *given, "--out", str(tmp_path / "latency.json")])
    content = json.loads((tmp_path / "latency.json").read_text())
    rows = pd.DataFrame(content["table"])
    assert {"Full", "FastV 0.25", "VTW 0.25", "DyRate evict-0.33-seed0"} <= set(rows.label) and rows.label.is_unique
    assert (rows.value > 0).all() and (rows.low <= rows.value).all() and (rows.value <= rows.high).all()
    assert content["about"]["batch"] == 1 and content["about"]["new_tokens"] == 3 and content["about"]["layers"] == 8


def test_an_answer_is_timed_after_the_plain_one_beside_it():
    timed = []
    pair = latency._pair(lambda strategy, n: timed.append((strategy, n)) or 2.0 * len(timed), "plain", "pruned", 5)
    assert timed == [("plain", 5), ("pruned", 5)] and pair == (4.0, 2.0)


def test_the_finding_quotes_dyrates_own_share_beside_the_hypothetical_one():
    about = {"layers": 4, "width": 8, "image_tokens": 16, "device": "CPU", "torch": "2", "batch": 8, "retention": 0.331}
    shares = {"prefill_realised_r90": 0.98, "decode_b8_r90_realised": 1.1, "decode_b8_dyrate_realised": 0.7}
    results = {key: {"value": x, "low": x - 0.1, "high": x + 0.1, "n": 3} for key, x in shares.items()}
    left = pd.DataFrame({"new tokens": [16, 64], "with cache, % left": [99.9, 99.8]})
    text = efficiency.finding(left, {"about": about, "results": results})
    assert "DyRate, at a forced mean retention of 0.33, realises an unmeasured part of the time" in text
    assert "copies more, it is 70 % (60 to 80 %, n = 3 repeats). A hypothetical R = .9 realises 110 % (100 to 120 %, n" in text
    assert "leaves 99.8 % of LLaVA-1.5-7B's multiply-accumulates (computed, 64 new tokens)" in text
    assert "leaves 99.9 %" in efficiency.finding(left[:1], {"about": about, "results": results})


def test_growth_has_a_line_for_each_case(tmp_path):
    lines = [{"image_tokens": n, "batch": rows, "new_tokens": 4} for n, rows in ((64, 1), (192, 2))]
    growth.growth(SMALL, 1, tmp_path / "growth.json", lines)
    found = json.loads((tmp_path / "growth.json").read_text())
    assert [{key: row[key] for key in lines[0]} for row in found["table"]] == lines
    kept = (runs.TEXT + 16 + 3) / (runs.TEXT + 64 + 3)  # of 64; two of four layers hold all
    assert found["table"][0]["FastV cache"] == pytest.approx((1 + kept) / 2)
    assert list(efficiency.grown(found))[:4] == ["image tokens", "batch", "new tokens", "plain (s)"]
    timing = {"plain": 10.0, "FastV": 6.0, "DyRate": 7.0, "limit": 4.0}
    made = {way: [runs.Timing(t - 1, np.ones(1), 1, [], 1.0, np.ones(0))] for way, t in timing.items()}
    assert growth.line(made, 0.5)["ideal"] == pytest.approx(0.7) and growth.line(made, 0.5)["DyRate"] == pytest.approx(0.7)
    axes = [{key for key in case if case[key] != growth.BASE[key]} for case in growth.cases()]
    assert axes[0] == set() and all(len(axis) == 1 for axis in axes[1:])


@pytest.mark.parametrize("budget", [0.25, 0.33, 0.5, 0.75])
def test_a_forced_rate_is_met_while_tokens_are_dropped_step_by_step(small, budget):
    found = runs.timed(small, 2, 64, runs.forced(SMALL, budget, 64), deciding=True)
    assert abs(found.retention - budget) < 0.02
    assert len(found.deciding) == len(found.steps) == 63
    assert (found.deciding < found.steps).all()
    whole = runs.timed(small, 2, 64)
    assert found.cache < whole.cache
    torch.manual_seed(0)
    with runs.forced(SMALL, budget, 64)(small) as trace:
        small.generate(**prompt(small), min_new_tokens=64, max_new_tokens=64, suppress_tokens=[runs.IMAGE])
    assert trace.steps[0].stages[0].counts[0] > trace.steps[30].stages[0].counts[0] > trace.steps[63].stages[0].counts[0]


def prompt(model):
    ids = torch.tensor([[*runs.BEFORE, *[runs.IMAGE] * 64, *runs.AFTER]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.zeros(1, 3, 112, 112)}


def test_the_table_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    out = tmp_path / "gpu" / "bench.json"
    measured, real = [], table3.measure

    def interrupted(*given):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(given[3].key)
        return real(*given)

    monkeypatch.setattr(table3, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        table3.table3("small", SMALL, GRID, out)
    first = json.loads(out.read_text())["shapes"]["small"]["rows"]
    assert list(first) == measured
    measured.clear()
    monkeypatch.setattr(table3, "measure", lambda *given: measured.append(given[3].key) or real(*given))
    found = table3.table3("small", SMALL, GRID, out)
    assert len(measured) == len(table3.cases(SMALL, GRID)) - 3
    content = json.loads(out.read_text())["shapes"]["small"]
    assert content["rows"].keys() == {case.key for case in table3.cases(SMALL, GRID)}
    assert {key: content["rows"][key] for key in first} == first
    assert set(content["results"]) == {"prefill_realised_r50", "prefill_realised_r90", "deciding_share"}  # no batch of 64
    rows = found["rows"]["DyRate K=2 retention 0.33, batch 1, images 1, static"]
    assert [row["new_tokens"] for row in rows] == [4, 12]
    assert abs(rows[1]["retention"] - rows[1]["budget"]) < 0.04
    assert all(row["roofline_ms_per_token"] < row["ms_per_token"] for rows in found["rows"].values() for row in rows)
    table3.show(found)
    with pytest.raises(ValueError, match="with other sizes"):
        table3.table3("small", runs.small_shape(2, 64, 4, 8), GRID, out)
    monkeypatch.setattr(table3, "name_of_device", lambda: "another")
    with pytest.raises(ValueError, match="measured elsewhere"):
        table3.table3("small", SMALL, GRID, out)


def test_what_does_not_fit_is_a_row_that_says_so(small, monkeypatch):
    full, machine = table3.cases(SMALL, GRID)[0], Machine("any", 1e9, 1e9, 0.0)
    (row, _) = table3.measure(small, SMALL, machine, full, GRID, memory=10**6)
    assert row["status"] == "needs 0 GB of 0"

    def no_room(*given, **more):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(table3, "timed", no_room)
    (row, _) = table3.measure(small, SMALL, machine, full, GRID, memory=10**12)
    assert row["status"] == "out of memory"
    assert not table3.headlines([row], SMALL.layers)


def test_the_chapter_shows_gpus_and_says_where_there_is_none(tmp_path):
    reported = pd.read_csv("data/reported/table3_efficiency.csv")
    assert efficiency.gpu_files(tmp_path) == []
    assert efficiency.gpu_sentence([]).startswith("**Not measured")
    assert set(efficiency.gpu_verdicts([]).verdict) == {"not measured"}
    assert len(efficiency.beside_reported(reported, []).columns) == len(reported.columns) - 1
    row = {
        "method": "Full", "first_pruned_layer": 0, "budget": 1.0, "batch": 1, "images": 1, "new_tokens": 64, "static": True,
        "prefill_ms": 50.0, "ms_per_token": 4.0, "roofline_prefill_ms": 40.0, "roofline_ms_per_token": 3.0,
        "tokens_per_s": 200.0, "peak_gib": 15.0, "status": "measured",
    }  # fmt: skip
    fastv = row | {"method": "FastV", "first_pruned_layer": 2, "budget": 0.5, "prefill_ms": 29.0, "ms_per_token": 5.0}
    rows = {"one": [fastv | {"new_tokens": 256, "prefill_ms": 30.0}, fastv], "two": [row], "three": [row | {"static": False}]}
    shape = {"rows": rows, "results": {"deciding_share": {"value": 0.05}, "prefill_realised_r50": {"value": 0.95}}}
    about = {"device": "A GPU", "torch": "2.13"}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "bench.json").write_text(json.dumps({"about": about, "shapes": {"llava-1.5-7b": shape}}))
    files = efficiency.gpu_files(tmp_path)
    found = efficiency.gpu_verdicts(files)
    assert found[found.model == "llava-1.5-7b"].set_index("what").verdict.to_dict() == {
        "prefill, R = .5": "met", "prefill, R = .9": "not measured", "decode, batch 64, R = .9": "not measured",
        "deciding / decode step (time)": "missed",
    }  # fmt: skip
    table = efficiency.beside_reported(reported, files)
    assert table["A GPU prefill ms, measured"].dropna().to_dict() == {0: 50, 2: 29}  # static, the shortest answer, the same K
    assert table["A GPU ms a token, measured"].dropna().to_dict() == {0: 4, 2: 5}
    assert efficiency.gpu_table(files)["ms a token"].tolist() == [5, 5, 4, 4]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("name", "gigabytes"), [("llava-1.5-7b", "14.6"), ("llava-1.5-13b", "27.4")])
def test_a_real_shape_without_a_gpu_is_refused_at_once(name, gigabytes, capsys):
    with pytest.raises(SystemExit):
        main(["prune", "--shape", name])
    assert f"needs a GPU with at least {gigabytes} GB" in capsys.readouterr().err


def test_a_real_shape_made_tiny_runs_anywhere(monkeypatch, capsys):
    monkeypatch.setattr("study.bench.__main__.QUICK", table3.Grid((), (1,), (1,), (2,), 1))
    main(["prune", "--shape", "llava-1.5-13b", "--quick", "--layers", "4", "--width", "32", "--heads", "2", "--side", "2"])
    printed = capsys.readouterr().out
    assert all(f"{method}, batch 1, images 1, {way}" in printed
               for method in ("Full K=0 retention 1", "VTW K=2 retention 0", "native K=0 retention 0.5")
               for way in ("eager", "static"))  # fmt: skip
    assert re.search(r"decode_b64_r90_realised +bar 0.75: not measured", printed)


def test_the_quick_table_measures_what_the_bars_need_and_nothing_else():
    measured = table3.cases(LLAVA_7B, table3.QUICK)
    rows = [
        asdict(case) | {"prefill_seconds": [seconds] * 2, "decode_seconds": [seconds] * 2}
        | ({"deciding_share": {"value": 0.1}} if case.method == "DyRate" else {})
        for case in measured for seconds in [{"Full": 10.0, "native": 0.0}.get(case.method, 7.0)]
    ]  # fmt: skip
    found = table3.headlines(rows, 4)
    assert set(table3.TABLE3_BARS) <= set(found) and found["prefill_realised_r50"]["value"] == pytest.approx(0.6)
    for i in range(len(rows)):  # each is needed
        fewer = table3.headlines([row for row in rows if row is not rows[i]], 4)
        assert len(fewer) < len(found)


def test_roofline_and_saving_by_hand():
    machine = Machine("any", macs_per_second=10.0, bytes_per_second=100.0, seconds_per_layer=0.0)
    assert machine.seconds(macs=5, n_bytes=200) == 2
    assert machine.seconds(macs=50, n_bytes=200) == 5
    tokens, fast = [600] * LLAVA_7B.layers, Machine("any", 1e30, 1e12, 0.0)
    assert fast.step_seconds(LLAVA_7B, tokens, 4) == read_bytes(LLAVA_7B, tokens, 2, 4) / 1e12
    assert results.realised([10.0] * 3, [6.0] * 3, [5.0] * 3)["value"] == pytest.approx(0.8)
    # two of four layers lie in both: the ideal is 7.5, not 5
    assert results.realised([10.0] * 3, [8.0] * 3, [5.0] * 3, 0.5)["value"] == pytest.approx(0.8)
    assert results.ratio([10.0] * 3, [5.0] * 3) == {"value": 2, "low": 2, "high": 2, "n": 3}


def test_a_bar_is_met_from_its_own_side():
    measured = {"deciding_share": {"value": 0.05}, "prefill_realised_r50": {"value": 0.95}}
    assert results.verdict(measured, "deciding_share", 0.03) == "missed"
    assert results.verdict(measured, "deciding_share", 0.05) == "met"
    assert results.verdict(measured, "prefill_realised_r50", 0.9) == "met"
    assert results.verdict(measured, "prefill_realised_r90", 0.9) == "not measured"


def test_a_probe_measures_this_machine():
    found = probe()
    assert min(found.macs_per_second, found.bytes_per_second) > 1e8
    assert 0 < found.seconds_per_layer < 1
    assert found.itemsize == (2 if torch.cuda.is_available() else 4)


def test_observing_prints_every_mode(monkeypatch, capsys):
    monkeypatch.setattr("study.bench.observing._in_own_process", lambda run, *given: run(*given))
    main(["observe", "--layers", "3", "--width", "64", "--side", "12", "--heads", "4", "--new-tokens", "6", "--repeats", "1"])
    *_, plain, observed, eager = capsys.readouterr().out.splitlines()
    assert (plain.split()[0], observed.split()[0], eager.split()[0]) == ("plain", "observed", "eager")
    assert float(plain.split()[2]) == 1


@pytest.mark.parametrize("shape", [SMALL, LLAVA_7B, LLAVA_13B])
def test_parameters_are_counted_exactly(shape):
    assert parameters(shape) == sum(p.numel() for p in runs.build(shape, "meta").parameters())


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("rate", [0.0, 0.75])
def test_memory_of_an_answer(rows, rate):
    shape = runs.small_shape(6, 256, 8, 12)
    model, n = runs.build(shape), 144
    with LiveBytes() as counted:
        runs.timed(model, rows, 8, dyrate.FastV(rate=rate))
    tokens = [runs.TEXT + n] * 2 + [runs.TEXT + n - int(n * rate)] * 4
    found = to_answer(shape, tokens, 8, rows, itemsize=4)
    assert counted.peak == pytest.approx(found["cache"] + found["activations"], rel=0.15)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("side", "answer"), [(12, 32), (8, 64)])
def test_memory_of_training(checkpointing, side, answer):
    shape = runs.small_shape(6, 256, 8, side)
    model, predictor = runs.build(shape), RatePredictor(8, 6, "llava")
    ids = torch.tensor([[*runs.BEFORE, *[runs.IMAGE] * side**2, *runs.AFTER]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.zeros(1, 3, 14 * side, 14 * side)}
    prepared = teacher_forcing.prepare_tokens(model, predictor, inputs, [[7] * answer])
    predictor.start_at(0.33, prepared.features.flatten(0, 1))
    with teacher_forcing.frozen(model), LiveBytes() as counted:
        choice = gumbel_one_hot(predictor(prepared.features), torch.zeros(1, answer, 32), 1.0)
        masks = teacher_forcing.masks_over_steps(choice, prepared, "evict")
        logits = teacher_forcing.masked_logits(model, predictor, prepared, masks, checkpointing)
        torch.nn.functional.cross_entropy(logits[0].float(), prepared.labels[0]).backward()
    found = to_train(shape, side**2, runs.TEXT, answer, itemsize=4, checkpointing=checkpointing)
    assert counted.peak == pytest.approx(found["activations"] + found["masks"] + found["logits"], rel=0.15)
    held = [prepared.hidden, *prepared.rotary, prepared.score, prepared.features]
    assert sum(x.numel() * 4 for x in held) == pytest.approx(found["prepared"], rel=0.02)
