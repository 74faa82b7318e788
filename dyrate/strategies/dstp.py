"""After DSTP (arXiv:2604.12358): what FastV dropped comes back when, while decoding, a token looks elsewhere."""

from dataclasses import dataclass

from dyrate.strategies.fastv import FastV


@dataclass(kw_only=True)
class DSTP(FastV):
    """FastV with re-selection while decoding, after DSTP (arXiv:2604.12358): when relevance has shifted, swap tokens.

    At each new token all image tokens are ranked by its attention in layer K - 1. While those that FastV's share would choose
    now have at most 1 / `caught` of the attention that those in use have, these stay; else they are swapped. Nothing leaves
    the cache (residency "mask"). That a shift makes a swap is DSTP's; how it tells a shift is not in what its authors have
    released so far (abstract and project page, no code), and this measure is ours. Another departure: in the prefill dropped
    tokens run through the deeper layers, masked, so that they have keys there to come back with; this costs a whole prefill.
    At caught = 1 it swaps at every token (FastVRerank), at 0 never.
    """

    residency: str = "mask"
    caught: float = 0.8
    each_step = True

    def score(self, seen):
        attention = super().score(seen)
        if seen.step == 0:
            return attention
        counts = seen.held.sum(1, keepdim=True)
        best = attention.sort(1, descending=True).values.cumsum(1).gather(1, (counts - 1).clamp(min=0))
        stays = (attention * seen.held).sum(1, keepdim=True) >= self.caught * best
        return attention + (stays & seen.held)  # attention is at most 1: what stays comes first
