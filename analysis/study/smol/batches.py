"""What `smol` is trained on: the pocket's scenes and texts in the words of SmolLM2, many turns packed behind one picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import LlavaProcessor

from study.pocket import language
from study.pocket.batches import IGNORE, N_PATCHES, SLOTS, last_words, padded, painted_parts
from study.pocket.scenes import GRID, PLACES, Scene, compose, render, seeds
from study.smol.parts import IMAGE

FILL = {"ids": 0, "turn": -1, "positions": 0, "labels": IGNORE, "weight": 0.0}


@dataclass(frozen=True)
class Config:
    """One training of the adapter and the projector; the pocket's scenes after those that its tower was trained on."""

    steps: int = 1000
    batch: int = 4  # scenes a step
    questions: int = 14  # turns of questions for each picture
    learning_rate: float = 1e-3  # peak
    rank: int = 16
    first_scene: int = 500_000
    seed: int = 0


class Batches(Dataset):
    """Batch number i, made from the training scenes that belong to it: resuming repeats and skips none."""

    def __init__(self, config: Config, start: int, processor: LlavaProcessor):
        self.config, self.start, self.tokenizer = config, start, processor.tokenizer
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
        chat = processor.apply_chat_template(asked, add_generation_prompt=True)
        before, self.after = chat.rsplit("?", 1)
        self.prefix = self._ids(before)
        at = self.prefix.index(self.tokenizer.convert_tokens_to_ids(IMAGE))
        self.prefix[at : at + 1] = [self.prefix[at]] * N_PATCHES
        words = [form for slot in SLOTS.values() for word in slot for form in (word, f" {word}")]
        self.telling = np.zeros(len(self.tokenizer), bool)
        self.telling[[i for word in words for i in self._ids(word)]] = True

    def __len__(self) -> int:
        return self.config.steps - self.start

    def __getitem__(self, index: int) -> dict:
        size = self.config.batch
        drawn = seeds("train", size, self.config.first_scene + (index + self.start) * size)
        scenes = [compose(seed, long_words=True) for seed in drawn]
        pictures = [render(scene) for scene in scenes]
        rows = [self.packed(scene) for scene in scenes]
        batch = {k: padded([row[k] for row in rows], fill) for k, fill in FILL.items()}
        batch["pixels"] = torch.from_numpy(np.stack([np.asarray(p.image) for p in pictures]))
        words = [self._patch_words(*both) for both in zip(scenes, pictures, strict=True)]
        return batch | {"patch_words": torch.from_numpy(np.stack(words))}

    def packed(self, scene: Scene) -> dict:
        """The shared prefix and all turns of a scene; labels stand where they are predicted, the token before."""
        n = len(self.prefix)
        row = {"ids": list(self.prefix), "turn": [0] * n, "positions": list(range(n))}
        row |= {"labels": [IGNORE] * n, "weight": [0.0] * n}
        for number, turn in enumerate(language.turns(scene, self.config.questions), 1):
            prompt, response = self._ids(turn.prompt + self.after), self._ids(f"{turn.response}<|im_end|>")
            length = len(prompt) + len(response)
            weight = np.where(self.telling[response], 3.0, 1.0)
            row["ids"] += prompt + response
            row["turn"] += [number] * length
            row["positions"] += range(n, n + length)
            row["labels"] += [IGNORE] * (len(prompt) - 1) + response + [IGNORE]
            row["weight"] += [0.0] * (len(prompt) - 1) + weight.tolist() + [0.0]
        return row

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def _patch_words(self, scene: Scene, picture) -> np.ndarray:
        """Ids (144, 6) for each patch: first tokens of its group's both names, count, colour and place; or of a painted word."""
        ids = np.full((GRID, GRID, 6), IGNORE)
        for group, cover in zip(scene.groups, picture.cover, strict=True):
            words = [*last_words(group.thing), language.COUNTS[group.count - 1], group.colour, *PLACES[group.place].split()]
            ids[cover, : len(words)] = [self._ids(f" {word}")[0] for word in words]
        for start, end, cover in painted_parts(scene, picture):
            spelled = self.tokenizer(scene.word, return_offsets_mapping=True)
            tokens = zip(spelled["input_ids"], spelled["offset_mapping"], strict=True)
            shown = [i for i, (first, last) in tokens if first < end and last > start]
            ids[cover, : len(shown)] = shown
        return ids.reshape(N_PATCHES, 6)
