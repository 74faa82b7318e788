"""SparseVLM (arXiv:2410.04417): the instruction's own tokens rate the image tokens; some of the rejected are recycled."""

from dataclasses import dataclass

import torch

from dyrate.seen import choose, kept_count
from dyrate.strategy import Strategy


@dataclass(kw_only=True)
class SparseVLM(Strategy):
    """SparseVLM (arXiv:2410.04417): raters are instruction tokens more relevant to the image than the mean; their mean
    attention ranks image tokens.

    retention: what stays after the last stage, falling by equal factors. None: the paper's rule, each stage drops
    `scale * (tokens - rank of the raters' attention matrix)`. recycled: of what is dropped, the best-rated part is
    clustered (density peaks) and merged into `clusters` of its number, so that tokens kept = rated best + cluster centres.
    Differs from the paper in that relevance is read from the hidden states entering the stage, not from the embeddings.
    """

    retention: float | None = None
    scale: float = 0.6
    recycled: float = 0.3
    clusters: float = 0.1
    each_step = False

    def stages(self, n_layers):
        """The paper's layers 2, 6 and 15 of 32, at the same relative depth and never before layer 1."""
        return sorted({max(1, round(n_layers * i / 32)) for i in (2, 6, 15)})

    def keep(self, seen):
        stages = list(self.stages(seen.n_layers))
        if self.retention is not None:
            return self.retention ** ((1 + stages.index(seen.layer)) / len(stages))
        rows, raters = self._rows(seen)
        left, n_image = seen.kept.sum(1), seen.image.sum(1)
        rank = torch.stack([torch.linalg.matrix_rank(row[chosen][:, kept]) for row, chosen, kept in
                            zip(rows, raters, seen.kept, strict=True)])  # fmt: skip
        dropped = (self.scale * (left - rank).clamp(min=0)).floor()
        centres = (dropped * self.recycled * self.clusters).ceil()
        return ((left - dropped + centres).clamp(max=left) / n_image).clamp(0, 1)

    def score(self, seen):
        """Rated best, then cluster centres, then the rest. Attention is at most 1, so the three do not mix."""
        rated = self._rated(seen)
        for i, (best, members) in enumerate(self._recycle(seen, rated)):
            rated[i, best] += 2
            rated[i, list(members)] += 1
        return rated

    def merge(self, seen, kept):
        hidden = seen.hidden.clone()
        for i, (_, members) in enumerate(self._recycle(seen, self._rated(seen))):
            for centre, cluster in members.items():
                hidden[i, centre] = seen.hidden[i, cluster].mean(0)
        return hidden

    @classmethod
    def at(cls, retention, n_layers, **fields):
        return cls(retention=retention, **fields)

    def selector_macs(self, shape, n_image, n_instruction):
        """Relevance of instruction tokens to patches, and their rows of attention; at most, for later stages see fewer tokens."""
        return len(self.stages(shape.layers)) * 2 * n_image * n_instruction * shape.width

    def _rows(self, seen):
        """The instruction's attention (batch, text, image_token), and which of its tokens rate (batch, text)."""
        if "rows" not in seen.notes:
            seen.notes["rows"] = self._read_rows(seen)
        return seen.notes["rows"]

    def _read_rows(self, seen):
        rows, real = seen.instruction_attention
        words = seen.instruction_hidden.float()
        relevance = (seen.hidden.float() @ words.transpose(1, 2)).masked_fill(~real[:, None], -torch.inf).softmax(2)
        relevance = (relevance * seen.kept[..., None]).sum(1) / seen.kept.sum(1, keepdim=True).clamp(min=1)
        mean = (relevance * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
        return rows, real & (relevance >= mean)

    def _rated(self, seen):
        rows, raters = self._rows(seen)
        return (rows * raters[..., None]).sum(1) / raters.sum(1, keepdim=True)

    def _recycle(self, seen, rated):
        """For each row: the best-rated tokens, and the recycled clusters {centre: members}, so many as `keep` leaves room."""
        if "recycled" not in seen.notes:
            seen.notes["recycled"] = self._find_clusters(seen, rated)
        return seen.notes["recycled"]

    def _find_clusters(self, seen, rated):
        share = torch.as_tensor(self.keep(seen)).expand(len(rated)).tolist()
        found = []
        for i in range(len(rated)):
            left, n_image = int(seen.kept[i].sum()), int(seen.image[i].sum())
            total = min(left, kept_count(n_image, share[i]))
            n_centres = min(total, round((left - total) * self.recycled * self.clusters))
            best = choose(rated[i : i + 1], seen.kept[i : i + 1], [total - n_centres])[0]
            again = choose(rated[i : i + 1], (seen.kept[i] & ~best)[None], [round((left - total) * self.recycled)])[0]
            found.append((best, cluster(seen.hidden[i].float(), again, n_centres) if n_centres else {}))
        return found


def cluster(hidden, members, n_centres: int, neighbours: int = 5) -> dict[int, list[int]]:
    """Density-peak clusters of the tokens where `members`: {centre: tokens}. hidden: (token, width)."""
    index = members.nonzero()[:, 0]
    if len(index) <= n_centres:
        return {int(i): [int(i)] for i in index}
    distance = torch.cdist(hidden[index], hidden[index]) / hidden.shape[1] ** 0.5
    nearest = distance.topk(min(neighbours, len(index)), largest=False).values
    density = (-(nearest**2).mean(1)).exp()
    higher = density[None] > density[:, None]
    peak = distance.masked_fill(~higher, torch.inf).min(1).values
    peak = torch.where(peak.isinf(), distance.max(), peak)
    centres = (peak * density).topk(n_centres).indices
    nearest_centre = distance[:, centres].argmin(1)
    nearest_centre[centres] = torch.arange(n_centres, device=centres.device)
    return {int(index[c]): index[nearest_centre == j].tolist() for j, c in enumerate(centres)}
