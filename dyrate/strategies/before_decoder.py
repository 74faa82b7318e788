"""What strategies share that drop a fixed share of the image tokens before the decoder."""

from dataclasses import dataclass

from dyrate.strategy import Strategy


@dataclass(kw_only=True)
class BeforeDecoder(Strategy, registered=False):
    """Drops the share `rate`, in [0, 1], once, before the first layer; what follows is renumbered. Subclasses say which."""

    rate: float = 0.5
    first_pruned_layer: int = 0
    positions: str = "compact"
    each_step = False

    def stages(self, n_layers):
        return (0,)

    def keep(self, seen):
        return 1 - self.rate

    @classmethod
    def at_retention(cls, retention, n_layers, **fields):
        return cls(rate=1 - retention, **fields)
