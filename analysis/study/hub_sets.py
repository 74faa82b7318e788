"""Caption sets on the Hugging Face hub: those that lmms-eval, and with it the paper, evaluates on.

Only the evaluated split is downloaded, once. Captions are read at once, an image only when it is opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import snapshot_download
from PIL import Image

from dyrate.models import unreachable


@dataclass(frozen=True)
class HubSet:
    """Where a caption set lies. files: of the split. name, captions: the columns that identify images and describe them."""

    repository: str
    revision: str
    files: str
    name: str
    captions: str

    @property
    def split(self) -> str:
        """As its publisher calls it."""
        return Path(self.files).name.split("-")[0]


SETS = {
    "nocaps": HubSet(
        "lmms-lab/NoCaps", "a26b3fe1e0021164ec430c57c48085d58f2fe922", "data/validation-*", "image_id", "annotations_captions"
    ),
    # its "test" is the whole of Flickr30k, not Karpathy's 1,000 images
    "flickr30k": HubSet("lmms-lab/flickr30k", "0d6d9049be2e08261be315e731e0d8054c1d1c03", "data/test-*", "img_id", "caption"),
    # here `id` and `file_name` are not unique to an image
    "coco2017": HubSet(
        "lmms-lab/COCO-Caption2017", "ba347b1dc8dcc9c2c07f0d51c073403ae2ab5d42", "data/val-*", "question_id", "answer"
    ),
}  # fmt: skip


def read_hub_set(name: str) -> tuple[dict[str, list[str]], dict[str, partial[Image.Image]]]:
    """Captions by image, and a function without arguments that opens each.

    Raises ImportError (no package `datasets`), FileNotFoundError (offline, gated, moved) and ValueError (other columns).
    """
    try:
        from datasets import Dataset
    except ImportError as error:
        raise ImportError(
            f'the caption set "{name}" is read with the package `datasets`: `pip install -e ".[study,hub]" -e analysis`, or '
            "name a folder with its photographs and its caption file"
        ) from error
    wanted = SETS[name]
    repository, revision = wanted.repository, wanted.revision
    try:
        folder = snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=wanted.files)
    except (OSError, ValueError) as error:
        options = f'--repo-type dataset --include "{wanted.files}"'
        raise unreachable(repository, revision, error, options) from error
    files = [str(path) for path in sorted(Path(folder).glob(wanted.files))]
    if not files:
        raise FileNotFoundError(f"{repository} at {revision} has no file {wanted.files}")
    data = Dataset.from_parquet(files)
    if missing := {"image", wanted.name, wanted.captions} - set(data.column_names):
        raise ValueError(f"{repository} has no column {sorted(missing)}; it has {data.column_names}")
    names = [f"{name}-{value}" for value in data[wanted.name]]
    captions = dict(zip(names, data[wanted.captions], strict=True))
    return captions, {image: partial(_open, data, i) for i, image in enumerate(names)}


def _open(data, index: int) -> Image.Image:
    return data[index]["image"]
