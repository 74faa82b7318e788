"""FastV (arXiv:2403.06764): from layer K on the image tokens that the last prompt token attends to least are dropped."""

from dataclasses import dataclass

from dyrate.strategy import Strategy


@dataclass(kw_only=True)
class FastV(Strategy):
    """FastV (arXiv:2403.06764): drop the image tokens that the last prompt token attends to least, once, in the prefill.

    rate: the share that is dropped, in [0, 1] (the paper's R). first_pruned_layer: the paper's K; tokens are ranked by the mean
    over heads of the attention in layer K - 1. `N - floor(N rate)` of N tokens stay, where its code rounds down.

        with dyrate.FastV(rate=0.75)(model, processor) as trace:
            tokens = model.generate(**inputs)
    """

    rate: float = 0.5
    each_step = False

    def keep(self, seen):
        return 1 - self.rate

    @classmethod
    def at_retention(cls, retention, n_layers, **fields):
        return cls(rate=1 - retention, **fields)


@dataclass(kw_only=True)
class FastVRerank(FastV):
    """FastV that ranks anew at every generated token, among all image tokens: what one drops the next may attend to again.

    Nothing leaves the cache (residency "mask").
    """

    residency: str = "mask"
    each_step = True
