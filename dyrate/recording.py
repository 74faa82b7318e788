"""How much attention the newest token pays to each kind of token, and where in the image: recorded while a model generates.

`record` is the measurement behind the paper's Figs. 1 and 2. It runs plain `generate`, keeps the model's fast attention,
and computes one extra row of attention weights per layer and step: the newest query's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from dyrate.attention import LayerAttention
from dyrate.data import Examples
from dyrate.engine import observe
from dyrate.generation import answer_batch, encode
from dyrate.segments import SEGMENTS, Segments, find_segments, segment_shares, system_ids


@dataclass
class Recording:
    """Attention of one generated answer of `step` tokens.

    tokens: the generated tokens as text, one a step. shares: (step, layer, head, 4), the newest query's attention to SEGMENTS;
    step 0 is the prefill's last row, which chooses the first token. counts: (step, 4), tokens of each segment in reach.
    image: (step, layer, image_token), attention to each image token, mean over heads (None if not asked for).
    """

    sample: str
    task: str
    tokens: list[str]
    text: str
    shares: Float[np.ndarray, "step layer head 4"]
    counts: np.ndarray
    image: np.ndarray | None = None

    def frame(self) -> pd.DataFrame:
        """One row per step and layer, means over heads: shares, tokens of each segment, and shares per token."""
        steps, layers = self.shares.shape[:2]
        mean = self.shares.mean(2).reshape(steps * layers, 4)
        frame = pd.DataFrame(mean, columns=[f"{s}_share" for s in SEGMENTS])
        frame.insert(0, "sample", self.sample)
        frame.insert(1, "task", self.task)
        frame.insert(2, "step", np.repeat(np.arange(steps), layers))
        frame.insert(3, "layer", np.tile(np.arange(layers), steps))
        frame.insert(4, "token", np.repeat(self.tokens, layers))
        for i, segment in enumerate(SEGMENTS):
            frame[f"{segment}_tokens"] = np.repeat(self.counts[:, i], layers)
        return frame


def record(
    model, processor, images: Iterable, prompts: list[str], *, max_new_tokens: int = 64, names: list[str] | None = None,
    tasks: list[str] | None = None, image_rows: bool = False, **generate,
) -> list[Recording]:  # fmt: skip
    """Generate an answer for each (image, prompt) of one batch and record every layer's attention at every step.

    images: PIL pictures; prompts: instructions without the chat template. image_rows: also keep the attention to each
    single image token. Further arguments go to `generate`; decoding is greedy unless they say otherwise.
    """
    if generate.get("num_beams", 1) > 1 or generate.get("num_return_sequences", 1) > 1:
        raise ValueError("record() follows one answer per prompt: use num_beams=1 and num_return_sequences=1")
    inputs = encode(processor, images, prompts).to(model.device)
    segments = find_segments(inputs["input_ids"], model.config.image_token_id, inputs["attention_mask"], system_ids(processor))
    recorder = Recorder(segments, image_rows)
    with observe(model, recorder):
        answers = answer_batch(model, processor, inputs, max_new_tokens=max_new_tokens, **generate)
    shares, rows = recorder.shares(), recorder.image_rows() if image_rows else None
    before = segments.counts().cpu().numpy()
    found = []
    for i, (ids, text) in enumerate(zip(answers.tokens, answers.texts, strict=True)):
        counts = np.repeat(before[i][None], len(ids), 0)
        counts[:, SEGMENTS.index("response")] = np.arange(len(ids))
        found.append(Recording(
            sample=names[i] if names else str(i), task=tasks[i] if tasks else "", text=text, counts=counts,
            tokens=[processor.tokenizer.decode([t]).strip() for t in ids], shares=shares[i, : len(ids)],
            image=None if rows is None else rows[i, : len(ids)][..., segments.mask("image")[i].cpu().numpy()],
        ))  # fmt: skip
    return found


def record_examples(
    model, processor, examples: Examples, *, max_new_tokens: int = 64, batch_size: int = 16, image_rows: bool = False,
    progress: bool = True,
) -> list[Recording]:  # fmt: skip
    """`record` for every example whose image can be used (`Examples.readable`), batch by batch."""
    found = []
    with tqdm(total=len(examples), desc="recording attention", disable=not progress) as bar:
        for batch, images in examples.batches(batch_size, processor):
            found += record(
                model, processor, images, [e.prompt for e in batch], max_new_tokens=max_new_tokens, image_rows=image_rows,
                names=[e.name for e in batch], tasks=[e.task for e in batch],
            )  # fmt: skip
            bar.update(len(batch))
    return found


class Recorder:
    """An observer that collects the newest query's segment shares, and its attention to the prompt, per layer and step."""

    def __init__(self, segments: Segments, image_rows: bool = False):
        self.segments, self.keeps_rows = segments, image_rows
        self._shares: dict[int, list[Tensor]] = {}
        self._rows: dict[int, list[Tensor]] = {}

    def __call__(self, layer: int, attention: LayerAttention) -> None:
        self._shares.setdefault(layer, []).append(segment_shares(attention.newest, self.segments))
        if self.keeps_rows:
            prompt = self.segments.kind.shape[1]
            self._rows.setdefault(layer, []).append(attention.newest[..., :prompt].mean(1))

    def shares(self) -> Float[np.ndarray, "row step layer head 4"]:
        """Of every row of the batch."""
        return _stacked(self._shares)

    def image_rows(self) -> Float[np.ndarray, "row step layer prompt"]:
        """Attention to each prompt position, mean over heads."""
        return _stacked(self._rows)


def _stacked(by_layer: dict[int, list[Tensor]]) -> np.ndarray:
    return torch.stack([torch.stack(by_layer[layer], 1) for layer in sorted(by_layer)], 2).cpu().numpy()
