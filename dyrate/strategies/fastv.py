"""FastV (arXiv:2403.06764): after layer K the image tokens that the last prompt token attends to least are gone."""

from dataclasses import dataclass

from dyrate.strategy import Strategy, rate_field


@dataclass(kw_only=True)
class FastV(Strategy):
    """Drop `rate` (the paper's R) of the image tokens by their mean attention in layer K-1, ranked once, in the prefill.

    rerank: rank anew at every generated token, as FastV does when it runs without a KV cache: dropped tokens can return.
    """

    rate: float = 0.5
    rerank: bool = False

    def __post_init__(self):
        rate_field("rate", self.rate)
        self.each_step = self.rerank
        if self.rerank:
            self.residency = "hide"
        super().__post_init__()

    def keep(self, seen):
        return 1 - self.rate

    @classmethod
    def at(cls, share, n_layers, **fields):
        return cls(rate=1 - share, **fields)
