"""After DyCoke's second stage (arXiv:2411.15024): the prefill is whole, and each new token reads a subset of its own."""

from dataclasses import dataclass

from dyrate.strategy import Strategy


@dataclass(kw_only=True)
class DyCoke(Strategy):
    """DyCoke (arXiv:2411.15024): while decoding, attend to a subset of the image tokens, chosen anew at each token.

    rate: share that a token does not attend to; it attends to those that attention ranks highest, and none is evicted. DyCoke
    chooses anew only when attention has moved, to save work; its first stage merges video frames and does not apply.
    """

    first_pruned_layer: int = 3
    residency: str = "mask"
    rate: float = 0.7

    def keep(self, seen):
        return 1 - self.rate if seen.step else 1.0

    @classmethod
    def at_retention(cls, retention, n_layers, **fields):
        return cls(rate=1 - retention, **fields)
