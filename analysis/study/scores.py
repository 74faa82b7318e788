"""What an answer is worth: the score of its task, and the comparison of conditions on the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
import pandas as pd

from dyrate.data import Example, Examples
from study.caption_metrics import caption_scores, cider, tokenize_captions
from study.examples import SceneExample
from study.intervals import bootstrap
from study.pocket.language import read_description
from study.pocket.scenes import Scene

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
    shown = [(g.thing, g.colour, g.count, g.place) for g in scene.groups]
    named = [(g["thing"], g["colour"], g["count"], g["place"]) for g in read_description(text)]
    agree = [[np.array([a == b for a, b in zip(s, n, strict=True)], float) for n in named] for s in shown]
    pairs = [(i, j) for i in range(len(shown)) for j in range(len(named))]
    right = np.zeros((len(shown), 4))
    matched_shown, matched_named = set(), set()
    for i, j in sorted(pairs, key=lambda pair: -agree[pair[0]][pair[1]].sum()):  # stable: of equal matches the first
        if i not in matched_shown and j not in matched_named:
            right[i] = agree[i][j]
            matched_shown.add(i)
            matched_named.add(j)
    return right


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
    summary = []
    for (_, task), rows in table.groupby(["label", "task"], sort=False):
        base = table[(table.method == reference) & (table.task == task)].set_index("sample")
        mine = rows.set_index("sample")
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
