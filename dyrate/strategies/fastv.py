"""FastV (arXiv:2403.06764): after layer K the image tokens that the last prompt token attends to least are gone."""

from dataclasses import dataclass

from dyrate.strategy import Strategy


@dataclass(kw_only=True)
class FastV(Strategy):
    """Drop `rate` (the paper's R) of the image tokens by their mean attention in layer K-1, ranked once, in the prefill."""

    rate: float = 0.5
    each_step = False

    def keep(self, seen):
        return 1 - self.rate

    @classmethod
    def at(cls, share, n_layers, **fields):
        return cls(rate=1 - share, **fields)


@dataclass(kw_only=True)
class FastVRerank(FastV):
    """FastV as it is without a KV cache: every generated token ranks anew, and what was dropped can return."""

    residency: str = "hide"
    each_step = True
