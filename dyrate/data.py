"""Images with an instruction and reference answers, in batches that a broken picture does not stop."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


@dataclass(frozen=True)
class Example:
    """One image with an instruction and reference answers.

    name: unique within a data set. path: the image file; in its place `opens`, a function that opens the image.
    """

    name: str
    task: str
    prompt: str
    references: tuple[str, ...]
    path: Path | None = None
    opens: Callable[[], Image.Image] | None = field(default=None, repr=False, compare=False)

    def image(self) -> Image.Image:
        """The image as `upright_rgb` has it. Raises OSError naming the file where it cannot be read."""
        try:
            with self.opens() if self.opens else Image.open(self.path) as image:
                return upright_rgb(image)
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise OSError(f"{self.path or self.name} cannot be read as an image: {error}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """A picture as a person sees it: turned as its EXIF says, on white where it is transparent, deep grey values scaled to 8 bit.

    Deep grey values (16 or 32 bit, or floats) are taken to span the least of 1 (floats only), 255 and 65,535 that holds them.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        spans = [1, 255, 65535] if image.mode == "F" else [65535] if ";16" in image.mode else [255, 65535]
        span = next((s for s in spans if values.max() <= s), values.max())
        image = Image.fromarray((values.clip(0) * 255 / span).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@dataclass
class Examples(Sequence):
    """Examples, and what was wrong with the data.

    problems: a line for whatever was mended or left out. missing: images that are named and not there. unreadable: images that
    were left out when their turn came, each with the reason.
    """

    items: list[Example]
    source: str
    problems: list[str] = field(default_factory=list)
    split: str = "all"
    missing: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def readable(self, processor=None) -> Iterator[tuple[Example, Image.Image]]:
        """Each example with its image. Where that cannot be read, or the processor refuses it, the example is left out for good.

        Warns of them in one line. Raises ValueError that names them if no example is left.
        """
        for example in list(self.items):
            try:
                image = example.image()
                if processor is not None:
                    _check_accepted(processor, image, example)
            except OSError as error:
                self.items = [e for e in self.items if e is not example]
                if str(error) not in self.unreadable:
                    self.unreadable.append(str(error))
            else:
                yield example, image
        reasons = "; ".join(self.unreadable[:3]) + ("; ..." if len(self.unreadable) > 3 else "")
        if not self.items:
            raise ValueError(f"{self.source}: no example has an image that can be used: {reasons}")
        if self.unreadable:
            warnings.warn(f"{self.source}: {len(self.unreadable)} images left out: {reasons}", stacklevel=2)

    def batches(self, size: int, processor=None) -> Iterator[tuple[list[Example], list[Image.Image]]]:
        """`readable` examples and their images, `size` at a time."""
        left = self.readable(processor)
        while pairs := list(islice(left, size)):
            batch, images = zip(*pairs, strict=True)
            yield list(batch), list(images)


def _check_accepted(processor, image: Image.Image, example: Example) -> None:
    """Raises OSError that names the image if the model's own processor can make nothing of it."""
    try:
        processor.image_processor(images=[image], return_tensors="pt")
    except Exception as error:  # each processor raises what it likes
        raise OSError(f"{example.path or example.name} is refused by the model's processor: {error}") from error


def one_line(message, *_) -> str:
    """A warning without the line of code that it comes from: `warnings.formatwarning = one_line`, where a program begins."""
    return f"warning: {message}\n"


def read_examples(path: str | Path) -> Examples:
    """Examples from a file of JSON lines, {"image": file, "prompt": text, "answer": text or list, "task": name}.

    image: relative to the file. task may be left out. Raises FileNotFoundError, or ValueError that names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'no such file: {path}. It should hold lines {{"image": ..., "prompt": ..., "answer": ...}}')
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            image, prompt, answer = row["image"], row["prompt"], row["answer"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{path}, line {number}: needs {{"image": ..., "prompt": ..., "answer": ...}} ({error})') from error
        references = (answer,) if isinstance(answer, str) else tuple(answer)
        if not references:
            raise ValueError(f"{path}, line {number}: no answer")
        items.append(Example(f"{number}-{Path(image).name}", row.get("task", "all"), prompt, references, path.parent / image))
    if not items:
        raise ValueError(f"{path} holds no example")
    return Examples(items, str(path))
