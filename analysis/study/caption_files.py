"""Caption files as their makers publish them and as people keep them: COCO's and nocaps' JSON, Karpathy's splits, tables.

What is repaired or left out is counted and told (`Captions.problems`); what could be meant in two ways is an error that names
file and line.
"""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

SPLIT_NAMES = {"train": "train", "restval": "train", "val": "validation", "test": "test"}  # restval: Karpathy's for COCO
IMAGES = ("image", "image_name", "filename", "file_name")
CAPTIONS = ("caption", "comment", "raw", "text", "captions")
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".token")
_TOKEN_LINE = re.compile(r"(\S.*\.\w+)#\d+\t(.*)")  # Flickr8k.token.txt: file#number, tab, caption


class NoCaptions(ValueError):
    """A file that was never meant to hold captions: a licence, a list of a split, COCO's instances."""


@dataclass
class Captions:
    """The captions of each image. Images are named as in the file, with "/" and composed characters.

    splits: an image's official one ("train", "validation" or "test"), where the file names it. lines: where something was
    repaired or left out, by what it was.
    """

    origin: Path
    texts: dict[str, list[str]] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    lines: dict[str, list[int]] = field(default_factory=dict)

    def add(self, image: str, texts: Iterable[str | None], line: int, split: str | None = None) -> None:
        """Note the captions of an image. line: of the file, or number of the entry, for reports."""
        name = image_name(image)
        known = self.texts.setdefault(name, [])
        for text in texts:
            text = text.strip() if isinstance(text, str) else ""
            if not text:
                self.report("without a caption, left out", line)
            elif text in known:
                self.report("with a caption that the image has already, left out", line)
            else:
                known.append(text)
        if split:
            if split not in SPLIT_NAMES:
                raise ValueError(f"{self.origin}: {image} is in a split {split!r}, which is none of {', '.join(SPLIT_NAMES)}")
            self.splits[name] = SPLIT_NAMES[split]

    def report(self, what: str, line: int) -> None:
        self.lines.setdefault(what, []).append(line)

    @property
    def problems(self) -> list[str]:
        """One sentence for each kind of repair."""
        return [f"{self.origin}: {len(lines)} {what} (first: {lines[0]})" for what, lines in self.lines.items()]


def image_name(path: str) -> str:
    """A relative path as it is compared: "/" between folders, composed characters (a Mac decomposes them)."""
    return unicodedata.normalize("NFC", str(path).strip().replace("\\", "/").removeprefix("./"))


def read_captions(folder: Path) -> Captions:
    """The captions of the one file in the folder that holds some.

    Raises FileNotFoundError (no such file) or ValueError that names file and line: damaged, several, or none with captions.
    """
    candidates = [p for p in sorted(folder.glob("*")) if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
    if not candidates:
        raise FileNotFoundError(
            f"{folder} holds no caption file: put COCO's or nocaps' JSON, Karpathy's dataset_flickr30k.json, Flickr8k's "
            "captions.txt, Flickr30k's CSV or a metadata.jsonl beside the images"
        )
    found, others = [], []
    for path in candidates:
        try:
            found.append(_read(path))
        except NoCaptions as error:
            others.append(str(error))
    if len(found) > 1:
        raise ValueError(f"{' and '.join(str(c.origin) for c in found)} all hold captions: leave one of them in {folder}")
    if not found:
        raise ValueError("; ".join(others))
    return found[0]


def _read(path: Path) -> Captions:
    form = {".json": _of_json, ".jsonl": _of_lines}.get(path.suffix.lower(), _of_table)
    captions = form(path, _text(path))
    captions.texts = {name: texts for name, texts in captions.texts.items() if texts}
    if not captions.texts:
        raise NoCaptions(f"{path}: no captions in it")
    return captions


def _text(path: Path) -> str:
    """The file's text, which is UTF-8, with or without a byte-order mark."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        header = data.split(b"\n", 1)[0].decode("latin-1")
        kind = ValueError if any(name in header for name in (*IMAGES, *CAPTIONS, "#0\t")) else NoCaptions
        raise kind(
            f"{path}, line {data[: error.start].count(bytes([10])) + 1}: is not UTF-8; if it is Latin-1, convert it with "
            f"`iconv -f latin1 -t utf8`"
        ) from error


def _of_json(path: Path, text: str) -> Captions:
    """{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}: COCO and nocaps; or Karpathy's form.

    Karpathy's: {"images": [{"filename", "filepath", "split", "sentences": [{"raw"}]}]}, filepath only for COCO's.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    captions = Captions(path)
    images = content.get("images") if isinstance(content, dict) else None
    karpathy = isinstance(images, list) and images and "sentences" in images[0]
    for key in ("images",) if karpathy else ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise NoCaptions(f'{path} is not a caption file in COCO\'s form: it has no list "{key}"')
    entries = images if karpathy else content["annotations"]
    if not karpathy and not any("caption" in annotation for annotation in entries):
        raise NoCaptions(f"{path}: an entry lacks 'caption', as all others do")
    names = {str(image.get("id")): image.get("file_name") for image in images}
    for number, entry in enumerate(entries, 1):
        try:
            if karpathy:
                name = "/".join(part for part in (entry.get("filepath"), entry["filename"]) if part)
                captions.add(name, [sentence["raw"] for sentence in entry["sentences"]], number, entry["split"])
            else:
                captions.add(names[str(entry["image_id"])], [entry["caption"]], number)
        except KeyError as error:
            raise ValueError(f"{path}, entry {number}: lacks or does not resolve {error}") from error
    return captions


def _of_lines(path: Path, text: str) -> Captions:
    """A metadata.jsonl: {"file_name": ..., "text": caption or list} a line."""
    captions = Captions(path)
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: is not valid JSON: {error}") from error
        image, caption = (next((c for c in names if c in row), None) for names in (IMAGES, CAPTIONS))
        if image is None or caption is None:
            raise NoCaptions(f"{path}, line {number}: has the fields {sorted(row)}; needed are an image and a caption")
        texts = row[caption] if isinstance(row[caption], list) else [row[caption]]
        captions.add(row[image], texts, number, row.get("split"))
    return captions


def _of_table(path: Path, text: str) -> Captions:
    """Flickr8k's `image,caption` or `file#number<tab>caption`, Flickr30k's `image_name| comment_number| comment`, or hub CSV."""
    header = text.split("\n", 1)[0]
    if _TOKEN_LINE.match(header):
        return _of_token_lines(path, text)
    separator = "|" if "|" in header else "\t" if "\t" in header else ","
    quoting = {"quoting": csv.QUOTE_MINIMAL, "strict": True} if separator == "," else {"quoting": csv.QUOTE_NONE}
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, **quoting)
    try:
        columns = [c.strip() for c in next(rows, [])]
    except csv.Error as error:  # prose
        raise NoCaptions(f"{path} is no table: {error}") from error
    image, caption = (next((columns.index(c) for c in names if c in columns), None) for names in (IMAGES, CAPTIONS))
    if image is None or caption is None:
        raise NoCaptions(
            f"{path} has the columns {columns[:8]}; needed are an image column ({', '.join(IMAGES)}) and a caption column "
            f"({', '.join(CAPTIONS)})"
        )
    captions = Captions(path)
    try:
        for cells in rows:
            cells = [cell.strip() for cell in cells]
            if any(cells):
                row = _whole_row(captions, cells, columns, caption, separator, rows.line_num)
                if row is not None:
                    split = row[columns.index("split")] if "split" in columns else None
                    captions.add(row[image], _several(row[caption]), rows.line_num, split)
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}; close or double the quotation marks") from error
    return captions


def _whole_row(captions: Captions, cells: list[str], columns: list[str], caption: int, separator: str, line: int) -> list | None:
    """The cells, one a column, mended where it is plain how; None where the row is left out."""
    missing = len(columns) - len(cells)
    if missing == 0:
        return cells
    if missing < 0 and caption == len(columns) - 1:
        captions.report(f'with "{separator}" in the caption, taken as a part of it', line)
        return [*cells[:caption], f"{separator} ".join(cells[caption:])]
    if missing < 0:
        raise ValueError(f"{captions.origin}, line {line}: has {len(cells)} cells for the columns {columns}; quote the caption")
    both = re.match(r"(\d+)\s+(.+)", cells[-1])
    if missing == 1 and both and "comment_number" in columns:  # the official table of Flickr30k has such a row
        captions.report("without the second delimiter, mended", line)
        return [*cells[:-1], *both.groups()]
    captions.report("with too few cells, left out", line)
    return None


def _of_token_lines(path: Path, text: str) -> Captions:
    captions = Captions(path)
    for number, line in enumerate(text.splitlines(), 1):
        if found := _TOKEN_LINE.match(line):
            captions.add(found[1], [found[2]], number)
        elif line.strip():
            captions.report("not of the form file#number, tab, caption, left out", number)
    return captions


def _several(cell: str) -> list[str]:
    """A cell's captions: a JSON list, or itself."""
    try:
        found = json.loads(cell) if cell.startswith("[") else None
    except json.JSONDecodeError:
        found = None
    return found if isinstance(found, list) else [cell]
