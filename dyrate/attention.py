"""How much attention the newest word pays to each kind of token, and where in the image: recorded while a model generates.

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

from dyrate.datasets import Examples
from dyrate.engine import observe
from dyrate.look import Look
from dyrate.segments import SEGMENTS, Segments, find_segments, segment_shares, system_ids


@dataclass
class Recording:
    """Attention of one generated answer of `step` tokens.

    tokens: the generated words, one a step. shares: (step, layer, head, 4), the newest query's attention to SEGMENTS;
    step 0 is the prefill's last row, which chooses the first word. counts: (step, 4), tokens of each segment in reach.
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
    inputs = encode(processor, images, prompts).to(model.device, model.dtype)
    segments = find_segments(inputs["input_ids"], model.config.image_token_id, inputs["attention_mask"], system_ids(processor))
    recorder = _Recorder(segments, image_rows)
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens} | generate
    if settings.get("num_beams", 1) > 1 or settings.get("num_return_sequences", 1) > 1:
        raise ValueError("record() follows one answer per prompt: use num_beams=1 and num_return_sequences=1")
    with observe(model, recorder), torch.inference_mode():
        output = model.generate(**inputs, **settings)
    return recorder.recordings(output[:, inputs["input_ids"].shape[1] :], model, processor, names, tasks)


def record_examples(
    model, processor, examples: Examples, *, max_new_tokens: int = 64, batch_size: int = 16, image_rows: bool = False,
    progress: bool = True,
) -> list[Recording]:  # fmt: skip
    """`record` for every example whose image can be read, batch by batch."""
    found = []
    bar = tqdm(total=len(examples), desc="recording attention", disable=not progress)
    for batch, images in examples.batches(batch_size):
        found += record(
            model, processor, images, [e.prompt for e in batch], max_new_tokens=max_new_tokens, image_rows=image_rows,
            names=[e.name for e in batch], tasks=[e.task for e in batch],
        )  # fmt: skip
        bar.update(len(batch))
    bar.close()
    return found


def encode(processor, images: Iterable, prompts: list[str]):
    """Chat-template one image and one instruction per row and pad on the left, as generation needs."""
    said = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}] for prompt in prompts]
    return encode_chats(processor, said, images)


def encode_chats(processor, chats: list[list[dict]], images: Iterable):
    """Chat-template whole conversations, with any number of images each. images: of all rows, in the order of their places."""
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    processor.tokenizer.padding_side = "left"
    return processor(images=list(images) or None, text=texts, return_tensors="pt", padding=True)


class _Recorder:
    """Collects shares per layer and step from the attention rows that the engine hands over."""

    def __init__(self, segments: Segments, image_rows: bool):
        self.segments, self.image_rows = segments, image_rows
        self.shares: dict[int, list[Tensor]] = {}
        self.rows: dict[int, list[Tensor]] = {}

    def __call__(self, layer: int, look: Look) -> None:
        row = look.newest
        self.shares.setdefault(layer, []).append(segment_shares(row, self.segments))
        if self.image_rows:
            prompt = self.segments.kind.shape[1]
            self.rows.setdefault(layer, []).append(row[..., :prompt].mean(1))

    def recordings(self, generated: Tensor, model, processor, names, tasks) -> list[Recording]:
        n_steps = generated.shape[1]
        layers = sorted(self.shares)
        shares = torch.stack([torch.stack(self.shares[i][:n_steps], 1) for i in layers], 2).cpu().numpy()
        before = self.segments.counts().cpu().numpy()
        image = self.segments.mask("image").cpu().numpy()
        rows = None
        if self.image_rows:
            rows = torch.stack([torch.stack(self.rows[i][:n_steps], 1) for i in layers], 2).cpu().numpy()
        ends = model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        found = []
        for i, ids in enumerate(generated.tolist()):
            length = next((n + 1 for n, token in enumerate(ids) if token in ends), n_steps)
            counts = np.repeat(before[i][None], length, 0)
            counts[:, 3] = np.arange(length)
            found.append(Recording(
                sample=names[i] if names else str(i), task=tasks[i] if tasks else "", shares=shares[i, :length],
                tokens=[processor.tokenizer.decode([t]).strip() for t in ids[:length]], counts=counts,
                text=processor.tokenizer.decode(ids[:length], skip_special_tokens=True).strip(),
                image=rows[i, :length][..., image[i]] if rows is not None else None,
            ))  # fmt: skip
        return found
