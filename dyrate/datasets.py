"""Images with something to say about them: pocket scenes, or a folder of photographs with captions.

`examples("pocket", ...)` renders scenes; `examples("path/to/folder", ...)` reads COCO's or nocaps' JSON, Flickr8k's
`captions.txt` or Flickr30k's CSV beside the images. A broken image never stops a run: it is left out and listed.
"""

from __future__ import annotations

import csv
import json
import random
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from dyrate.pocket import language
from dyrate.pocket.scenes import SPLITS, Scene, compose, render, seeds

CAPTION_PROMPT = language.CAPTION_PROMPTS[0]  # lmms-eval's, which the paper used
IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class Example:
    """One image with an instruction and reference answers. scene: what it shows, where that is known (pocket)."""

    name: str
    task: str
    prompt: str
    references: tuple[str, ...]
    path: Path | None = None
    scene: Scene | None = None

    def image(self) -> Image.Image:
        """The picture in RGB. Raises OSError naming the file where it cannot be read."""
        if self.scene is not None:
            return render(self.scene).image
        try:
            with Image.open(self.path) as image:
                return image.convert("RGB")
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise OSError(f"{self.path} cannot be read as an image: {error}") from error


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
    """`n` images per task from "pocket" or from a folder of photographs.

    tasks: for pocket any of caption, description, recap, look_late and qa_count, qa_colour, qa_place, qa_relation,
    qa_existence, qa_reading, each on scenes of its own; photographs have captions only. split: "train", "validation" or
    "test", which share no image; by default pocket's test scenes, or all photographs. start: which pocket scenes. seed:
    which photographs, if there are more than `n`.
    """
    if split not in (None, *SPLITS):
        raise ValueError(f"split is one of {', '.join(SPLITS)}, not {split!r}")
    if str(source) == "pocket":
        return _pocket(n or 100, tasks, split or "test", start)
    if tuple(tasks) != ("caption",):
        raise ValueError(f"{source}: photographs with captions offer the task 'caption' only, not {list(tasks)}")
    return _photographs(Path(source), n, seed, split)


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


def _photographs(folder: Path, n: int | None, seed: int, split: str | None) -> Examples:
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder of photographs: {folder}")
    files = {p.name: p for p in sorted(folder.rglob("*")) if p.suffix.lower() in IMAGE_TYPES}
    if not files:
        raise FileNotFoundError(f"{folder} holds no image ({', '.join(IMAGE_TYPES)})")
    captions, origin = _read_captions(folder)
    found = Examples([], str(folder), split=split or "all")
    for name in [name for name in captions if name not in files]:
        found.report(f"{origin}: the caption of {name} has no image file in {folder}")
    names = [name for name in captions if name in files]
    if not names:
        raise ValueError(f"{origin}: none of its {len(captions)} captioned images is in {folder}")
    if split is not None:  # by name, so that a photograph stays where it is when others come
        share = {"train": range(6), "validation": range(6, 7), "test": range(7, 10)}[split]
        names = [name for name in names if zlib.crc32(name.encode()) % 10 in share]
    if n is not None and n < len(names):
        names = sorted(random.Random(seed).sample(names, n))
    found.items = [Example(name, "caption", CAPTION_PROMPT, tuple(captions[name]), path=files[name]) for name in names]
    return found


def _read_captions(folder: Path) -> tuple[dict[str, list[str]], Path]:
    """The captions of each image file, from the first caption file in the folder that is understood."""
    candidates = [p for p in sorted(folder.glob("*")) if p.suffix.lower() in (".json", ".csv", ".txt", ".token")]
    if not candidates:
        raise FileNotFoundError(
            f"{folder} holds no caption file: put COCO's or nocaps' JSON, Flickr8k's captions.txt or Flickr30k's CSV beside "
            "the images"
        )
    for path in candidates:
        captions = _from_json(path) if path.suffix.lower() == ".json" else _from_table(path)
        if captions:
            return captions, path
    raise ValueError(f"{', '.join(str(p) for p in candidates)}: no captions in it")


def _from_json(path: Path) -> dict[str, list[str]]:
    """COCO and nocaps: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f'{path} is not a caption file in COCO\'s form: it has no list "{key}"')
    try:
        names = {image["id"]: Path(image["file_name"]).name for image in content["images"]}
        captions: dict[str, list[str]] = {}
        for annotation in content["annotations"]:
            captions.setdefault(names[annotation["image_id"]], []).append(annotation["caption"])
    except KeyError as error:
        raise ValueError(f"{path}: an entry lacks or does not resolve {error}") from error
    return captions


def _from_table(path: Path) -> dict[str, list[str]]:
    """Flickr8k's `image,caption`, Flickr30k's `image_name| comment_number| comment`, or its hub CSV with `raw` lists."""
    text = path.read_text(encoding="utf-8-sig")
    header = text.split("\n", 1)[0]
    separator = "|" if "|" in header else "\t" if "\t" in header else ","
    rows = csv.DictReader(text.splitlines(), delimiter=separator, skipinitialspace=True)
    columns = [c.strip() for c in rows.fieldnames or []]
    image = next((c for c in ("image", "image_name", "filename", "file_name") if c in columns), None)
    caption = next((c for c in ("caption", "comment", "raw") if c in columns), None)
    if image is None or caption is None:
        raise ValueError(
            f"{path} has the columns {columns}; needed are an image column (image, image_name, filename or file_name) and a "
            "caption column (caption, comment or raw)"
        )
    captions: dict[str, list[str]] = {}
    for row in rows:
        row = {k.strip(): v for k, v in row.items() if k is not None and v is not None}
        if not row.get(image) or not row.get(caption):
            continue
        value = row[caption].strip()
        texts = json.loads(value) if value.startswith("[") else [value]
        captions.setdefault(Path(row[image].strip()).name, []).extend(texts)
    return captions
