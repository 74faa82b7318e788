"""What a pruning strategy is: which image tokens stay (`score`), how many (`keep`), from which layer on (`stages`).

Defining a subclass registers it in `STRATEGIES`; every test, table and figure of the study then takes it up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dyrate.look import Look
from dyrate.segments import Segments, segment_shares
from dyrate.trace import Trace

STRATEGIES: dict[str, type[Strategy]] = {}


@dataclass
class Vision:
    """What the vision tower said of each image token, before the projector. Needs a tower with one [CLS] an image.

    cls_attention: of the layer whose features are used, mean over heads. keys: of that layer, heads side by side.
    project: from features to hidden states of the decoder.
    """

    features: Float[Tensor, "batch image_token vision_width"]
    cls_attention: Float[Tensor, "batch image_token"]
    keys: Float[Tensor, "batch image_token key_width"]
    project: Callable[[Tensor], Tensor]


@dataclass
class Seen:
    """What a strategy may look at when it decides, for every row of the batch.

    step: 0 in the prefill, then 1, 2, ... for each new token. layer: the first layer that will miss what is dropped now.
    image: True at real image tokens (rows with fewer than others are padded at the end). kept: those that may be kept.
    positions: of each image token in the prompt. segments: the kind of each prompt position. look: the attention of
    layer - 1 in this pass, None before the first layer. columns: prompt position of each of its keys, None if all are there.
    """

    step: int
    layer: int
    n_layers: int
    image: Bool[Tensor, "batch image_token"]
    kept: Bool[Tensor, "batch image_token"]
    positions: Tensor
    segments: Segments
    look: Look | None
    columns: Tensor | None
    looks: dict[int, Look] = field(default_factory=dict)  # of all observed layers in this pass
    notes: dict = field(default_factory=dict)  # scratch, for what `keep`, `score` and `merge` share in one decision
    read_hidden: Callable[[Tensor], Tensor] | None = None
    read_vision: Callable[[], Vision] | None = None
    read_no_rope: Callable[[], Tensor] | None = None

    @cached_property
    def attention(self) -> Float[Tensor, "batch head image_token"]:
        """Attention weights of the newest query on each image token; 0 where it is gone."""
        return self._on_images(self._looked.newest)

    @cached_property
    def shares(self) -> Float[Tensor, "batch head 4"]:
        """The newest query's attention to system, image, instruction and response tokens: the predictor's features."""
        kind = self.segments.kind if self.columns is None else self.segments.kind.gather(1, self.columns)
        return segment_shares(self._looked.newest, Segments(kind))

    def shares_in(self, layer: int) -> Float[Tensor, "batch head 4"]:
        """The same shares in another observed layer, before the first pruned one."""
        return self.shares if layer == self.layer - 1 else segment_shares(self.looks[layer].newest, self.segments)

    @cached_property
    def instruction_attention(self) -> tuple[Float[Tensor, "batch text image_token"], Bool[Tensor, "batch text"]]:
        """Attention of each instruction token on each image token, mean over heads, and which are real. Prefill only."""
        order, real = self._instruction
        return self._on_images(self._looked.rows(self._slots(order))).mean(1), real

    @property
    def no_rope_attention(self) -> Float[Tensor, "batch head image_token"]:
        """The newest query's attention as it were without rotary positions. Prefill only; ask with `needs = {"no_rope"}`."""
        return self._on_images(self.read_no_rope())

    @property
    def hidden(self) -> Float[Tensor, "batch image_token width"]:
        """Hidden states of the image tokens as they enter `layer`. Prefill only."""
        return self.read_hidden(self._slots(self.positions))

    @property
    def instruction_hidden(self) -> Float[Tensor, "batch text width"]:
        """Hidden states of the instruction tokens as they enter `layer`. Prefill only."""
        return self.read_hidden(self._slots(self._instruction[0]))

    @cached_property
    def vision(self) -> Vision:
        """What the vision tower said. Prefill only; ask with `needs = {"vision"}`."""
        return self.read_vision()

    @cached_property
    def _instruction(self) -> tuple[Tensor, Tensor]:
        """Positions of the instruction tokens in the prompt, (batch, text), and which are real."""
        return self.segments.positions("instruction")

    @property
    def _looked(self) -> Look:
        if self.look is None:
            raise RuntimeError("there is no attention to read before the first layer: use first_pruned_layer >= 1")
        return self.look

    def _slots(self, positions: Tensor) -> Tensor:
        """Where prompt positions stand among the keys of `look`; 0 where they are gone."""
        if self.columns is None:
            return positions
        slot = torch.zeros_like(self.segments.kind)
        slot.scatter_(1, self.columns, torch.arange(self.columns.shape[1], device=slot.device).expand_as(self.columns))
        return slot.gather(1, positions)

    def _on_images(self, rows: Float[Tensor, "batch *n key"]) -> Float[Tensor, "batch *n image_token"]:
        shape = (len(self.kept), *[1] * (rows.ndim - 2), -1)
        index = self._slots(self.positions).view(shape).expand(*rows.shape[:-1], -1)
        return rows.gather(-1, index) * (self.kept & self.image).view(shape)


@dataclass(kw_only=True)
class Strategy:
    """Keeps every image token; subclasses say what to drop. Use: `with strategy(model) as trace: model.generate(...)`.

    first_pruned_layer: the paper's K; layers before it see every image token, and the one before it is observed.
    residency: "evict" (dropped tokens leave memory and never return) or "hide" (they stay cached, and from the first
    pruned layer on each step attends to a subset chosen anew).
    """

    first_pruned_layer: int = 2
    residency: Literal["evict", "hide"] = "evict"

    compared: ClassVar[bool] = True  # stands in the study's comparison
    each_step: ClassVar[bool] = True  # decide again at every new token, not only in the prefill
    needs: ClassVar[frozenset[str]] = frozenset()  # of "vision", "no_rope" (costly to have at hand), "scene" (pocket's)

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        STRATEGIES[cls.__name__] = cls

    def __call__(self, model, processor=None, *, static: int = 0) -> AbstractContextManager[Trace]:
        """Apply to a live model until the context is left. processor: lets the system prompt be told from the rest.

        static: new tokens for which decode steps get buffers that stay in place, on a GPU replayed as CUDA graphs (see
        `engine.static_steps`); 0: eager steps.
        """
        from dyrate.engine import prune  # the engine hands out what strategies see, so it imports this file

        return prune(model, self, processor, static=static)

    def keep(self, seen: Seen) -> float | Float[Tensor, " batch"]:
        """Share of each row's image tokens, from now on: `image_tokens - floor(rate * image_tokens)` of them stay."""
        return 1.0

    def score(self, seen: Seen) -> Float[Tensor, "batch image_token"]:
        """The higher, the longer a token stays. Default: FastV's, the newest query's attention averaged over heads."""
        return seen.attention.mean(1)

    def stages(self, n_layers: int) -> Sequence[int]:
        """Layers before which tokens are dropped, ascending; 0 is before the decoder."""
        return (self.first_pruned_layer,)

    def observes(self, n_layers: int) -> Sequence[int]:
        """Layers whose attention is wanted; default: those just before the stages."""
        return [stage - 1 for stage in self.stages(n_layers) if 0 < stage < n_layers]

    def merge(self, seen: Seen, kept: Bool[Tensor, "batch image_token"]) -> Float[Tensor, "batch image_token width"] | None:
        """New hidden states for the kept tokens, with what the dropped ones said; None leaves them as they are."""
        return None

    def selector_macs(self, shape, n_image: int, n_instruction: int) -> int:
        """Multiply-accumulates of deciding at all stages of one prefill, beside the observed rows of attention."""
        return 0

    def meet(self, examples: Sequence) -> None:
        """Told which examples the next batch's rows are, for strategies that know something of each."""

    @classmethod
    def at(cls, share: float, n_layers: int, **fields) -> Strategy:
        """The strategy with its rate set so that `share` of the image tokens stay where it prunes."""
        return cls(**fields)

    def __post_init__(self) -> None:
        if self.residency not in ("evict", "hide"):
            raise ValueError(f'residency is "evict" or "hide", not {self.residency!r}')
        if self.first_pruned_layer < 0:
            raise ValueError(f"first_pruned_layer counts from 0; {self.first_pruned_layer} is no layer")
        if hasattr(self, "rate"):
            rate_field("rate", self.rate)


def lineup(shares: Sequence[float], n_layers: int, names: Sequence[str] = (), *, scenes: bool = True) -> dict[str, Strategy]:
    """Strategies to compare, by label: Full, and each of `names` (default: all that are `compared`) at each kept share.

    scenes: False for photographs, of which nobody knows what they show: without the strategies that need to.
    """
    able = {name: cls for name, cls in STRATEGIES.items() if scenes or "scene" not in cls.needs}
    chosen = list(names) or [name for name, cls in able.items() if cls.compared and name != "Full"]
    if unknown := set(chosen) - set(STRATEGIES):
        raise ValueError(f"no strategy is called {sorted(unknown)}; there are {sorted(STRATEGIES)}")
    found = {"Full": STRATEGIES["Full"]()}
    for name in chosen:
        found |= {f"{name} {share:g}": STRATEGIES[name].at(share, n_layers) for share in shares}
    return found


def rate_field(name: str, rate: float) -> float:
    """A drop rate in [0, 1], or a clear error."""
    if not 0 <= rate <= 1:
        raise ValueError(f"{name} is the share of image tokens to drop and lies in [0, 1], not {rate}")
    return rate


def kept_count(n_image: int, share: float) -> int:
    """Image tokens that stay: `n - floor(n * rate)` (arXiv:2501.14204, Eq. 3), robust against rounding in `1 - share`."""
    return n_image - int(n_image * (1 - share) + 1e-4)


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
