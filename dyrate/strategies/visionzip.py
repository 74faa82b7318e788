"""VisionZip (arXiv:2412.04467): before the decoder, the tokens that [CLS] attends to, and a few that stand for the rest."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dyrate.seen import choose, kept_count
from dyrate.strategy import Strategy


@dataclass(kw_only=True)
class VisionZip(Strategy):
    """VisionZip (arXiv:2412.04467): keep dominant tokens by [CLS] attention, and contextual ones that stand for the rest.

    rate: share dropped, in [0, 1]. contextual: their share of what is kept (the paper's 10 of 64). Contextual tokens are
    spread evenly over the remaining ones; each of those is averaged into the contextual token whose key is most similar.
    """

    rate: float = 0.5
    contextual: float = 10 / 64
    first_pruned_layer: int = 0
    each_step = False
    needs = frozenset({"vision"})

    def stages(self, n_layers):
        return (0,)

    def keep(self, seen):
        return 1 - self.rate

    def score(self, seen):
        """Dominant tokens, then contextual ones, then the rest. Attention is at most 1, so the three do not mix."""
        score = seen.vision.cls_attention.clone()
        for i in range(len(score)):
            dominant, targets = self._split(seen, i)
            score[i, dominant] += 2
            score[i, targets] += 1
        return score

    def merge(self, seen, kept):
        features = seen.vision.features.clone()
        for i in range(len(features)):
            dominant, targets = self._split(seen, i)
            rest = (seen.image[i] & ~dominant).nonzero()[:, 0]
            if len(targets):
                keys = F.normalize(seen.vision.keys[i].float(), dim=-1)
                nearest = (keys[rest] @ keys[targets].T).argmax(1)
                nearest[(rest[:, None] == targets).any(1)] = torch.arange(len(targets), device=nearest.device)
                for j, target in enumerate(targets):
                    features[i, target] = seen.vision.features[i, rest[nearest == j]].mean(0)
        return seen.vision.project(features)

    def _split(self, seen, i):
        """Of row i: the dominant tokens (mask), the contextual ones (indices, evenly spread over what is not dominant)."""
        count = kept_count(int(seen.image[i].sum()), 1 - self.rate)
        n_contextual = round(count * self.contextual) if self.rate else 0
        dominant = choose(seen.vision.cls_attention[i : i + 1], seen.image[i : i + 1], [count - n_contextual])[0]
        rest = (seen.image[i] & ~dominant).nonzero()[:, 0]
        spread = torch.arange(n_contextual, device=rest.device) * len(rest) // max(1, n_contextual)
        return dominant, rest[spread]

    def selector_macs(self, shape, n_image, n_instruction):
        """[CLS]'s row, likeness of keys, and projecting once more what was merged."""
        kept = kept_count(n_image, 1 - self.rate)
        targets = round(kept * self.contextual)
        project = n_image * (shape.tower_width * shape.width + shape.width**2)
        return (n_image + (n_image - kept + targets) * targets) * shape.tower_width + project

    @classmethod
    def at(cls, retention, n_layers, **fields):
        return cls(rate=1 - retention, **fields)
