"""VisionZip (arXiv:2412.04467): before the decoder, the tokens that [CLS] attends to, and a few that stand for the rest."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dyrate.seen import choose, kept_count
from dyrate.strategies.before_decoder import BeforeDecoder


@dataclass(kw_only=True)
class VisionZip(BeforeDecoder):
    """VisionZip (arXiv:2412.04467): [CLS] itself, the dominant tokens by its attention, and contextual ones for the rest.

    rate: share dropped, in [0, 1]. contextual: their share of what is kept (the paper's 10 of 64). Contextual tokens are every
    `R // c`-th of the R that are not dominant; to each is added the mean of those of the others whose key, mean over heads, is
    most like its own.
    """

    contextual: float = 10 / 64
    needs = frozenset({"vision"})

    def score(self, seen):
        """Dominant tokens, contextual ones, the one whose place [CLS] takes, the rest. Attention is at most 1: no mixing."""
        score = seen.vision.cls_attention.clone()
        for i in range(len(score)):
            for bonus, tokens in zip((1, 3, 2), self._parts(seen, i), strict=True):
                score[i, tokens] += bonus
        return score

    def merge(self, seen, kept):
        vision = seen.vision
        merged = torch.zeros_like(vision.features)
        for i in range(len(merged)):
            place, dominant, targets = self._parts(seen, i)
            features, others = vision.features[i], seen.image[i].clone()
            others[torch.cat([dominant, targets])] = False
            others = others.nonzero()[:, 0]
            contextual = features[targets]
            if len(targets) and len(others):
                keys = F.normalize(vision.keys[i].float().mean(1), dim=-1)
                nearest = F.one_hot((keys[others] @ keys[targets].T).argmax(1), len(targets)).to(features)
                contextual = contextual + nearest.T @ features[others] / nearest.sum(0).clamp(min=1)[:, None]
            sequence = torch.cat([vision.cls[i : i + 1][: len(place)], features[dominant], contextual])
            merged[i, self.slots(torch.cat([place, dominant, targets]))] = sequence
        return vision.project(merged)

    def _parts(self, seen, i):
        """Of row i: the token whose place [CLS] takes, the dominant ones, the contextual ones."""
        if i not in seen.notes:
            attention, image = seen.vision.cls_attention[i : i + 1], seen.image[i : i + 1]
            count = kept_count(int(image.sum()), 1 - self.rate)
            n_contextual = min(round(count * self.contextual), max(0, count - 1))
            dominant = choose(attention, image, [max(0, count - n_contextual - 1)])
            rest = (image & ~dominant)[0].nonzero()[:, 0]
            targets = rest[:: max(1, len(rest) // max(1, n_contextual))][:n_contextual]
            free = image & ~dominant
            free[0, targets] = False
            place = choose(attention, free, [min(1, count)])
            seen.notes[i] = place[0].nonzero()[:, 0], dominant[0].nonzero()[:, 0], targets
        return seen.notes[i]

    def selector_macs(self, shape, tokens):
        """[CLS]'s row, likeness of keys, and projecting once more what was merged."""
        n, kept = tokens.image
        targets = round(kept * self.contextual)
        project = n * (shape.tower_width * shape.width + shape.width**2)
        return (n + (n - kept + 1) * targets) * shape.tower_width + project
