"""The least time that a pass can take on this machine: bytes over the bandwidth, multiply-accumulates over the rate, measured."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from study.bench.runs import synchronize
from dyrate.cost import Shape, decode_macs, prefill_macs, read_bytes, tower_macs


@dataclass(frozen=True)
class Machine:
    """What one device can do. bandwidth: bytes a second, read and written, of a copy; rate: multiply-accumulates a second."""

    bandwidth: float
    rate: float

    def seconds(self, n_bytes: float, macs: float) -> float:
        return max(n_bytes / self.bandwidth, macs / self.rate)

    def prefill(self, shape: Shape, tokens: list[int], rows: int, images: int, itemsize: int) -> float:
        """Seconds, at least, of a prefill of `rows` prompts of whose tokens layer i holds `tokens[i]`, tower included."""
        macs = rows * (prefill_macs(shape, tokens) + tower_macs(shape, images) + shape.width * shape.vocabulary)
        return self.seconds(read_bytes(shape, tokens, itemsize, rows), macs)

    def step(self, shape: Shape, tokens: list[int], rows: int, itemsize: int) -> float:
        """Seconds, at least, of a decode step of `rows` rows."""
        macs = rows * (decode_macs(shape, tokens) + shape.width * shape.vocabulary)
        return self.seconds(read_bytes(shape, tokens, itemsize, rows), macs)


def measure(model) -> Machine:
    """Bandwidth and matrix rate in the model's own number format: the best of several repeats of one large operation."""
    on_gpu = model.device.type == "cuda"
    given = {"device": model.device, "dtype": model.dtype}
    here, there = (torch.zeros(2**29 if on_gpu else 2**24, **given) for _ in range(2))
    n = 8192 if on_gpu else 512
    a, b = (torch.rand(n, n, **given) for _ in range(2))
    return Machine(
        2 * here.numel() * here.element_size() / _best(lambda: here.copy_(there)),
        n**3 / _best(lambda: a @ b),
    )  # fmt: skip


def _best(run, repeats: int = 10) -> float:
    found = []
    for _ in range(repeats):
        synchronize()
        begun = time.perf_counter()
        run()
        synchronize()
        found.append(time.perf_counter() - begun)
    return min(found)
