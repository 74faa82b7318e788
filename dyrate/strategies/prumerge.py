"""LLaVA-PruMerge (arXiv:2403.15388): keep the outliers of [CLS] attention and merge into each what resembles it."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dyrate.strategy import Strategy


@dataclass(kw_only=True)
class PruMerge(Strategy):
    """PruMerge (arXiv:2403.15388): keep tokens whose [CLS] attention lies above the third quartile by 1.5 interquartile
    ranges, at least one.

    retention: keep so many of the best instead. Each kept token becomes the mean of itself and its `neighbours` most similar
    tokens (by key), weighted by [CLS] attention.
    """

    retention: float | None = None
    neighbours: int = 32
    first_pruned_layer: int = 0
    each_step = False
    needs = frozenset({"vision"})

    def stages(self, n_layers):
        return (0,)

    def keep(self, seen):
        if self.retention is not None:
            return self.retention
        attention = seen.vision.cls_attention.float().masked_fill(~seen.image, torch.nan)
        low, high = (attention.nanquantile(q, 1, keepdim=True) for q in (0.25, 0.75))
        outliers = (attention > high + 1.5 * (high - low)).sum(1).clamp(min=1)
        return outliers / seen.image.sum(1)

    def score(self, seen):
        return seen.vision.cls_attention

    def merge(self, seen, kept):
        vision = seen.vision
        keys = F.normalize(vision.keys.float(), dim=-1)
        likeness = (keys @ keys.transpose(1, 2)).masked_fill(~seen.image[:, None], -torch.inf)
        near = likeness.topk(min(self.neighbours + 1, likeness.shape[-1]), -1).indices  # a token is most like itself
        row = torch.arange(len(near), device=near.device)[:, None, None]
        weight = vision.cls_attention.masked_fill(~seen.image, 0)[row, near]
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-12)
        return vision.project((weight[..., None].to(vision.features) * vision.features[row, near]).sum(2))

    def selector_macs(self, shape, n_image, n_instruction):
        """[CLS]'s row, likeness of keys, and projecting once more what was merged."""
        return n_image * ((1 + n_image) * shape.tower_width + shape.tower_width * shape.width + shape.width**2)

    @classmethod
    def at(cls, retention, n_layers, **fields):
        return cls(retention=retention, **fields)
