"""What the pocket LLaVA is trained on: batch after batch of scenes with many turns each, made as they are needed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from study.pocket import language
from study.pocket.scenes import COLOURS, GRID, HALVES, LONG_WORDS, PLACES, THINGS, WORDS, Group, Scene, compose, render, seeds
from study.pocket.vlm import SYSTEM

IGNORE = -100
N_PATCHES = GRID * GRID
PAINTED = (*WORDS, *HALVES[0], *HALVES[1])  # what one patch can show of a word
SLOTS = {
    "object": set(" ".join([*THINGS, *language.PLURAL.values()]).split()) - {"of"},
    "colour": set(COLOURS) | {c.capitalize() for c in COLOURS},
    "count": {"A", "An", "Two", "Three", "a", "an", "one", "two", "three"},
    "place": set("top bottom left right centre middle".split()),
    "relation": {"above", "below"},
    "existence": {"yes", "no"},
    "reading": set(WORDS),
    "two_step": set(),
    "more": set(),
    "total": {"four", "five", "six"},
    "long_word": set(LONG_WORDS),
}


@dataclass(frozen=True)
class Config:
    """One training. Steps, batch sizes and peak learning rates of the two stages; `study.pocket.train` says their purpose."""

    tower_steps: int = 2200
    tower_batch: int = 64
    tower_learning_rate: float = 2e-3
    language_steps: int = 4000
    language_batch: int = 24
    language_learning_rate: float = 1.5e-3
    questions: int = 16  # turns of questions for each picture
    drop_share: float = 0.6  # of the steps in the last quarter drop image tokens
    drop_layer: int = 2  # first layer that misses them
    seed: int = 0


class Batches(Dataset):
    """Batch number i of a stage, made from the training scenes that belong to it: resuming repeats and skips none."""

    def __init__(self, stage: str, config: Config, start: int, processor):
        self.stage, self.config, self.start = stage, config, start
        self.tokenizer = processor.tokenizer
        self.vocabulary = {i: w for w, i in self.tokenizer.get_vocab().items()}
        slot_of = {word: i + 1 for i, words in enumerate(SLOTS.values()) for word in words}
        names = {word: thing for thing in THINGS for word in last_words(thing)}
        self.thing = {self.tokenizer.convert_tokens_to_ids(word): thing for word, thing in names.items()}
        self.slot = np.array([slot_of.get(self.vocabulary[i], 0) for i in range(len(self.vocabulary))])
        self.prefix = self._ids(f"{SYSTEM} USER: <image>", first=True)
        at = self.prefix.index(self.tokenizer.convert_tokens_to_ids("<image>"))
        self.prefix[at : at + 1] = [self.prefix[at]] * N_PATCHES

    def __len__(self) -> int:
        return getattr(self.config, f"{self.stage}_steps") - self.start

    def __getitem__(self, index: int) -> dict:
        step, config = index + self.start, self.config
        size = getattr(config, f"{self.stage}_batch")
        skipped = 0 if self.stage == "tower" else config.tower_steps * config.tower_batch
        scenes = [compose(seed, long_words=True) for seed in seeds("train", size, skipped + step * size)]
        pictures = [render(scene) for scene in scenes]
        batch = {"pixels": torch.from_numpy(np.stack([np.asarray(p.image) for p in pictures]))}
        labels = [_patch_labels(*both) for both in zip(scenes, pictures, strict=True)]
        batch |= {f"patch_{k}": torch.from_numpy(np.stack([x[k] for x in labels])) for k in labels[0]}
        batch["caption"] = padded([self._ids(language.captions(s, 1)[0]) for s in scenes], 0)
        if self.stage == "language":
            words = [self._patch_words(*both) for both in zip(scenes, pictures, strict=True)]
            batch["patch_words"] = torch.from_numpy(np.stack(words))
            rows = [self._packed(scene) for scene in scenes]
            fill = {"ids": 0, "turn": -1, "positions": 0, "labels": IGNORE, "weight": 0.0, "slot": 0, "noun": [IGNORE] * 4}
            batch |= {k: padded([row[k] for row in rows], fill[k]) for k in fill}
        return batch

    def _ids(self, text: str, first: bool = False) -> list[int]:
        ids = self.tokenizer(text)["input_ids"]
        return ids if first else ids[1:]  # without the leading <s>

    def _patch_words(self, scene: Scene, picture) -> np.ndarray:
        """Token ids (144, 6) for each patch's group: both forms of its name, and its properties."""
        ids = np.full((GRID, GRID, 6), IGNORE)
        for group, cover in zip(scene.groups, picture.cover, strict=True):
            ids[cover, :2] = self.tokenizer.convert_tokens_to_ids(last_words(group.thing))
            ids[cover, 2:] = self._properties(group)
        return ids.reshape(N_PATCHES, 6)

    def _properties(self, group: Group) -> list[int]:
        """Token ids of a group's count, colour and place; four, the last may be IGNORE."""
        words = [language.COUNTS[group.count - 1], group.colour, *PLACES[group.place].split()]
        return (self.tokenizer.convert_tokens_to_ids(words) + [IGNORE])[:4]

    def _nouns(self, scene: Scene, prompt: list[int]) -> list[list[int]]:
        """For each token of a question (length, 4): at a thing's name its properties, or "no" where it is absent."""
        properties = {thing: [self.tokenizer.convert_tokens_to_ids("no"), *[IGNORE] * 3] for thing in THINGS}
        properties |= {group.thing: self._properties(group) for group in scene.groups}
        return [properties[self.thing[i]] if i in self.thing else [IGNORE] * 4 for i in prompt]

    def _packed(self, scene: Scene) -> dict:
        n = len(self.prefix)
        row = {
            "ids": list(self.prefix), "turn": [0] * n, "positions": list(range(n)), "labels": [IGNORE] * n,
            "weight": [0.0] * n, "slot": [0] * n, "noun": [[IGNORE] * 4] * n,
        }  # fmt: skip
        for number, turn in enumerate(language.turns(scene, self.config.questions), 1):
            prompt = self._ids(f"{turn.prompt} ASSISTANT:")
            response = [*self._ids(turn.response), self.tokenizer.eos_token_id]
            length = len(prompt) + len(response)
            slots = self.slot[response]
            weight = np.where(slots == 1, 3.0, np.where(slots > 1, 2.0, 1.0))
            if turn.task.startswith("qa_"):
                weight[0] = 3.0  # answers are few among all words
                kind = list(SLOTS).index(turn.task[3:]) + 1
                slots = np.array([-kind] + [0] * (len(response) - 1))
            row["ids"] += prompt + response
            row["turn"] += [number] * length
            row["positions"] += range(n, n + length)
            # the position before a word predicts it
            row["labels"] += [IGNORE] * (len(prompt) - 1) + response + [IGNORE]
            row["weight"] += [0.0] * (len(prompt) - 1) + weight.tolist() + [0.0]
            row["slot"] += [0] * (len(prompt) - 1) + slots.tolist() + [0]
            row["noun"] += self._nouns(scene, prompt) + [[IGNORE] * 4] * len(response)
        return row


def last_words(thing: str) -> list[str]:
    """The last word of a thing's name, for one and for many: what its name is known by."""
    return [thing.split()[-1], language.PLURAL[thing].split()[-1]]


def _patch_labels(scene: Scene, picture) -> dict[str, np.ndarray]:
    """Classes of each patch (144,): its group's object, colour, count and place, the painted word; last class: none."""
    shape = (GRID, GRID)
    labels = {
        "object": np.full(shape, len(THINGS)), "colour": np.full(shape, IGNORE), "count": np.full(shape, IGNORE),
        "place": np.full(shape, IGNORE), "word": np.full(shape, len(PAINTED)),
    }  # fmt: skip
    things, colours = list(THINGS), list(COLOURS)
    for group, cover in zip(scene.groups, picture.cover, strict=True):
        labels["object"][cover] = things.index(group.thing)
        labels["colour"][cover] = colours.index(group.colour)
        labels["count"][cover] = group.count - 1
        labels["place"][cover] = group.place
    for start, end, cover in painted_parts(scene, picture):
        part = scene.word[start:end]
        labels["word"][cover] = len(WORDS) + len(HALVES[0]) + HALVES[1].index(part) if start else PAINTED.index(part)
    return {name: label.flatten() for name, label in labels.items()}


def painted_parts(scene: Scene, picture) -> list[tuple[int, int, np.ndarray]]:
    """The painted word's characters from start to end and the patches (12, 12) that show them: of a long word both halves."""
    if scene.word is None:
        return []
    if scene.word in WORDS:
        return [(0, len(scene.word), picture.word_cover)]
    middle = next(len(a) for a in HALVES[0] for b in HALVES[1] if a + b == scene.word)
    columns = picture.word_cover.any(0).nonzero()[0]
    left = np.arange(GRID) + 0.5 < columns[0] + len(columns) * middle / len(scene.word)
    return [(0, middle, picture.word_cover & left), (middle, len(scene.word), picture.word_cover & ~left)]


def padded(rows: list[list], fill) -> Tensor:
    """Rows of unequal length as one tensor, filled on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
