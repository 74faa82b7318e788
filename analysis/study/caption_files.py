"""Caption files as their makers publish them: COCO's and nocaps' JSON, Karpathy's splits, Flickr8k's and Flickr30k's tables."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path

SPLIT_NAMES = {"train": "train", "restval": "train", "val": "validation", "test": "test"}  # restval: Karpathy's for COCO


@dataclass
class Captions:
    """The captions of each image file. splits: its official one ("train", "validation" or "test"), where the file names it."""

    origin: Path
    texts: dict[str, list[str]] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)

    def add(self, image: str, texts: list[str], split: str | None = None) -> None:
        name = Path(image).name
        self.texts.setdefault(name, []).extend(texts)
        if split:
            if split not in SPLIT_NAMES:
                raise ValueError(f"{self.origin}: {image} is in a split {split!r}, which is none of {', '.join(SPLIT_NAMES)}")
            self.splits[name] = SPLIT_NAMES[split]


def read_captions(folder: Path) -> Captions:
    """The first caption file in the folder that has captions. Raises FileNotFoundError or ValueError that names what is wrong."""
    candidates = [p for p in sorted(folder.glob("*")) if p.suffix.lower() in (".json", ".csv", ".txt", ".token")]
    if not candidates:
        raise FileNotFoundError(
            f"{folder} holds no caption file: put COCO's or nocaps' JSON, Karpathy's dataset_flickr30k.json, Flickr8k's "
            "captions.txt or Flickr30k's CSV beside the images"
        )
    for path in candidates:
        captions = _from_json(path) if path.suffix.lower() == ".json" else _from_table(path)
        if any(captions.texts.values()):
            return captions
    raise ValueError(f"{', '.join(str(p) for p in candidates)}: no captions in it")


def _from_json(path: Path) -> Captions:
    """{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}: COCO and nocaps; or Karpathy's form.

    Karpathy's: {"images": [{"filename", "split", "sentences": [{"raw"}]}]}.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    captions = Captions(path)
    images = content.get("images") if isinstance(content, dict) else None
    karpathy = isinstance(images, list) and images and "sentences" in images[0]
    for key in ("images",) if karpathy else ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f'{path} is not a caption file in COCO\'s form: it has no list "{key}"')
    try:
        if karpathy:
            for image in images:
                captions.add(image["filename"], [sentence["raw"] for sentence in image["sentences"]], image["split"])
        else:
            names = {image["id"]: image["file_name"] for image in images}
            for annotation in content["annotations"]:
                captions.add(names[annotation["image_id"]], [annotation["caption"]])
    except KeyError as error:
        raise ValueError(f"{path}: an entry lacks or does not resolve {error}") from error
    return captions


def _from_table(path: Path) -> Captions:
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
    captions = Captions(path)
    for row in rows:
        row = {k.strip(): v.strip() for k, v in row.items() if k is not None and v is not None}
        if row.get(image) and row.get(caption):
            cell = row[caption]
            captions.add(row[image], json.loads(cell) if cell.startswith("[") else [cell], row.get("split"))
    return captions
