"""SparseVLM (arXiv:2410.04417, v1.5): the instruction's own tokens rate the image tokens; some of the rejected are recycled."""

from dataclasses import dataclass

import torch

from dyrate.seen import choose, kept_count
from dyrate.strategy import Strategy

STARTS = (3, 7, 16)  # of 32 layers: layers 2, 6 and 15 run whole, and their output is pruned
NOMINAL = 576  # image tokens for which the published numbers of tokens are meant


@dataclass(kw_only=True)
class SparseVLM(Strategy):
    """SparseVLM v1.5 (arXiv:2410.04417): raters are instruction tokens that resemble the image; their attention ranks it.

    Raters are chosen once, from the embeddings: tokens whose mean similarity to the image lies above the mean. shares: of the
    image tokens, those that stay for their rating at the three stages, so the published 300, 200 and 110 of 576. Of the
    others the best-rated three in ten are recycled: density-peak clusters of ten on average, each merged into its mean, follow
    the image. Its code breaks ties of density by noise, this one by order; it takes one image a prompt.
    """

    shares: tuple[float, float, float] = (300 / NOMINAL, 200 / NOMINAL, 110 / NOMINAL)
    positions: str = "compact"
    each_step = False
    needs = frozenset({"embeddings"})

    def stages(self, n_layers):
        """The published layers at the same relative depth."""
        return sorted({max(1, round(n_layers * start / 32)) for start in STARTS})

    def keep(self, seen):
        return [sum(self._counts(seen, i)[::2]) / int(n) for i, n in enumerate(seen.image.sum(1))]

    def score(self, seen):
        """Rated best, then cluster centres, then the rest. Attention is at most 1, so the three do not mix."""
        rated = self._rated(seen)
        score = rated.clone()
        for i in range(len(rated)):
            best, clusters = self._parts(seen, rated, i)
            score[i, best] += 2
            score[i, list(clusters)] += 1
        return score

    def merge(self, seen, kept):
        rated, hidden = self._rated(seen), seen.hidden
        merged = hidden.clone()
        for i in range(len(rated)):
            best, clusters = self._parts(seen, rated, i)
            means = [hidden[i, members].mean(0, keepdim=True) for members in clusters.values()]
            centres = torch.tensor(list(clusters), dtype=torch.long, device=best.device)
            merged[i, self.slots(torch.cat([best, centres]))] = torch.cat([hidden[i, best], *means])
        return merged

    @classmethod
    def at_retention(cls, retention, n_layers, **fields):
        """The published shares scaled until the mean over pruned layers, clusters among them, is the retention."""
        low, high = 0.0, 1 / cls.shares[-1]
        for _ in range(40):
            middle = (low + high) / 2
            scaled = cls(shares=tuple(min(1.0, middle * x) for x in cls.shares), **fields)
            low, high = (middle, high) if scaled.mean_kept(n_layers) < retention * NOMINAL else (low, middle)
        return cls(shares=tuple(min(1.0, high * x) for x in cls.shares), **fields)

    def mean_kept(self, n_layers: int) -> float:
        """Image tokens of `NOMINAL` in a pruned layer, mean over these."""
        ends = [*list(self.stages(n_layers))[1:], n_layers]
        left, total = NOMINAL, 0
        for stage, end in zip(self.stages(n_layers), ends, strict=True):
            best, _, clusters = counts(NOMINAL, left, self._share(stage, n_layers))
            left = best + clusters
            total += left * (end - stage)
        return total / (n_layers - self.stages(n_layers)[0])

    def selector_macs(self, shape, tokens):
        """At each stage the similarity of instruction and image, and the instruction's rows of attention."""
        return sum((tokens.image[0] + n + tokens.text) * tokens.instruction * shape.width for n in tokens.image[:-1])

    def _share(self, stage, n_layers):
        return self.shares[len(self.shares) - len(self.stages(n_layers)) + list(self.stages(n_layers)).index(stage)]

    def _counts(self, seen, i):
        return counts(int(seen.image[i].sum()), int(seen.kept[i].sum()), self._share(seen.layer, seen.n_layers))

    def _rated(self, seen):
        """Mean attention of the raters to each image token, (batch, image_token)."""
        if "rated" in seen.notes:
            return seen.notes["rated"]
        rows, real = seen.instruction_attention
        image, text = seen.embedded, seen.instruction_embedded
        similar = (image @ text.transpose(1, 2)).float().masked_fill(~real[:, None], -torch.inf).softmax(2)
        similar = (similar * seen.image[..., None]).sum(1) / seen.image.sum(1, keepdim=True)
        raters = real & (similar > (similar * real).sum(1, keepdim=True) / real.sum(1, keepdim=True))
        raters |= real & ~raters.any(1, keepdim=True)  # one token alone is not above the mean
        seen.notes["rated"] = (rows * raters[..., None]).sum(1) / raters.sum(1, keepdim=True)
        return seen.notes["rated"]

    def _parts(self, seen, rated, i):
        """Of row i: the tokens rated best, ascending, and the clusters {centre: members} of the recycled ones."""
        if i not in seen.notes:
            n_best, n_recycled, n_clusters = self._counts(seen, i)
            best = choose(rated[i : i + 1], seen.kept[i : i + 1], [n_best])[0]
            again = choose(rated[i : i + 1], (seen.kept[i] & ~best)[None], [n_recycled])[0]
            seen.notes[i] = best.nonzero()[:, 0], cluster(seen.hidden[i].float(), again, n_clusters) if n_clusters else {}
        return seen.notes[i]


def counts(n_image: int, left: int, share: float) -> tuple[int, int, int]:
    """Of `left` tokens: how many stay for their rating, how many are recycled, and into how many clusters."""
    if share >= 1:
        return left, 0, 0
    best = min(kept_count(n_image, share), left - 1)
    recycled = int(0.3 * (left - best)) + 1
    return best, recycled, int(recycled / 10) + 1


def cluster(hidden, members, n_centres: int) -> dict[int, list[int]]:
    """Density-peak clusters of the tokens where `members`: {centre: tokens}, the highest peak first. hidden: (token, width)."""
    index = members.nonzero()[:, 0]
    distance = torch.cdist(hidden[index], hidden[index]) / hidden.shape[1] ** 0.5
    nearest = distance.topk(n_centres, largest=False).values
    density = (-(nearest**2).mean(1)).exp()
    higher = density[None] > density[:, None]
    peak = torch.where(higher, distance, distance.max()).min(1).values
    centres = (peak * density).topk(n_centres).indices
    nearest_centre = distance[:, centres].argmin(1)
    nearest_centre[centres] = torch.arange(n_centres, device=centres.device)
    return {int(index[c]): index[nearest_centre == j].tolist() for j, c in enumerate(centres)}
