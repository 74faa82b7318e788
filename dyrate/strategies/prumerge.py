"""LLaVA-PruMerge (arXiv:2403.15388): keep the outliers of [CLS] attention and merge into each what resembles it."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dyrate.seen import kept_count
from dyrate.strategy import Strategy


@dataclass(kw_only=True)
class PruMerge(Strategy):
    """PruMerge (arXiv:2403.15388): tokens whose [CLS] attention is an outlier stay, and one that sums up all others.

    An outlier lies above the third quartile by 1.5 interquartile ranges, in the attention of the tower's last layer with all
    heads taken as one. Each outlier becomes itself plus the [CLS]-weighted sum of its `neighbours` most similar other tokens
    (by key), not normalised; the last token is the weighted sum of all that are no outliers. retention: keep so many of the
    best, the last token among them, in place of the outliers.
    """

    retention: float | None = None
    neighbours: int = 32
    first_pruned_layer: int = 0
    positions: str = "compact"
    each_step = False
    needs = frozenset({"vision"})

    def stages(self, n_layers):
        return (0,)

    def keep(self, seen):
        n_image = seen.image.sum(1).tolist()
        return [min(1.0, (len(self._chosen(seen, i)) + 1) / n) for i, n in enumerate(n_image)]

    def score(self, seen):
        """The chosen tokens, then the most attended of the others, whose place the last token takes."""
        score = seen.vision.joint_attention.clone()
        for i in range(len(score)):
            score[i, self._chosen(seen, i)] += 1
        return score

    def merge(self, seen, kept):
        vision = seen.vision
        merged = torch.zeros_like(vision.features)
        for i in range(len(merged)):
            chosen, real = self._chosen(seen, i), seen.image[i].nonzero()[:, 0]
            features, weight = vision.features[i], vision.joint_attention[i].to(vision.features)[:, None]
            keys = F.normalize(vision.joint_keys[i].float(), dim=-1)
            alike = keys[chosen] @ keys[real].T
            alike[chosen[:, None] == real] = -torch.inf
            near = real[alike.topk(min(self.neighbours, len(real) - 1), -1).indices]  # (chosen, neighbour)
            others = real[~torch.isin(real, chosen)]
            rest = (features[others] * weight[others]).sum(0, keepdim=True)
            sequence = torch.cat([features[chosen] + (features[near] * weight[near]).sum(1), rest])
            last = kept[i].nonzero()[:, 0]
            last = last[~torch.isin(last, chosen)]
            merged[i, self.slots(torch.cat([chosen, last]))] = sequence
        return vision.project(merged)

    def selector_macs(self, shape, tokens):
        """[CLS]'s row, likeness of the kept tokens' keys to all, and projecting once more."""
        n, kept = tokens.image
        return n * ((1 + kept) * shape.tower_width + shape.tower_width * shape.width + shape.width**2)

    @classmethod
    def at_retention(cls, retention, n_layers, **fields):
        return cls(retention=retention, **fields)

    def _chosen(self, seen, i):
        """The tokens of row i that stay, most attended first."""
        key = ("chosen", i)
        if key not in seen.notes:
            seen.notes[key] = self._choose(seen.vision.joint_attention[i].float(), seen.image[i])
        return seen.notes[key]

    def _choose(self, attention, image):
        n = int(image.sum())
        if self.retention is None:
            count = int(outliers(attention[image]).sum())
        else:
            count = max(0, kept_count(n, self.retention) - 1)
        return attention.masked_fill(~image, -torch.inf).argsort(descending=True, stable=True)[:count]


@dataclass(kw_only=True)
class PruMergePlus(PruMerge):
    """PruMerge+ (arXiv:2403.15388), what its authors' code runs: beside the outliers, tokens spread evenly over the image.

    Every `int(int(1 / ratio) / 3)`-th token, where `ratio` is the share of outliers. retention: half of them by attention.
    """

    def _choose(self, attention, image):
        n = int(image.sum())
        order = attention.masked_fill(~image, -torch.inf).argsort(descending=True, stable=True)
        if self.retention is None:
            best = order[: int(outliers(attention[image]).sum())]
            step = max(1, int(int(n / max(1, len(best))) / 3))
            spread = image.nonzero()[:, 0][torch.arange(0, n - 1, step, device=order.device)]
            return torch.cat([best, spread[~torch.isin(spread, best)]])
        count = max(0, kept_count(n, self.retention) - 1)
        best = order[: (count + 1) // 2]
        rest = image.nonzero()[:, 0]
        rest = rest[~torch.isin(rest, best)]
        n = count - len(best)
        return torch.cat([best, rest[torch.arange(n, device=order.device) * len(rest) // max(1, n)]])


def outliers(attention):
    """Which of the values, (n,), lie above the third quartile by more than 1.5 interquartile ranges."""
    low, high = attention.quantile(0.25), attention.quantile(0.75)
    return attention > high + 1.5 * (high - low)
