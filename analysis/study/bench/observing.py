"""Every layer observed, beside plain `generate` and beside eager attention whose matrices are all kept: time and memory."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import torch

from dyrate.recording import Recorder
from study.bench.runs import AFTER, BEFORE, IMAGE, build, device_name, peak_bytes, small_shape, synchronize
from dyrate.engine import observe
from dyrate.segments import find_segments

MODES = ("plain", "observed", "eager")
SIZES = ("layers", "width", "heads", "side", "new_tokens")


def generate(model, mode: str, new_tokens: int):
    """One answer of `new_tokens` tokens; what a mode collects is returned, so that it counts as memory in use."""
    side = model.config.vision_config.image_size
    ids = torch.tensor([[*BEFORE, *[IMAGE] * model.config.image_seq_length, *AFTER]], device=model.device)
    settings = dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new_tokens,
        max_new_tokens=new_tokens, pixel_values=torch.zeros(1, 3, side, side, device=model.device, dtype=model.dtype),
    )  # fmt: skip
    with torch.inference_mode():
        if mode == "plain":
            return model.generate(**settings)
        if mode == "observed":
            recorder = _Recorder(find_segments(ids, IMAGE), image_rows=False)
            with observe(model, recorder):
                model.generate(**settings)
            return recorder
        model.set_attn_implementation("eager")
        try:
            return model.generate(**settings, output_attentions=True, return_dict_in_generate=True)
        finally:
            model.set_attn_implementation("sdpa")


def observing(given) -> None:
    model = build(small_shape(given.layers, given.width, given.heads, given.side))
    if given.memory_of:
        generate(model, "plain", given.new_tokens)  # what any run needs
        before = peak_bytes()
        kept = generate(model, given.memory_of, given.new_tokens)
        print((peak_bytes() - before) / 2**20)
        del kept
        return
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for mode in MODES:
        generate(model, mode, 4)
    for _ in range(given.repeats):  # in turn, so that the machine's moods meet every mode
        for mode in MODES:
            begun = time.perf_counter()
            generate(model, mode, given.new_tokens)
            synchronize()
            times[mode].append(time.perf_counter() - begun)
    sizes = [f"--{name.replace('_', '-')}={getattr(given, name)}" for name in SIZES]
    memory = {}
    for mode in MODES:
        command = [sys.executable, "-m", "study.bench", "observe", *sizes, "--memory-of", mode]
        memory[mode] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    print(f"{given.side**2} image tokens, {given.new_tokens} new tokens, {given.layers} layers x {given.width}, {device_name()}")
    print(f"{'':10}{'seconds':>10}{'x plain':>10}{'extra MiB':>12}{'x eager':>10}")
    for mode in MODES:
        ratio = statistics.median(t / p for t, p in zip(times[mode], times["plain"], strict=True))
        share = memory[mode] / memory["eager"] if memory["eager"] else float("nan")
        print(f"{mode:10}{statistics.median(times[mode]):10.3f}{ratio:10.2f}{memory[mode]:12.1f}{share:10.3f}")
