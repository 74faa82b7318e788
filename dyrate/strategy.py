"""What a pruning strategy is: which image tokens stay (`score`), how many (`keep`), from which layer on (`stages`).

Defining a subclass registers it in `STRATEGIES`; every test, table and figure of the study then takes it up.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from inspect import get_annotations
from typing import ClassVar, Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from dyrate.data import Example
from dyrate.engine import prune
from dyrate.seen import Seen
from dyrate.trace import PrefillTokens, Trace

STRATEGIES: dict[str, type[Strategy]] = {}


@dataclass(kw_only=True)
class Strategy:
    """Keeps every image token; subclasses say what to drop. Use: `with strategy(model) as trace: model.generate(...)`.

    first_pruned_layer: the paper's K; layers before it see every image token, and the one before it is observed.
    residency: "evict" (dropped tokens leave memory and never return) or "mask" (they stay cached, and from the first
    pruned layer on each step attends to a subset chosen anew). positions: of what follows a token dropped in the prefill,
    "kept" as they were or renumbered ("compact"); the default is what the method's authors run.
    """

    first_pruned_layer: int = 2
    residency: Literal["evict", "mask"] = "evict"
    positions: Literal["kept", "compact"] = "kept"

    compared: ClassVar[bool] = True  # stands in comparisons of all strategies
    control: ClassVar[bool] = False  # no published method, but what a method must beat
    each_step: ClassVar[bool] = True  # decide again at every new token, not only in the prefill
    needs: ClassVar[frozenset[str]] = frozenset()  # what is costly to have: of "vision", "no_rope", "own_attention", "embeddings"

    def __init_subclass__(cls, *, registered: bool = True, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        bare = [f.name for f in fields(cls) if f.name in vars(cls) and f.name not in get_annotations(cls)]
        if bare:  # else the field keeps the default that it has in the base class, in silence
            raise TypeError(f"{cls.__name__}.{bare[0]} is a field: give it its type, as in `{bare[0]}: str = ...`")
        if registered:  # all but what is only there to be inherited from
            STRATEGIES[cls.__name__] = cls

    def __new__(cls, *args, **kwargs):
        if get_annotations(cls) and "__dataclass_fields__" not in vars(cls):
            raise TypeError(f"{cls.__name__} has fields of its own: put @dataclass(kw_only=True) above it")
        return super().__new__(cls)

    def __call__(
        self, model, processor=None, *, examples: Sequence[Example] | None = None, static: int = 0
    ) -> AbstractContextManager[Trace]:
        """Apply to a live model until the context is left.

        processor: lets the system prompt be told from the rest. examples: those of the batch's rows, for strategies that use
        what is known of them. static: new tokens for which decode steps get buffers that stay in place, on a GPU replayed as
        CUDA graphs, which has not been run on one yet (see `engine.static_steps`); 0: eager steps.
        """
        return prune(model, self, processor, examples=examples, static=static)

    def keep(self, seen: Seen) -> float | Sequence[float] | Float[Tensor, " batch"]:
        """The retention ratio from now on, in [0, 1]: the share of each row's image tokens that stay. One, or one a row."""
        return 1.0

    def score(self, seen: Seen) -> Float[Tensor, "batch image_token"]:
        """The higher, the longer a token stays. Default: FastV's, the newest query's attention averaged over heads."""
        return seen.attention.mean(1)

    def stages(self, n_layers: int) -> Sequence[int]:
        """Layers before which tokens are dropped, ascending; 0 is before the decoder."""
        return (self.first_pruned_layer,)

    def observes(self, n_layers: int) -> Sequence[int]:
        """Layers whose attention is read; default: those just before the stages."""
        return [stage - 1 for stage in self.stages(n_layers) if 0 < stage < n_layers]

    def merge(self, seen: Seen, kept: Bool[Tensor, "batch image_token"]) -> Float[Tensor, "batch image_token width"] | None:
        """New hidden states for the kept tokens, with something of the dropped ones; None leaves them as they are."""
        return None

    def selector_macs(self, shape, tokens: PrefillTokens) -> int:
        """Multiply-accumulates of deciding at all stages of one prefill, beside the observed rows of attention.

        shape: of the model, a `cost.Shape`. tokens: what the stages of this prefill saw and left.
        """
        return 0

    def slots(self, tokens: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Where a sequence of new hidden states goes that stand for these image tokens, in this order.

        Renumbered, they follow one another in the order of the sequence; else each has the place of its token.
        """
        return tokens.sort().values if self.positions == "compact" else tokens

    @classmethod
    def at(cls, budget: float, n_layers: int, image_tokens: int | None = None, **fields) -> Strategy:
        """The strategy that keeps so much of the image where it prunes: a share in [0, 1], or a number of `image_tokens`."""
        return cls.at_retention(retention_of(budget, image_tokens), n_layers, **fields)

    @classmethod
    def at_retention(cls, retention: float, n_layers: int, **fields) -> Strategy:
        """The strategy with its rate set such that this share of the image tokens stays where it prunes."""
        return cls(**fields)

    def __post_init__(self) -> None:
        self.residency = current_name(self.residency)
        if self.residency not in ("evict", "mask"):
            raise ValueError(f'residency is "evict" or "mask", not {self.residency!r}')
        if self.positions not in ("kept", "compact"):
            raise ValueError(f'positions is "kept" or "compact", not {self.positions!r}')
        if self.first_pruned_layer < 0:
            raise ValueError(f"first_pruned_layer counts from 0; {self.first_pruned_layer} is no layer")
        if hasattr(self, "rate"):
            rate_field("rate", self.rate)


def retention_of(budget: float, image_tokens: int | None) -> float:
    """A share in [0, 1] as it is; a whole number above 1 as that many of `image_tokens`, of which an image may have no fewer."""
    if 0 <= budget <= 1:
        return budget
    if budget != int(budget) or budget < 0:
        raise ValueError(f"a budget is a share in [0, 1] or a whole number of image tokens, not {budget}")
    if image_tokens is None:
        raise ValueError(f"a budget of {budget} tokens needs to know of how many: name image_tokens")
    if budget > image_tokens:
        raise ValueError(f"a budget of {budget} tokens is more than the {image_tokens} that an image has")
    return budget / image_tokens


def current_name(residency: str) -> str:
    """Predictors saved by earlier versions call the residency "mask" "hide"."""
    return "mask" if residency == "hide" else residency


def rate_field(name: str, rate: float) -> float:
    """A drop rate in [0, 1], or a clear error."""
    if not 0 <= rate <= 1:
        raise ValueError(f"{name} is the share of image tokens to drop and lies in [0, 1], not {rate}")
    return rate
