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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from weakref import WeakKeyDictionary

import pandas as pd
import torch
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

import dyrate
from dyrate.atomic import write_whole
from dyrate.cost import ledger, shape_of
from dyrate.data import Example, Examples
from dyrate.distributed import this_process
from dyrate.generation import answer_batch, encode
from dyrate.strategy import Strategy
from study.examples import SceneExample
from study.pocket import scenes


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
    task, and is the same in every run, so that an interrupt changes no number. Under `accelerate launch` each process takes
    its part of what is missing, and all return the whole table. seed: of sampling.
    """
    state = this_process()
    batches = _batches(examples, batch_size)
    base = {"model": _model(model), "code": _code(), "versions": {p: version(p) for p in ("torch", "transformers")}}
    work: dict[Path, tuple[Condition, list[Example], dict]] = {}
    table: list[tuple[Condition, Path]] = []
    for condition in conditions:
        settings = {"max_new_tokens": max_new_tokens} | condition.settings
        seeded = {"seed": seed} if settings.get("do_sample") else {}
        about = base | {"strategy": described(condition.strategy), "settings": settings | seeded}
        for batch in batches:
            path = _path(Path(store), about | {"examples": [_content(e) for e in batch]})
            work.setdefault(path, (condition, batch, settings | seeded))
            table.append((condition, path))
    if len(lists := set(gather_object([_digest(sorted(str(path) for path in work))]))) > 1:  # before any process writes
        raise RuntimeError(
            f"the processes disagree on what to measure ({', '.join(sorted(lists))}): give each the same model, strategies "
            "and examples, on GPUs of one kind"
        )
    missing = [path for path in work if not path.exists()]
    state.wait_for_everyone()
    mine = missing[state.process_index :: state.num_processes]
    total = sum(len(work[path][1]) for path in mine)
    with tqdm(total=total, desc="answers", disable=not progress or not state.is_main_process) as bar:
        for path in mine:
            condition, batch, settings = work[path]
            bar.set_postfix_str(f"{condition.label}, {batch[0].task}")
            rows = _measure(model, processor, condition.strategy, batch, examples, settings)
            write_whole(path, json.dumps(rows) + "\n")
            bar.update(len(batch))
    state.wait_for_everyone()
    stored = {path: json.loads(path.read_text()) for path in work}
    rows = pd.DataFrame([condition.columns | row for condition, path in table for row in stored[path]])
    return rows.astype({"budget": float, "seed": "Int64"})


def _batches(examples: Iterable[Example], size: int) -> list[list[Example]]:
    """Batches of one task each, in the order of the examples."""
    by_task: dict[str, list[Example]] = {}
    for example in examples:
        by_task.setdefault(example.task, []).append(example)
    return [of_task[i : i + size] for of_task in by_task.values() for i in range(0, len(of_task), size)]


def _measure(model, processor, strategy: Strategy, batch: list[Example], examples: Examples, settings: dict) -> list[dict]:
    """Rows of one batch; an image that cannot be read is reported to `examples` and has none."""
    settings = dict(settings)
    rows = []
    for readable, images in Examples(batch, examples.source, examples.problems).batches(len(batch)):
        if (seed := settings.pop("seed", None)) is not None:  # a batch draws the same tokens in every run
            torch.manual_seed(zlib.crc32(f"{seed} {batch[0].name}".encode()))
        inputs = encode(processor, images, [e.prompt for e in readable])
        answers = answer_batch(model, processor, inputs, strategy, readable, **settings)
        lengths = [len(ids) for ids in answers.tokens]
        beams = len(answers.trace.n_image) // len(readable)
        per_row = [length for length in lengths for _ in range(beams)]
        costs = ledger(shape_of(model), answers.trace, strategy, lengths=per_row, itemsize=model.dtype.itemsize)
        costs = costs.groupby(costs.row // beams).sum().drop(columns="row")
        retention = answers.retention()
        for i, example in enumerate(readable):
            scene = str(example.scene.seed) if isinstance(example, SceneExample) else example.name
            row = {"sample": example.name, "scene": scene, "task": example.task, "answer": answers.texts[i]}
            row |= {"tokens": lengths[i], "retention": float(retention[i].mean())}
            rows.append(row | {k: int(v) for k, v in costs.iloc[i].items()})
    return rows


# -- what decides an answer ------------------------------------------------------------------------------------------------


def _digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _path(store: Path, about: dict) -> Path:
    key = _digest(about)
    return store / key[:2] / f"{key[2:34]}.json"


def _model(model) -> dict:
    kind = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
    return {"weights": weights_digest(model), "config": model.config.to_json_string(), "device": kind}


_WEIGHTS: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def weights_digest(module: nn.Module) -> str:
    """A hash of every parameter and buffer; computed once for each module, whose weights should not change afterwards."""
    if module not in _WEIGHTS:
        digest = hashlib.sha256()
        for name, value in module.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy() if value.ndim else str(value.item()).encode())
        _WEIGHTS[module] = digest.hexdigest()
    return _WEIGHTS[module]


def described(strategy: Strategy) -> str:
    """A strategy with all its fields, the weights of those that have any, and the source of its classes."""
    values = {f.name: getattr(strategy, f.name) for f in fields(strategy)}
    values = {k: weights_digest(v) if isinstance(v, nn.Module) else repr(v) for k, v in values.items()}
    source = [inspect.getsource(cls) for cls in type(strategy).__mro__ if issubclass(cls, Strategy)]
    return _digest([type(strategy).__qualname__, values, source])


@cache
def _code() -> str:
    """A hash of the library, and of what draws the scenes."""
    folder = Path(dyrate.__file__).parent
    files = sorted(folder.rglob("*.py"))
    if folder / "engine" / "pruning.py" not in files:
        raise FileNotFoundError(f"{folder} does not hold the library's source, which decides what a stored answer is worth")
    return _digest([[path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8")] for path in files]
                   + [Path(scenes.__file__).read_text(encoding="utf-8")])  # fmt: skip


@cache
def _content(example: Example) -> list[str]:
    """What of an example decides the answer; of an image that cannot be read, that it cannot."""
    try:
        pixels = hashlib.sha256(example.image().tobytes()).hexdigest()
    except OSError:
        pixels = "unreadable"
    scene = repr(example.scene) if isinstance(example, SceneExample) else ""
    return [example.name, example.task, example.prompt, pixels, scene]
