"""DivPrune (arXiv:2503.02175): before the decoder, image tokens as different from one another as can be."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dyrate.seen import kept_count
from dyrate.strategy import Strategy


@dataclass(kw_only=True)
class DivPrune(Strategy):
    """DivPrune (arXiv:2503.02175): greedy maximum of the least cosine distance between the kept, projected image tokens.

    rate: share dropped, in [0, 1]. The first is the token whose nearest neighbour is farthest, each next one that whose least
    distance to those taken is largest. Uses no attention and no instruction. Rounds up, its code to the nearest.
    """

    rate: float = 0.5
    first_pruned_layer: int = 0
    positions: str = "compact"
    each_step = False

    def stages(self, n_layers):
        return (0,)

    def keep(self, seen):
        return 1 - self.rate

    def score(self, seen):
        score = torch.zeros(seen.image.shape, device=seen.image.device)
        for i, image in enumerate(seen.image):
            index = image.nonzero()[:, 0]
            order = farthest(seen.hidden[i, index], kept_count(len(index), 1 - self.rate))
            score[i, index[order]] = torch.arange(len(order), 0, -1, device=score.device, dtype=score.dtype)
        return score

    def selector_macs(self, shape, tokens):
        return tokens.image[0] ** 2 * shape.width

    @classmethod
    def at(cls, retention, n_layers, **fields):
        return cls(rate=1 - retention, **fields)


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
