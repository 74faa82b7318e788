"""VTW, visual tokens withdrawal (arXiv:2405.05803): from layer K on there are no image tokens at all."""

from dataclasses import dataclass

from dyrate.strategy import Strategy


@dataclass(kw_only=True)
class VTW(Strategy):
    """VTW (arXiv:2405.05803): drop every image token before layer `first_pruned_layer`; the paper takes 16 of 32 layers."""

    first_pruned_layer: int = 16
    each_step = False

    def stages(self, n_layers):
        """None where all layers see the image."""
        return () if self.first_pruned_layer == n_layers else super().stages(n_layers)

    def keep(self, seen):
        return 0.0

    def score(self, seen):
        return seen.image.float()

    @classmethod
    def at_retention(cls, retention, n_layers, **fields):
        """Here the retention is one of layers: this share of them still sees the image."""
        return cls(first_pruned_layer=round(retention * n_layers), **fields)
