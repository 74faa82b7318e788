"""Chapter 6, which patches are kept: the image tokens that a predictor leaves at each step of an answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
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
from study.examples import SceneExample, has_scenes, left_out, model_and_images
from study.examples import examples as study_examples
from study.intervals import bootstrap, in_words
from study.pocket.language import PROMPTS
from study.pocket.scenes import Scene, render
from study.scores import marked, slot_scores

SHOWN = 3  # answers that are drawn


@dataclass
class Answer:
    """One answer and what was kept for it.

    tokens: the generated ones as text. kept: (step, patch), the image tokens left at the step that generates each token.
    shown: (patch,), patches that show a thing or a word; None where it is not known. text: the answer; unpruned: the one with
    every image token kept. scene: by which both are scored; None where none is known, or the task is not to describe it.
    """

    name: str
    picture: Image
    tokens: list[str]
    kept: np.ndarray
    shown: np.ndarray | None
    text: str = ""
    unpruned: str = ""
    scene: Scene | None = None

    @property
    def row_bias(self) -> float:
        """How far below the image's middle the patches kept in the prefill lie on average, in heights of the image."""
        side = round(self.kept.shape[1] ** 0.5)
        rows = np.flatnonzero(self.kept[0]) // side
        return float(rows.mean() / (side - 1) - 0.5) if len(rows) else 0.0

    @property
    def last_change(self) -> int:
        """The step at which the number of kept patches changed for the last time."""
        return int(np.flatnonzero(np.diff(self.kept.sum(1), prepend=-1))[-1])


@dataclass
class Masks:
    """What the chapter measured.

    model: its name and size, for captions; place: model and images, for the headline; predictor: the name of its folder;
    n_rates: of its grid. answers: `by_answer` of all. first: the first of them, as `as_json` has them.
    """

    model: str
    place: str
    predictor: str
    n_rates: int
    first_pruned_layer: int
    residency: str
    examples: Examples
    answers: pd.DataFrame
    first: list[dict]

    @cached_property
    def shown(self) -> list[Answer]:
        """The first answers, to be drawn."""
        return [from_json(answer, self.examples) for answer in self.first]


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
    how = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    answers = list(kept_by_token(loaded, processor, strategy, examples, **how))
    for answer, text in zip(answers, unpruned(loaded, processor, examples, **how), strict=True):
        answer.unpruned = text
    about = describe(loaded)
    return Masks(
        f"`{model}` ({about['family']}, {about['parameters'] / 1e6:.1f} M parameters)", model_and_images(model, examples),
        Path(predictor).name, len(strategy.predictor.rates), strategy.first_pruned_layer, strategy.residency, examples,
        by_answer(answers), [as_json(answer) for answer in answers[:SHOWN]],
    )  # fmt: skip


def as_json(answer: Answer) -> dict:
    """An answer as JSON holds it, without its picture; of each step the patches as a text of 1 (kept) and 0."""
    kept = ["".join("1" if patch else "0" for patch in step) for step in answer.kept]
    return {"name": answer.name, "tokens": answer.tokens, "kept": kept, "text": answer.text, "unpruned": answer.unpruned}


def from_json(answer: dict, examples: Examples) -> Answer:
    """The answer that `as_json` took apart, to one of these examples."""
    example = next(e for e in examples if e.name == answer["name"])
    kept = np.array([[patch == "1" for patch in step] for step in answer["kept"]])
    return Answer(**answer | {"kept": kept}, picture=example.image(), shown=_shown(example), scene=_scored(example))


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
            shown, scene = _shown(example), _scored(example)
            yield Answer(
                example.name, images[i], tokens, kept[i, : len(ids), : trace.n_image[i]], shown, answers.texts[i], "", scene
            )


def unpruned(model, processor, examples: Examples, **settings) -> list[str]:
    """The answer to each example with every image token kept."""
    return [text for _, _, answers in answer_examples(model, processor, examples, **settings) for text in answers.texts]


def _shown(example: Example) -> np.ndarray | None:
    return render(example.scene).shown if isinstance(example, SceneExample) else None


def _scored(example: Example) -> Scene | None:
    return example.scene if isinstance(example, SceneExample) and example.task in PROMPTS else None


def by_answer(answers: list[Answer]) -> pd.DataFrame:
    """Retention at the first and last token of each answer: of all patches and, on scenes, of those that show something.

    last_change: the step at which it changed for the last time, of `steps`. right, right_unpruned: share of right slots of
    descriptions of scenes, pruned and unpruned.
    """
    rows = []
    for answer in answers:
        row = {"sample": answer.name, "row_bias": answer.row_bias, "last_change": answer.last_change, "steps": len(answer.kept)}
        for when, kept in (("first", answer.kept[0]), ("last", answer.kept[-1])):
            row[f"kept_{when}"] = kept.mean()
            if answer.shown is not None:
                row |= {f"shown_{when}": kept[answer.shown].mean(), f"other_{when}": kept[~answer.shown].mean()}
        if answer.scene is not None:
            for name, text in (("right", answer.text), ("right_unpruned", answer.unpruned)):
                row[name] = slot_scores(answer.scene, text).mean()
        rows.append(row)
    return pd.DataFrame(rows)


def beside_unpruned(answers: list[Answer]) -> pd.DataFrame:
    """The pruned answer to each image below the unpruned one, wrong words in bold where it is known what is right."""
    rows = []
    for i, answer in enumerate(answers, 1):
        for name, text, retention in (("unpruned", answer.unpruned, 1.0), ("pruned", answer.text, answer.kept.mean())):
            row = {"image": str(i), "answer": name, "mean retention": retention}
            if answer.scene is not None:
                row["right slots"] = slot_scores(answer.scene, text).mean()
            rows.append(row | {"text": _wrong_in_bold(answer.scene, text)})
    return pd.DataFrame(rows)


def _wrong_in_bold(scene: Scene | None, text: str) -> str:
    wrong = [] if scene is None else [mark for mark in marked(scene, text) if not mark.right]
    for mark in reversed(wrong):  # from the end, so that positions before it stay
        text = f"{text[: mark.start]}**{text[mark.start : mark.end]}**{text[mark.end :]}"
    return text


def finding(masks: Masks) -> str:
    """Where retention ends, why, and what pruning costs these answers."""
    table = masks.answers
    ends = table.kept_last.round(6).value_counts()
    first = in_words(bootstrap(table.kept_first))
    text = (
        f"**With {masks.place} and the predictor `{masks.predictor}`, {ends.iloc[0]} of {len(table)} answers end at the same "
        f"retention, {ends.index[0]:.3f} (distinct last retentions: {len(ends)}); at the first token it is {first}.**"
    )
    if masks.residency == "evict":
        text += (
            " Evicted tokens do not return: the highest rate so far decides, and a lower one that follows changes nothing. The "
            f"{masks.n_rates} rates lie {1 / masks.n_rates:.3f} apart, so that answers can meet in exactly one. "
            f"Retention changes last at token {table.last_change.median() + 1:.0f} of {table.steps.median():.0f} (medians)."
        )
    if "right" in table:
        cost, right, whole = (bootstrap(x) for x in (table.right - table.right_unpruned, table.right, table.right_unpruned))
        text += (
            f" These answers get {right['value']:.2f} of the slots right, unpruned {whole['value']:.2f}: a difference of "
            f"{in_words(cost, '+.2f')}."
        )
    return text + " 95 % intervals."


def record(chapter: Chapter, masks: Masks) -> None:
    """The chapter's headline numbers and sentences."""
    means = {key: bootstrap(masks.answers[key]) for key in masks.answers.columns.drop(["sample", "last_change", "steps"])}
    for key, mean in means.items():
        chapter.number(key, mean)
    chapter.number("first_pruned_layer", masks.first_pruned_layer)
    on_content = "This needs to know what each patch shows: it is measured on pocket scenes only."
    if has_scenes(masks.examples):
        value = {key: f"{mean['value']:.2f}" for key, mean in means.items()}
        shown, other = means["shown_first"], means["other_first"]
        apart = shown["low"] > other["high"] or other["low"] > shown["high"]
        on_content = (
            f"Of the patches that show a thing or a word, {value['shown_first']} are kept at the first token and "
            f"{value['shown_last']} at the last; of the others {value['other_first']} and {value['other_last']} (at the first "
            f"token the 95 % intervals {'do not overlap' if apart else 'overlap'}, n = {shown['n']})."
        )
    chapter.text("masks_finding", finding(masks))
    chapter.text("masks_on_content", on_content)
    answers = f"{masks.examples[0].task.replace('_', ' ')} of {len(masks.answers)} unseen images{left_out(masks.examples)}"
    chapter.text("masks_measured_on", f"{masks.model}, {answers}, predictor `{masks.predictor}`, greedy")
