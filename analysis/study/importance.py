"""Is attention importance? What chapter 11 draws from, measured on a laboratory and written as rows.

    python -m study.importance --model smol --n 100 --out data/results/smol    # a GPU: minutes

Four parts, each written when it is finished: `answers` (what each answer loses without the image), `groups` (what it loses
without one group's patches), `ranks` (agreement of rankings with importance), `noise` (scores under rankings made worse).
Importance is attributed to image tokens by `study.attribution`, teacher-forced on reference answers.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import dyrate
from dyrate.atomic import write_whole
from dyrate.data import Examples
from dyrate.generation import answer_batch, encode
from dyrate.models import describe
from dyrate.strategies import STRATEGIES
from dyrate.strategy import Strategy
from dyrate.teacher_forcing import prepare, token_losses
from study import agreement
from study.attribution import every_token, integrated_gradients, pruned_from
from study.compared import scanned_layers
from study.examples import examples
from study.groups import group_rows
from study.noise import Scores, cls_attention, noise_rows
from study.pocket.language import description
from study.profiles import ROOT
from study.rows import write_rows

EARLY = 2  # FastV's layer
RANKINGS = (
    "Oracle", "SparseVLM", "VisionZip", "PruMerge", "DivPrune", "DART", "VisPruner", "CDPruner", "UniformPool", "RandomPrune",
)  # fmt: skip
MAPS = 2  # scenes whose importance is kept by token, to look at


@dataclass
class Attributed:
    """A batch of answers: what each image token at each step is worth from one layer on, and the attention that would rank it.

    effect, attention: of each answer, (step, image_token): the attribution in nats, and the attention of the layer before, mean
    over heads. loss, blind: of each answer in nats, with all and with no image token from that layer on.
    """

    samples: list[str]
    effect: list[np.ndarray]
    attention: list[np.ndarray]
    loss: np.ndarray
    blind: np.ndarray

    @cached_property
    def worth(self) -> list[np.ndarray]:
        """The importance: the effect where it helps, 0 where reading misleads.

        Keeping the tokens that help at some step costs less than keeping those with the largest sum over all steps.
        """
        return [effect.clip(min=0) for effect in self.effect]

    def known(self) -> Scores:
        """The worth of each image token for the whole answer, by sample."""
        return {name: tuple(w.sum(0).round(6).tolist()) for name, w in zip(self.samples, self.worth, strict=True)}


def attribute(model, processor, asked: Examples, layer: int, batch_size: int) -> Attributed:
    """Importance of the image tokens for every reference answer, from `layer` on."""
    place, found = pruned_from(model, layer), Attributed([], [], [], np.empty(0), np.empty(0))
    for batch, images in asked.batches(batch_size, processor):
        prepared = prepare(model, processor, place, batch, images)
        effect = integrated_gradients(model, place, prepared)
        with torch.no_grad():
            whole = every_token(prepared)
            loss, blind = (token_losses(model, place, prepared, m * whole).sum(1).cpu().numpy() for m in (1, 0))
        for i, n in enumerate(prepared.valid.sum(1).tolist()):
            found.effect.append(effect[i, :n].cpu().numpy())
            found.attention.append(prepared.score[i, :n].float().cpu().numpy())
        found.samples += [e.name for e in batch]
        found.loss, found.blind = np.append(found.loss, loss), np.append(found.blind, blind)
    return found


def answer_rows(of: Attributed, layer: int) -> list[dict]:
    """What each answer loses without the image, what the attribution sums to, and the share of it in each third and at step 0."""
    rows = []
    for sample, effect, loss, blind in zip(of.samples, of.effect, of.loss, of.blind, strict=True):
        total = effect.sum()
        row = {"sample": sample, "layer": layer, "tokens": len(effect), "loss": loss, "blind": blind, "attributed": total}
        parts = zip(agreement.PARTS[1:], agreement.parts_of(len(effect))[1:], strict=True)
        rows.append(row | {"step 0": effect[0].sum() / total} | {part: effect[steps].sum() / total for part, steps in parts})
    return rows


def layer_ranks(of: Attributed, layer: int) -> list[dict]:
    """Agreement of the attention in the layer before, as the prompt ends and at every step, with importance from `layer` on."""
    pairs = list(zip(of.attention, of.worth, strict=True))
    prefill = [agreement.once(a[0], w) for a, w in pairs]
    steps = [agreement.each_step(a, w) for a, w in pairs]
    return agreement.rows(of.samples, prefill, layer=layer, ranking="prefill") + agreement.rows(
        of.samples, steps, layer=layer, ranking="each step"
    )


def other_ranks(model, processor, asked: Examples, of: Attributed, batch_size: int) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Agreement of other rankings with importance from layer EARLY on, and their scores (sample, image_token) by name.

    "another wording" is the importance for another reference answer about the same scene: what agreement can be hoped for.
    "sum of effects" is the importance with what misleads.
    """
    n_layers, scores = model.config.get_text_config().num_hidden_layers, {}
    for name in RANKINGS:
        strategy = STRATEGIES[name].at(agreement.RETENTION, n_layers)
        scores[name] = scores_of(model, processor, strategy, asked, batch_size)
    scores["[CLS] attention"] = scores_of(model, processor, cls_attention(agreement.RETENTION, n_layers), asked, batch_size)
    other = attribute(model, processor, reworded(asked), EARLY, batch_size)
    scores["another wording"] = np.stack([w.sum(0) for w in other.worth])
    scores["sum of effects"] = np.stack([e.sum(0) for e in of.effect])
    rows = []
    for name, found in scores.items():
        each = [agreement.once(score, worth) for score, worth in zip(found, of.worth, strict=True)]
        rows += agreement.rows(of.samples, each, layer=EARLY, ranking=name)
    return rows, scores


def scores_of(model, processor, strategy: Strategy, asked: Examples, batch_size: int) -> np.ndarray:
    """By which scores a strategy would rank the image tokens at its first stage, (sample, image_token)."""
    found, score = [], strategy.score
    for batch, images in asked.batches(batch_size, processor):
        heard = []
        strategy.score = lambda seen, heard=heard: heard.append(score(seen)) or heard[-1]
        inputs = encode(processor, images, [e.prompt for e in batch])
        answer_batch(model, processor, inputs, strategy, batch, max_new_tokens=1)
        found.append(heard[0].float().cpu().numpy())
    return np.concatenate(found)


def reworded(asked: Examples) -> Examples:
    """The same scenes and prompts with another reference answer: other words, and the groups in another order."""
    return replace(asked, items=[replace(e, references=(description(e.scene, variant=1),)) for e in asked])


def late_layer(model: str) -> int:
    """The first pruned layer from which FastV gains most over random pruning, by the laboratory's reference rows."""
    path = ROOT / "data" / "results" / Path(model).name / "reference_layers.csv.gz"
    if not path.exists():
        raise FileNotFoundError(f"no {path}: measure the laboratory's reference rows first, `python -m study.reference`")
    rows = pd.read_csv(path)
    rows = rows[(rows.task == "description") & (rows.budget == agreement.RETENTION)]
    score = rows.groupby(["first_pruned_layer", "method"]).score.mean().unstack()
    return int((score.FastV - score.RandomPrune).idxmax())


def measure(model: str, n: int, out: Path, *, store: Path, batch_size: int = 50) -> None:
    """Measure all parts in float32 and write `importance_<part>.csv.gz` and `importance.json` into `out`."""
    late = late_layer(model)
    loaded, processor = dyrate.load(model, dtype=torch.float32)
    about, asked = describe(loaded), examples("laboratories", n, tasks=["description"])
    out.mkdir(parents=True, exist_ok=True)

    def write(part: str, rows) -> None:
        write_rows(out / f"importance_{part}.csv.gz", pd.DataFrame(rows), digits=4)

    answers, ranks, known = [], [], {}
    for layer in scanned_layers(about["layers"]):
        of = attribute(loaded, processor, asked, layer, batch_size)
        answers, ranks = answers + answer_rows(of, layer), ranks + layer_ranks(of, layer)
        if layer in (EARLY, late):
            known[layer] = of.known()
        if layer == EARLY:
            others, scores = other_ranks(loaded, processor, asked, of, batch_size)
            write(
                "groups", group_rows(loaded, processor, asked, EARLY, dict(zip(of.samples, of.effect, strict=True)), batch_size)
            )
            write("maps", map_rows(of, scores))
    write("answers", answers)
    write("ranks", ranks + others)
    write("noise", noise_rows(loaded, processor, asked, known, store))
    record = {"model": model, "n": n, **about, "late": late, "torch": torch.__version__}
    write_whole(out / "importance.json", json.dumps(record, indent=1) + "\n")


def map_rows(of: Attributed, scores: dict[str, np.ndarray]) -> pd.DataFrame:
    """Of the first MAPS answers importance, FastV's attention and some other scores of each image token, to look at."""
    shown = ("[CLS] attention", "another wording")
    return pd.concat([
        pd.DataFrame({
            "sample": of.samples[i], "token": np.arange(of.worth[i].shape[1]), "importance": of.worth[i].sum(0),
            "FastV": of.attention[i][0], "each step": of.attention[i].mean(0), **{name: scores[name][i] for name in shown},
        })
        for i in range(min(MAPS, len(of.samples)))
    ])  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a laboratory: pocket, pocket-plain, pocket-dropped, smol")
    parser.add_argument("--n", type=int, default=100, help="descriptions")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--store", type=Path, default=Path("build/answers"), help="finished batches of answers")
    parser.add_argument("--batch", dest="batch_size", type=int, default=50, help="answers attributed at once")
    measure(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
