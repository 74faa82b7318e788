"""What lmms-eval measured of `dyrate_llava`, read from its result files and set beside the paper's Table I."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd

# The paper's Table I: its column for lmms-eval's task and metric, and what brings the metric to the paper's unit
TABLE_1 = {
    ("gqa", "exact_match"): ("gqa_em", 100), ("vizwiz_vqa_val", "exact_match"): ("vizwiz_em", 100),
    ("scienceqa_img", "exact_match"): ("sqa_i_em", 100), ("textvqa_val", "exact_match"): ("textvqa_em", 100),
    ("pope", "pope_accuracy"): ("pope_acc", 100), ("mmbench_en_dev", "gpt_eval_score"): ("mmb_acc", 1),
    ("mmbench_en_dev_static", "gpt_eval_score"): ("mmb_acc", 1), ("mme", "mme_perception_score"): ("mme", 1),
}  # fmt: skip


def read_results(folder: str | Path) -> pd.DataFrame:
    """One row for each task and metric in lmms-eval's result files anywhere below a folder; of repeated runs the latest.

    Columns: model, strategy (with its arguments), task, metric, value, stderr (NaN: not stated), n, retention (measured;
    NaN: it was not), split, prompt (what the task puts around a question), harness.
    """
    # by date; files that tasks write themselves have other names
    files = sorted(Path(folder).rglob("[0-9]*_results.json"), key=lambda path: path.name)
    if not files:
        raise FileNotFoundError(f"{folder} holds no <date>_results.json: give it to `lmms-eval` as --output_path")
    rows = pd.DataFrame([row for path in files for row in _rows(json.loads(path.read_text(encoding="utf-8")))])
    return rows.drop_duplicates(["model", "strategy", "task", "metric"], keep="last", ignore_index=True)


def _rows(content: dict):
    """The rows of one result file. Earlier versions wrote the retention of a task as "avg_kept <task>"."""
    run, measured = content["config"], content.get("throughput", {})
    arguments = dict(re.findall(r"(\w+)=(.*?)(?=,\w+=|$)", run["model_args"]))
    model = arguments.pop("pretrained", "")
    strategy = arguments.pop("strategy", "full" if run["model"].startswith("dyrate") else run["model"])
    versions = [key.removeprefix("avg_") for key in measured if key.startswith("avg_lmms-eval ")]
    for task, metrics in content["results"].items():
        config = content["configs"].get(task, {})
        for key, value in metrics.items():
            metric, comma, filtered = key.partition(",")
            if comma and "_stderr" not in metric and isinstance(value, int | float):
                yield {
                    "model": model, "strategy": " ".join([strategy, *(f"{k}={v}" for k, v in arguments.items())]), "task": task,
                    "metric": metric, "value": float(value),
                    "stderr": pd.to_numeric(metrics.get(f"{metric}_stderr,{filtered}"), errors="coerce"),
                    "n": content["n-samples"].get(task, {}).get("effective"),
                    "retention": measured.get(f"avg_retention {task}", measured.get(f"avg_kept {task}", float("nan"))),
                    "split": config.get("test_split"), "prompt": json.dumps(config.get("lmms_eval_specific_kwargs")),
                    "harness": versions[0] if versions else f"lmms-eval {content.get('lmms_eval_version', '')}",
                }  # fmt: skip


def table_1(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of `read_results` in the form and the units of the paper's Table I, one line for each model and strategy."""
    lines: dict[tuple, dict] = {}
    for row in rows.itertuples():
        column, scale = TABLE_1.get((row.task, row.metric), (None, 1))
        line = lines.setdefault((row.strategy, row.model), {"model": f"{row.strategy} ({row.model})"})
        if column is not None:
            line[column] = scale * row.value
    return pd.DataFrame([line for line in lines.values() if len(line) > 1])


def protocols(rows: pd.DataFrame) -> list[dict]:
    """Rows of `read_results` as lines of the protocol ledger (`study.protocol`), one for each task and harness."""
    lines = []
    for (task, harness), results in rows.groupby(["task", "harness"], sort=False):
        first, around = results.iloc[0], json.loads(results.prompt.iloc[0]) or {}
        lines.append({
            "task": task, "source": "lmms-eval's data set", "split": first.split or "not stated",
            "n": "not stated" if pd.isna(first.n) else int(first.n),
            "prompt": f"the question in `{first.prompt}`" if around else "the task's question",
            "ocr": "yes" if around.get("ocr") else "no", "metric": ", ".join(results.metric.unique()),
            "decoding": "as lmms-eval's task sets it", "harness": harness, "basis": "measured",
        })  # fmt: skip
    return lines
