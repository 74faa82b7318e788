"""The study's images: scenes of the pocket laboratory, or photographs with captions from a folder or the hub.

`examples("pocket", ...)` renders scenes, `examples("laboratories", ...)` such with long words among them;
`examples("nocaps", ...)` reads a caption set of the hub (also flickr30k, coco2017);
`examples("path/to/folder", ...)` reads photographs with a caption file beside them. A broken image does not stop a run: it is
left out and listed.
"""

from __future__ import annotations

import json
import random
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pandas as pd
from PIL import Image

from dyrate.data import Example, Examples
from study.caption_files import image_name, read_captions
from study.hub_sets import SETS, read_hub_set
from study.pocket import language
from study.pocket.scenes import SPLITS, Scene, compose, render, seeds

CAPTION_PROMPT = language.CAPTION_PROMPTS[0]  # of lmms-eval, which the paper used
SCENES = ("pocket", "laboratories")
TASKS = ("caption", *language.PROMPTS, *(f"qa_{kind}" for kind in language.QUESTION_KINDS))
HARD_TASKS = ("backwards", *(f"qa_{kind}" for kind in language.HARD_KINDS))
IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True, kw_only=True)
class SceneExample(Example):
    """An example whose image is rendered, so that what it shows is known."""

    scene: Scene

    def image(self) -> Image.Image:
        return render(self.scene).image


def has_scenes(examples: Sequence[Example]) -> bool:
    """Whether it is known what the images show."""
    return all(isinstance(e, SceneExample) for e in examples)


def examples(
    source: str | Path = "pocket", n: int | None = None, *, tasks: Sequence[str] = ("caption",), split: str | None = None,
    seed: int = 0, start: int = 0,
) -> Examples:  # fmt: skip
    """`n` images per task from scenes, from a caption set of the hub (nocaps, flickr30k, coco2017), or from a folder.

    source: of scenes "pocket", or "laboratories" for the models that were trained on long painted words and the harder tasks
    (pocket-plain, pocket-dropped, smol). tasks: of scenes any of TASKS, those of HARD_TASKS only for "laboratories", each on
    scenes of its own; photographs have captions only. split: "train", "validation" or
    "test", which share no image: those of the caption file if it names them, else by the image's name. By default pocket's
    test scenes, the caption file's test images, or all photographs. start: which pocket scenes. seed: which photographs, if
    there are more than `n`.
    """
    if split not in (None, *SPLITS):
        raise ValueError(f"split is one of {', '.join(SPLITS)}, not {split!r}")
    if n is not None and n < 1:
        raise ValueError(f"n is how many images, at least 1, not {n}")
    if not tasks:
        raise ValueError("tasks is empty: name what to ask")
    if str(source) in SCENES:
        return _of_laboratory(str(source), 100 if n is None else n, tasks, split or "test", start)
    if tuple(tasks) != ("caption",):
        raise ValueError(f"{source}: photographs with captions offer the task 'caption' only, not {list(tasks)}")
    if str(source) in SETS:
        return _of_hub(str(source), n, seed, split)
    return _of_folder(Path(source), n, seed, split)


def _of_laboratory(source: str, n: int, tasks: Sequence[str], split: str, start: int) -> Examples:
    known = set(TASKS) - (set(HARD_TASKS) if source == "pocket" else set())
    if unknown := set(tasks) - known:
        raise ValueError(f"unknown {source} task {sorted(unknown)}; choose from {sorted(known)}")
    drawn = seeds(split, 12 * n, start)  # more than n, for a scene without a word has nothing to read
    items = [example for task in tasks for example in islice(_of_scenes(drawn, task, source != "pocket"), n)]
    return Examples(items, source, split=split)


def _of_scenes(drawn: Iterable[int], task: str, long_words: bool) -> Iterator[SceneExample]:
    """Of the scenes with these seeds those in which there is something to ask."""
    for seed in drawn:
        scene = compose(seed, long_words)
        turn, references = _turn(scene, task)
        if turn is not None:
            yield SceneExample(f"{task}-{seed}", task, turn.prompt, references, scene=scene)


def _turn(scene: Scene, task: str) -> tuple[language.Turn | None, tuple[str, ...]]:
    if task == "caption":
        texts = tuple(language.captions(scene))
        return language.Turn(task, CAPTION_PROMPT, texts[0]), texts
    if task in language.PROMPTS:
        turn = language.long_turn(scene, task, prompt=0)
    else:
        turn = language.question(scene, task.removeprefix("qa_"))
    return turn, (turn.response,) if turn else ()


def _of_folder(folder: Path, n: int | None, seed: int, split: str | None) -> Examples:
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder of photographs: {folder} (or name one of {', '.join(SETS)}, or pocket)")
    files = _files(folder)
    if not files:
        raise FileNotFoundError(f"{folder} holds no image ({', '.join(IMAGE_TYPES)})")
    captions = read_captions(folder)
    names, file_of = list(captions.texts), {name: _file_of(name, files) for name in captions.texts}
    captioned = Examples([], str(folder), split=split or ("test" if captions.splits else "all"))
    if captions.splits:
        names, split = [name for name in names if captions.splits[name] == captioned.split], None
    captioned.problems += captions.problems
    captioned.missing = [name for name in names if file_of[name] is None]
    there = [name for name in names if file_of[name] is not None]
    if not there:
        raise ValueError(f"{captions.origin}: none of its {len(names)} captioned images is in {folder}")
    if n_missing := len(captioned.missing):
        which = f"{n_missing} of its {len(names)} captioned images are not in {folder} (first: {captioned.missing[0]})"
        captioned.problems.append(f"{captions.origin}: {which}")
    chosen = _chosen(there, n, seed, split)
    captioned.items = [
        Example(name, "caption", CAPTION_PROMPT, tuple(captions.texts[name]), path=file_of[name]) for name in chosen
    ]
    return _with_images(captioned)


def _files(folder: Path) -> dict[str, list[tuple[str, Path]]]:
    """The image files by name, each with its path relative to the folder; without what a Mac hides beside them."""
    found = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_TYPES and not path.name.startswith("."):
            found[image_name(path.name)].append((image_name(path.relative_to(folder).as_posix()), path))
    return found


def _file_of(name: str, files: dict[str, list[tuple[str, Path]]]) -> Path | None:
    """The image file that a caption file means: by its path, else by as much of the path's end as fits, at least its name.

    Raises ValueError where several files fit equally well.
    """
    parts = name.split("/")
    for i in range(len(parts)):
        end = "/".join(parts[i:])
        found = [(relative, path) for relative, path in files.get(parts[-1], []) if f"/{relative}".endswith(f"/{end}")]
        exact = [path for relative, path in found if relative == name]
        if exact or len(found) == 1:
            return exact[0] if exact else found[0][1]
        if found:
            both = " or ".join(relative for relative, _ in found[:2])
            raise ValueError(f"the caption of {name} could be meant for {both}: name the folder in the caption file")
    return None


def _of_hub(source: str, n: int | None, seed: int, split: str | None) -> Examples:
    captions, opens = read_hub_set(source)
    published = SETS[source].split
    captioned = Examples([], source, split=published if split is None else f"{split} of {published}")
    if not any(captions.values()):
        raise ValueError(f"{source}: no captions in it")
    if bare := [name for name, texts in captions.items() if not texts]:
        captioned.problems.append(f"{source}: {len(bare)} images without a caption, left out (first: {bare[0]})")
    chosen = _chosen([name for name, texts in captions.items() if texts], n, seed, split)
    captioned.items = [Example(name, "caption", CAPTION_PROMPT, tuple(captions[name]), opens=opens[name]) for name in chosen]
    return _with_images(captioned)


def _with_images(examples: Examples) -> Examples:
    """The examples, of which one at least has an image that can be read: else ValueError, before a model is loaded."""
    if not examples.items:
        raise ValueError(f"{examples.source}: none of its photographs is in the split {examples.split}: add photographs")
    next(examples.readable())
    for problem in examples.problems:
        warnings.warn(problem, stacklevel=2)
    return examples


def as_rows(examples: Examples) -> tuple[pd.DataFrame, dict]:
    """Examples as a table, a row each, and what holds for all of them, to be written; `from_rows` has them back."""
    columns = ["name", "task", "prompt", "references", "path"]
    items = [(e.name, e.task, e.prompt, json.dumps(e.references), str(e.path or "")) for e in examples]
    about = {key: getattr(examples, key) for key in ("source", "split", "problems", "missing", "unreadable")}
    return pd.DataFrame(items, columns=columns, dtype=object), about


def from_rows(table: pd.DataFrame, about: dict) -> Examples:
    """The examples that `as_rows` took apart: scenes are composed anew, photographs opened where they lay."""
    items = []
    for row in table.to_dict("records"):
        given = row | {"references": tuple(json.loads(row["references"])), "path": Path(row["path"]) if row["path"] else None}
        if about["source"] in SCENES:
            scene = compose(int(row["name"].rpartition("-")[2]), about["source"] != "pocket")
            items.append(SceneExample(**given, scene=scene))
        else:
            items.append(Example(**given))
    return Examples(items, **about)


def left_out(examples: Examples) -> str:
    """How many photographs could not be measured, in words to follow the number that were; "" for none."""
    counts = {"unreadable": len(examples.unreadable), "missing": len(examples.missing)}
    named = " and ".join(f"{n} {why}" for why, n in counts.items() if n)
    return f" ({named} left out)" if named else ""


def images_in_words(examples: Examples) -> str:
    """What was measured, for captions: how many images a task, of what kind, and how many were left out."""
    n = max(Counter(e.task for e in examples).values())
    kind = "unseen pocket scenes a task" if has_scenes(examples) else f"photographs of `{examples.source}`"
    return f"{n} {kind}{left_out(examples)}"


def model_and_images(model: str, examples: Examples) -> str:
    """The model and the kind of images that it was asked about, for a headline: "`pocket` (synthetic scenes)"."""
    return f"`{model}` ({'synthetic scenes' if has_scenes(examples) else f'photographs of `{examples.source}`'})"


def _chosen(names: list[str], n: int | None, seed: int, split: str | None) -> list[str]:
    """`n` of a split of the names: by name, so that a photograph stays where it is when others come."""
    if split is not None:
        share = {"train": range(6), "validation": range(6, 7), "test": range(7, 10)}[split]
        names = [name for name in names if zlib.crc32(name.encode()) % 10 in share]
    return sorted(random.Random(seed).sample(names, n)) if n is not None and n < len(names) else names
