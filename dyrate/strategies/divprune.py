"""DivPrune (arXiv:2503.02175): before the decoder, image tokens as different from one another as can be."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dyrate.seen import kept_count, score_of
from dyrate.strategies.before_decoder import BeforeDecoder


@dataclass(kw_only=True)
class DivPrune(BeforeDecoder):
    """DivPrune (arXiv:2503.02175): greedy maximum of the least cosine distance between the kept, projected image tokens.

    rate: share dropped, in [0, 1]. The first is the token whose nearest neighbour is farthest, each next one that whose least
    distance to those taken is largest. Uses no attention and no instruction. Rounds up, its code to the nearest.
    """

    def score(self, seen):
        score = torch.zeros(seen.image.shape, device=seen.image.device)
        for i, image in enumerate(seen.image):
            index = image.nonzero()[:, 0]
            order = farthest(seen.hidden[i, index], kept_count(len(index), 1 - self.rate))
            score[i, index] = score_of(order, len(index))
        return score

    def selector_macs(self, shape, tokens):
        return tokens.image[0] ** 2 * shape.width


def farthest(tokens, count: int):
    """Indices of `count` of the tokens, (n, width), in the order in which the greedy rule takes them."""
    tokens = F.normalize(tokens.float(), dim=-1)
    distance = 1 - tokens @ tokens.T
    least = distance.topk(min(2, len(tokens)), dim=0, largest=False).values[-1]  # of itself it has the distance 0
    chosen = []
    for step in range(count):
        chosen.append(int(least.argmax()))
        row = distance[chosen[-1]]
        least = row.clone() if step == 0 else torch.minimum(least, row)
        least[chosen] = -torch.inf
    return torch.tensor(chosen, dtype=torch.long, device=tokens.device)
