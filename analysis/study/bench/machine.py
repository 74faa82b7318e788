"""What a device does in a second, measured in seconds, and the least time that a forward pass can take on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dyrate.cost import Shape, decode_macs, prefill_macs, read_bytes, tower_macs


@dataclass(frozen=True)
class Machine:
    """What a device does in a second: multiply-accumulates of a large matrix product, bytes read and written by a large copy.

    seconds_per_layer: of Python, for a layer of one step, however narrow. memory: bytes; a CPU's is taken to suffice. itemsize:
    bytes of a number in the type that `dyrate.load` takes there.
    """

    name: str
    macs_per_second: float
    bytes_per_second: float
    seconds_per_layer: float
    memory: float = float("inf")
    itemsize: int = 2

    def seconds(self, macs: float, n_bytes: float) -> float:
        """The roofline: arithmetic or memory, whichever takes longer."""
        return max(macs / self.macs_per_second, n_bytes / self.bytes_per_second)

    def prefill_seconds(self, shape: Shape, tokens: Sequence[int], rows: int, images: int) -> float:
        """At least, for `rows` prompts of which layer i holds `tokens[i]` tokens each, tower included."""
        macs = rows * (prefill_macs(shape, tokens) + tower_macs(shape, images) + shape.width * shape.vocabulary)
        return self.seconds(macs, read_bytes(shape, tokens, self.itemsize, rows))

    def step_seconds(self, shape: Shape, tokens: Sequence[int], rows: int) -> float:
        """At least, for one decode step of `rows` rows."""
        macs = rows * (decode_macs(shape, tokens) + shape.width * shape.vocabulary)
        return self.seconds(macs, read_bytes(shape, tokens, self.itemsize, rows))


def probe(device: str | torch.device | None = None) -> Machine:
    """Measure a device: a matrix product, a copy, and decode steps of a model too narrow to compute.

    No GPU has run this yet: the sizes for one are chosen such that a launch takes a small part of the time.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    dtype, size = (torch.bfloat16, 8192) if on_gpu else (torch.float32, 1024)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = best_of(lambda: a @ b)
    here, there = (torch.zeros(2**29 if on_gpu else 2**26, device=device, dtype=torch.uint8) for _ in range(2))
    copy = best_of(lambda: here.copy_(there))
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=2, pad_token_id=0
    )
    narrow, steps = LlamaForCausalLM(config).eval().to(device, dtype), 16
    ids = torch.ones(1, 8, dtype=torch.long, device=device)
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "min_new_tokens": steps, "max_new_tokens": steps}
    with torch.inference_mode():
        decode = best_of(lambda: narrow.generate(ids, **settings), 3)
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else float("inf")
    return Machine(
        name_of_device(), size**3 / product, 2 * here.numel() / copy, decode / steps / config.num_hidden_layers, memory,
        dtype.itemsize,
    )  # fmt: skip


def best_of(run: Callable[[], object], repeats: int = 5) -> float:
    """The shortest time of several runs, after one to warm up, in seconds."""
    run()
    return min(seconds_of(run) for _ in range(repeats))


def seconds_of(run: Callable[[], object]) -> float:
    """The time of one run, what it queued on a GPU included."""
    synchronize()
    begun = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - begun


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def name_of_device() -> str:
    """The GPU's name, or the CPU's number of threads."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
