"""What observing costs: a table of times and memory, as ratios measured in one run.

    python -m dyrate.bench                       # 576 image tokens, 64 new tokens, every layer observed

The model has random weights: neither time nor memory depends on them.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dyrate.attention import _Recorder
from dyrate.engine import observe
from dyrate.segments import find_segments

MODES = ("plain", "observed", "eager")
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in dict(layers=8, width=512, heads=8, side=24, new_tokens=64, repeats=5).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--memory-of", choices=MODES, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
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
    sizes = [f"--{k.replace('_', '-')}={v}" for k, v in vars(given).items() if k not in ("memory_of", "repeats")]
    memory = {}
    for mode in MODES:
        command = [sys.executable, "-m", "dyrate.bench", *sizes, "--memory-of", mode]
        memory[mode] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{given.side**2} image tokens, {given.new_tokens} new tokens, {given.layers} layers x {given.width}, {device}")
    print(f"{'':10}{'seconds':>10}{'x plain':>10}{'extra MiB':>12}{'x eager':>10}")
    for mode in MODES:
        ratio = statistics.median(t / p for t, p in zip(times[mode], times["plain"], strict=True))
        share = memory[mode] / memory["eager"] if memory["eager"] else float("nan")
        print(f"{mode:10}{statistics.median(times[mode]):10.3f}{ratio:10.2f}{memory[mode]:12.1f}{share:10.3f}")


if __name__ == "__main__":
    main()
