"""What an answer is worth: the score of its task, and the comparison of conditions on the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import pandas as pd

from dyrate.data import Example, Examples
from study.caption_metrics import caption_scores, cider, tokenize_captions
from study.examples import SceneExample
from study.intervals import bootstrap
from study.pocket.language import find_groups, read_description
from study.pocket.scenes import Group, Scene

SLOTS = ("thing", "colour", "count", "place")  # of each group of a scene
CONDITION = ["label", "method", "budget", "seed"]  # what tells conditions apart in a table


def metric_of(task: str) -> str:
    """What `scored` computes for a task, in words."""
    if task == "caption":
        return f"CIDEr (pycocoevalcap {version('pycocoevalcap')}, PTB tokens; 1 is what papers print as 100)"
    return "exact match (share)" if task.startswith("qa_") else "right slots (share)"


def scored(answers: pd.DataFrame, examples: Examples) -> pd.DataFrame:
    """The rows of `answer_all` with `score` (1 is best, but CIDEr has no bound) and `invented`, a description's CHAIR.

    Captions score CIDEr; questions 1 or 0; descriptions of scenes the share of slots (thing, colour, count, place) that are
    right. invented is NaN for other tasks, and for a description that names nothing. Raises ValueError for a description
    whose image is no scene.
    """
    by_name = {e.name: e for e in examples}
    table = answers.assign(score=np.nan, invented=np.nan)
    captions = table[table.task == "caption"]
    tokenize_captions([*captions.answer, *(r for name in captions["sample"].unique() for r in by_name[name].references)])
    for (_, task), rows in table.groupby(["label", "task"], sort=False):  # CIDEr's weights count the captions scored together
        of_rows = [by_name[name] for name in rows["sample"]]
        if task == "caption":
            scores = cider(list(rows.answer), [e.references for e in of_rows])
        elif task.startswith("qa_"):
            scores = [exact_match(answer, e.references) for answer, e in zip(rows.answer, of_rows, strict=True)]
        else:
            scenes = [_scene_of(e) for e in of_rows]
            scores = [slot_scores(scene, answer).mean() for answer, scene in zip(rows.answer, scenes, strict=True)]
            table.loc[rows.index, "invented"] = [_invented(s, a) for a, s in zip(rows.answer, scenes, strict=True)]
        table.loc[rows.index, "score"] = scores
    return table


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references, letter case, outer blanks and a final full stop aside (GQA, MMBench)."""

    def plain(text: str) -> str:
        return text.strip().rstrip(".").strip().lower()

    return float(plain(answer) in {plain(r) for r in references})


def slot_scores(scene: Scene, text: str) -> np.ndarray:
    """Which slots a description got right: (group, 4) of 0 or 1 for object, colour, count, place.

    Each group of the scene is matched to the not yet matched group of the text that shares most slots with it, best
    matches first; a group that the text leaves out has every slot wrong.
    """
    named = read_description(text)
    right = np.zeros((len(scene.groups), len(SLOTS)))
    for i, j in _matched(scene, named):
        right[i] = _agree(scene.groups[i], named[j])
    return right


@dataclass(frozen=True)
class Mark:
    """A word of a description that `slot_scores` judges: characters start to end.

    slot: one of SLOTS. group: which of the scene's is meant; None where all of them are taken by other groups of the text.
    """

    start: int
    end: int
    slot: str
    group: int | None
    right: bool


def marked(scene: Scene, text: str) -> list[Mark]:
    """The words that fill a slot, right or wrong, in the text's order. Right ones are as many as `slot_scores` counts."""
    named = find_groups(text)
    meant = {j: i for i, j in _matched(scene, [group for group, _ in named])}
    marks = []
    for j, (group, spans) in enumerate(named):
        i = meant.get(j)
        right = np.zeros(len(SLOTS)) if i is None else _agree(scene.groups[i], group)
        marks += [Mark(*spans[slot], slot, i, bool(ok)) for slot, ok in zip(SLOTS, right, strict=True) if slot in spans]
    return sorted(marks, key=lambda mark: mark.start)


def _matched(scene: Scene, named: list[dict]) -> list[tuple[int, int]]:
    """Pairs of a group of the scene and the group of the text that is taken for it."""
    agree = np.array([[_agree(group, other).sum() for other in named] for group in scene.groups])
    pairs, taken, used = [], set(), set()
    for i, j in sorted(np.ndindex(len(scene.groups), len(named)), key=lambda pair: -agree[pair]):  # stable: of equals the first
        if i not in taken and j not in used:
            pairs.append((i, j))
            taken.add(i)
            used.add(j)
    return pairs


def _agree(group: Group, named: dict) -> np.ndarray:
    return np.array([getattr(group, slot) == named[slot] for slot in SLOTS], float)


def _invented(scene: Scene, text: str) -> float:
    """CHAIR's share (arXiv:1809.02156), exact here: of the things that a description names, those that the scene lacks."""
    named = [group["thing"] for group in read_description(text)]
    shown = {group.thing for group in scene.groups}
    return float(np.mean([thing not in shown for thing in named])) if named else float("nan")


def _scene_of(example: Example) -> Scene:
    if not isinstance(example, SceneExample):
        raise ValueError(f"{example.name}: the task {example.task!r} is scored by what a scene of a laboratory shows")
    return example.scene


def compare(table: pd.DataFrame, reference: str = "Full") -> pd.DataFrame:
    """One row for each condition and task: mean score with its interval, paired difference from a reference method, cost.

    table: `scored` rows. macs_share: multiply-accumulates of the decoder (prefill and decode) relative to the reference;
    prefill_share, kv_share: the same of the prefill alone, and of the cached bytes. retention: measured mean.
    """
    bases = {task: rows.set_index("sample") for task, rows in table[table.method == reference].groupby("task")}
    nothing, summary = table[:0].set_index("sample"), []
    for (_, task), rows in table.groupby(["label", "task"], sort=False):
        base, mine = bases.get(task, nothing), rows.set_index("sample")
        row = {**rows.iloc[0][CONDITION], "task": task, **bootstrap(mine.score)}
        if len(base):
            difference = bootstrap((mine.score - base.score).dropna())
            row |= {f"difference_{k}": difference[k] for k in ("value", "low", "high")}
            decoder = (mine.prefill + mine.decode).mean() / (base.prefill + base.decode).mean()
            row |= {"macs_share": decoder, "prefill_share": mine.prefill.mean() / base.prefill.mean()}
            row |= {"kv_share": mine.kv_bytes.mean() / base.kv_bytes.mean()}
        summary.append(row | {"retention": mine.retention.mean(), "tokens": mine.tokens.mean(), "invented": mine.invented.mean()})
    return pd.DataFrame(summary)


def caption_measures(table: pd.DataFrame, examples: Examples) -> pd.DataFrame:
    """Mean CIDEr, BLEU-4, ROUGE-L and METEOR of the captions of each label, all on the same images. table: `scored` rows."""
    if table.empty:
        return pd.DataFrame(columns=["label", "CIDEr", "BLEU-4", "ROUGE-L", "METEOR"])
    references = {e.name: e.references for e in examples}
    # these three score each caption by itself, so all at once; CIDEr depends on its company
    names = ("BLEU-4", "ROUGE-L", "METEOR")
    scores = caption_scores(list(table.answer), [references[name] for name in table["sample"]], names)
    measures = pd.DataFrame({"label": list(table.label), "CIDEr": list(table.score), **scores})
    return measures.groupby("label", sort=False).mean().reset_index()


def method_scores(table: pd.DataFrame, method: str, task: str) -> pd.Series:
    """Score of each sample of a task under one method, mean over the retention ratios that it was measured at."""
    return table[(table.task == task) & (table.method == method)].groupby("sample").score.mean()
