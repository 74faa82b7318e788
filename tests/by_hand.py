"""Attention and hidden states made by hand, for rules whose outcome is worked out on paper."""

import torch

from dyrate.seen import Seen, Vision, choose, kept_count
from dyrate.segments import SEGMENTS, Segments

S, I, U = (SEGMENTS.index(s) for s in ("system", "image", "instruction"))  # noqa: E741


class Rows:
    """A LayerAttention with given weights, (head, query, key), for one row of a batch."""

    def __init__(self, weights):
        self.weights = torch.tensor(weights)[None]
        self.newest = self.weights[:, :, -1]

    def rows(self, queries):
        return self.weights[:, :, queries[0]]


def seen(newest=None, *, weights=None, step=0, layer=2, n_layers=8, hidden=None, vision=None, n_image=None, examples=None):
    """One system token, n image tokens, two instruction tokens. newest: attention to the image, for each head."""
    observed = {}
    if newest is not None:
        n_image = len(newest[0])
        observed[layer - 1] = Rows([[[0.0, *head, 0.0, 0.0]] for head in newest])
    if weights is not None:
        n_image = len(weights[0][0]) - 3
        observed[layer - 1] = Rows(weights)
    kind = torch.tensor([[S, *[I] * n_image, U, U]])
    image = torch.ones(1, n_image, dtype=torch.bool)
    positions = torch.arange(1, n_image + 1)[None]
    found = Seen(step, layer, n_layers, image, image, positions, Segments(kind), observed, examples=examples)
    if hidden is not None:
        found.read_hidden = found.read_embedded = lambda slots: torch.tensor(hidden)[None][:, slots[0]]
    found.read_vision = lambda: vision
    return found


def kept(strategy, at):
    retention = strategy.keep(at)
    count = kept_count(at.image.shape[1], retention if isinstance(retention, int | float) else float(retention[0]))
    return choose(strategy.score(at), at.kept, [count])[0].nonzero()[:, 0].tolist()


HEADS = [[0.1, 0.5, 0.0, 0.2], [0.1, 0.0, 0.4, 0.3]]  # means .1, .25, .2, .25


def tower(cls, keys=None, features=None):
    """A vision tower of one head with these attention weights of [CLS]; the feature of [CLS] itself is 100."""
    n = len(cls)
    keys = torch.tensor(keys)[None] if keys else torch.eye(n)[None]
    features = torch.tensor(features)[None] if features else torch.eye(n)[None]
    attention = torch.tensor(cls)[None]
    start = torch.full((1, features.shape[-1]), 100.0)
    return Vision(features, start, attention, keys[:, :, None], attention, keys, lambda x: x)
