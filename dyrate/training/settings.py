"""What can be set of a training, with the words that its command line shows."""

from __future__ import annotations

from dataclasses import dataclass, field

from dyrate.cost import UNITS
from dyrate.strategy import current_name


def _setting(default, *text: str):
    return field(default=default, metadata={"help": " ".join(text)})


@dataclass(frozen=True)
class Settings:
    """One training run. The text beside each field is its help in `python -m dyrate.training --help`."""

    budget: float = _setting(0.33, "what must remain of the unpruned cost, a share in (0, 1], counted in --unit")
    unit: str = _setting(
        "retention",
        "retention: mean share of image tokens kept over the steps of an answer; macs: the decoder's multiply-accumulates with a",
        "KV cache; macs_uncached: the same if every step ran over the whole sequence, most likely the paper's unit; kv_bytes:",
        "bytes that decoding reads from the cache",
    )
    first_pruned_layer: int = _setting(2, "first decoder layer, counted from 0, that misses dropped tokens: the paper's K")
    observed_layers: list[int] | None = _setting(  # noqa: RUF009
        None, "decoder layers whose attention the predictor reads (default: the one before the first pruned layer)"
    )
    residency: str = _setting("evict", "evict: dropped tokens leave the cache for good; mask: they stay and are re-selectable")
    n_rates: int = _setting(32, "number n of drop rates to choose from: 0, 1/n, 2/n, ... (n-1)/n")
    with_step: bool = _setting(False, "give the predictor the step number as one more feature")
    steps: int = _setting(200, "training steps")
    batch: int = _setting(8, "answers in a batch")
    accumulate: int = _setting(1, "batches in a step, for where memory holds few answers; the budget is a mean over all of them")
    learning_rate: float = _setting(0.1, "learning rate of Adam in the first step; it falls in a straight line to a tenth")
    temperature: float = _setting(8.0, "temperature of the Gumbel-softmax in the first step")
    last_temperature: float = _setting(8.0, "temperature in the last step; in between a straight line")
    noise_until: float = _setting(0.3, "share of the steps over which the Gumbel noise fades to nothing")
    budget_penalty: float = _setting(10.0, "weight of the squared excess over the budget, in nats a token; 0: no budget")
    distill: bool = _setting(False, "imitate the unpruned model's token distribution in place of the reference answers")
    checkpointing: bool = _setting(False, "compute activations anew in the backward pass: less memory, more time")
    seed: int = _setting(0, "seed of all random numbers")

    def __post_init__(self):
        object.__setattr__(self, "residency", current_name(self.residency))
        object.__setattr__(self, "unit", "retention" if self.unit == "kept" else self.unit)  # the name in earlier versions
        if self.unit not in UNITS:
            raise ValueError(f"unit is one of {UNITS}, not {self.unit!r}")
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget is the share that remains and lies in (0, 1], not {self.budget}")
        if self.first_pruned_layer < 1:
            raise ValueError("first_pruned_layer must be at least 1: the layer before it is observed")

    @property
    def retention(self) -> float | None:
        """The retention ratio to meet; None where there is no budget, or one in another unit."""
        return self.budget if self.unit == "retention" and self.budget_penalty else None
