"""No pruning: what every comparison is measured against."""

from dataclasses import dataclass

from dyrate.strategy import Strategy


@dataclass(kw_only=True)
class Full(Strategy):
    """Keep every image token in every layer: plain `generate`, with a trace."""

    def stages(self, n_layers):
        return ()
