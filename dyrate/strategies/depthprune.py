"""The two ways to spread a rate over the layers that the DyRate paper compares (arXiv:2501.14204, Sec. IV-D1)."""

from dataclasses import dataclass

from dyrate.strategies.fastv import FastV
from dyrate.strategy import Strategy, rate_field


@dataclass(kw_only=True)
class FixedPrune(FastV):
    """FixedPrune (arXiv:2501.14204, Sec. IV-D1): one rate for all layers from the fourth on, ranked as FastV does."""

    first_pruned_layer: int = 3


@dataclass(kw_only=True)
class DepthPrune(Strategy):
    """DepthPrune (arXiv:2501.14204, Sec. IV-D1): the rate grows with depth, from `rate` (P_4th) at the fourth layer to `deepest`.

    rate, deepest: shares dropped at the first and at the last pruned layer, in [0, 1]. The paper leaves open how R' grows
    with the layer index; here it grows in equal steps.
    """

    first_pruned_layer: int = 3
    rate: float = 0.5
    deepest: float = 0.9
    each_step = False

    def __post_init__(self):
        rate_field("deepest", self.deepest)
        if self.deepest < self.rate:
            raise ValueError(f"deepest ({self.deepest}) is below rate ({self.rate}), but dropped tokens cannot return")
        super().__post_init__()

    def stages(self, n_layers):
        return range(self.first_pruned_layer, max(n_layers, self.first_pruned_layer + 1))

    def keep(self, seen):
        depth = (seen.layer - self.first_pruned_layer) / max(1, seen.n_layers - 1 - self.first_pruned_layer)
        return 1 - (self.rate + (self.deepest - self.rate) * depth)

    @classmethod
    def at_retention(cls, retention, n_layers, **fields):
        spread = min(0.2, retention, 1 - retention)  # the mean over layers is the retention
        return cls(rate=1 - retention - spread, deepest=1 - retention + spread, **fields)
