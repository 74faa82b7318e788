"""Prompts in, answers out: the one loop that generates, under a strategy or without, and reads the strategy's trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from PIL.Image import Image
from tqdm import tqdm

from dyrate.data import Example, Examples
from dyrate.strategy import Strategy
from dyrate.trace import Trace


def encode(processor, images: Iterable, prompts: list[str]):
    """Chat-template one image and one instruction per row and pad on the left, as generation needs.

    Returns the processor's tensors, to be passed to `model.generate(**inputs)`.
    """
    chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}] for prompt in prompts]
    return encode_chats(processor, chats, images)


def encode_chats(processor, chats: list[list[dict]], images: Iterable):
    """Chat-template whole conversations, with any number of images each. images: of all rows, in the order of their places."""
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    processor.tokenizer.padding_side = "left"
    return processor(images=list(images) or None, text=texts, return_tensors="pt", padding=True)


@dataclass
class Answers:
    """The answers to one batch. tokens: ids of each, with the end token. trace: the strategy's; None without one."""

    tokens: list[list[int]]
    texts: list[str]
    trace: Trace | None = None

    def retention(self) -> list[np.ndarray]:
        """For each answer the share of image tokens kept at each of its steps, (step,): mean over its beams and the stages."""
        kept = self.trace.retention()
        beams = kept.shape[1] // len(self.tokens)  # rows of one prompt stand side by side
        kept = kept.reshape(len(kept), len(self.tokens), beams).mean(2)
        return [kept[: len(ids), i] for i, ids in enumerate(self.tokens)]


def answer_batch(
    model, processor, inputs, strategy: Strategy | None = None, examples: Sequence[Example] | None = None, **settings
) -> Answers:
    """Generate an answer to each row that `encode` made; greedy, and at most 64 tokens, unless `settings` say otherwise.

    examples: which example each row is, for strategies that use it. settings: of `model.generate`.
    """
    inputs = inputs.to(model.device, model.dtype)
    settings = {"do_sample": False, "max_new_tokens": 64} | settings
    pruned = nullcontext() if strategy is None else strategy(model, processor, examples=examples)
    with pruned as trace, torch.inference_mode():
        output = model.generate(**inputs, **settings)
    tokens = _until_end(model, output[:, inputs["input_ids"].shape[1] :])
    texts = [text.strip() for text in processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    return Answers(tokens, texts, trace)


def answer_examples(
    model, processor, examples: Examples, strategy: Strategy | None = None, *, batch_size: int = 32, progress: bool = False,
    **settings,
) -> Iterator[tuple[list[Example], list[Image], Answers]]:  # fmt: skip
    """Batch by batch the examples whose image can be used (`Examples.readable`), their images, and `answer_batch`'s answers."""
    with tqdm(total=len(examples), desc="answers", disable=not progress) as bar:
        for batch, images in examples.batches(batch_size, processor):
            inputs = encode(processor, images, [e.prompt for e in batch])
            yield batch, images, answer_batch(model, processor, inputs, strategy, batch, **settings)
            bar.update(len(batch))


def _until_end(model, generated: torch.Tensor) -> list[list[int]]:
    """The token ids of each row, (row, step), up to and with the end token."""
    ends = model.generation_config.eos_token_id
    ended = torch.isin(generated, torch.tensor(ends, device=generated.device)) if ends is not None else generated != generated
    lengths = (ended.cumsum(1) - ended.long() == 0).sum(1).tolist()
    return [ids[:length] for ids, length in zip(generated.tolist(), lengths, strict=True)]
