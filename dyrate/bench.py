"""What observing and dropping cost and save: tables of ratios, each measured in one run.

    python -m dyrate.bench prune                 # 576 image tokens: prefill, decode, cache, against the limit
    python -m dyrate.bench observe               # every layer observed: time and memory

The model has random weights: neither time nor memory depends on them. The limit is the same model fed, natively, only as
many tokens as a strategy keeps; `realised` is (plain - strategy) / (plain - limit).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, StoppingCriteria

import dyrate
from dyrate.attention import _Recorder
from dyrate.engine import observe
from dyrate.files import write_whole
from dyrate.metrics import bootstrap
from dyrate.segments import find_segments
from dyrate.strategy import kept_count

MODES = ("plain", "observed", "eager")
SIZES = ("layers", "width", "heads", "side", "new_tokens")
IMAGE = 60


def build(layers: int, width: int, heads: int, side: int) -> LlavaForConditionalGeneration:
    """A random LLaVA whose images take side * side tokens."""
    torch.manual_seed(0)
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=14 * side, patch_size=14
        ),
        text_config=LlamaConfig(
            vocab_size=1000, hidden_size=width, intermediate_size=round(2.7 * width), num_hidden_layers=layers,
            num_attention_heads=heads, **ids,
        ),
        image_token_index=IMAGE, image_seq_length=side * side,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model.to("cuda", torch.bfloat16) if torch.cuda.is_available() else model


def generate(model, mode: str, new_tokens: int, side: int):
    """One answer of `new_tokens` tokens; what a mode collects is returned, so that it counts as memory in use."""
    ids = torch.tensor([[1, *range(5, 40), *[IMAGE] * side * side, *range(5, 25)]], device=model.device)
    pixels = torch.zeros(1, 3, 14 * side, 14 * side, device=model.device, dtype=model.dtype)
    settings = dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, do_sample=False,
        min_new_tokens=new_tokens, max_new_tokens=new_tokens,
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


def peak_megabytes() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would carry over the peak of the process that started this one
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Clock(StoppingCriteria):
    """Notes the time at which each token is there."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, input_ids, scores, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def timed(model, n_image: int, batch: int, new_tokens: int, strategy=None, side: int = 24) -> tuple[float, float, int]:
    """Seconds of the prefill with the vision tower, seconds of a decode step, cached bytes at the end.

    n_image: side * side for a prompt with its image; fewer for the limit: so many plain tokens in its place, the tower run
    beside.
    """
    device, native = model.device, n_image < side * side
    middle = [7] * n_image if native else [IMAGE] * n_image
    ids = torch.tensor([[1, *range(5, 40), *middle, *range(5, 25)]] * batch, device=device)
    pixels = torch.zeros(batch, 3, 14 * side, 14 * side, device=device, dtype=model.dtype)
    clock = Clock()
    settings = dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new_tokens,
        max_new_tokens=new_tokens, stopping_criteria=[clock], suppress_tokens=[IMAGE], return_dict_in_generate=True,
    )  # fmt: skip
    with torch.inference_mode():
        begun = time.perf_counter()
        if native:
            model.get_image_features(pixels)
            out = model.generate(**settings)
        elif strategy is None:
            out = model.generate(**settings, pixel_values=pixels)
        else:
            with strategy(model):
                out = model.generate(**settings, pixel_values=pixels)
    steps = np.diff(clock.times)
    held = sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in out.past_key_values.layers)
    return clock.times[0] - begun, float(np.median(steps)) if len(steps) else float("nan"), held


def realised(plain: list[float], pruned: list[float], limit: list[float]) -> dict:
    """Share of the ideal saving, with its bootstrap interval over repeats; paired by repeat, medians of each."""
    rows = np.array([plain, pruned, limit]).T

    def share(x, axis):
        full, mine, best = np.median(x, axis=axis)
        return (full - mine) / (full - best)

    found = bootstrap(rows, share, resamples=1000)
    return {k: float(found[k]) for k in ("value", "low", "high")} | {"n": int(found["n"])}


def prune(given) -> None:
    """Prefill at batch 1 and decode at batch 8, plain, pruned and native, in turn."""
    model = build(given.layers, given.width, given.heads, given.side)
    n = given.side**2
    cases = {
        "keep1": (1, given.new_tokens, 0.0, dyrate.FastV(rate=0.0)),
        "prefill_r50": (1, 1, 0.5, dyrate.FastV(rate=0.5)),
        "prefill_r90": (1, 1, 0.9, dyrate.FastV(rate=0.9)),
        "decode_b8_r90": (8, 17, 0.9, dyrate.FastV(rate=0.9)),
        "decode_b8_r90_each_step": (8, 17, 0.9, dyrate.LinearAnneal(start=0.9, end=0.95, steps=100)),
        "decode_b8_r90_hide": (8, 17, 0.9, dyrate.Constant(rate=0.9, residency="hide")),
    }
    rows, results = [], {}
    for name, (batch, new_tokens, rate, strategy) in cases.items():
        kept = kept_count(n, 1 - rate)
        runs = {"plain": [], "strategy": [], "limit": []}
        ways = {"plain": (n, None), "strategy": (n, strategy)} | ({"limit": (kept, None)} if rate else {})
        for way in ways.values():
            timed(model, way[0], batch, min(4, new_tokens), way[1], given.side)
        for _ in range(given.repeats * (3 if batch == 1 else 1)):  # short runs are noisier
            for key, (tokens, how) in ways.items():
                runs[key].append(timed(model, tokens, batch, new_tokens, how, given.side))
        column = 0 if "prefill" in name else 1
        if rate == 0:
            whole = [[prefill + step * (new_tokens - 1) for prefill, step, _ in runs[key]] for key in ("plain", "strategy")]
            ratio = bootstrap(np.array(whole).T, lambda x, axis: np.divide(*np.median(x, axis=axis)[::-1]), resamples=1000)
            results["keep1_over_plain"] = {k: float(ratio[k]) for k in ("value", "low", "high")} | {"n": ratio["n"]}
        else:
            results[f"{name}_realised"] = realised(*([run[column] for run in runs[key]] for key in runs))
        for key, found in runs.items():
            if found:
                median = np.median(found, axis=0)
                rows.append([name, key, 1000 * median[0], 1000 * median[1], median[2] / 2**20])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{n} image tokens, {given.layers} layers x {given.width}, first pruned layer 2, {device}")
    print(f"{'case':26}{'way':10}{'prefill ms':>12}{'ms / token':>12}{'cache MiB':>12}")
    for name, key, prefill, step, held in rows:
        print(f"{name:26}{key:10}{prefill:12.1f}{step:12.2f}{held:12.1f}")
    bars = {"keep1_over_plain": 1.05, "prefill_r50_realised": 0.9, "prefill_r90_realised": 0.9, "decode_b8_r90_realised": 0.75}
    for name, found in results.items():
        bar = bars.get(name)
        met = "" if bar is None else f"  bar {bar}: {'met' if (found['value'] <= bar) == (name[0] == 'k') else 'missed'}"
        print(f"{name:36}{found['value']:7.3f}  ({found['low']:.3f} to {found['high']:.3f}, n = {found['n']}){met}")
    if given.out:
        about = {"device": device, "image_tokens": n, "layers": given.layers, "width": given.width, "torch": torch.__version__}
        names = {"prefill_r50_realised": "prefill_realised_r50", "prefill_r90_realised": "prefill_realised_r90"}
        content = {names.get(k, k): v for k, v in results.items()}
        table = [dict(zip(("case", "way", "prefill_ms", "ms_per_token", "cache_mib"), row, strict=True)) for row in rows]
        write_whole(given.out, json.dumps({"about": about, "bars": bars, "results": content, "table": table}, indent=1) + "\n")


def observing(given) -> None:
    model = build(given.layers, given.width, given.heads, given.side)
    if given.memory_of:
        generate(model, "plain", given.new_tokens, given.side)  # what any run needs
        before = peak_megabytes()
        kept = generate(model, given.memory_of, given.new_tokens, given.side)
        print(peak_megabytes() - before)
        del kept
        return
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for mode in MODES:
        generate(model, mode, 4, given.side)
    for _ in range(given.repeats):  # in turn, so that the machine's moods meet every mode
        for mode in MODES:
            begun = time.perf_counter()
            generate(model, mode, given.new_tokens, given.side)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[mode].append(time.perf_counter() - begun)
    sizes = [
        f"--{k.replace('_', '-')}={v}" for k, v in vars(given).items() if k in ("layers", "width", "heads", "side", "new_tokens")
    ]
    memory = {}
    for mode in MODES:
        command = [sys.executable, "-m", "dyrate.bench", "observe", *sizes, "--memory-of", mode]
        memory[mode] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{given.side**2} image tokens, {given.new_tokens} new tokens, {given.layers} layers x {given.width}, {device}")
    print(f"{'':10}{'seconds':>10}{'x plain':>10}{'extra MiB':>12}{'x eager':>10}")
    for mode in MODES:
        ratio = statistics.median(t / p for t, p in zip(times[mode], times["plain"], strict=True))
        share = memory[mode] / memory["eager"] if memory["eager"] else float("nan")
        print(f"{mode:10}{statistics.median(times[mode]):10.3f}{ratio:10.2f}{memory[mode]:12.1f}{share:10.3f}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("prune", "observe"))
    parser.add_argument("--layers", type=int, help="default: 32 for prune, as LLaVA-1.5-7B has; 8 for observe")
    parser.add_argument("--width", type=int, help="default: 256 for prune, 512 for observe")
    for name, value in dict(heads=8, side=24, new_tokens=64, repeats=5).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--out", type=Path, help="also write prune's results as JSON")
    parser.add_argument("--memory-of", choices=MODES, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    pruning = given.what == "prune"
    given.layers, given.width = given.layers or (32 if pruning else 8), given.width or (256 if pruning else 512)
    (prune if pruning else observing)(given)


if __name__ == "__main__":
    main()
