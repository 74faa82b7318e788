"""CDPruner (arXiv:2506.10967): before the decoder, a determinantal point process of relevance and diversity."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dyrate.seen import kept_count, score_of
from dyrate.strategies.before_decoder import BeforeDecoder


@dataclass(kw_only=True)
class CDPruner(BeforeDecoder):
    """CDPruner (arXiv:2506.10967): greedy most likely set of a determinantal point process, relevance times similarity.

    rate: share dropped, in [0, 1]. Similarity is the cosine of projected image tokens. Relevance is the mean cosine of an image
    token and the instruction's embeddings, scaled to (0, 1]: a departure, for its code asks CLIP's text tower, which these
    models do not carry. So what the departure costs cannot be measured with them; what this relevance is worth can, against
    `relevance` 0 (`DiversityAlone`; chapter 3). relevance: its exponent.
    """

    relevance: float = 1.0

    def score(self, seen):
        score = torch.zeros(seen.image.shape, device=seen.image.device)
        hidden, text = (F.normalize(x.float(), dim=-1) for x in (seen.hidden, seen.instruction_hidden))
        for i, image in enumerate(seen.image):
            index = image.nonzero()[:, 0]
            tokens = hidden[i, index]
            relevance = (tokens @ text[i, seen.instruction_real[i]].T).mean(1)
            relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min() + 1e-6)
            relevance = relevance**self.relevance
            order = likeliest(relevance[:, None] * (tokens @ tokens.T) * relevance, kept_count(len(index), 1 - self.rate))
            score[i, index] = score_of(order, len(index))
        return score

    def selector_macs(self, shape, tokens):
        """Similarities, relevance, and in each greedy step the rows so far."""
        n, kept = tokens.image
        return n * (n + tokens.instruction) * shape.width + n * kept * (kept - 1) // 2


def likeliest(kernel, count: int):
    """Indices of `count` items in the order of greedy MAP inference (Chen et al., 2018). kernel: (n, n), semidefinite."""
    left = kernel.diagonal().clone()
    least = 1e-5 * left.max()  # below is rounding: where more are wanted than the kernel has ranks, the first of what is left
    rows = kernel.new_zeros(count, len(kernel))
    chosen = []
    for step in range(count):
        chosen.append(int((left >= left.max() - least).nonzero()[0]))  # of equals, but for rounding, the first
        gain = left[chosen[-1]].clamp(min=1e-12).sqrt()
        rows[step] = (kernel[chosen[-1]] - rows[:step, chosen[-1]] @ rows[:step]) / gain
        left = left - rows[step] ** 2
        left[left < least] = 0
        left[chosen] = -torch.inf
    return torch.tensor(chosen, dtype=torch.long, device=kernel.device)
