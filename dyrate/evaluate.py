"""Generate answers for examples, batch by batch."""

from __future__ import annotations

import torch
from tqdm import tqdm

from dyrate.attention import encode
from dyrate.datasets import Example, Examples


def answers(
    model, processor, examples: Examples, *, max_new_tokens: int = 64, batch_size: int = 32, progress: bool = True, **generate
) -> list[tuple[Example, str]]:
    """The model's answer to each example whose image can be read; greedy unless `generate` says otherwise."""
    found = []
    bar = tqdm(total=len(examples), desc="answers", disable=not progress)
    for batch, images in examples.batches(batch_size):
        inputs = encode(processor, images, [e.prompt for e in batch]).to(model.device, model.dtype)
        with torch.inference_mode():
            output = model.generate(**inputs, **({"do_sample": False, "max_new_tokens": max_new_tokens} | generate))
        texts = processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found += zip(batch, [text.strip() for text in texts], strict=True)
        bar.update(len(batch))
    bar.close()
    return found
