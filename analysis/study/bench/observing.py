"""Every layer observed, beside plain `generate` and beside eager attention whose matrices are all kept: time and memory."""

from __future__ import annotations

import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch

from dyrate.cost import Shape
from dyrate.engine import observe
from dyrate.recording import Recorder
from dyrate.segments import find_segments
from study.bench.machine import name_of_device, seconds_of
from study.bench.runs import IMAGE, build, in_turn, peak_bytes, request

MODES = ("plain", "observed", "eager")


def generate(model, mode: str, new_tokens: int):
    """One answer of `new_tokens` tokens; what a mode collects is returned, so that it counts as memory in use."""
    settings = request(model, 1, new_tokens)
    with torch.inference_mode():
        if mode == "plain":
            return model.generate(**settings)
        if mode == "observed":
            recorder = Recorder(find_segments(settings["input_ids"], IMAGE))
            with observe(model, recorder):
                model.generate(**settings)
            return recorder
        model.set_attn_implementation("eager")
        try:
            return model.generate(**settings, output_attentions=True)
        finally:
            model.set_attn_implementation("sdpa")


def observing(shape: Shape, new_tokens: int, repeats: int) -> None:
    """Measure and print every mode: its time, and the memory that it takes beyond a plain run's."""
    model = build(shape)
    timings = in_turn({mode: partial(_timed, model, mode) for mode in MODES}, new_tokens, repeats)
    memory = {mode: _in_own_process(extra_memory, shape, new_tokens, mode) for mode in MODES}
    sizes = f"{shape.patches - 1} image tokens, {new_tokens} new tokens, {shape.layers} layers x {shape.width}"
    print(f"{sizes}, {name_of_device()}")
    print(f"{'':10}{'seconds':>10}{'x plain':>10}{'extra MiB':>12}{'x eager':>10}")
    for mode in MODES:
        slower = statistics.median(t / p for t, p in zip(timings[mode], timings["plain"], strict=True))
        share = memory[mode] / memory["eager"] if memory["eager"] else float("nan")
        print(f"{mode:10}{statistics.median(timings[mode]):10.3f}{slower:10.2f}{memory[mode]:12.1f}{share:10.3f}")


def _timed(model, mode: str, new_tokens: int) -> float:
    return seconds_of(lambda: generate(model, mode, new_tokens))


def extra_memory(shape: Shape, new_tokens: int, mode: str) -> float:
    """MiB by which a mode's peak lies above a plain run's, in this process."""
    model = build(shape)
    generate(model, "plain", new_tokens)
    before = peak_bytes()
    collected = generate(model, mode, new_tokens)
    extra = (peak_bytes() - before) / 2**20
    del collected
    return extra


def _in_own_process(run, *given):
    """What a function returns where nothing else has run, for a process's peak of memory never falls again."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run, *given).result()
