"""What the engine remembers for each row of the batch: which tokens every run of layers still holds.

Beam search reorders, chooses and repeats rows between steps. All that belongs to a row therefore lives in a `PerRow`, whose
one method moves every field: a new field follows by being declared.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dyrate.segments import Segments


@dataclass
class PerRow:
    """Every field has one entry for each row of the batch: a tensor, a list, segments, a dict of further `PerRow`s, or None."""

    def take(self, index: Int[Tensor, " row"]) -> None:
        """Row i becomes what row `index[i]` was, in every field."""
        for field in fields(self):
            setattr(self, field.name, _taken(field.name, getattr(self, field.name), index))


def _taken(name: str, value, index: Tensor):
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value.index_select(0, index.to(value.device))
    if isinstance(value, list):  # mostly alike in all rows; then there is no need to wait for the device
        return value[:1] * len(index) if len(set(value)) == 1 else [value[i] for i in index.tolist()]
    if isinstance(value, Segments):
        return Segments(_taken(name, value.kind, index))
    if isinstance(value, dict) and all(isinstance(part, PerRow) for part in value.values()):
        for part in value.values():
            part.take(index)
        return value
    raise TypeError(f"{name} holds a {type(value).__name__}, which cannot be reordered by row: use a tensor or a list")


@dataclass
class Held(PerRow):
    """The tokens that a run of layers holds.

    kept (row, image_token) and counts (row): the image tokens still there. columns (row, slot): the prompt position of each
    cached slot, ascending; None while all are there. alive (row, slot): which slots may be seen; None while the model's own
    mask is right. shift (row): by how many positions what follows the prompt was moved up, where the prefill renumbered.
    """

    kept: Bool[Tensor, "row image_token"]
    counts: list[int]
    columns: Int[Tensor, "row slot"] | None = None
    alive: Bool[Tensor, "row slot"] | None = None
    shift: list[int] | None = None


@dataclass
class Rows(PerRow):
    """A prompt batch from prefill to last token.

    segments: the kind of each prompt position. real: no padding. positions: of each image token, rows with fewer
    than others filled up; image: which of them are real. n_real, n_image: such tokens of each row. held: what the runs of
    layers hold, by their first layer; -1 stands for the layers before the first stage.
    """

    segments: Segments
    real: Bool[Tensor, "row prompt"]
    positions: Int[Tensor, "row image_token"]
    image: Bool[Tensor, "row image_token"]
    n_real: list[int]
    n_image: list[int]
    held: dict[int, Held]

    @classmethod
    def of_prompt(cls, segments: Segments, real: Tensor, stages: list[int]) -> Rows:
        """All tokens are there in all layers."""
        positions, image = segments.positions("image")
        n_image = segments.mask("image").sum(1).tolist()
        whole = Held(image, n_image)
        held = {first: replace(whole) for first in (-1, *stages)}
        return cls(segments, real.bool(), positions, image, real.sum(1).tolist(), n_image, held)

    def n_alive(self, counts: list[int]) -> list[int]:
        """Prompt tokens of each row that may be seen, where `counts` image tokens are kept."""
        return [n - i + c for n, i, c in zip(self.n_real, self.n_image, counts, strict=True)]

    def whole(self, held: Held) -> bool:
        """Every cached slot of every row may be seen, so that no mask is needed."""
        return {held.alive.shape[1]} == set(self.n_alive(held.counts))

    def see_only(self, held: Held, kept: Tensor, counts: list[int]) -> None:
        """From now on `kept` image tokens may be seen; the others stay where they are."""
        alive = self.real & ~self.segments.mask("image")
        alive |= torch.zeros_like(alive).scatter(1, self.positions, kept & self.image)
        held.kept, held.counts = kept, counts
        held.alive = alive if held.columns is None else alive.gather(1, held.columns)

    def seen_slots(self, held: Held) -> Int[Tensor, "row n"]:
        """The slots that may be seen, ascending. Rows with fewer than others are filled up with slots that may not be seen."""
        longest = max(self.n_alive(held.counts))
        return (~held.alive).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest].sort(1).values

    def shrink(self, held: Held) -> Int[Tensor, "row n"]:
        """Leave the slots that may not be seen; returns which stay, ascending."""
        index = self.seen_slots(held)
        held.columns = index if held.columns is None else held.columns.gather(1, index)
        held.alive = held.alive.gather(1, index)
        return index


def take(x: Tensor, index: Int[Tensor, "batch n"]) -> Tensor:
    """Positions `index` of each row of x, (*lead, batch, length, dim); where x has one row for all, each row takes its own.

    Takes whole vectors: far faster than gather with an expanded index.
    """
    batch, n = index.shape
    length, dim = x.shape[-2:]
    x = x.expand(*x.shape[:-3], batch, length, dim)
    flat = (index + length * torch.arange(batch, device=index.device)[:, None]).flatten().to(x.device)
    taken = x.reshape(*x.shape[:-3], batch * length, dim).index_select(-2, flat)
    return taken.view(*x.shape[:-3], batch, n, dim)
