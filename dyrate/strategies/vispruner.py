"""VisPruner (arXiv:2412.01818): before the decoder, half by [CLS] attention, half by removing near-duplicates."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dyrate.seen import kept_count
from dyrate.strategies.before_decoder import BeforeDecoder


@dataclass(kw_only=True)
class VisPruner(BeforeDecoder):
    """VisPruner (arXiv:2412.01818; with important=1 FasterVLM): tokens that [CLS] attends to, and distinct ones of the rest.

    rate: share dropped, in [0, 1]. important: share of the kept ones chosen by [CLS] attention. The rest, ordered by it, loses
    eight at a time: of every second token those that most resemble one of the others (features before the projector).
    """

    important: float = 0.5
    needs = frozenset({"vision"})

    def score(self, seen):
        score = seen.vision.cls_attention.clone()
        for i, image in enumerate(seen.image):
            n = int(image.sum())
            count = kept_count(n, 1 - self.rate)
            order = score[i].masked_fill(~image, -torch.inf).argsort(descending=True, stable=True)[:n]
            important = int(count * self.important)
            score[i, order[:important]] += 2
            score[i, distinct(seen.vision.features[i], order[important:], count - important)] += 1
        return score

    def selector_macs(self, shape, tokens):
        """[CLS]'s row, and likeness of every second token to the others, while eight at a time are removed."""
        n, kept = tokens.image
        wanted = kept - int(kept * self.important)
        left = range(n - int(kept * self.important), wanted, -8) if wanted else ()
        return (n + sum((x // 2) * (x - x // 2) for x in left)) * shape.tower_width


def distinct(features, left, count: int):
    """Of the tokens `left`, indices into features (n, width), `count` that resemble one another least."""
    features = F.normalize(features.float(), dim=-1)
    while len(left) > count > 0:
        even, odd = left[::2], left[1::2]
        surplus = min(8, len(left) - count)
        order = (features[even] @ features[odd].T).amax(1).argsort(descending=True)
        left = torch.cat([even[order[surplus:]], odd])
    return left[:count]
