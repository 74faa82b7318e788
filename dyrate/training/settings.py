"""What can be set of a training, with the words that its command line shows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields

from dyrate.cost import UNITS
from dyrate.features import FEATURES
from dyrate.strategy import current_name

RECIPES = ("paper", "anneal", "rloo", "imitate", "curves")


def _setting(default, *text: str, later: bool = False):
    """later: the field came after predictors had been stored under a hash of their settings (`Settings.decisive`)."""
    return field(default=default, metadata={"help": " ".join(text), "later": later})


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
    recipe: str = _setting(
        "paper",
        "paper: Gumbel-softmax with a straight-through gradient; anneal: the same with the unpruned model as teacher and a",
        "budget that falls from everything to its end; rloo: the score function, with a leave-one-out baseline over --samples",
        "trajectories of each answer; imitate: the best of a library of trajectories for each answer, then rloo; curves:",
        "the loss of each token measured at constant rates, interpolated",
        later=True,
    )
    features: str = _setting(
        "shares",
        "what the predictor reads: shares of attention by segment and head (the paper's); log_shares; tokens: by token of a",
        "segment; entropy: of the attention over the image, by head; step: the step number alone; hidden: the newest token's",
        "hidden state",
        later=True,
    )
    ordered: bool = _setting(
        False,
        "rates as an ordered scale: one linear function of the features is the likeliest rate, not one for each",
        later=True,
    )
    per_task: bool = _setting(
        False, "hold every task to the budget, each with a multiplier of its own, not their mean", later=True
    )
    once: bool = _setting(False, "decide in the prefill alone: the rate holds for the whole answer", later=True)
    samples: int = _setting(6, "trajectories that rloo and imitate draw of each answer", later=True)
    delay: int = _setting(
        0, "first tokens of an answer that see the whole image; budgets that short answers cannot meet so are not met", later=True
    )

    @property
    def imitates(self) -> bool:
        """Whether the unpruned model's distribution is the teacher."""
        return self.distill or self.recipe == "anneal"

    def __post_init__(self):
        object.__setattr__(self, "residency", current_name(self.residency))
        object.__setattr__(self, "unit", "retention" if self.unit == "kept" else self.unit)  # the name in earlier versions
        if self.unit not in UNITS:
            raise ValueError(f"unit is one of {UNITS}, not {self.unit!r}")
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget is the share that remains and lies in (0, 1], not {self.budget}")
        if self.first_pruned_layer < 1:
            raise ValueError("first_pruned_layer must be at least 1: the layer before it is observed")
        for name, known in {"recipe": RECIPES, "features": FEATURES}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.once and (self.delay or self.residency == "mask"):
            raise ValueError('once decides in the prefill what leaves: it goes with no delay, and with residency "evict" alone')
        if self.samples < 2:
            raise ValueError(f"samples is at least 2, for each is held against the others, not {self.samples}")

    def decisive(self) -> dict:
        """All fields but later ones at their defaults: what a predictor is found by that was stored before those came."""
        usual = {f.name: f.default for f in fields(self) if f.metadata["later"]}
        return {name: value for name, value in asdict(self).items() if name not in usual or value != usual[name]}

    @property
    def retention(self) -> float | None:
        """The retention ratio to meet; None where there is no budget, or one in another unit."""
        return self.budget if self.unit == "retention" and self.budget_penalty else None
