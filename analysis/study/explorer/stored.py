"""The explorer's traces on disk: a file for each laboratory and scene that a page loads when the reader asks for it.

A page that is opened from a folder may load scripts and nothing else, so each file is one call, `explorer.add({...})`, around
JSON. Kept image tokens are bits, written where they change; attention shares are bytes.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

import numpy as np

from dyrate.atomic import write_whole
from dyrate.data import Examples
from study.answers import Condition
from study.explorer.measure import Answer
from study.pocket.language import noun_phrase
from study.pocket.scenes import PLACES, Picture, Scene, render
from study.scores import SLOTS

HEAD, TAIL = "explorer.add(", ");\n"


def write_laboratory(
    out: Path, laboratory: str, about: dict, examples: Examples, answered: Iterable[tuple[Condition, list[Answer]]]
) -> None:
    """Write `<laboratory>/<scene>.js`, `<laboratory>/about.json` and `scenes/<scene>.webp` below `out`.

    Conditions that were written there before stay, unless they are measured anew; where some stay, both devices are named.
    Raises ValueError if they had other scenes.
    """
    folder, scenes = out / laboratory, [e.name for e in examples]
    before = read_laboratories(out).get(laboratory, {"scenes": scenes, "conditions": []})
    if before["scenes"] != scenes:
        raise ValueError(f"{folder} holds traces of other scenes: name another folder, or remove it")
    conditions = {c["label"]: c for c in before["conditions"]}
    answers = {e.name: read_scene(folder / f"{e.name}.js")["answers"] if conditions else {} for e in examples}
    staying = set(conditions)
    for condition, given in answered:
        staying.discard(condition.label)
        conditions[condition.label] = {"label": condition.label, "method": condition.method, "retention": condition.budget}
        for example, answer in zip(examples, given, strict=True):
            answers[example.name][condition.label] = packed(answer)
    for example in examples:
        picture = render(example.scene)
        content = {"laboratory": laboratory, "scene": example.name, "groups": _groups(example.scene, picture)}
        text = json.dumps(content | {"answers": answers[example.name]}, separators=(",", ":"))
        write_whole(folder / f"{example.name}.js", f"{HEAD}{text}{TAIL}")
        write_whole(out / "scenes" / f"{example.name}.webp", lambda path, p=picture.image: p.save(path, "WEBP", quality=80))
    if staying:
        here = {key: dict.fromkeys([*before[key].split(", "), about[key]]) for key in ("device", "torch") if key in about}
        about = about | {key: ", ".join(names) for key, names in here.items()}
    content = about | {"scenes": scenes, "conditions": list(conditions.values())}
    write_whole(folder / "about.json", json.dumps(content, indent=1) + "\n")


def _groups(scene: Scene, picture: Picture) -> list[dict]:
    """What a picture shows, group by group, and the patches that show it."""
    return [
        {"text": noun_phrase(group), "thing": group.thing, "colour": group.colour, "count": group.count,
         "place": PLACES[group.place], "patches": bits(patches)}
        for group, patches in zip(scene.groups, picture.cover, strict=True)
    ]  # fmt: skip


def packed(answer: Answer) -> dict:
    """An answer as the page reads it.

    kept: [step, bits] where the kept tokens change. shares: a byte for each step and segment, 255 being 1. marks: [first token,
    behind the last, slot, group of the scene or -1, right].
    """
    changes = [t for t in range(len(answer.kept)) if t == 0 or (answer.kept[t] != answer.kept[t - 1]).any()]
    ends = np.array(list(accumulate(map(len, answer.pieces))))
    marks = [
        [int(np.searchsorted(ends, m.start, "right")), int(np.searchsorted(ends, m.end)) + 1, SLOTS.index(m.slot),
         -1 if m.group is None else m.group, int(m.right)]
        for m in answer.marks
    ]  # fmt: skip
    shares = (255 * answer.shares).round().astype(np.uint8)
    return {
        "pieces": answer.pieces, "kept": [[t, bits(answer.kept[t])] for t in changes],
        "shares": base64.b64encode(shares.tobytes()).decode(), "marks": marks,
    }  # fmt: skip


def bits(mask: np.ndarray) -> str:
    """A mask of image tokens, in raster order, as base64: eight tokens a byte, the first one highest."""
    return base64.b64encode(np.packbits(mask).tobytes()).decode()


def mask(text: str) -> np.ndarray:
    """What `bits` packed; a picture's image tokens are a multiple of eight."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8)).astype(bool)


def kept(answer: dict) -> np.ndarray:
    """The image tokens that a stored answer keeps, (step, image token)."""
    changes = [mask(text) for _, text in answer["kept"]]
    which = np.searchsorted([step for step, _ in answer["kept"]], np.arange(len(answer["pieces"])), "right") - 1
    return np.stack(changes)[which]


def read_scene(path: Path) -> dict:
    """What a file of a scene holds."""
    return json.loads(path.read_text(encoding="utf-8").removeprefix(HEAD).removesuffix(TAIL))


def read_laboratories(folder: Path) -> dict[str, dict]:
    """What is known of each laboratory below a folder, by its name."""
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/about.json"))}
