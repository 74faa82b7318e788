"""What an answer loses without the patches of one group: importance by leaving out, of which scenes know what to leave out."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import torch

from dyrate.data import Examples
from dyrate.teacher_forcing import prepare
from study.attribution import left_out, pruned_from
from study.examples import SceneExample
from study.pocket.language import PLURAL
from study.pocket.scenes import render


def group_rows(model, processor, asked: Examples, layer: int, effects: Mapping[str, np.ndarray], batch_size: int) -> list[dict]:
    """What each answer loses, in nats, without the patches of one group from `layer` on: its own sentence, and the others.

    group: its index in the scene; -1: as many patches as group 0 has, of those that show nothing, drawn at random. effects:
    of each answer, (step, image_token), by integrated gradients; attributed: the sum of these patches.
    """
    place, rows = pruned_from(model, layer), []
    for batch, images in asked.batches(batch_size, processor):
        prepared, own = prepare(model, processor, place, batch, images), [sentences(processor, e) for e in batch]
        covers = [covered(e) for e in batch]
        for group in range(-1, max(map(len, covers)) - 1):
            there = [i for i, cover in enumerate(covers) if group + 1 < len(cover)]
            tokens = np.stack([c[min(group + 1, len(c) - 1)] for c in covers])
            lost = left_out(model, place, prepared, torch.from_numpy(tokens).to(model.device)).cpu().numpy()
            for i in there:
                mine, n = own[i][group + 1], len(own[i][0])
                row = {"sample": batch[i].name, "group": group, "patches": tokens[i].sum()}
                row |= {"own": lost[i, :n][mine].sum(), "other": lost[i, :n][~mine].sum(), "own_tokens": mine.sum(), "tokens": n}
                rows.append(row | {"attributed": effects[batch[i].name][:, tokens[i]].sum()})
    return rows


def covered(example: SceneExample) -> np.ndarray:
    """The patches of each group, (1 + group, token); first, as many as the first group has, at random, that show nothing."""
    picture = render(example.scene)
    cover = picture.cover.reshape(len(picture.cover), -1)
    empty = np.flatnonzero(~picture.shown)
    nothing = np.zeros_like(cover[:1])
    nothing[0, np.random.default_rng(example.scene.seed).choice(empty, min(cover[0].sum(), len(empty)), replace=False)] = True
    return np.concatenate([nothing, cover])


def sentences(processor, example: SceneExample) -> np.ndarray:
    """Which tokens of the reference answer, the end token among them, stand in a sentence that names each group.

    (1 + group, step); the first row is empty, as `covered` begins with patches that show nothing.
    """
    text = example.references[0]
    encoded = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = np.array([max(start, end - 1) for start, end in encoded["offset_mapping"]])
    spans = [m.span() for m in re.finditer(r"[^.]+\.", text)]
    own = np.zeros((1 + len(example.scene.groups), len(starts) + 1), bool)
    for row, group in zip(own[1:], example.scene.groups, strict=True):
        for first, last in spans:
            if re.search(rf"\b({group.thing}|{PLURAL[group.thing]})\b", text[first:last]):
                row[:-1] |= (starts >= first) & (starts < last)
    return own
