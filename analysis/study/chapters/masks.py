"""Chapter 6, which patches are kept: the image tokens that a predictor leaves at each step of an answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL.Image import Image

import dyrate
from dyrate.data import Example, Examples
from dyrate.generation import answer_examples
from dyrate.models import describe, read_config
from dyrate.strategies.dyrate import DyRate
from dyrate.strategy import Strategy
from study.book import ROOT, Chapter
from study.examples import SceneExample, has_scenes, left_out
from study.examples import examples as study_examples
from study.intervals import bootstrap
from study.pocket.scenes import render


@dataclass
class Answer:
    """One answer and what was kept for it.

    tokens: the generated ones as text. kept: (step, patch), the image tokens left at the step that generates each token.
    shown: (patch,), patches that show a thing or a word; None where it is not known.
    """

    name: str
    picture: Image
    tokens: list[str]
    kept: np.ndarray
    shown: np.ndarray | None

    @property
    def row_bias(self) -> float:
        """How far below the image's middle the patches kept in the prefill lie on average, in heights of the image."""
        side = round(self.kept.shape[1] ** 0.5)
        rows = np.flatnonzero(self.kept[0]) // side
        return float(rows.mean() / (side - 1) - 0.5) if len(rows) else 0.0


@dataclass
class Masks:
    """What the chapter measured. model: its name and size, for captions; predictor: the name of its folder."""

    model: str
    predictor: str
    strategy: Strategy
    examples: Examples
    answers: list[Answer]


def measure(
    *, model: str, source: str, task: str, n: int, predictor: str, max_new_tokens: int, batch_size: int, seed: int,
    device_map: str = "", **_,
) -> Masks:  # fmt: skip
    """Answer `n` test prompts under a trained predictor, and note what it keeps. Parameters: the notebook's.

    Raises ValueError for a family whose image tokens are not one square grid of patches, before it is loaded.
    """
    if (family := read_config(model).model_type) != "llava":
        raise ValueError(f"chapter 6 draws a square grid of patches, which {family!r} has not: leave it out, or name a LLaVA-1.5")
    examples = study_examples(source, n, tasks=[task], split="test", seed=seed)
    loaded, processor = dyrate.load(model, device_map=device_map or None)
    strategy = DyRate.from_pretrained(ROOT / predictor)
    answers = kept_by_token(loaded, processor, strategy, examples, batch_size=batch_size, max_new_tokens=max_new_tokens)
    about = describe(loaded)
    name = f"`{model}` ({about['family']}, {about['parameters'] / 1e6:.1f} M parameters)"
    return Masks(name, Path(predictor).name, strategy, examples, list(answers))


def kept_by_token(
    model, processor, strategy: Strategy, examples: Examples, *, batch_size: int = 24, max_new_tokens: int = 64
) -> Iterator[Answer]:
    """The answer to each example, with the image tokens that the strategy's last stage kept at each step."""
    settings = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    special = set(processor.tokenizer.all_special_ids)
    for batch, images, answers in answer_examples(model, processor, examples, strategy, **settings):
        trace = answers.trace
        kept = np.stack([step.stages[-1].kept.cpu().numpy() for step in trace.steps], 1)  # (row, step, image token)
        for i, example in enumerate(batch):
            ids = [t for t in answers.tokens[i] if t not in special]
            tokens = [processor.tokenizer.decode([t]).strip() for t in ids]
            yield Answer(example.name, images[i], tokens, kept[i, : len(ids), : trace.n_image[i]], _shown(example))


def _shown(example: Example) -> np.ndarray | None:
    return render(example.scene).shown if isinstance(example, SceneExample) else None


def by_answer(answers: list[Answer]) -> pd.DataFrame:
    """Retention at the first and last token of each answer: of all patches and, on scenes, of those that show something."""
    rows = []
    for answer in answers:
        row = {"sample": answer.name, "row_bias": answer.row_bias}
        for when, kept in (("first", answer.kept[0]), ("last", answer.kept[-1])):
            row[f"kept_{when}"] = kept.mean()
            if answer.shown is not None:
                row |= {f"shown_{when}": kept[answer.shown].mean(), f"other_{when}": kept[~answer.shown].mean()}
        rows.append(row)
    return pd.DataFrame(rows)


def record(chapter: Chapter, masks: Masks, table: pd.DataFrame) -> None:
    """The chapter's headline numbers and sentences. table: `by_answer`."""
    means = {key: bootstrap(table[key]) for key in table.columns.drop("sample")}
    for key, mean in means.items():
        chapter.number(key, mean)
    chapter.number("first_pruned_layer", masks.strategy.first_pruned_layer)
    value = {key: f"{mean['value']:.2f}" for key, mean in means.items()}
    finding = f"From the first token to the last the retention ratio goes from {value['kept_first']} to {value['kept_last']}"
    if has_scenes(masks.examples):
        shown, other = means["shown_first"], means["other_first"]
        apart = shown["low"] > other["high"] or other["low"] > shown["high"]
        finding += (
            f", and at the first token the ranking keeps {value['shown_first']} of the patches that show something and "
            f"{value['other_first']} of the others (95 % intervals {'do not overlap' if apart else 'overlap'})"
        )
        on_content = (
            f"Of the patches that show a thing or a word, {value['shown_first']} are kept at the first token and "
            f"{value['shown_last']} at the last; of the others {value['other_first']} and {value['other_last']}."
        )
    else:
        on_content = "This needs to know what each patch shows: it is measured on pocket scenes only."
    chapter.text("masks_finding", f"**{finding}.**")
    chapter.text("masks_on_content", on_content)
    answers = f"{masks.examples[0].task.replace('_', ' ')} of {len(masks.answers)} unseen images{left_out(masks.examples)}"
    chapter.text("masks_measured_on", f"{masks.model}, {answers}, predictor `{masks.predictor}`, greedy")
