"""Short answers through lmms-eval, the harness that the paper used: `lmms-eval --model dyrate_llava`.

`strategy_of` reads the model's arguments, `answer` answers a batch, `read_results` reads what lmms-eval wrote. None of them
needs lmms-eval; `lmms_plugin` is what lmms-eval calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from transformers import GenerationConfig

from dyrate.generation import encode_chats
from dyrate.data import Example
from study.answers import generated, in_words, kept_shares
from dyrate.strategies.dyrate import DyRate
from dyrate.strategies import STRATEGIES
from dyrate.strategy import Strategy

# The paper's Table I: its column for lmms-eval's task and metric, and what brings the metric to the paper's unit
TABLE_1 = {
    ("gqa", "exact_match"): ("gqa_em", 100), ("vizwiz_vqa_val", "exact_match"): ("vizwiz_em", 100),
    ("scienceqa_img", "exact_match"): ("sqa_i_em", 100), ("textvqa_val", "exact_match"): ("textvqa_em", 100),
    ("pope", "pope_accuracy"): ("pope_acc", 100), ("mmbench_en_dev", "gpt_eval_score"): ("mmb_acc", 1),
    ("mmbench_en_dev_static", "gpt_eval_score"): ("mmb_acc", 1), ("mme", "mme_perception_score"): ("mme", 1),
}  # fmt: skip


def strategy_of(name: str, n_layers: int, *, predictor: str | None = None, budget: float | None = None, **given) -> Strategy:
    """The strategy that model arguments mean.

    name: one of STRATEGIES, in any case. given: its fields, lists and mappings as JSON. budget: share of the image tokens
    that stays; it sets the rate of a strategy that has one (`Strategy.at`), and must be what a predictor was trained for.
    predictor: DyRate's, a folder or hub name. Raises ValueError for what is unknown, missing or contradicts itself.
    """
    cls = {known.lower(): cls for known, cls in STRATEGIES.items()}.get(str(name).lower())
    if cls is None:
        raise ValueError(f"no strategy is called {name!r}; there are {', '.join(sorted(STRATEGIES))}")
    if issubclass(cls, DyRate):
        return _trained(predictor, budget, given)
    if predictor is not None:
        raise ValueError(f"predictor={predictor} goes with strategy=dyrate, not with strategy={name}")
    known = [field.name for field in fields(cls) if field.repr]
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(known)}")
    if budget is not None and cls.at.__func__ is Strategy.at.__func__:
        raise ValueError(f"{cls.__name__} has no rate that budget={budget} could set; it has {', '.join(known)}")
    if budget is not None and not 0 <= budget <= 1:
        raise ValueError(f"budget is the share of image tokens that stays and lies in [0, 1], not {budget}")
    try:
        given = {key: json.loads(v) if str(v).startswith(("[", "{")) else v for key, v in given.items()}
        strategy = cls(**given) if budget is None else cls.at(budget, n_layers, **given)
    except (TypeError, json.JSONDecodeError) as error:
        wanted = ", ".join(f"{key}={value}" for key, value in given.items())
        beside = "" if budget is None else f" beside budget={budget}, which sets the rate"
        raise ValueError(f"{cls.__name__} cannot have {wanted}{beside}: {error}") from error
    strategy.meet([Example("", "", "", ())])  # what must know the scene says so now
    return strategy


def _trained(predictor: str | None, budget: float | None, given: dict) -> DyRate:
    if predictor is None:
        raise ValueError("strategy=dyrate needs predictor=<folder or hub name>; `python -m dyrate.training` makes one")
    if given:
        raise ValueError(f"{', '.join(given)}: strategy=dyrate has these from its predictor; leave them out")
    try:
        strategy = DyRate.from_pretrained(predictor)
    except (OSError, ValueError) as error:
        raise ValueError(f"predictor={predictor} is no folder with a predictor, and the hub does not give it: {error}") from error
    trained = strategy.predictor.about.get("settings", {})
    if budget is not None and budget != trained.get("budget"):
        made = f"{trained['budget']} ({trained['unit']})" if trained else "a budget that it does not tell"
        raise ValueError(f"predictor={predictor} was trained for {made}, not for {budget}: name another, or no budget")
    return strategy


class Answer(NamedTuple):
    """tokens: with the end. kept: mean share of image tokens that stayed; NaN without an image."""

    text: str
    tokens: int
    kept: float


def answer(
    model, processor, strategy: Strategy, chats: list[list[dict]], examples: Sequence[Example], wanted: dict
) -> list[Answer]:
    """Answer each chat under a strategy; the text ends before the first of the strings in `wanted["until"]`.

    chats: messages as lmms-eval hands them over, images in place, any number or none. examples: what strategies are told of
    each. wanted: lmms-eval's generation_kwargs, understood as its own `llava_hf` does: greedy unless temperature > 0, 1024
    new tokens unless told, and what `generate` does not know is left out.
    """
    until = [wanted["until"]] if isinstance(wanted.get("until"), str) else wanted.get("until") or []
    settings = {"max_new_tokens": 1024} | _generate_settings(wanted)
    found: dict[int, Answer] = {}
    images = [_images(chat) for chat in chats]
    for sees in (True, False):
        rows = [i for i, pictures in enumerate(images) if bool(pictures) == sees]
        if not rows:
            continue
        strategy.meet([examples[i] for i in rows])
        inputs = encode_chats(processor, [chats[i] for i in rows], [picture for i in rows for picture in images[i]])
        with strategy(model, processor) if sees else nullcontext() as trace:  # without an image there is nothing to drop
            said = generated(model, inputs, settings)
        lengths = [len(ids) for ids in said]
        kept = kept_shares(trace, lengths) if sees else [float("nan")] * len(rows)
        texts = [min((text.partition(stop)[0] for stop in until), key=len, default=text) for text in in_words(processor, said)]
        found |= {i: Answer(*one) for i, *one in zip(rows, texts, lengths, kept, strict=True)}
    return [found[i] for i in range(len(chats))]


def _generate_settings(wanted: dict) -> dict:
    drawn = (wanted.get("temperature") or 0) > 0
    known = set(vars(GenerationConfig())) - ({"do_sample"} if drawn else {"do_sample", "temperature", "top_p", "top_k"})
    return {k: v for k, v in wanted.items() if k in known and v is not None} | {"do_sample": drawn}


def _images(chat: list[dict]) -> list:
    """A chat's images in reading order."""
    parts = [part for message in chat for part in message["content"]]
    if other := {part["type"] for part in parts} - {"text", "image"}:
        raise ValueError(f"the task shows {', '.join(sorted(other))}: dyrate_llava answers questions about images only")
    return [part["url"] for part in parts if part["type"] == "image"]


def read_results(folder: str | Path) -> pd.DataFrame:
    """One row for each task and metric in lmms-eval's result files anywhere below a folder; of repeated runs the latest.

    Columns: model, strategy (with its arguments), task, metric, value, stderr (NaN: not stated), n, kept (measured mean share
    of image tokens that stayed; NaN: not measured), split, prompt (what the task puts around a question), harness.
    """
    # by date; what tasks write themselves is named otherwise
    files = sorted(Path(folder).rglob("[0-9]*_results.json"), key=lambda path: path.name)
    if not files:
        raise FileNotFoundError(f"{folder} holds no <date>_results.json: give it to `lmms-eval` as --output_path")
    rows = pd.DataFrame([row for path in files for row in _rows(json.loads(path.read_text(encoding="utf-8")))])
    return rows.drop_duplicates(["model", "strategy", "task", "metric"], keep="last", ignore_index=True)


def _rows(content: dict):
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
                    "kept": measured.get(f"avg_kept {task}", float("nan")),
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
    for (task, harness), found in rows.groupby(["task", "harness"], sort=False):
        first, around = found.iloc[0], json.loads(found.prompt.iloc[0]) or {}
        lines.append({
            "task": task, "source": "lmms-eval's data set", "split": first.split or "not stated",
            "n": "not stated" if pd.isna(first.n) else int(first.n),
            "prompt": f"the question in `{first.prompt}`" if around else "the task's question",
            "ocr": "yes" if around.get("ocr") else "no", "metric": ", ".join(found.metric.unique()),
            "decoding": "as lmms-eval's task sets it", "harness": harness, "basis": "measured",
        })  # fmt: skip
    return lines
