"""DART (arXiv:2502.11494): duplication matters, so keep what is least like a few pivot tokens."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dyrate.seen import kept_count, score_of
from dyrate.strategies.fastv import FastV


@dataclass(kw_only=True)
class DART(FastV):
    """DART (arXiv:2502.11494): pivots are tokens with large keys; each in turn keeps the image tokens least like it.

    rate: share dropped, in [0, 1]. pivots: of the image and of the instruction, each, by the L1 norm of their keys in layer
    K - 1. Likeness is the cosine of hidden states that enter layer K, after the decoder's last norm. Keeps exactly
    `N - floor(N rate)` tokens, where its code keeps the image's pivots beside them and rounds up for each pivot.
    """

    pivots: int = 4

    def score(self, seen):
        keys = seen.observed[seen.layer - 1].key.transpose(1, 2).flatten(2).float().norm(p=1, dim=-1)
        size = {"image": keys.gather(1, seen.slots(seen.positions)), "text": keys.gather(1, seen.instruction_slots)}
        image, text = (F.normalize(seen.norm(x).float(), dim=-1) for x in (seen.hidden, seen.instruction_hidden))
        score = torch.zeros_like(size["image"])
        for i in range(len(score)):
            left = seen.kept[i].clone()
            total = kept_count(int(seen.image[i].sum()), 1 - self.rate)
            own = size["image"][i].masked_fill(~left, -torch.inf).topk(min(self.pivots, total)).indices
            real = size["text"][i].masked_fill(~seen.instruction_real[i], -torch.inf)
            theirs = real.topk(min(self.pivots, int(seen.instruction_real[i].sum()))).indices
            left[own] = False
            order = own.tolist()
            each = -(-(total - len(order)) // max(1, len(own) + len(theirs)))
            for pivot in [*image[i, own], *text[i, theirs]]:
                like = (image[i] @ pivot).masked_fill(~left, torch.inf)
                found = like.topk(min(each, int(left.sum())), largest=False).indices
                left[found] = False
                order += found.tolist()
            score[i] = score_of(torch.tensor(order, dtype=torch.long, device=score.device), len(left))
        return score

    def selector_macs(self, shape, tokens):
        """Likeness of every image token to each pivot."""
        return 2 * self.pivots * tokens.image[0] * shape.width
