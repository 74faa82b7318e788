"""Seconds of an answer under every strategy at several retention ratios, all of one length, on a real model and real prompts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

import dyrate
from dyrate.atomic import write_whole
from dyrate.generation import answer_batch, encode
from dyrate.models import describe
from dyrate.strategy import Strategy
from study import predictors
from study.bench import results
from study.bench.machine import name_of_device, synchronize
from study.bench.runs import in_turn
from study.compared import RETENTIONS, lineup
from study.examples import examples

TASK = "description"


def latency(
    name: str, *, batch: int, new_tokens: int, repeats: int, source: str = "pocket", trained: Sequence[Path] = (),
    retentions: Sequence[float] = RETENTIONS, out: Path | None = None,
) -> list[dict]:  # fmt: skip
    """Measure and print one line a strategy and retention ratio, relative to no pruning; out: also write them there, as JSON.

    Tower, prefill, decode and what a strategy does itself; every answer has `new_tokens` tokens, so that a strategy whose answers
    are longer is not slower by that. trained: folders of predictors, compared as DyRate.
    """
    model, processor = dyrate.load(name)
    about = describe(model)
    prompts = examples(source, batch, tasks=[TASK])
    inputs = encode(processor, [e.image() for e in prompts], [e.prompt for e in prompts])
    conditions = lineup(retentions, about["layers"]) + [predictors.condition_of(folder) for folder in trained]
    model.generation_config.eos_token_id = None  # no answer ends before the others
    timed = partial(seconds, model, processor, inputs, list(prompts))
    ways = {c.label: partial(_pair, timed, conditions[0].strategy, c.strategy) for c in conditions}
    runs = in_turn(ways, new_tokens, repeats)
    rows = [
        {"label": c.label, "method": c.method, "budget": c.budget} | results.ratio(*zip(*runs[c.label], strict=True))
        for c in conditions
    ]
    about |= {"model": name, "device": name_of_device(), "torch": torch.__version__, "batch": batch, "new_tokens": new_tokens}
    show(about, rows)
    if out:
        write_whole(out, json.dumps({"about": about | {"repeats": repeats}, "table": rows}, indent=1) + "\n")
    return rows


def _pair(timed: Callable[[Strategy, int], float], plain: Strategy, strategy: Strategy, new_tokens: int) -> tuple[float, float]:
    """Seconds under a strategy, and under the plain one just before, so that the machine's noise meets both."""
    before = timed(plain, new_tokens)
    return timed(strategy, new_tokens), before


def seconds(model, processor, inputs, prompts: list, strategy: Strategy, new_tokens: int) -> float:
    """Of one batch of answers with so many tokens each, attaching the strategy included."""
    synchronize()
    begun = time.perf_counter()
    length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    answer_batch(model, processor, inputs, strategy, prompts, **length)
    synchronize()
    return time.perf_counter() - begun


def show(about: dict, rows: list[dict]) -> None:
    """Print the ratios with their intervals over repeats."""
    print("time relative to no pruning: {model}, {layers} layers, batch {batch}, {new_tokens} tokens, {device}".format(**about))
    for row in rows:
        print("{label:32}{value:8.2f} ({low:.2f} to {high:.2f})".format(**row))
