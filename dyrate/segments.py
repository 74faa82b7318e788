"""Which positions of a prompt are system, image, instruction: read from the token ids, never from fixed offsets.

Every token generated after the prompt is a response token, the paper's fourth kind (arXiv:2501.14204, Sec. III-A).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SEGMENTS = ("system", "image", "instruction", "response")
PADDING = -1


@dataclass(frozen=True)
class Segments:
    """The kind of each prompt position. kind: index into SEGMENTS, or PADDING."""

    kind: Int[Tensor, "batch prompt"]

    def mask(self, segment: str) -> Bool[Tensor, "batch prompt"]:
        """True where a position belongs to `segment`."""
        return self.kind == SEGMENTS.index(segment)

    @cached_property
    def members(self) -> Float[Tensor, "batch prompt 3"]:
        """1 where a position is system, image, instruction."""
        return torch.stack([self.mask(segment) for segment in SEGMENTS[:3]], -1).float()

    def positions(self, segment: str) -> tuple[Int[Tensor, "batch n"], Bool[Tensor, "batch n"]]:
        """Where each row's tokens of `segment` stand, ascending, and which entries are real: rows with fewer are filled up."""
        member = self.mask(segment)
        order = (~member).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(member.sum(1).max())]
        return order, member.gather(1, order)

    def counts(self) -> Int[Tensor, "batch 4"]:
        """Tokens of each segment; the response is still empty."""
        return torch.stack([self.mask(segment).sum(1) for segment in SEGMENTS], 1)


def find_segments(
    input_ids: Int[Tensor, "batch prompt"],
    image_token_id: int,
    attention_mask: Int[Tensor, "batch prompt"] | None = None,
    system_ids: list[int] | None = None,
) -> Segments:
    """Label each prompt position as system, image, instruction or padding.

    The system segment is the longest beginning of a row that agrees with `system_ids`, the tokens that the chat template
    puts before what the user says (see `system_ids`). Without them it is all that stands before the first image token,
    the layout of the paper. Image tokens may stand anywhere and belong to any number of images; what remains is
    instruction. Raises ValueError for a row without an image token.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    image = (input_ids == image_token_id) & real
    if not image.any(1).all():
        row = int((~image.any(1)).nonzero()[0])
        raise ValueError(
            f"prompt {row} has no image token (id {image_token_id}): pass the prompt through the processor together with "
            "an image, so that it expands the image placeholder"
        )
    if system_ids is None:
        system = real & (image.cumsum(1) == 0)
    else:
        wanted = torch.tensor(system_ids, device=input_ids.device)
        nth = real.cumsum(1) - 1  # counted from the first token that is no padding
        inside = real & (nth < len(system_ids))
        agrees = inside & (input_ids == wanted[nth.clamp(0, len(system_ids) - 1)])
        system = inside & ((inside & ~agrees).cumsum(1) == 0) & ~image
    kind = torch.full_like(input_ids, SEGMENTS.index("instruction"))
    kind[system] = SEGMENTS.index("system")
    kind[image] = SEGMENTS.index("image")
    kind[~real] = PADDING
    return Segments(kind)


def segment_shares(row: Float[Tensor, "batch head key"], segments: Segments) -> Float[Tensor, "batch head 4"]:
    """Sum one query's attention weights over system, image, instruction and response tokens; the four sum to 1."""
    prompt = segments.kind.shape[1]
    shares = row[..., :prompt] @ segments.members.to(row)
    response = row[..., prompt:].sum(-1, keepdim=True)
    return torch.cat([shares, response], -1)


def system_ids(processor) -> list[int] | None:
    """Tokens that the processor's chat template puts before the user's own words; None without a chat template."""
    if not getattr(processor, "chat_template", None):
        return None

    def ids(words: str) -> list[int]:
        said = [{"role": "user", "content": [{"type": "text", "text": words}]}]
        return processor.tokenizer(processor.apply_chat_template(said), add_special_tokens=True)["input_ids"]

    shared = []
    for a, b in zip(ids("one"), ids("2 two"), strict=False):
        if a != b:
            break
        shared.append(a)
    return shared
