"""lmms-eval drives the pocket model under strategies; its arguments, batches and result files, also without lmms-eval."""

import json
import math
import os
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest

import dyrate
from dyrate import STRATEGIES
from dyrate.data import Example
from dyrate.lmms import answer, strategy_of
from study import controls  # noqa: F401  (registers its strategies)
from study.answers import Condition, answer_all
from study.examples import examples
from study.lmms_results import TABLE_1, protocols, read_results, table_1

ROOT = Path(__file__).resolve().parents[2]
PREDICTOR = str(ROOT / "data/pocket/dyrate/evict-0.33-seed0")
TASKS = ["qa_colour", "caption", "qa_relation"]
with_lmms_eval = pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed: pip install '.[lmms]'")


@pytest.fixture(scope="module")
def pocket():
    return dyrate.load("pocket")


@pytest.fixture(scope="module")
def prompts():
    return examples("pocket", 2, tasks=TASKS)


def chat(example, *images):
    pictures = [{"type": "image", "url": image} for image in images]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": example.prompt}]}]


def answered(pocket, strategy, prompts, **wanted):
    wanted = {"until": ["\n\n"], "max_new_tokens": 24} | wanted
    return answer(*pocket, strategy, [chat(e, e.image()) for e in prompts], prompts, wanted)


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - {"DyRate", "Oracle"}))
def test_every_strategy_is_named_in_any_case_and_takes_its_fields(name):
    assert repr(strategy_of(name.upper(), 8, first_pruned_layer=3)) == repr(STRATEGIES[name](first_pruned_layer=3))


def test_fields_may_be_lists_and_mappings():
    assert strategy_of("meantrajectory", 8, rates="[0.1, 0.2]").rates == [0.1, 0.2]
    assert strategy_of("TaskConstant", 8, rates='{"gqa": 0.5}').rates == {"gqa": 0.5}


def test_a_budget_is_the_retention():
    assert strategy_of("fastv", 32, budget=0.25, first_pruned_layer=3) == dyrate.FastV(rate=0.75, first_pruned_layer=3)
    assert strategy_of("vtw", 32, budget=0.5).first_pruned_layer == 16
    assert strategy_of("DYRATE", 8, predictor=PREDICTOR, budget=0.33).predictor.about["settings"]["budget"] == 0.33


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "fastvv"}, "no strategy is called 'fastvv'; there are"),
        ({"name": "fastv", "ratio": 0.5}, "FastV has no field ratio; it has first_pruned_layer, residency, positions, rate"),
        ({"name": "fastv", "names": "[]"}, "no field names"),
        ({"name": "fastv", "rate": 0.5, "budget": 0.5}, "FastV cannot have rate=0.5 beside budget=0.5, which sets the rate"),
        ({"name": "fastv", "rate": "high"}, "cannot have rate=high"),
        ({"name": "fastv", "rate": 2}, "lies in"),
        ({"name": "fastv", "budget": 33}, "budget is the share of image tokens that is kept"),
        ({"name": "full", "budget": 0.33}, "Full has no rate that budget=0.33 could set"),
        ({"name": "fastv", "predictor": PREDICTOR}, "goes with strategy=dyrate"),
        ({"name": "dyrate"}, "needs predictor="),
        ({"name": "dyrate", "predictor": "no/such"}, "predictor=no/such is no folder"),
        ({"name": "dyrate", "predictor": PREDICTOR, "first_pruned_layer": 3}, "first_pruned_layer: strategy=dyrate has these"),
        ({"name": "dyrate", "predictor": PREDICTOR, "budget": 0.5}, r"was trained for 0.33 \(retention\), not for 0.5"),
        ({"name": "meantrajectory", "rates": "[0.1"}, "cannot have rates"),
        ({"name": "oracle"}, "needs to know what an image shows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_arguments_that_contradict_themselves_are_refused(arguments, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message):
        strategy_of(arguments.pop("name"), 8, **arguments)


def test_full_is_plain_generate(pocket, prompts):
    model, processor = pocket
    inputs = dyrate.encode(processor, [e.image() for e in prompts], [e.prompt for e in prompts])
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=24)[:, inputs["input_ids"].shape[1] :]
    plain = [text.strip() for text in processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    answers = answered(pocket, dyrate.Full(), prompts)
    assert [a.text for a in answers] == plain and all(plain) and all(a.retention == 1 for a in answers)


def test_a_strategy_answers_as_in_our_own_evaluation(pocket, prompts, tmp_path):
    strategy = dyrate.FastV(rate=0.75)
    conditions = [Condition("x", strategy, "FastV")]
    rows = answer_all(*pocket, conditions, prompts, tmp_path, max_new_tokens=24, batch_size=2, progress=False)
    answers = answered(pocket, strategy, prompts)
    assert [a.text for a in answers] == list(rows.answer) and [a.tokens for a in answers] == list(rows.tokens)
    assert [a.retention for a in answers] == pytest.approx(list(rows.retention)) and answers[0].retention == 0.25
    assert [a.text for a in answers] != [a.text for a in answered(pocket, dyrate.Full(), prompts)]


def test_text_alone_and_several_images_stand_in_one_batch(pocket, prompts):
    strategy = dyrate.FastV(rate=0.5)
    first, second, third, *_ = prompts
    chats = [chat(first), chat(second, second.image(), first.image()), chat(third, third.image()), chat(second)]
    together = answer(*pocket, strategy, chats, [first, second, third, second], {"max_new_tokens": 12})
    alone = [answer(*pocket, strategy, [one], [first], {"max_new_tokens": 12})[0] for one in chats]
    assert [a.text for a in together] == [a.text for a in alone]
    assert [math.isnan(a.retention) for a in together] == [True, False, False, True]
    assert alone[2].text == answered(pocket, strategy, [third], max_new_tokens=12)[0].text


def test_generation_settings_are_read_as_lmms_evals_llava_hf_does(pocket, prompts):
    greedy = answered(pocket, dyrate.Full(), prompts)
    unused = {"temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": True, "image_aspect_ratio": "original"}
    assert answered(pocket, dyrate.Full(), prompts, **unused) == greedy
    assert [a.tokens for a in answered(pocket, dyrate.Full(), prompts, max_new_tokens=3)] == [min(3, a.tokens) for a in greedy]
    caption = next(a.text for a, e in zip(greedy, prompts, strict=True) if e.task == "caption")
    stop = caption.split()[2]
    cut = answered(pocket, dyrate.Full(), [e for e in prompts if e.task == "caption"][:1], until=stop)[0]
    assert cut.text == caption.partition(stop)[0] != ""
    beams = answered(pocket, dyrate.FastV(rate=0.5), prompts, num_beams=3)
    assert all(a.retention == 0.5 for a in beams)
    ((_, _, plain),) = dyrate.answer_examples(*pocket, prompts, max_new_tokens=24, num_beams=3)
    assert [a.text for a in answered(pocket, dyrate.Full(), prompts, num_beams=3)] == plain.texts


def test_what_is_no_image_is_refused(pocket, prompts):
    video = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}, {"type": "text", "text": "?"}]}]
    with pytest.raises(ValueError, match="the task shows video"):
        answer(*pocket, dyrate.Full(), [video], [Example("", "", "", ())], {})


@pytest.mark.skipif(find_spec("lmms_eval") is not None, reason="lmms-eval is installed")
def test_without_lmms_eval_the_remedy_is_named():
    with pytest.raises(ImportError, match=r"pip install 'dyrate\[lmms\]'"):
        import dyrate.lmms_plugin  # noqa: F401


RESULT = {
    "results": {
        "gqa": {"alias": "gqa", "exact_match,none": 0.6, "exact_match_stderr,none": 0.01, "exact_match_stderr_clt,none": 0.01},
        "pope": {"pope_accuracy,none": 0.85, "pope_accuracy_stderr,none": "N/A", "pope_f1_score,none": 0.84, "s,none": None},
    },
    "configs": {"gqa": {"test_split": "testdev", "lmms_eval_specific_kwargs": {"post_prompt": "\nBriefly."}}},
    "n-samples": {"gqa": {"original": 12578, "effective": 100}, "pope": {"original": 9000, "effective": 9000}},
    "config": {"model": "dyrate_llava", "model_args": "pretrained=llava-hf/llava-1.5-7b-hf,strategy=fastv,rate=0.75"},
    "throughput": {"avg_retention gqa": 0.25, "avg_lmms-eval 0.7.3": 1.0},
    "lmms_eval_version": "unknown@unknown",
}  # fmt: skip


def test_result_files_become_rows_and_table_1(tmp_path):
    with pytest.raises(FileNotFoundError, match="--output_path"):
        read_results(tmp_path)
    later = json.loads(json.dumps(RESULT))
    later["results"]["gqa"]["exact_match,none"] = 0.61
    plain = RESULT | {"config": {"model": "llava_hf", "model_args": "pretrained=x/y"}, "throughput": {}}
    written = {"a/20260101_010101": RESULT, "a/20260102_010101": later, "b/20260101_010101": plain}
    for name, content in written.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}_results.json").write_text(json.dumps(content))
    (tmp_path / "a/mmbench_en_dev_results.json").write_text("{}")  # a task's own file
    rows = read_results(tmp_path)
    assert len(rows) == 6
    ours = rows[rows.strategy == "fastv rate=0.75"].set_index(["task", "metric"])
    gqa, f1 = ours.loc["gqa", "exact_match"], ours.loc["pope", "pope_f1_score"]
    assert (gqa.value, gqa.stderr, gqa.n, gqa.retention, gqa.split) == (0.61, 0.01, 100, 0.25, "testdev")
    assert (gqa.model, gqa.harness, f1.n) == ("llava-hf/llava-1.5-7b-hf", "lmms-eval 0.7.3", 9000)
    assert "Briefly" in gqa.prompt and math.isnan(f1.stderr) and math.isnan(f1.retention)
    lines = {(line["task"], line["harness"]): line for line in protocols(rows)}
    assert (lines["gqa", "lmms-eval 0.7.3"]["split"], lines["gqa", "lmms-eval 0.7.3"]["n"]) == ("testdev", 100)
    assert lines["pope", "lmms-eval 0.7.3"]["metric"] == "pope_accuracy, pope_f1_score"
    assert {line["ocr"] for line in lines.values()} == {"no"}
    with_ocr = rows.assign(prompt='{"ocr": true}')
    assert {line["ocr"] for line in protocols(with_ocr)} == {"yes"}
    table = table_1(rows).set_index("model")
    assert table.loc["fastv rate=0.75 (llava-hf/llava-1.5-7b-hf)", "gqa_em"] == pytest.approx(61)
    assert table.loc["llava_hf (x/y)", "pope_acc"] == pytest.approx(85)
    reported = pd.read_csv(ROOT / "data/reported/table1_short_generation.csv")
    assert {column for column, _ in TABLE_1.values()} <= set(reported.columns)


def test_the_retention_of_earlier_result_files_is_read(tmp_path):
    content = RESULT | {"throughput": {"avg_kept gqa": 0.25}}
    (tmp_path / "20260101_010101_results.json").write_text(json.dumps(content))
    assert read_results(tmp_path).set_index("task").retention["gqa"] == 0.25


LOCAL_TASK = """
task: pocket_{name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function local_utils.picture
doc_to_text: !function local_utils.prompt
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 24, temperature: 0, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}]
"""
UTILS = """
def picture(doc):
    return [doc["image"].convert("RGB")]

def prompt(doc, lmms_eval_specific_kwargs=None):
    return doc["prompt"]
"""


@with_lmms_eval
@pytest.mark.parametrize("processes", [1, 2])
def test_lmms_eval_drives_a_strategy(pocket, tmp_path, processes):
    from datasets import Dataset, Features, Image, Value

    (entry,) = entry_points(group="lmms_eval.models", name="dyrate_llava")
    assert entry.value == "dyrate.lmms_plugin:manifest"
    strategy, expected = dyrate.FastV(rate=0.9), {}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/local_utils.py").write_text(UTILS)
    for name in ("qa_colour", "qa_relation"):
        prompts = examples("pocket", 5, tasks=[name])
        docs = [{"image": e.image(), "prompt": e.prompt, "answer": e.references[0]} for e in prompts]
        features = Features({"image": Image(), "prompt": Value("string"), "answer": Value("string")})
        Dataset.from_list(docs, features=features).to_parquet(tmp_path / f"{name}.parquet")
        (tmp_path / f"tasks/{name}.yaml").write_text(LOCAL_TASK.format(name=name, data=tmp_path / f"{name}.parquet"))
        expected[f"pocket_{name}"] = [a.text for a in answered(pocket, strategy, prompts)], [e.references[0] for e in prompts]
    shared = [] if processes == 1 else ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    command = [
        sys.executable, *shared, "-m", "lmms_eval", "--model", "dyrate_llava",
        "--model_args", "pretrained=pocket,strategy=fastv,rate=0.9", "--tasks", ",".join(expected),
        "--include_path", str(tmp_path / "tasks"), "--batch_size", "3", "--log_samples",
        "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    rows = read_results(tmp_path / "out").set_index("task")
    assert set(rows.index) == set(expected) and (rows.strategy == "fastv rate=0.9").all() and (rows.n == 5).all()
    assert rows.retention.tolist() == pytest.approx([15 / 144] * 2) and rows.harness.str.match(r"lmms-eval \d+\.\d+").all()
    for task, (answers, references) in expected.items():
        (logged,) = (tmp_path / "out").rglob(f"*_samples_{task}.jsonl")
        samples = sorted((json.loads(line) for line in logged.read_text().splitlines()), key=lambda s: s["doc_id"])
        assert [s["filtered_resps"] for s in samples] == answers
        right = [a.lower() == r.lower() for a, r in zip(answers, references, strict=True)]
        assert rows.value[task] == pytest.approx(sum(right) / len(right))
