"""Rankings made worse on purpose, and one that knows the answer: how much of a method's score is its ranking?"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import pandas as pd
import torch

from dyrate.data import Examples
from dyrate.strategies import STRATEGIES
from dyrate.strategies.fastv import FastV
from dyrate.strategy import Strategy
from study.answers import Condition, answer_all
from study.scores import scored

SHARES = {0.25: (0.0, 0.1, 0.25, 0.5, 0.75, 1.0), 0.1: (0.0, 1.0)}  # of the tokens, by retention ratio

Scores = dict[str, tuple[float, ...]]  # of each image token, by the example's name


@dataclass(kw_only=True)
class Reranked(Strategy, registered=False):
    """Prunes where and as much as `base` does, by another ranking. For a base that decides in the prefill and merges nothing."""

    base: Strategy = field(default_factory=FastV)
    each_step = False

    def __post_init__(self):
        if self.base.each_step or type(self.base).merge is not Strategy.merge:
            raise ValueError(f"{self.base}: only a ranking made once, of tokens that are not merged, can be replaced")
        for shared in fields(Strategy):
            setattr(self, shared.name, getattr(self.base, shared.name))
        self.needs = self.base.needs
        super().__post_init__()

    def stages(self, n_layers):
        return self.base.stages(n_layers)

    def observes(self, n_layers):
        return self.base.observes(n_layers)

    def keep(self, seen):
        return self.base.keep(seen)


@dataclass(kw_only=True)
class Noisy(Reranked, registered=False):
    """The ranking of `base`, in which a share of the image tokens, in [0, 1], drawn at random, have exchanged their ranks.

    At 0 it is the base; at 1 every order is as likely as any other: random pruning. The tokens of a smaller share are among
    those of a larger one. An example has the same draw in any batch.
    """

    share: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is how many of the tokens exchange ranks and lies in [0, 1], not {self.share}")
        super().__post_init__()

    def score(self, seen):
        score = self.base.score(seen).clone()
        for i, example in enumerate(seen.example_of_each_row()):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {example.name}".encode()))
            tokens = seen.image[i].nonzero()[:, 0]
            drawn = torch.randperm(len(tokens), generator=generator)[: round(self.share * len(tokens))].sort().values
            among = torch.randperm(len(drawn), generator=generator)
            score[i, tokens[drawn.to(tokens.device)]] = score[i, tokens[drawn[among].to(tokens.device)]]
        return score


@dataclass(kw_only=True)
class Reversed(Reranked, registered=False):
    """The ranking of `base` upside down: keeps what the base drops first."""

    def score(self, seen):
        return -self.base.score(seen)


@dataclass(kw_only=True)
class Known(FastV, registered=False):
    """FastV with scores that are known beforehand."""

    scores: Scores = field(default_factory=dict)

    def score(self, seen):
        names = [e.name for e in seen.example_of_each_row()]
        if missing := set(names) - set(self.scores):
            raise ValueError(f"no score is known for {sorted(missing)}")
        return torch.tensor([self.scores[name] for name in names], device=seen.image.device)


def cls_attention(retention: float, n_layers: int) -> Strategy:
    """Before the decoder, by the attention of the tower's [CLS] alone, and nothing is merged (FasterVLM, arXiv:2412.01818)."""
    return STRATEGIES["VisPruner"].at(retention, n_layers, important=1.0)


def noise_conditions(n_layers: int, known: Mapping[int, Scores]) -> tuple[list[Condition], pd.DataFrame]:
    """Rankings with more and more of their tokens exchanged, and reversed; what tells each, by label.

    known: importance by layer: FastV and it prune from these layers.
    """
    conditions, about = [Condition("Full", STRATEGIES["Full"](), "Full")], []
    for retention, shares in SHARES.items():
        bases = {("[CLS] attention", 0): cls_attention(retention, n_layers)}
        for layer in known:
            bases["FastV", layer] = STRATEGIES["FastV"].at(retention, n_layers, first_pruned_layer=layer)
            bases["importance", layer] = Known(rate=1 - retention, first_pruned_layer=layer, scores=known[layer])
        for (ranking, layer), base in bases.items():
            made = {share: Noisy(base=base, share=share) for share in shares} | {"reversed": Reversed(base=base)}
            for order, strategy in made.items():
                label = f"{ranking} {retention:g} from layer {layer}, {order}"
                conditions.append(Condition(label, strategy, ranking, retention))
                about.append({"label": label, "layer": layer, "order": order})
    return conditions, pd.DataFrame(about)


def noise_rows(model, processor, asked: Examples, known: Mapping[int, Scores], store: Path) -> pd.DataFrame:
    """Scores of generated descriptions under each condition of `noise_conditions`."""
    conditions, about = noise_conditions(model.config.get_text_config().num_hidden_layers, known)
    rows = answer_all(model, processor, conditions, asked, store, max_new_tokens=100, batch_size=100)
    table = scored(rows, asked).merge(about, on="label", how="left")
    return table[["sample", "method", "budget", "layer", "order", "score", "tokens", "retention"]]
