"""What a strategy sees when it decides, and the two steps from its answer to a set of tokens: how many, and which."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dyrate.attention import LayerAttention
from dyrate.data import Example
from dyrate.segments import Segments, segment_shares


@dataclass
class Vision:
    """What the vision tower computed for each image token, before the projector. Needs a tower with one [CLS] an image.

    features, cls: of the layer that the decoder gets, patches and [CLS] (of a row's first image). cls_attention: [CLS]'s
    attention in that layer, mean over heads; keys: its keys. joint_attention: [CLS]'s attention in the tower's last layer as
    if all heads were one, softmax(q k / sqrt(width)); joint_keys: the keys of that. project: from features to hidden states.
    """

    features: Float[Tensor, "batch image_token vision_width"]
    cls: Float[Tensor, "batch vision_width"]
    cls_attention: Float[Tensor, "batch image_token"]
    keys: Float[Tensor, "batch image_token head dim"]
    joint_attention: Float[Tensor, "batch image_token"]
    joint_keys: Float[Tensor, "batch image_token vision_width"]
    project: Callable[[Tensor], Tensor]


@dataclass
class Seen:
    """What a strategy may look at when it decides, for every row of the batch.

    step: 0 in the prefill, then 1, 2, ... for each new token. layer: the first layer that will miss what is dropped now.
    image: True at real image tokens (rows with fewer than others are padded at the end). kept: those that may be kept; held:
    those in use until now, fewer where dropped tokens are re-selectable.
    positions: of each image token in the prompt. segments: the kind of each prompt position. observed: the attention of
    each observed layer in this pass. columns: prompt position of each key of the layer before, None if all are there.
    newest_hidden: the newest token's hidden state as it enters `layer`. examples: which example each row is, where the caller
    told.
    """

    step: int
    layer: int
    n_layers: int
    image: Bool[Tensor, "batch image_token"]
    kept: Bool[Tensor, "batch image_token"]
    positions: Tensor
    segments: Segments
    observed: dict[int, LayerAttention] = field(default_factory=dict)
    columns: Tensor | None = None
    examples: Sequence[Example] | None = None
    notes: dict = field(default_factory=dict)  # scratch, for what `keep`, `score` and `merge` share in one decision
    held: Bool[Tensor, "batch image_token"] | None = None
    newest_hidden: Float[Tensor, "batch width"] | None = None
    read_hidden: Callable[[Tensor], Tensor] | None = None
    read_embedded: Callable[[Tensor], Tensor] | None = None
    norm: Callable[[Tensor], Tensor] | None = None
    read_own: Callable[[], LayerAttention] | None = None
    read_vision: Callable[[], Vision] | None = None
    read_no_rope: Callable[[], Tensor] | None = None

    @cached_property
    def attention(self) -> Float[Tensor, "batch head image_token"]:
        """Attention weights of the newest query on each image token, in the layer before; 0 where the token was dropped."""
        return self._on_images(self._before.newest)

    @cached_property
    def shares(self) -> Float[Tensor, "batch head 4"]:
        """The newest query's attention to system, image, instruction and response tokens: the predictor's features."""
        held = self.segments if self.columns is None else Segments(self.segments.kind.gather(1, self.columns))
        return segment_shares(self._before.newest, held)

    @cached_property
    def instruction_attention(self) -> tuple[Float[Tensor, "batch text image_token"], Bool[Tensor, "batch text"]]:
        """Attention of each instruction token on each image token, mean over heads, and which are real. Prefill only."""
        order, real = self._instruction
        return self._on_images(self._before.rows(self.slots(order))).mean(1), real

    @property
    def no_rope_attention(self) -> Float[Tensor, "batch head image_token"]:
        """The newest query's attention as it were without rotary positions. Prefill only; ask with `needs = {"no_rope"}`."""
        return self._on_images(self.read_no_rope())

    @cached_property
    def own_attention(self) -> Float[Tensor, "batch head image_token"]:
        """The newest query's attention as `layer` itself would have it with all tokens that enter it.

        Prefill only; ask with `needs = {"own_attention"}`.
        """
        return self._on_images(self.read_own().newest)

    @property
    def embedded(self) -> Float[Tensor, "batch image_token width"]:
        """The image tokens as they enter the decoder. Prefill only; ask with `needs = {"embeddings"}`."""
        return self.read_embedded(self.positions)

    @property
    def instruction_embedded(self) -> Float[Tensor, "batch text width"]:
        """The instruction tokens as they enter the decoder. Prefill only; ask with `needs = {"embeddings"}`."""
        return self.read_embedded(self._instruction[0])

    @cached_property
    def hidden(self) -> Float[Tensor, "batch image_token width"]:
        """Hidden states of the image tokens as they enter `layer`. Prefill only."""
        return self.read_hidden(self.slots(self.positions))

    @property
    def instruction_real(self) -> Bool[Tensor, "batch text"]:
        """Which entries of `instruction_hidden` and the like are real: rows with fewer than others are filled up."""
        return self._instruction[1]

    @property
    def instruction_slots(self) -> Int[Tensor, "batch text"]:
        """Where the instruction tokens stand among the keys of the layer before."""
        return self.slots(self._instruction[0])

    @property
    def instruction_hidden(self) -> Float[Tensor, "batch text width"]:
        """Hidden states of the instruction tokens as they enter `layer`. Prefill only."""
        return self.read_hidden(self.instruction_slots)

    @cached_property
    def vision(self) -> Vision:
        """What the vision tower computed. Prefill only; ask with `needs = {"vision"}`."""
        return self.read_vision()

    def example_of_each_row(self) -> list[Example]:
        """The example of each row; with beams several rows come from one. Raises ValueError where the caller told none."""
        if not self.examples:
            raise ValueError("this strategy needs to know its examples: apply it as `strategy(model, processor, examples=batch)`")
        rows = len(self.image)
        return [self.examples[row * len(self.examples) // rows] for row in range(rows)]

    @cached_property
    def _instruction(self) -> tuple[Tensor, Tensor]:
        """Positions of the instruction tokens in the prompt, (batch, text), and which are real."""
        return self.segments.positions("instruction")

    @property
    def _before(self) -> LayerAttention:
        if self.layer - 1 not in self.observed:
            raise RuntimeError("there is no attention to read before the first layer: use first_pruned_layer >= 1")
        return self.observed[self.layer - 1]

    def slots(self, positions: Tensor) -> Tensor:
        """Where prompt positions stand among the keys of the layer before; 0 where they were dropped."""
        if self.columns is None:
            return positions
        slot = torch.zeros_like(self.segments.kind)
        slot.scatter_(1, self.columns, torch.arange(self.columns.shape[1], device=slot.device).expand_as(self.columns))
        return slot.gather(1, positions)

    def _on_images(self, rows: Float[Tensor, "batch *n key"]) -> Float[Tensor, "batch *n image_token"]:
        shape = (len(self.kept), *[1] * (rows.ndim - 2), -1)
        index = self.slots(self.positions).view(shape).expand(*rows.shape[:-1], -1)
        return rows.gather(-1, index) * (self.kept & self.image).view(shape)


def kept_count(n_image: int, retention: float) -> int:
    """Image tokens kept at a retention ratio 1 - R: `n - floor(n R)` (arXiv:2501.14204, Eq. 3), that is `ceil(n * retention)`.

    Rounded to three digits first, so that the float32 number next to .3 keeps 3 tokens of 10, not 4.
    """
    return math.ceil(round(n_image * retention, 3))


def choose(
    score: Float[Tensor, "batch image_token"], candidates: Bool[Tensor, "batch image_token"], counts: Sequence[int]
) -> Bool[Tensor, "batch image_token"]:
    """The `counts[row]` best candidates of each row; of equals the first."""
    order = score.float().masked_fill(~candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)
    if min(counts) == max(counts):
        best = torch.zeros_like(candidates).scatter_(1, order[:, : counts[0]], True)
    else:
        wanted = torch.tensor(counts, device=score.device)[:, None]
        best = torch.zeros_like(candidates).scatter_(1, order, torch.arange(score.shape[1], device=score.device) < wanted)
    return best & candidates


def score_of(order: Int[Tensor, " m"], n: int) -> Float[Tensor, " n"]:
    """Scores of `n` tokens by which those of `order` come first, in this order."""
    score = torch.zeros(n, device=order.device)
    score[order] = torch.arange(len(order), 0, -1, device=order.device, dtype=score.dtype)
    return score
