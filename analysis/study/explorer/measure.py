"""What each method does to a few scenes: the answer, the image tokens kept at each step, and where attention goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from dyrate.attention import LayerAttention
from dyrate.data import Examples
from dyrate.engine import decoder_layers, observe
from dyrate.generation import answer_batch, encode
from dyrate.segments import Segments, find_segments, system_ids
from dyrate.strategies import STRATEGIES
from study import controls  # noqa: F401  (registers its strategies)
from study.answers import Condition
from study.headroom.report import EVERYWHERE
from study.predictors import condition_of
from study.scores import Mark, marked

TASK = "description"
METHODS = ("FastV", "FastVRerank", "VisionZip", "LinearAnneal", "RandomPrune", "Oracle")
RETENTIONS = (0.75, 0.5, 0.25, 0.1, 0.05)
MAX_NEW_TOKENS = 100
PRUNED_FROM = 2  # the first layer that every method of METHODS prunes; those before it see all image tokens


@dataclass
class Answer:
    """One answer under one condition. pieces: its text by token, which joined give the text.

    kept: image tokens that the last layers attend to at the step that generates each token. shares: the newest query's attention
    to SEGMENTS at that step, mean over heads and the layers from PRUNED_FROM on. marks: the words that are right or wrong.
    """

    pieces: list[str]
    kept: Bool[np.ndarray, "step image_token"]
    shares: Float[np.ndarray, "step 4"]
    marks: list[Mark]

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def conditions(n_layers: int, predictors: Path) -> list[Condition]:
    """Unpruned, each of METHODS at each of RETENTIONS, and DyRate's predictors of seed 0 at their own budgets, if any."""
    full = Condition("Full", STRATEGIES["Full"](), "Full")
    fixed = [Condition(f"{m} {x:g}", STRATEGIES[m].at(x, n_layers), m, x) for m in METHODS for x in RETENTIONS]
    trained = [folder for recipe in EVERYWHERE for folder in sorted(predictors.glob(f"{recipe}-*-seed0"))]
    return [full, *fixed, *map(condition_of, trained)]


def explored(
    model, processor, conditions: Sequence[Condition], examples: Examples, *, max_new_tokens: int = MAX_NEW_TOKENS
) -> Iterator[tuple[Condition, list[Answer]]]:
    """Condition by condition the answers to all examples, generated greedily in one batch. examples: scenes, one prompt for all.

    Raises ValueError if prompts differ in length, for shares are read off where the segments stand.
    """
    inputs = encode(processor, [e.image() for e in examples], [e.prompt for e in examples])
    segments = find_segments(inputs["input_ids"], model.config.image_token_id, inputs["attention_mask"], system_ids(processor))
    pruned_layers = range(PRUNED_FROM, len(decoder_layers(model)))
    for condition in tqdm(conditions, desc="conditions"):
        shares = SegmentShares(segments)
        with observe(model, shares, pruned_layers):
            answers = answer_batch(model, processor, inputs, condition.strategy, examples, max_new_tokens=max_new_tokens)
        steps = torch.stack([step.stages[-1].kept for step in answers.trace.steps], 1).cpu().numpy()
        mean, found = shares.mean(), []
        for i, example in enumerate(examples):
            pieces = _pieces(processor.tokenizer, answers.tokens[i])
            n = len(pieces)
            found.append(Answer(pieces, steps[i, :n], mean[i, :n], marked(example.scene, "".join(pieces))))
        yield condition, found


class SegmentShares:
    """An observer of layers that hold any part of the image: the newest query's attention to each segment.

    Reads it off where the segments stand, system, image, instruction, response: however few image tokens a layer still holds,
    what is before and behind them is all there. Needs prompts of one length.
    """

    def __init__(self, segments: Segments):
        self.before, _, self.behind, _ = segments.counts()[0].tolist()
        layout = [0] * self.before + [1] * (segments.kind.shape[1] - self.before - self.behind) + [2] * self.behind
        if not (segments.kind.cpu() == torch.tensor(layout)).all():
            raise ValueError("the prompts differ in length, or have no one image between a beginning and an instruction")
        self._sums: dict[int, list[Tensor]] = {}

    def __call__(self, layer: int, attention: LayerAttention) -> None:
        of_layer = self._sums.setdefault(layer, [])
        keys, step = attention.newest.shape[-1], len(of_layer)
        sizes = [self.before, keys - self.before - self.behind - step, self.behind, step]
        parts = attention.newest.mean(1).split(sizes, dim=-1)
        of_layer.append(torch.stack([part.sum(-1) for part in parts], -1))

    def mean(self) -> Float[np.ndarray, "row step 4"]:
        """Mean over the observed layers; the last axis is SEGMENTS."""
        return torch.stack([torch.stack(steps, 1) for steps in self._sums.values()]).mean(0).cpu().numpy()


def _pieces(tokenizer, ids: list[int]) -> list[str]:
    """The text that each token adds, special tokens left out."""
    ids = [t for t in ids if t not in set(tokenizer.all_special_ids)]
    texts = [tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
    return [after.removeprefix(before) for before, after in pairwise(texts)]
