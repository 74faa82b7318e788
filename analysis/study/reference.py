"""The reference run of a laboratory: many answers, measured once, whose rows are committed and drawn from.

    python -m study.reference measure --model smol --n 100 --out build/reference/smol     # a GPU: minutes
    python -m study.reference score --from build/reference/smol --out data/results/smol   # needs Java, no model
    python -m study.reference attention --model smol --out data/results/smol              # two cores: minutes

A part is one question to the laboratory. Its rows are written when it is finished; batches are stored, so that an interrupted
run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from PIL import Image

import dyrate
from dyrate.atomic import write_whole
from dyrate.data import Examples
from dyrate.models import describe
from dyrate.recording import record_examples
from dyrate.strategies import STRATEGIES
from study.answers import Condition, answer_all
from study.compared import LATE, LATE_METHODS, METHODS, QUESTIONS, RETENTIONS, scanned_layers
from study.examples import TASKS, SceneExample, examples
from study.pocket.language import PROMPTS
from study.pocket.scenes import compose, render
from study.predictors import condition_of
from study.rows import read_answers, write_rows
from study.scores import scored, slot_scores

SCANNED = ("description", "qa_two_step", "qa_total", "qa_long_word")
COMPARED = ("description", "backwards", "look_late", "qa_long_word", "qa_two_step")  # DyRate against constants
SLOTS = ("object", "colour", "count", "place")


class OtherPicture(SceneExample):
    """The same question about another scene's picture: what a model answers that guesses."""

    def image(self) -> Image.Image:
        return render(compose(self.scene.seed + 500_000_000, long_words=True)).image


@dataclass(frozen=True)
class Part:
    """Some conditions on some tasks. n: scenes a task, as a multiple of the run's."""

    name: str
    conditions: Sequence[Condition]
    tasks: Sequence[str]
    n: float = 1
    other_picture: bool = False


def parts(n_layers: int, retentions: Sequence[float] = RETENTIONS) -> list[Part]:
    """What the reference run measures of a laboratory with so many decoder layers; the most important first.

    retentions: at which methods are compared.
    """
    full = Condition("Full", STRATEGIES["Full"](), "Full")
    blind = Condition("no image", STRATEGIES["RandomPrune"](rate=1.0, first_pruned_layer=0), "no image", 0.0)
    tenth = _at("RandomPrune", 0.1, n_layers, 2)
    scan = [
        _at(name, x, n_layers, k) for x in RETENTIONS[1:] for k in scanned_layers(n_layers) for name in ("FastV", "RandomPrune")
    ]
    methods = [_at(name, x, n_layers) for x in retentions for name in METHODS]
    late = [_at(name, x, n_layers) for x in retentions for name in LATE_METHODS]
    return [
        Part("unpruned", [full], TASKS, n=4),
        Part("other_picture", [full], TASKS, other_picture=True),
        Part("needs_image", [full, blind, tenth], TASKS),
        Part("layers", [full, *scan], SCANNED),
        Part("methods", [full, *methods], ("caption", "description")),
        Part("questions", [full, *methods], QUESTIONS),
        Part("late", [full, *late], LATE),
    ]


def _at(name: str, retention: float, n_layers: int, layer: int | None = None) -> Condition:
    fields = {} if layer is None else {"first_pruned_layer": layer}
    label = f"{name} {retention:g}" + ("" if layer is None else f" from layer {layer}")
    return Condition(label, STRATEGIES[name].at(retention, n_layers, **fields), name, retention)


def measure(
    model: str, n: int, out: Path, *, store: Path, names: Sequence[str] = (), retentions: Sequence[float] = RETENTIONS,
    batch_size: int = 100,
) -> None:  # fmt: skip
    """Measure the parts (all, or those named) in float32 and write `<part>.csv.gz` and `about.json` into `out`."""
    loaded, processor = dyrate.load(model, dtype=torch.float32)
    about = describe(loaded)
    out.mkdir(parents=True, exist_ok=True)
    for part in parts(about["layers"], retentions):
        if names and part.name not in names:
            continue
        asked = _asked(part, n)
        rows = answer_all(loaded, processor, part.conditions, asked, store, max_new_tokens=100, batch_size=batch_size)
        layer = {c.label: c.strategy.first_pruned_layer for c in part.conditions}
        rows = rows.assign(first_pruned_layer=rows.label.map(layer))
        write_rows(out / f"{part.name}.csv.gz", rows)
        record = {"model": model, "n": n, **about, "torch": torch.__version__}
        write_whole(out / "about.json", json.dumps(record, indent=1) + "\n")


def attention(model: str, n: int, out: Path, *, batch_size: int = 20) -> None:
    """Record the attention of `n` unpruned descriptions, and write how its measures change over an answer, by layer."""
    from study.chapters.attention import layer_trends, trends  # needs what draws pages

    loaded, processor = dyrate.load(model, dtype=torch.float32)
    recordings = record_examples(
        loaded, processor, examples("laboratories", n, tasks=["description"]), max_new_tokens=100, batch_size=batch_size
    )
    changes = pd.concat([trends(recordings), layer_trends(recordings)], ignore_index=True)
    write_whole(out / "reference_attention.csv", changes.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def constants(model: str, n: int, predictors: Path, out: Path, *, store: Path, batch_size: int = 50) -> None:
    """Trained predictors of a model, each beside the constant rate of its own measured mean retention, on the same prompts.

    predictors: a folder of them. Each task has its constant, so that DyRate and its constant keep equally much of every task.
    """
    loaded, processor = dyrate.load(model, dtype=torch.float32)
    asked = examples("laboratories", n, tasks=COMPARED)
    settings = {"max_new_tokens": 100, "batch_size": batch_size}
    trained = [condition_of(folder) for folder in sorted(predictors.glob("evict-*"))]
    if not trained:
        raise FileNotFoundError(f"no predictor in {predictors}: train some with `python analysis/train.py --model {model}`")
    rows = [answer_all(loaded, processor, [Condition("Full", STRATEGIES["Full"](), "Full"), *trained], asked, store, **settings)]
    dynamic = rows[0][rows[0].method == "DyRate"]
    for (label, task, seed), mine in dynamic.groupby(["label", "task", "seed"]):
        constant = STRATEGIES["Constant"](rate=1 - mine.retention.mean())
        alike = Condition(f"constant as {label}", constant, "Constant", mine.budget.iloc[0], int(seed))
        rows.append(answer_all(loaded, processor, [alike], examples("laboratories", n, tasks=[task]), store, **settings))
    table = scored(pd.concat(rows, ignore_index=True), asked).drop(columns=["answer", "scene"])
    write_rows(out / "reference_constants.csv.gz", table, digits=6)


def _asked(part: Part, n: int) -> Examples:
    asked = examples("laboratories", int(n * part.n), tasks=part.tasks)
    if part.other_picture:
        asked.items = [OtherPicture(**vars(e)) for e in asked.items]
    return asked


def score(source: Path, out: Path) -> None:
    """Score the measured parts and write them without their texts: what the pages are drawn from.

    Parts that were scored before stay; `devices` in the record names those that were measured on another device than the rest.
    """
    about = json.loads((source / "about.json").read_text())
    known = json.loads((out / "reference.json").read_text()) if (out / "reference.json").exists() else about
    devices = known.get("devices", {})
    for part in parts(about["layers"]):
        if not (source / f"{part.name}.csv.gz").exists():  # measured elsewhere, or before
            continue
        rows = read_answers(source / f"{part.name}.csv.gz")
        asked = _asked(replace(part, other_picture=False), about["n"])
        rows = _with_slots(scored(rows, asked), asked).drop(columns=["answer", "scene"])
        write_rows(out / f"reference_{part.name}.csv.gz", rows, digits=6)
        devices[part.name] = about["device"]
    elsewhere = {part: device for part, device in devices.items() if device != known["device"]}
    write_whole(out / "reference.json", json.dumps(known | {"devices": elsewhere}, indent=1) + "\n")


def _with_slots(rows: pd.DataFrame, asked: Examples) -> pd.DataFrame:
    """With how many groups a described scene has, and of how many each slot is right."""
    scenes = {e.name: e.scene for e in asked}
    described = rows[rows.task.isin(PROMPTS)]
    right = [slot_scores(scenes[name], text) for name, text in zip(described["sample"], described.answer, strict=True)]
    counts = pd.DataFrame([[len(r), *r.sum(0)] for r in right], described.index, ["groups", *SLOTS])
    return rows.join(counts.astype("Int64"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    measuring = verbs.add_parser("measure", help="answer all prompts of the reference run")
    measuring.add_argument("--model", required=True, help="a laboratory: pocket, pocket-plain, smol, or a folder")
    measuring.add_argument("--n", type=int, default=100, help="scenes a task")
    measuring.add_argument("--out", type=Path, required=True)
    measuring.add_argument("--store", type=Path, default=Path("build/answers"), help="finished batches")
    measuring.add_argument("--parts", dest="names", nargs="+", default=(), help="only these")
    measuring.add_argument("--retentions", type=float, nargs="+", default=RETENTIONS, help="at which methods are compared")
    measuring.add_argument("--batch-size", type=int, default=100)
    recording = verbs.add_parser("attention", help="where attention goes, without pruning")
    recording.add_argument("--model", required=True)
    recording.add_argument("--n", type=int, default=60, help="descriptions")
    recording.add_argument("--out", type=Path, required=True)
    comparing = verbs.add_parser("constants", help="trained predictors, each beside the constant of its retention")
    comparing.add_argument("--model", required=True)
    comparing.add_argument("--predictors", type=Path, required=True, help="a folder of trained predictors")
    comparing.add_argument("--n", type=int, default=100, help="scenes a task")
    comparing.add_argument("--out", type=Path, required=True)
    comparing.add_argument("--store", type=Path, default=Path("build/answers"))
    scoring = verbs.add_parser("score", help="score measured answers")
    scoring.add_argument("--from", dest="source", type=Path, required=True)
    scoring.add_argument("--out", type=Path, required=True)
    given = vars(parser.parse_args(argv))
    {"measure": measure, "attention": attention, "constants": constants, "score": score}[given.pop("verb")](**given)


if __name__ == "__main__":
    main()
