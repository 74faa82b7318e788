"""Images with something to say about them: pocket scenes, or photographs with captions from a folder or the hub.

`examples("pocket", ...)` renders scenes; `examples("nocaps", ...)` reads a caption set of the hub (also flickr30k, coco2017);
`examples("path/to/folder", ...)` reads photographs with a caption file beside them. A broken image never stops a run: it is
left out and listed.
"""

from __future__ import annotations

import random
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from dyrate.datasets.files import read_captions
from dyrate.datasets.hub_sets import SETS, read_hub_set
from dyrate.pocket import language
from dyrate.pocket.scenes import SPLITS, Scene, compose, render, seeds

CAPTION_PROMPT = language.CAPTION_PROMPTS[0]  # lmms-eval's, which the paper used
IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class Example:
    """One image with an instruction and reference answers.

    scene: what it shows, where that is known (pocket). Else its file lies at `path`, or `opens` opens it.
    """

    name: str
    task: str
    prompt: str
    references: tuple[str, ...]
    path: Path | None = None
    scene: Scene | None = None
    opens: Callable[[], Image.Image] | None = field(default=None, repr=False, compare=False)

    def image(self) -> Image.Image:
        """The picture in RGB. Raises OSError naming the file where it cannot be read."""
        if self.scene is not None:
            return render(self.scene).image
        try:
            with self.opens() if self.opens else Image.open(self.path) as image:
                return image.convert("RGB")
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise OSError(f"{self.path or self.name} cannot be read as an image: {error}") from error


@dataclass
class Examples(Sequence):
    """Examples and what was wrong with the data: `problems` lists each left-out file or caption with its reason."""

    items: list[Example]
    source: str
    problems: list[str] = field(default_factory=list)
    split: str = "all"

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def batches(self, size: int) -> Iterator[tuple[list[Example], list[Image.Image]]]:
        """Examples with their pictures, `size` at a time; a picture that cannot be read is reported and skipped."""
        batch, pictures = [], []
        for example in self.items:
            try:
                picture = example.image()
            except OSError as error:
                self.report(str(error))
                continue
            batch.append(example)
            pictures.append(picture)
            if len(batch) == size:
                yield batch, pictures
                batch, pictures = [], []
        if batch:
            yield batch, pictures

    def report(self, problem: str) -> None:
        """Note a problem once, and warn."""
        if problem not in self.problems:
            self.problems.append(problem)
            warnings.warn(problem, stacklevel=3)


def examples(
    source: str | Path = "pocket", n: int | None = None, *, tasks: Sequence[str] = ("caption",), split: str | None = None,
    seed: int = 0, start: int = 0,
) -> Examples:  # fmt: skip
    """`n` images per task from "pocket", from a caption set of the hub (nocaps, flickr30k, coco2017), or from a folder.

    tasks: for pocket any of caption, description, recap, look_late and qa_count, qa_colour, qa_place, qa_relation,
    qa_existence, qa_reading, each on scenes of its own; photographs have captions only. split: "train", "validation" or
    "test", which share no image: those of the caption file if it names them, else by the image's name. By default pocket's
    test scenes, the caption file's test images, or all photographs. start: which pocket scenes. seed: which photographs, if
    there are more than `n`.
    """
    if split not in (None, *SPLITS):
        raise ValueError(f"split is one of {', '.join(SPLITS)}, not {split!r}")
    if str(source) == "pocket":
        return _pocket(n or 100, tasks, split or "test", start)
    if tuple(tasks) != ("caption",):
        raise ValueError(f"{source}: photographs with captions offer the task 'caption' only, not {list(tasks)}")
    if str(source) in SETS:
        return _of_hub(str(source), n, seed, split)
    return _of_folder(Path(source), n, seed, split)


def _pocket(n: int, tasks: Sequence[str], split: str, start: int) -> Examples:
    known = {"caption", *language.PROMPTS, *(f"qa_{kind}" for kind in language.QUESTION_KINDS)}
    if unknown := set(tasks) - known:
        raise ValueError(f"unknown pocket task {sorted(unknown)}; choose from {sorted(known)}")
    items = []
    for task in tasks:
        made = 0
        for seed in seeds(split, 4 * n, start):  # a scene without a word has nothing to read
            if made == n:
                break
            scene = compose(seed)
            turn, references = _turn(scene, task)
            if turn is not None:
                items.append(Example(f"{task}-{seed}", task, turn.prompt, references, scene=scene))
                made += 1
    return Examples(items, "pocket", split=split)


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
    files = {p.name: p for p in sorted(folder.rglob("*")) if p.suffix.lower() in IMAGE_TYPES}
    if not files:
        raise FileNotFoundError(f"{folder} holds no image ({', '.join(IMAGE_TYPES)})")
    captions = read_captions(folder)
    names = [name for name, texts in captions.texts.items() if texts]
    found = Examples([], str(folder), split=split or ("test" if captions.splits else "all"))
    if captions.splits:
        names, split = [name for name in names if captions.splits[name] == found.split], None
    for name in [name for name in names if name not in files]:
        found.report(f"{captions.origin}: the caption of {name} has no image file in {folder}")
    there = [name for name in names if name in files]
    if not there:
        raise ValueError(f"{captions.origin}: none of its {len(names)} captioned images is in {folder}")
    chosen = _chosen(there, n, seed, split)
    found.items = [Example(name, "caption", CAPTION_PROMPT, tuple(captions.texts[name]), path=files[name]) for name in chosen]
    return found


def _of_hub(source: str, n: int | None, seed: int, split: str | None) -> Examples:
    captions, opens = read_hub_set(source)
    published = SETS[source].split
    found = Examples([], source, split=published if split is None else f"{split} of {published}")
    for name in [name for name, texts in captions.items() if not texts]:
        found.report(f"{source}: {name} has no caption")
    if not any(captions.values()):
        raise ValueError(f"{source}: no captions in it")
    chosen = _chosen([name for name, texts in captions.items() if texts], n, seed, split)
    found.items = [Example(name, "caption", CAPTION_PROMPT, tuple(captions[name]), opens=opens[name]) for name in chosen]
    return found


def _chosen(names: list[str], n: int | None, seed: int, split: str | None) -> list[str]:
    """`n` of a split of the names: by name, so that a photograph stays where it is when others come."""
    if split is not None:
        share = {"train": range(6), "validation": range(6, 7), "test": range(7, 10)}[split]
        names = [name for name in names if zlib.crc32(name.encode()) % 10 in share]
    return sorted(random.Random(seed).sample(names, n)) if n is not None and n < len(names) else names
