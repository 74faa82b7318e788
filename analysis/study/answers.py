"""Answers under many conditions, each batch stored when it is finished.

An interrupted run goes on where it stopped, several processes (`accelerate launch`) share the work, chapters share what they
have in common, and all end with the table that one run would give. A stored batch is found by a key of all that decides it:
weights, code, versions, strategy, settings, and the pixels and prompts of its examples.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import zlib
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields
from functools import cache, lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from weakref import WeakKeyDictionary

import pandas as pd
import torch
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm
from transformers import BatchFeature

import dyrate
from dyrate.atomic import write_whole
from dyrate.cost import ledger, shape_of
from dyrate.data import Example, Examples
from dyrate.distributed import this_process
from dyrate.engine import encode_images
from dyrate.generation import answer_batch, encode
from dyrate.strategy import Strategy
from study import controls
from study.examples import SceneExample
from study.pocket import scenes

PACKAGES = ("torch", "transformers", "tokenizers")


@dataclass(frozen=True)
class Condition:
    """One way to answer, with what tells it apart in tables and figures.

    label: unique in a table. method, budget (retention asked for; None: has none), seed (of a trained predictor): columns of
    the results. settings: of `generate`.
    """

    label: str
    strategy: Strategy
    method: str
    budget: float | None = None
    seed: int | None = None
    settings: dict = field(default_factory=dict)

    @property
    def columns(self) -> dict:
        return {"label": self.label, "method": self.method, "budget": self.budget, "seed": self.seed}


def answer_all(
    model, processor, conditions: Sequence[Condition], examples: Examples, store: Path, *, max_new_tokens: int = 64,
    batch_size: int = 32, seed: int = 0, progress: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """One row for each condition and example: answer, tokens, measured retention, multiply-accumulates and bytes.

    Greedy, unless a condition's settings say otherwise. store: folder of finished batches. A batch holds examples of one
    task, and is the same in every run, so that an interrupt changes no number; an image that cannot be used leaves
    `examples` and has no rows. Under `accelerate launch` each process takes its part of what is missing, and all return the
    whole table. seed: of sampling.
    """
    base = surroundings(model, processor)
    settings = [{"max_new_tokens": max_new_tokens} | condition.settings for condition in conditions]
    settings = [s | ({"seed": seed} if s.get("do_sample") else {}) for s in settings]
    about = [base | {"strategy": described(c.strategy), "settings": s} for c, s in zip(conditions, settings, strict=True)]
    work: dict[Path, tuple[Condition, list[Example], dict]] = {}
    paths: list[list[Path]] = [[] for _ in conditions]
    for batch, contents in _batches(examples, batch_size, processor):  # one after the other, so that each is encoded once
        for i, condition in enumerate(conditions):
            path = _path(Path(store), about[i] | {"examples": contents})
            paths[i].append(path)
            work.setdefault(path, (condition, batch, settings[i]))  # of equal conditions, one is measured
    rows_of = _answered(model, processor, work, progress)
    table = [c.columns | row for c, found in zip(conditions, paths, strict=True) for path in found for row in rows_of[path]]
    return pd.DataFrame(table).astype({"budget": float, "seed": "Int64"})


def _answered(model, processor, work: dict[Path, tuple[Condition, list[Example], dict]], progress: bool) -> dict[Path, list]:
    """The rows of each path: read, or measured now and stored, by each process its part."""
    if len(lists := set(gather_object([digest(sorted(map(str, work)))]))) > 1:  # before any process writes
        raise RuntimeError(
            f"the processes disagree on what to measure ({', '.join(sorted(lists))}): give each the same model, strategies "
            "and examples, on GPUs of one kind"
        )
    state = this_process()
    missing = [path for path in work if not path.exists()]
    state.wait_for_everyone()  # all have looked: they divide the same rest
    mine, measured = missing[state.process_index :: state.num_processes], []
    inputs_of = lru_cache(maxsize=1)(partial(_inputs, model, processor))
    total = sum(len(work[path][1]) for path in mine)
    with tqdm(total=total, desc="answers", disable=not progress or not state.is_main_process) as bar:
        for path in mine:
            condition, batch, settings = work[path]
            bar.set_postfix_str(f"{condition.label}, {batch[0].task}")
            rows = _measure(model, processor, inputs_of(tuple(batch)), condition.strategy, batch, settings)
            write_whole(path, json.dumps(rows) + "\n")
            measured.append((path, rows))
            bar.update(len(batch))
    found = dict(gather_object(measured))  # from each other, not from files, which a network's file system may show late
    return found | {path: json.loads(path.read_text(encoding="utf-8")) for path in work if path not in found}


def _batches(examples: Examples, size: int, processor) -> list[tuple[list[Example], list[list[str]]]]:
    """Batches of one task each, in the order of the examples, and what of each example decides its answer."""
    by_task: dict[str, list[tuple[Example, list[str]]]] = {}
    for example, image in examples.readable(processor):
        pixels = hashlib.sha256(image.tobytes()).hexdigest()
        scene = repr(example.scene) if isinstance(example, SceneExample) else ""
        content = [example.name, example.task, example.prompt, f"{image.size} {pixels}", scene]
        by_task.setdefault(example.task, []).append((example, content))
    parts = [found[i : i + size] for found in by_task.values() for i in range(0, len(found), size)]
    return [([example for example, _ in part], [content for _, content in part]) for part in parts]


def _inputs(model, processor, batch: Sequence[Example]) -> tuple[BatchFeature, BatchFeature]:
    """A batch as `encode` makes it, and with the vision tower's output, which is the same under most strategies."""
    inputs = encode(processor, [e.image() for e in batch], [e.prompt for e in batch]).to(model.device, model.dtype)
    with torch.inference_mode():
        return inputs, encode_images(model, inputs)


def _measure(model, processor, inputs, strategy: Strategy, batch: list[Example], settings: dict) -> list[dict]:
    """The rows of one batch. inputs: from `_inputs`. settings: of `generate`, with the seed of sampling."""
    settings = dict(settings)
    if (seed := settings.pop("seed", None)) is not None:  # a batch draws the same tokens in every run
        torch.manual_seed(zlib.crc32(f"{seed} {batch[0].name}".encode()))
    pixels, seen = inputs
    given = pixels if "vision" in strategy.needs else deepcopy(seen)  # `generate` repeats the tower's output in place for beams
    answers = answer_batch(model, processor, given, strategy, batch, **settings)
    lengths = [len(ids) for ids in answers.tokens]
    beams = len(answers.trace.n_image) // len(batch)
    per_row = [length for length in lengths for _ in range(beams)]
    costs = ledger(shape_of(model), answers.trace, strategy, lengths=per_row, itemsize=model.dtype.itemsize)
    costs = costs.groupby(costs.row // beams).sum().drop(columns="row")
    rows = []
    for i, (example, retention) in enumerate(zip(batch, answers.retention(), strict=True)):
        scene = str(example.scene.seed) if isinstance(example, SceneExample) else example.name
        row = {"sample": example.name, "scene": scene, "task": example.task, "answer": answers.texts[i]}
        row |= {"tokens": lengths[i], "retention": float(retention.mean())}
        rows.append(row | {k: int(v) for k, v in costs.iloc[i].items()})
    return rows


# -- what decides an answer ------------------------------------------------------------------------------------------------


def surroundings(model, processor) -> dict:
    """What decides an answer beside its strategy, its settings and its example: model, code and versions."""
    return {"model": _model(model, processor), "code": _code(), "versions": {p: version(p) for p in PACKAGES}}


def digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _path(store: Path, about: dict) -> Path:
    key = digest(about)
    return store / key[:2] / f"{key[2:34]}.json"


def _model(model, processor) -> dict:
    kind = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
    return {
        "weights": weights_digest(model), "config": model.config.to_json_string(), "device": kind,
        "attention": model.config._attn_implementation, "generation": model.generation_config.to_json_string(),
        "processor": [processor.to_json_string(), processor.chat_template, processor.tokenizer.get_vocab()],
    }  # fmt: skip


_WEIGHTS: WeakKeyDictionary[nn.Module, tuple[list, str]] = WeakKeyDictionary()


def weights_digest(module: nn.Module) -> str:
    """A hash of every parameter and buffer; computed again only after one of them was changed in place or replaced."""
    state = module.state_dict()
    versions = [(value.data_ptr(), value._version) for value in state.values()]
    if module not in _WEIGHTS or _WEIGHTS[module][0] != versions:
        digest = hashlib.sha256()
        for name, value in state.items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        _WEIGHTS[module] = versions, digest.hexdigest()
    return _WEIGHTS[module][1]


def described(strategy: Strategy) -> str:
    """A hash of a strategy's class and fields, with weights, and of the source of its classes."""
    values = {f.name: _described(getattr(strategy, f.name)) for f in fields(strategy)}
    source = [inspect.getsource(cls) for cls in type(strategy).__mro__ if issubclass(cls, Strategy)]
    return digest([type(strategy).__qualname__, values, source])


def _described(value) -> str:
    """A field's value in full; of a module its weights and plain attributes, but for how it came to be."""
    if isinstance(value, nn.Module):
        plain = {k: v for k, v in vars(value).items() if not k.startswith("_") and k not in ("about", "training")}
        return f"{plain!r} {weights_digest(value)}"
    return repr(value.tolist() if hasattr(value, "tolist") else value)  # the repr of a long array leaves out its middle


@cache
def _code() -> str:
    """A hash of the library, and of what here measures, knows more than a model, and draws scenes."""
    folder = Path(dyrate.__file__).parent
    files = sorted(folder.rglob("*.py"))
    if folder / "engine" / "pruning.py" not in files:
        raise FileNotFoundError(f"{folder} does not hold the library's source, which decides what a stored answer is worth")
    files += [Path(module.__file__) for module in (controls, scenes)] + [Path(__file__)]
    return digest([[path.name, path.read_text(encoding="utf-8")] for path in files])
