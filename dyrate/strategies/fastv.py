"""FastV (arXiv:2403.06764): after layer K the image tokens that the last prompt token attends to least are dropped."""

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
    def at(cls, retention, n_layers, **fields):
        return cls(rate=1 - retention, **fields)


@dataclass(kw_only=True)
class FastVRerank(FastV):
    """FastV ranking anew at every generated token, among all image tokens: what one token drops the next may attend to again."""

    residency: str = "mask"
    each_step = True
