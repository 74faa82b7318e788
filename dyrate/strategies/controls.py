"""Controls: what a clever rule must beat, and FastV with one of its choices changed."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dyrate.strategies.before_decoder import BeforeDecoder
from dyrate.strategies.cdpruner import CDPruner
from dyrate.strategies.fastv import FastV
from dyrate.strategy import Strategy, rate_field


@dataclass(kw_only=True)
class Constant(FastV):
    """The same rate at every step: what a dynamic rate must beat at equal mean retention, in the same residency.

    In "evict" it is FastV, for the ranking of the first step decides; in "mask" it is FastVRerank.
    """

    each_step = True
    compared = False
    control = True


@dataclass(kw_only=True)
class LinearAnneal(Strategy):
    """The rate grows from `start` to `end` in equal steps over `steps` new tokens, whatever is seen."""

    start: float = 0.0
    end: float = 0.9
    steps: int = 32
    control = True

    def __post_init__(self):
        rate_field("start", self.start)
        rate_field("end", self.end)
        super().__post_init__()

    def keep(self, seen):
        return 1 - (self.start + (self.end - self.start) * min(1.0, seen.step / self.steps))

    @classmethod
    def at_retention(cls, retention, n_layers, **fields):
        spread = min(retention, 1 - retention)  # the mean over `steps` is the retention
        return cls(start=1 - retention - spread, end=1 - retention + spread, **fields)


@dataclass(kw_only=True)
class MeanTrajectory(Strategy):
    """One schedule for all inputs: rates[step], the last one from then on. With DyRate's mean rates: is it adaptive?"""

    rates: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)
    compared = False  # its rates come from a predictor
    control = True

    def __post_init__(self):
        for rate in self.rates:
            rate_field("rates", rate)
        super().__post_init__()

    def keep(self, seen):
        return 1 - self.rates[min(seen.step, len(self.rates) - 1)]

    @classmethod
    def at_retention(cls, retention, n_layers, **fields):
        return cls(rates=(1 - retention,), **fields)


@dataclass(kw_only=True)
class RandomPrune(FastV):
    """Random pruning: FastV with random scores. An example has the same scores in any batch."""

    seed: int = 0
    control = True

    def score(self, seen):
        rows, n = seen.image.shape
        names = [e.name for e in seen.example_of_each_row()] if seen.examples else [""] * rows
        scores = [random_scores(name, n, seed=self.seed, step=seen.step) for name in names]
        return torch.stack(scores).to(seen.image.device)


def random_scores(name: str, n: int, *, seed: int = 0, step: int = 0) -> Float[Tensor, " image_token"]:
    """The scores that `RandomPrune` gives an example's `n` image tokens at one step."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name} {step}".encode()))
    return torch.rand(n, generator=generator)


@dataclass(kw_only=True)
class WorstFirst(FastV):
    """FastV upside down: keeps what is attended least. If this does not hurt, the ranking carries no information."""

    control = True

    def score(self, seen):
        return -super().score(seen)


@dataclass(kw_only=True)
class MaxHead(FastV):
    """FastV's score with the most attentive head in place of the mean over heads."""

    compared = False
    control = True

    def score(self, seen):
        return seen.attention.amax(1)


@dataclass(kw_only=True)
class AllWords(FastV):
    """FastV's score from every token of the instruction in place of the last one alone."""

    compared = False
    control = True

    def score(self, seen):
        rows, real = seen.instruction_attention
        return (rows * real[..., None]).sum(1) / real.sum(1, keepdim=True)

    def selector_macs(self, shape, tokens):
        return tokens.image[0] * tokens.instruction * shape.width


@dataclass(kw_only=True)
class NoRoPE(FastV):
    """FastV's score without rotary positions, which favour the image's last rows (after FEATHER, arXiv:2412.13180)."""

    needs = frozenset({"no_rope"})
    control = True

    def selector_macs(self, shape, tokens):
        return tokens.image[0] * shape.width

    def score(self, seen):
        return seen.no_rope_attention.mean(1)


@dataclass(kw_only=True)
class DiversityAlone(CDPruner):
    """CDPruner without relevance: the most diverse tokens, whatever is asked."""

    relevance: float = 0.0
    control = True


@dataclass(kw_only=True)
class UniformPool(BeforeDecoder):
    """Down-sample before the decoder: evenly spread tokens stay, each the mean of what is nearest to it in the image."""

    positions: str = "kept"
    control = True

    def score(self, seen):
        return -evenly(seen.image.shape[1]).to(seen.image.device).expand(len(seen.image), -1)

    def merge(self, seen, kept):
        places = grid(seen.image.shape[1]).to(seen.image.device)
        distance = torch.cdist(places, places)
        hidden = seen.hidden.clone()
        for i in range(len(hidden)):
            centres, members = kept[i].nonzero()[:, 0], seen.image[i].nonzero()[:, 0]
            nearest = distance[members][:, centres].argmin(1)
            total = hidden.new_zeros(len(centres), hidden.shape[-1]).index_add(0, nearest, seen.hidden[i, members])
            hidden[i, centres] = total / nearest.bincount(minlength=len(centres)).to(total)[:, None]
        return hidden


def grid(n: int):
    """Row and column of each of `n` tokens, (n, 2): a square in raster order, or a line where n is no square."""
    side = round(n**0.5)
    width = side if side * side == n else n
    index = torch.arange(n)
    return torch.stack([index // width, index % width], 1).float()


def evenly(n: int):
    """A rank for each of `n` tokens, (n,), such that the first m ranks are spread evenly over the image, for any m.

    Tokens are taken in the order in which a low-discrepancy sequence (the plastic number's) first comes nearest to them.
    """
    places = grid(n)
    size = places.max(0).values + 1
    steps = torch.arange(1, 64 * n + 1, dtype=torch.float64)[:, None]
    points = (0.5 + steps * torch.tensor([0.7548776662466927, 0.5698402909980532], dtype=torch.float64)) % 1 * size
    cell = (points[:, 0].long() * int(size[1]) + points[:, 1].long()).tolist()
    order = dict.fromkeys([*cell, *range(n)])
    rank = torch.empty(n)
    rank[list(order)] = torch.arange(n, dtype=torch.float)
    return rank
