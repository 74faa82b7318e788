"""Teacher-forced losses of a library of trajectories on the answers of every task, each batch stored when it is finished.

Written, for one laboratory and first pruned layer: `headroom_layer2_answers.csv.gz` (one line an answer, with what its costs
depend on and the predictor's features at step 0), `..._losses.csv.gz` (nats a token; a column for each ranking, residency and
trajectory), `..._dyrate.csv.gz` (trained predictors, with the costs of their own trajectories) and `..._about.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
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
    trained = trained_here(predictors, layer)
    for strategy in trained.values():
        strategy.predictor.check_fits(lab.model)
    asked = [examples(source, n, tasks=[task], split="test") for task in tasks]
    work = [batch for of_task in asked for batch in of_task.batches(batch_size, lab.processor)]
    stored = Store(store, lab)
    tables: dict[str, list[pd.DataFrame]] = {"answers": [], "losses": [], "dyrate": []}
    for batch, images in tqdm(work, desc=f"{model}, layer {layer}"):
        for table, rows in _measured(lab, batch, images, rankings, trained, stored).items():
            tables[table].append(rows)
    out.mkdir(parents=True, exist_ok=True)
    for table, rows in tables.items():
        path = out / f"headroom_layer{layer}_{table}.csv.gz"
        frame = pd.concat(rows, ignore_index=True).round(4)
        write_whole(path, lambda path, frame=frame: frame.to_csv(path, index=False, compression="gzip", float_format="%.3g"))
    about = describe(lab.model) | {"model": model, "n": n, "layer": layer, "source": source, "tasks": list(tasks)}
    about |= {"rankings": list(rankings), "shape": asdict(shape_of(lab.model)), "torch": torch.__version__}
    write_whole(out / f"headroom_layer{layer}_about.json", json.dumps(about, indent=1) + "\n")


def trained_here(folder: Path | None, layer: int) -> dict[str, DyRate]:
    """The trained predictors in a folder that prune from this layer on, by name; none without a folder."""
    found = {path.parent.name: path.parent for path in sorted(folder.glob("*/model.safetensors"))} if folder else {}
    trained = {name: DyRate.from_pretrained(path) for name, path in found.items()}
    return {name: strategy for name, strategy in trained.items() if strategy.first_pruned_layer == layer}


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


def _measured(lab: Laboratory, batch, images, rankings, trained: dict[str, DyRate], stored: Store) -> dict[str, pd.DataFrame]:
    """The rows of one batch in each table."""
    prepared = cache(lambda: prepare(lab.model, lab.processor, lab.place, batch, images))
    scores = {r: cache(lambda r=r: ranked(lab.model, lab.place, prepared(), r, [e.name for e in batch])) for r in rankings}
    answers = stored.rows(batch, "answers", lambda: answer_rows(batch, prepared()))
    losses = [
        stored.rows(batch, f"{ranking} {residency}", lambda: library_losses(lab, scores[ranking](), ranking, residency))
        for ranking in rankings for residency in LIBRARIES if residency == "mask" or ranking not in STATIC
    ]  # fmt: skip
    dynamic = []
    for name, strategy in trained.items():
        own = cache(lambda: prepare(lab.model, lab.processor, strategy.predictor.to(lab.model.device), batch, images))
        for ranking in rankings:
            what = f"{name} {weights_digest(strategy.predictor)} {ranking}"
            rows = stored.rows(batch, what, lambda: predictor_rows(lab, own(), scores[ranking](), strategy.predictor))
            dynamic.append(rows.assign(sample=answers["sample"], task=answers.task, predictor=name, ranking=ranking))
    return {
        "answers": answers, "losses": pd.concat([answers[["sample"]], *losses], axis=1),
        "dyrate": pd.concat(dynamic, ignore_index=True) if dynamic else pd.DataFrame(),
    }  # fmt: skip


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
