"""The errata's evidence, each tried on tables without the slip too, and the protocol ledger's completeness."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import dyrate
from dyrate.cost import LLAVA_7B, LLAVA_13B
from study.book import Chapter
from study.chapters import errata
from study.examples import examples as study_examples
from study.protocol import REPORTED, figures_of, protocol_of, protocol_rows, reported

SCORE = [0.9, 0.1, 0.4, 0.3, 0.8, 0.2, 0.6, 0.5]
SETTINGS = {"resolution", "K", "R"}  # numbers of a table that tell what was run, not what came out


@pytest.fixture
def tables():
    """The reported tables by short names, fresh for each test."""
    return errata.read_tables()


def put(frame, column, value, **where):
    """Overwrite one column of the rows that `where` picks."""
    frame.loc[np.logical_and.reduce([frame[k] == v for k, v in where.items()]), column] = value


def test_eq3_as_printed_keeps_what_it_should_drop():
    assert errata.printed_masks(8, 4).sum(1).tolist() == [0, 2, 4, 6]
    assert errata.eq3(SCORE, 4).holds
    rank = np.arange(1, 9)
    as_described = rank <= 8 - np.array([0, 2, 4, 6])[:, None]
    assert not errata.eq3(SCORE, 4, as_described).holds


def test_eq6_with_the_querys_index_drops_nothing_for_others():
    assert errata.dropped_attention("i") == pytest.approx(1 / 5)
    assert errata.dropped_attention("j") == pytest.approx(0, abs=1e-12)
    assert errata.eq6().holds
    assert not errata.eq6("j").holds


def test_the_columns_are_swapped_for_7b_only(tables):
    table2, others = tables["table2"], tables["others"]
    assert errata.swapped(table2, tables["table4b"], others).holds
    assert errata.distance(table2, others, "LLaVA-1.5-13B", "FastV Table 1", swap=False) < 5
    mended = table2.copy()
    small = mended.model == "LLaVA-1.5-7B"
    mended.loc[small, errata.CAPTIONS] = table2.loc[small, errata.CAPTIONS[::-1]].to_numpy()
    assert not errata.swapped(mended, tables["table4b"], others).holds
    rows = errata.swap_rows(table2, others)
    off = (rows.paper - rows.report).abs().groupby(rows.reading).mean()
    for reading, swap in (("as printed", False), ("swapped", True)):
        assert off[reading] == pytest.approx(errata.distance(table2, others, "LLaVA-1.5-7B", "FastV repository", swap=swap))


def test_13b_mixes_protocols(tables):
    assert errata.mixed_13b(tables["table2"], tables["others"]).holds
    put(tables["table2"], errata.CAPTIONS, [102.8, 73.0], model="LLaVA-1.5-13B", method="Original")
    assert not errata.mixed_13b(tables["table2"], tables["others"]).holds


def test_table_1_mixes_protocols(tables):
    table1, others = tables["table1"], tables["others"]
    for check in (errata.mme_totals, errata.unpruned_of_another_harness, errata.mislabelled_row, errata.mixed_visionzip):
        assert check(table1, others).holds
    put(table1, "mme", 1450.0, model="SparseVLM")
    put(table1, "sqa_i_em", 69.5, model="LLaVA-1.5")
    put(table1, "gqa_em", 40.0, model="MiniGPT-4")
    put(table1, "sqa_i_em", 68.2, model="VisionZip")
    for check in (errata.mme_totals, errata.unpruned_of_another_harness, errata.mislabelled_row, errata.mixed_visionzip):
        assert not check(table1, others).holds


def test_the_flops_column_needs_three_prompts(tables):
    needed = [round(errata.text_needed(LLAVA_7B, *errata.PRUNED[c], p))
              for c, p in errata.printed_percentages(tables["table3"], "LLaVA-1.5-7B").items()]  # fmt: skip
    assert needed == [55, 39, 69]  # as in the table: K=3, K=2, VTW
    assert errata.irreproducible_flops(tables["table3"]).holds
    for size, shape in (("7B", LLAVA_7B), ("13B", LLAVA_13B)):  # one protocol, 50 text tokens
        for case, setting in errata.PRUNED.items():
            method, k = case.split(" K=")
            row = {"model": f"LLaVA-1.5-{size}", "method": method, "K": int(k)}
            put(tables["table3"], "tflops_percent", errata.macs_left(shape, 50, *setting), **row)
    assert errata.best_single_text(errata.printed_percentages(tables["table3"], "LLaVA-1.5-7B"), LLAVA_7B) < 1e-9
    assert not errata.irreproducible_flops(tables["table3"]).holds


def test_a_third_is_left_and_half_of_the_tokens_leave_more(tables):
    found = errata.remaining(tables["table3"], tables["claims"], [36, 69])
    assert found.holds
    assert "66.67" in found.evidence
    for k in (2, 3):
        share = errata.retention_needed(33.33, k, 56)
        assert errata.macs_left(LLAVA_7B, 56, k, share) == pytest.approx(33.33, abs=0.05)
        assert share < 0.26
    put(tables["table3"], "tflops_percent", 66.67, method="DyRate")
    assert not errata.remaining(tables["table3"], tables["claims"], [36, 69]).holds


def test_dropping_while_decoding_barely_moves_flops(tables):
    assert errata.decode_left(56, 64, k=LLAVA_7B.layers) == 100  # nothing dropped, nothing saved
    assert 98 < errata.decode_left(56, 1024) < errata.decode_left(56, 16) < 100
    assert errata.decode_saves_little(tables["table3"], 56, 64).holds
    put(tables["table3"], "tflops_percent", 99.0, method="DyRate")
    assert not errata.decode_saves_little(tables["table3"], 56, 64).holds


def test_text_against_tables(tables):
    def found():
        t = tables
        return [
            errata.savings_ratio(t["table3"], t["claims"]).holds,
            errata.latency(t["table3"], t["claims"]).holds,
            errata.ablation_elsewhere(t["table2"], t["table3"], t["table4b"]).holds,
            errata.decoding_spread(t["table2"], t["table4a"], t["table4b"], t["claims"]).holds,
        ]

    assert found() == [True] * 4
    put(tables["table3"], "tflops_percent", 50.0, method="VTW")
    put(tables["table3"], "latency_ms", 500.0, model="LLaVA-1.5-7B", method="Original")
    put(tables["table4b"], "flops_percent", 33.33, strategy="DyRate (FP)")
    put(tables["table4a"], "strategy", "top_k = 6", strategy="top_p")
    assert found() == [False] * 4
    assert errata.wins(tables["table2"]) == (4, 6)


def test_the_finding_says_what_the_list_is(tables):
    found = errata.check(tables, score=SCORE, n_rates=4, text_tokens=[36, 56, 69], answer_tokens=64)
    assert {e.kind for e in found} == set(errata.KINDS)
    text = errata.finding(found, 33.33)
    assert f"{len(found)} of {len(found)} are confirmed (equation 2, mixed protocols 4, figure in a wrong place 2" in text
    denied = [replace(e, holds=e.kind == errata.EQUATION) for e in found]
    assert f"2 of {len(found)} are confirmed (equation 2).**" in errata.finding(denied, 33.33)
    assert f"0 of {len(found)} are confirmed.**" in errata.finding([replace(e, holds=False) for e in found], 33.33)


def uncovered(name, protocols):
    """What is wrong with a reported table's protocols: figures with none, or with several."""
    frame = reported(name)
    covered = [cell for line in protocols[protocols.file == name].itertuples() for cell in figures_of(line, frame)]
    columns = [c for c in frame.select_dtypes("number").columns if c not in SETTINGS]
    figures = [(row, column) for column in columns for row in frame.index if pd.notna(frame.loc[row, column])]
    counts = {cell: covered.count(cell) for cell in figures}
    return [f"{name}: {n} protocols for {column} of row {row}" for (row, column), n in counts.items() if n != 1]


def test_every_reported_figure_has_one_protocol():
    protocols = reported("protocols")
    names = {path.stem for path in REPORTED.glob("*.csv")} - {"protocols"}
    assert set(protocols.file) == names
    assert not [problem for name in names for problem in uncovered(name, protocols)]
    assert (protocols.drop(columns="rows") != "").all(axis=None)
    assert set(protocols.basis) == {"stated", "inferred"}
    missing = protocols[~((protocols.file == "table2_caption_cider") & protocols["columns"].str.contains("coco2017"))]
    assert any("coco2017_cider" in problem for problem in uncovered("table2_caption_cider", missing))
    twice = pd.concat([protocols, protocols])
    assert uncovered("table4a_decoding", twice)
    ocr = protocol_of("table1_short_generation", "textvqa_em", "ocr")
    assert ocr[reported("table1_short_generation").model == "DyRate"].tolist() == ["no"]


def test_a_chapter_carries_its_protocol(tmp_path):
    examples = study_examples("pocket", 3, tasks=["caption", "qa_count"], split="validation")
    asked, counted = protocol_rows(examples, decoding="greedy, at most 5 tokens")
    assert asked["prompt"] == "“Provide a one-sentence caption for the provided image.”"
    assert [asked[k] for k in ("source", "split", "n", "ocr")] == ["pocket", "validation", 3, "no"]
    assert asked["metric"].startswith("CIDEr (pycocoevalcap 1.") and counted["metric"] == "exact match (share)"
    assert asked["harness"].startswith("dyrate 0.") and asked["basis"] == "measured"

    chapter = Chapter("99_test", str(tmp_path))
    with pytest.raises(ValueError, match="99_test states no protocol"):
        chapter.close()
    chapter.protocol(examples, max_new_tokens=5)
    chapter.close()
    assert json.loads((tmp_path / "99_test.json").read_text())["protocol"] == [asked, counted]
    read_aloud = [dyrate.Example("a", "caption", "What does it say? Reference OCR tokens: STOP", ("stop",))]
    assert protocol_rows(dyrate.Examples(read_aloud, "signs"), decoding="none")[0]["ocr"] == "yes"
