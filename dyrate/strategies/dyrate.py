"""DyRate (arXiv:2501.14204): the rate of each step is predicted from how attention divides over four kinds of tokens."""

from __future__ import annotations

from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from dyrate.features import looks
from dyrate.predictor import RatePredictor
from dyrate.strategy import Strategy

FILES = ("config.json", "model.safetensors")
REMEDY = "train one with `python -m dyrate.training`, or name a folder that holds one or a hub repository as owner/name"


@dataclass(kw_only=True)
class DyRate(Strategy):
    """A rate for each step and input, from a trained predictor (arXiv:2501.14204). `DyRate.from_pretrained(folder or hub name)`.

    The rate is the predictor's likeliest. first_pruned_layer and residency are those that it was trained with.
    """

    predictor: RatePredictor
    compared = False  # needs a predictor of the model's own

    @classmethod
    def from_pretrained(cls, name: str | Path, **hub) -> DyRate:
        """The strategy of a saved predictor: a folder, or "owner/name" on the hub. hub: of `snapshot_download`.

        Raises FileNotFoundError that says where there is none, and how to come by one.
        """
        folder = Path(name) if Path(name).is_dir() else _download(str(name), hub)
        if missing := [file for file in FILES if not (folder / file).is_file()]:
            raise FileNotFoundError(f"{name} holds no predictor ({' and '.join(missing)} missing): {REMEDY}")
        with redirect_stdout(StringIO()):  # the hub's mixin prints where it loads from
            return cls.of(RatePredictor.from_pretrained(str(folder), strict=True).eval())

    @classmethod
    def of(cls, predictor: RatePredictor) -> DyRate:
        return cls(predictor=predictor, first_pruned_layer=predictor.first_pruned_layer, residency=predictor.residency)

    @property
    def each_step(self) -> bool:
        return not self.predictor.once

    def save_pretrained(self, folder: str | Path, **hub) -> None:
        self.predictor.save_pretrained(str(folder), **hub)

    def push_to_hub(self, name: str, **hub) -> None:
        self.predictor.push_to_hub(name, **hub)

    def __call__(self, model, processor=None, **how):
        self.predictor.check_fits(model)
        self.predictor.to(model.device)
        return super().__call__(model, processor, **how)

    def observes(self, n_layers):
        return sorted({*self.predictor.observed_layers, self.first_pruned_layer - 1})

    @torch.no_grad()
    def keep(self, seen):
        predictor = self.predictor
        if seen.step < predictor.delay:
            return 1.0
        rows = [seen.observed[layer].newest for layer in predictor.observed_layers]
        read = looks(predictor.reads, rows, seen.segments, seen.step, seen.newest_hidden)
        return 1 - predictor.rates[predictor(predictor.features(read, seen.step)).argmax(-1)]

    def selector_macs(self, shape, tokens):
        return self.predictor.linear.weight.numel()


def _download(name: str, hub: dict) -> Path:
    """The local copy of a hub repository's predictor."""
    if name.count("/") != 1 or name.startswith(("/", ".", "~")) or Path(name).parent.is_dir():
        raise FileNotFoundError(f"there is no folder {name}: {REMEDY}")
    try:
        return Path(snapshot_download(name, allow_patterns=FILES, **hub))
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(f"neither a folder nor the hub has {name} ({type(error).__name__}): {REMEDY}") from error
