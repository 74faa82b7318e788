"""How long a chapter takes and how much memory it needs, estimated before it runs.

The ledger (`dyrate.cost`) counts multiply-accumulates and bytes of what a profile asks for; `study.bench.machine`
measures what the device does of each in a second, and how long Python takes for a layer, below which no small batch falls.
Every answer is taken to be as long as it may be.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Sequence
from dataclasses import dataclass

from dyrate.cost import Shape, decode_macs, prefill_macs, read_bytes, tower_macs
from dyrate.strategies import STRATEGIES
from dyrate.training import Settings
from study.bench.machine import Machine
from study.compared import methods
from study.examples import SCENES
from study.memory import parameters, to_answer, to_train

TEXT = 56  # text tokens of a prompt, as in the efficiency chapter
CALIBRATION = 7  # rounds at most, of a trained predictor
CONSTANTS, GRADIENT = 12, 12  # constant rates in chapter 2, and those that the gradient's prediction is compared at
CONTROLS, FEW = 9, 3  # in chapter 7 (one less for photographs), and under its other conditions
LARGE = 1e9  # parameters that want a GPU
CONTEXT = 2**30  # bytes that a GPU's libraries take


@dataclass(frozen=True)
class Work:
    """What a chapter does. answers: generated, at most `longest` tokens each, `batch` rows together (beams count).

    teacher_forced: sequences run forward once; trained: forward and backward, `train_batch` together; held: sequences whose
    hidden states stay in memory for training.
    """

    answers: int = 0
    longest: int = 64
    batch: int = 1
    teacher_forced: int = 0
    trained: int = 0
    train_batch: int = 1
    held: int = 0
    checkpointing: bool = False


def work(chapter: str, values: dict, predictors: Sequence[str]) -> Work:
    """What a chapter (its notebook's name) does with these parameters.

    predictors: names of those that lie in its folder, or will.
    """
    v = values
    common = {"longest": v.get("max_new_tokens", 0), "batch": v.get("batch_size", 1)}
    per_set = v.get("n", 0) * len(v.get("tasks", [0]))
    if chapter.startswith("01"):
        return Work(answers=per_set, **common)
    if chapter.startswith("02"):
        learn, check, unseen = (v[key] * len(v["tasks"]) for key in ("n_train", "n_validation", "n_test"))
        trained = len(v["budgets"]) * v["seeds"]
        return Work(
            answers=CALIBRATION * check + trained * (CALIBRATION * check + unseen), **common,
            teacher_forced=v["seeds"] * learn + (CONSTANTS + GRADIENT + trained + 1) * unseen, held=learn,
            trained=(trained + 1) * v["steps"] * v["batch"] * v["accumulate"], train_batch=v["batch"],
            checkpointing=v["checkpointing"],
        )  # fmt: skip
    if chapter.startswith("03"):
        compared = 1 + len(methods(v["strategies"], scenes=v["source"] in SCENES)) * len(v["retentions"])
        trained = sum(len(fnmatch.filter(predictors, pattern)) for pattern in v["patterns"])
        return Work(answers=per_set * (compared + trained), **common)
    if chapter.startswith("04"):
        lines = {_answers(line): line for line in v["ablations"]}.values()
        beams = [line.get("generate", {}).get("num_beams", 1) for line in lines]
        training = [Settings(**line["train"]) for line in lines if "train" in line]
        learn, check = (v[key] * len(v["learn_tasks"]) for key in ("n_train", "n_validation"))
        return Work(
            answers=per_set * (len(v["constant_retentions"]) + sum(beams)) + len(training) * CALIBRATION * check,
            longest=v["max_new_tokens"], batch=v["batch_size"] * max(beams), teacher_forced=len(training) * learn,
            trained=sum(t.steps * t.batch * t.accumulate for t in training), held=learn if training else 0,
            train_batch=max((t.batch for t in training), default=1), checkpointing=all(t.checkpointing for t in training),
        )  # fmt: skip
    if chapter.startswith("06"):
        return Work(answers=v["n"], **common)
    if chapter.startswith("07"):
        seeds = [len(fnmatch.filter(predictors, f"{start}*")) for start in (v["prefix"], *v["others"].values())]
        watched = sum(seeds) * v["n_validation"] * len(v["tasks"])
        controls = CONTROLS if v["source"] in SCENES else CONTROLS - 1
        return Work(answers=watched + (sum(seeds) + controls + FEW * len(v["others"])) * per_set, **common)
    return Work()


def _answers(line: dict) -> str:
    """What decides the answers of an ablation: equal lines are measured once."""
    if "train" in line:
        what = Settings(**line["train"])
    else:
        what = line.get("predictor") or STRATEGIES[line["strategy"]](**line.get("fields", {}))
    return f"{what} {json.dumps(line.get('generate', {}), sort_keys=True)}"


def seconds(found: Work, shape: Shape, machine: Machine) -> float:
    """How long the work takes: each batch and step by what bounds it, arithmetic, memory or Python."""
    prompt, itemsize = TEXT + max(0, shape.patches - 1), machine.itemsize
    rows = min(found.batch, found.answers)

    def bound(macs: float, size: float, passes: int = 1) -> float:
        return max(machine.seconds(macs, size), passes * shape.layers * machine.seconds_per_layer)

    whole = prefill_macs(shape, [prompt] * shape.layers) + tower_macs(shape)
    middle = [prompt + found.longest // 2] * shape.layers
    total = 0.0
    if found.answers:
        step = bound(rows * decode_macs(shape, middle), read_bytes(shape, middle, itemsize, rows))
        total += found.answers / rows * (bound(rows * whole, 0) + max(0, found.longest - 1) * step)
    total += found.teacher_forced * bound(whole, 0)
    if found.trained:  # the weights are frozen: backward costs what forward does, twice in attention
        passes = 3 if found.checkpointing else 2
        total += found.trained / found.train_batch * bound(passes * found.train_batch * whole, 0, passes=3)
    return total


def memory(found: Work, shape: Shape, itemsize: int = 2) -> float:
    """Bytes that the work needs: the larger of answering and training (`study.memory`)."""
    image = max(0, shape.patches - 1)
    rows = min(found.batch, found.answers)
    needs = [to_answer(shape, [TEXT + image] * shape.layers, found.longest, rows, itemsize)]
    if found.trained:
        how = {"batch": found.train_batch, "examples": found.held, "checkpointing": found.checkpointing, "itemsize": itemsize}
        needs.append(to_train(shape, image, TEXT, found.longest, **how))
    return max(sum(need.values()) for need in needs) + CONTEXT


def check_fits(found: Work, shape: Shape, machine: Machine, model: str) -> None:
    """Raises ValueError that says what is missing and what to change, if the machine cannot do the work."""
    if parameters(shape) > LARGE and machine.memory == float("inf"):
        raise ValueError(
            f"{model} has {parameters(shape) / 1e9:.1f} billion parameters and needs a GPU, and none is found here: run where "
            "there is one, or take the profile pocket"
        )
    need, weights = memory(found, shape, machine.itemsize), parameters(shape) * machine.itemsize
    if need > machine.memory:
        raise ValueError(
            f"{model} needs about {need / 2**30:.0f} GiB here, {weights / 2**30:.0f} of them for its weights, and {machine.name} "
            f"has {machine.memory / 2**30:.0f}: lower batch_size (now {found.batch}) or n_train, take a larger GPU, or several "
            'with device_map: "auto"'
        )
