"""One timed run: a random LLaVA of a given shape, a prompt with images, an answer of a given length."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    StoppingCriteria,
)

from dyrate.cost import Shape
from dyrate.engine import decoder_layers, own_layers, static_steps
from dyrate.predictor import RatePredictor
from dyrate.strategies.dyrate import DyRate
from dyrate.strategy import Strategy
from study.bench.machine import synchronize

IMAGE = 60
BEFORE, AFTER = [1, *range(5, 40)], [*range(5, 25)]  # text around the images
TEXT = len(BEFORE) + len(AFTER)
WARM_UP = 4  # new tokens


def small_shape(layers: int, width: int, heads: int, side: int) -> Shape:
    """A decoder of these sizes under a tiny tower; an image takes side * side tokens."""
    return Shape(layers, width, heads, heads, round(2.7 * width), 1000, 2, 64, 128, side**2 + 1, 588)


def build(shape: Shape, device: str | None = None) -> LlavaForConditionalGeneration:
    """A random LLaVA, made where it runs (default: the GPU, if there is one): in bfloat16 on a GPU, else in float32."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    patch = math.isqrt(shape.patch_values // 3)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=shape.tower_width, intermediate_size=shape.tower_inner, num_hidden_layers=shape.tower_layers,
            num_attention_heads=max(1, shape.tower_width // 64), image_size=patch * math.isqrt(shape.patches - 1),
            patch_size=patch,
        ),
        text_config=LlamaConfig(
            vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        ),
        image_token_index=IMAGE, image_seq_length=shape.patches - 1,
    )  # fmt: skip
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    model.generation_config.eos_token_id = None
    return model.eval()


def request(model, batch: int, new_tokens: int, *, images: int = 1, native: int | None = None) -> dict:
    """Arguments of `generate` for a batch of equal prompts and answers of one length.

    native: so many plain tokens in place of the images, whose pixels are given all the same.
    """
    device, side, image = model.device, model.config.vision_config.image_size, model.config.image_token_id
    middle = [image] * images * model.config.image_seq_length if native is None else [7] * native
    ids = torch.tensor([[*BEFORE, *middle, *AFTER]] * batch, device=device)
    return dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new_tokens,
        max_new_tokens=new_tokens, suppress_tokens=[image], return_dict_in_generate=True,
        pixel_values=torch.zeros(batch * images, 3, side, side, device=device, dtype=model.dtype),
    )  # fmt: skip


def peak_bytes() -> int:
    """The most memory that was in use so far: on the GPU since its counter was last set back, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would carry over the peak of the process that started this one
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Clock(StoppingCriteria):
    """Notes when each token is there, and the peak of memory from its making until then."""

    def __init__(self):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.times: list[float] = []
        self.peaks: list[int] = []

    def __call__(self, input_ids, scores, **kwargs):
        synchronize()
        self.times.append(time.perf_counter())
        self.peaks.append(peak_bytes())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@dataclass
class Timing:
    """Seconds of the prefill with the vision tower and of each decode step; bytes; mean retention of image tokens.

    deciding: seconds of each decode step that went into observing, predicting and dropping, where that was asked for.
    """

    prefill: float
    steps: np.ndarray
    cache: int
    peaks: list[int]
    retention: float
    deciding: np.ndarray

    @property
    def step(self) -> float:
        """Median seconds of a decode step; NaN where there was none."""
        return float(np.median(self.steps)) if len(self.steps) else float("nan")


def timed(
    model, batch: int, new_tokens: int, strategy: Strategy | None = None, *, images: int = 1, native: int | None = None,
    static: bool = False, deciding: bool = False, warm: int = 0, in_place: bool = False, clock: Clock | None = None,
) -> Timing:  # fmt: skip
    """One batch of answers. native: the limit, so many plain tokens in place of the images, the tower run beside.

    static: with `engine.static_steps`. deciding: also time what stands before the strategy's first layer, waiting for the
    device on both sides. warm: answers before the one that counts; without any, attaching the strategy counts too. in_place:
    with a cache like that of strategies. clock: in place of a new one, for a single answer.
    """
    settings = request(model, batch, new_tokens, images=images, native=native)
    beside = settings.pop("pixel_values") if native is not None else None
    ticks: list[float] = []
    synchronize()
    begun = time.perf_counter()
    with torch.inference_mode(), ExitStack() as stack:
        if deciding:  # hooks run in the order of their registration: one before the engine's own, one after
            layer = decoder_layers(model)[strategy.first_pruned_layer]
            stack.enter_context(layer.register_forward_pre_hook(lambda *_: _tick(ticks)))
        trace = None
        if strategy is not None:
            trace = stack.enter_context(strategy(model, static=new_tokens * static))
        elif static:
            stack.enter_context(static_steps(model, room=new_tokens))
        if deciding:
            stack.enter_context(layer.register_forward_pre_hook(lambda *_: _tick(ticks)))
        for turn in range(warm + 1):
            clock = clock if turn == 0 and clock else Clock()
            if in_place:
                settings["past_key_values"] = own_layers(DynamicCache(), len(decoder_layers(model)))
            if turn:
                begun = time.perf_counter()
                ticks.clear()
            if beside is not None:
                model.get_image_features(beside)
            out = model.generate(**settings, stopping_criteria=[clock])
    return Timing(
        clock.times[0] - begun, np.diff(clock.times),
        sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in out.past_key_values.layers), clock.peaks,
        float(trace.retention().mean()) if trace is not None else 1.0, np.diff(ticks)[2::2],
    )  # fmt: skip


def _tick(ticks: list[float]) -> None:
    synchronize()
    ticks.append(time.perf_counter())


def in_turn(ways: dict[str, Callable], new_tokens: int, repeats: int) -> dict[str, list]:
    """What each way returns for so many new tokens: all warmed up, then in turn, so that the machine's noise meets them all."""
    for run in ways.values():
        run(min(WARM_UP, new_tokens))
    rounds = [{way: run(new_tokens) for way, run in ways.items()} for _ in range(repeats)]
    return {way: [results[way] for results in rounds] for way in ways}


def forced(shape: Shape, budget: float, new_tokens: int, swing: float = 0.1) -> DyRate:
    """DyRate with a predictor of random weights whose biases make the retention fall from budget + swing to budget - swing.

    So a step observes, predicts and, now and then, drops, as it would with a trained predictor; mean retention is the budget.
    """
    predictor = RatePredictor(shape.heads, shape.layers, "llava", with_step=True)
    torch.manual_seed(0)
    sharpness = 2 * len(predictor.rates) ** 2  # of a parabola over rates, whose peak moves with the step
    first, last = 1 - budget - swing, 1 - budget + swing
    with torch.no_grad():
        predictor.linear.weight.normal_(std=1e-3)
        predictor.linear.bias.copy_(sharpness * (2 * first * predictor.rates - predictor.rates**2))
        predictor.linear.weight[:, -1] = sharpness * 2 * (last - first) * predictor.rates * 64 / max(1, new_tokens - 1)
    return DyRate.of(predictor.eval())
