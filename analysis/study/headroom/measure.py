"""Teacher-forced losses of a library of trajectories on the answers of every task, each batch stored when it is finished.

Written, for one laboratory and first pruned layer: `headroom_layer2_answers.csv.gz` (one line an answer, with what its costs
depend on and the predictor's features at step 0), `..._losses.csv.gz` (nats a token; a column for each ranking, residency and
trajectory), `..._dyrate.csv.gz` (trained predictors, with the costs of their own trajectories) and `..._about.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import dyrate
from dyrate.atomic import write_whole
from dyrate.cost import shape_of
from dyrate.data import Example
from dyrate.models import describe
from dyrate.predictor import RatePredictor
from dyrate.strategies.dyrate import DyRate
from dyrate.teacher_forcing import Prepared, masks_over_steps, prepare, teacher_forced, token_losses
from study.answers import weights_digest
from study.attribution import pruned_from
from study.examples import examples
from study.headroom.library import LIBRARIES, N_RATES, costs, kept_tokens
from study.headroom.rankings import RANKINGS, STATIC, ranked
from study.profiles import ROOT
from study.provenance import digest, files
from study.rows import write_rows

TASKS = ("caption", "description", "look_late", "backwards", "qa_reading", "qa_long_word", "qa_two_step", "qa_place")


@dataclass
class Laboratory:
    """A model under measurement. place: says from which layer on tokens are missing, and what a predictor there would see."""

    model: nn.Module
    processor: object
    place: RatePredictor

    @classmethod
    def load(cls, name: str, layer: int) -> Laboratory:
        model, processor = dyrate.load(name, dtype=torch.float32)
        return cls(model, processor, pruned_from(model, layer, n_rates=N_RATES))


def measure(
    model: str, n: int, out: Path, *, layer: int = 2, source: str = "laboratories", tasks: Sequence[str] = TASKS,
    rankings: Sequence[str] = RANKINGS, predictors: Path | None = None, store: Path = Path("build/headroom"),
    batch_size: int = 100,
) -> None:  # fmt: skip
    """Measure `n` test answers a task and write the tables into `out`. predictors: a folder of trained ones for this model."""
    lab = Laboratory.load(model, layer)
    trained = trained_here(predictors, layer, lab.model)
    stored = Store(store, lab)
    tables: dict[str, list[pd.DataFrame]] = {"answers": [], "losses": [], "dyrate": []}
    for batch, images in _batches(lab, source, n, tasks, batch_size):
        work = Work(lab, batch, images, rankings, stored)
        for table, rows in (("answers", work.answers), ("losses", work.losses()), ("dyrate", work.dyrate(trained))):
            tables[table].append(rows)
    out.mkdir(parents=True, exist_ok=True)
    for table, rows in tables.items():
        _write(out / f"headroom_layer{layer}_{table}.csv.gz", pd.concat(rows, ignore_index=True))
    about = describe(lab.model) | {"model": model, "n": n, "layer": layer, "source": source, "tasks": list(tasks)}
    about |= {"rankings": list(rankings), "shape": asdict(shape_of(lab.model)), "torch": torch.__version__}
    write_whole(out / f"headroom_layer{layer}_about.json", json.dumps(about, indent=1) + "\n")


def measure_predictors(
    folder: Path, predictors: Path, *, rankings: Sequence[str] = (), layer: int = 2, store: Path = Path("build/headroom"),
    batch_size: int = 100,
) -> None:  # fmt: skip
    """Add predictors that were trained after the library was measured to its tables, or measure them anew, on the same answers.

    folder: of the measured losses; predictors: a folder of trained ones; rankings: default the library's. Raises
    ValueError if the answers are others by now.
    """
    about = json.loads((folder / f"headroom_layer{layer}_about.json").read_text())
    lab = Laboratory.load(about["model"], layer)
    trained = trained_here(predictors, layer, lab.model)
    if not trained:
        raise FileNotFoundError(f"no predictor in {predictors} prunes from layer {layer} on")
    known = pd.read_csv(folder / f"headroom_layer{layer}_answers.csv.gz")
    stored, found, samples = Store(store, lab), [], []
    for batch, images in _batches(lab, about["source"], about["n"], about["tasks"], batch_size):
        samples += [e.name for e in batch]
        found.append(Work(lab, batch, images, rankings or about["rankings"], stored).dyrate(trained))
    if samples != list(known["sample"]):
        raise ValueError(f"{folder} was measured on other answers than these: measure the library anew")
    path = folder / f"headroom_layer{layer}_dyrate.csv.gz"
    rows = pd.concat(found, ignore_index=True)
    try:
        earlier = pd.read_csv(path)
        rows = pd.concat([earlier[~earlier.predictor.isin(trained)], rows], ignore_index=True)
    except pd.errors.EmptyDataError:
        pass  # the library was measured without predictors
    _write(path, rows)


def _batches(lab: Laboratory, source: str, n: int, tasks: Sequence[str], batch_size: int) -> Iterator[tuple]:
    """The test answers of each task with their pictures, in batches of like lengths."""
    asked = [examples(source, n, tasks=[task], split="test") for task in tasks]
    work = [batch for of_task in asked for batch in of_task.batches(batch_size, lab.processor)]
    return iter(tqdm(work, desc=f"layer {lab.place.first_pruned_layer}"))


def _write(path: Path, table: pd.DataFrame) -> None:
    write_rows(path, table.round(4), digits=3)


def trained_here(folder: Path | None, layer: int, model: nn.Module) -> dict[str, DyRate]:
    """The trained predictors in a folder that prune from this layer on, by name; none without a folder.

    Raises ValueError for one that was trained for another model.
    """
    found = {path.parent.name: path.parent for path in sorted(folder.glob("*/model.safetensors"))} if folder else {}
    trained = {name: DyRate.from_pretrained(path) for name, path in found.items()}
    here = {name: strategy for name, strategy in trained.items() if strategy.first_pruned_layer == layer}
    for strategy in here.values():
        strategy.predictor.check_fits(model)
    return here


class Store:
    """Finished parts of the work, a file each, found by a hash of all that decides them: weights, code, examples, question."""

    def __init__(self, folder: Path, lab: Laboratory):
        self.folder = folder
        here = [Path(__file__).with_name(f"{name}.py") for name in ("library", "rankings", "measure")]
        code = digest([*files(ROOT / "dyrate"), *files(ROOT / "analysis" / "study" / "pocket"), *here])
        self.base = [weights_digest(lab.model), lab.place.first_pruned_layer, str(lab.model.device.type), torch.__version__, code]

    def rows(self, batch: Sequence[Example], what: str, measured: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The rows of one part of the work on a batch: read, or measured now and stored."""
        key = json.dumps([self.base, [[e.name, e.prompt, e.references] for e in batch], what])
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.csv"
        if not path.exists():
            write_whole(path, measured().to_csv(index=False))
        return pd.read_csv(path)


class Work:
    """What is measured of one batch. A part is read where it is stored already, and the model does not run for it."""

    def __init__(self, lab: Laboratory, batch: Sequence[Example], images: Sequence, rankings: Sequence[str], stored: Store):
        self.lab, self.batch, self.images, self.rankings, self.stored = lab, batch, images, rankings, stored
        self._ranked: dict[str, Prepared] = {}

    @cached_property
    def prepared(self) -> Prepared:
        return prepare(self.lab.model, self.lab.processor, self.lab.place, self.batch, self.images)

    @cached_property
    def answers(self) -> pd.DataFrame:
        return self.stored.rows(self.batch, "answers", lambda: answer_rows(self.batch, self.prepared))

    def ranks(self, ranking: str) -> Prepared:
        """The batch with the ranking's scores."""
        if ranking not in self._ranked:
            names = [e.name for e in self.batch]
            self._ranked[ranking] = ranked(self.lab.model, self.lab.place, self.prepared, ranking, names)
        return self._ranked[ranking]

    def losses(self) -> pd.DataFrame:
        """The losses of the library under every ranking and residency; under a fixed ranking evicting is masking."""
        parts = [
            self.stored.rows(
                self.batch, f"{ranking} {residency}",
                lambda ranking=ranking, residency=residency: library_losses(self.lab, self.ranks(ranking), ranking, residency),
            )
            for ranking in self.rankings for residency in LIBRARIES if residency == "mask" or ranking not in STATIC
        ]  # fmt: skip
        return pd.concat([self.answers[["sample"]], *parts], axis=1)

    def dyrate(self, trained: dict[str, DyRate]) -> pd.DataFrame:
        """The rows of trained predictors under every ranking."""
        found = []
        for name, strategy in trained.items():
            predictor = strategy.predictor.to(self.lab.model.device)
            own = cache(lambda p=predictor: prepare(self.lab.model, self.lab.processor, p, self.batch, self.images))
            for ranking in self.rankings:
                rows = self.stored.rows(
                    self.batch, f"{name} {weights_digest(predictor)} {ranking}",
                    lambda p=predictor, own=own, r=ranking: predictor_rows(self.lab, own(), self.ranks(r), p),
                )  # fmt: skip
                found.append(rows.assign(sample=self.answers["sample"], task=self.answers.task, predictor=name, ranking=ranking))
        return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def answer_rows(batch: Sequence[Example], prepared: Prepared) -> pd.DataFrame:
    """One row an answer: its tokens (with the one that ends it), the prompt's tokens of text and image, features at step 0."""
    n_image = prepared.image.sum(1)
    text = prepared.real[:, : prepared.n_prompt].sum(1) - n_image
    rows = pd.DataFrame({"sample": [e.name for e in batch], "task": [e.task for e in batch]})
    for column, values in (("tokens", prepared.valid.sum(1)), ("text", text), ("image", n_image)):
        rows[column] = values.tolist()
    features = prepared.features[:, 0].cpu().numpy()
    return rows.join(pd.DataFrame(features, columns=[f"feature{i}" for i in range(features.shape[1])]))


@torch.no_grad()
def library_losses(lab: Laboratory, prepared: Prepared, ranking: str, residency: str) -> pd.DataFrame:
    """Loss of each answer (rows) under each trajectory (columns). Those that agree on all steps of the batch are run once."""
    steps = prepared.labels.shape[1]
    measured: dict[tuple, list[float]] = {}
    columns = {}
    for trajectory in tqdm(LIBRARIES[residency], desc=f"{ranking}, {residency}", leave=False):
        indices = trajectory.rate_indices(steps)
        if (key := tuple(indices)) not in measured:
            choice = torch.from_numpy(indices).to(prepared.labels.device).expand(len(prepared.labels), -1)
            measured[key] = losses(lab, prepared, choice, residency)
        columns[f"{ranking} {residency} {trajectory.name}"] = measured[key]
    return pd.DataFrame(columns)


def losses(lab: Laboratory, prepared: Prepared, indices: Tensor, residency: str) -> list[float]:
    """Teacher-forced loss of each answer in nats a token, under the rates with these indices at each step (batch, step)."""
    masks = masks_over_steps(F.one_hot(indices, N_RATES).float(), prepared, residency)
    return (token_losses(lab.model, lab.place, prepared, masks).sum(1) / prepared.valid.sum(1)).tolist()


def predictor_rows(lab: Laboratory, own: Prepared, ranks: Prepared, predictor: RatePredictor) -> pd.DataFrame:
    """Loss and costs of each answer under the rates that a predictor chooses, evicting by another ranking.

    own: prepared with what this predictor observes; ranks: with the ranking's scores.
    """
    prepared = replace(own, score=ranks.score)
    rows, n_rates = teacher_forced(lab.model, predictor, [prepared]), len(predictor.rates)
    indices = torch.zeros_like(prepared.labels)
    for i, row in enumerate(rows):
        rates = torch.tensor(row["rates"], device=indices.device)
        indices[i, : len(rates)] = (rates * n_rates).round().long()
    n_image = prepared.image.sum(1)
    kept = kept_tokens(indices, n_image, predictor.residency, n_rates)
    text = prepared.real[:, : prepared.n_prompt].sum(1) - n_image
    where = shape_of(lab.model), predictor.first_pruned_layer, predictor.residency
    spent = costs(kept, prepared.valid, n_image, text, *where)
    found = {"residency": predictor.residency, "loss": [row["loss"] for row in rows]}
    return pd.DataFrame(found | {unit: values.tolist() for unit, values in spent.items()})
