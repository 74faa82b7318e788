"""What an answer is worth: the score of its task, and the comparison of methods on the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
import pandas as pd

from dyrate.data import Examples
from study.caption_metrics import caption_scores, cider
from study.examples import SceneExample
from study.intervals import bootstrap
from study.pocket.language import read_description
from study.pocket.quality import slot_scores


def metric_of(task: str) -> str:
    """What `scored` computes for a task, in words."""
    if task == "caption":
        return f"CIDEr (pycocoevalcap {version('pycocoevalcap')}, PTB tokens; 1 is what papers print as 100)"
    return "exact match (share)" if task.startswith("qa_") else "right slots (share)"


def scored(table: pd.DataFrame, examples: Examples) -> pd.DataFrame:
    """The table with `score` (1 is best, but CIDEr has no bound) and `invented`, the share of named things that are not there.

    Captions score CIDEr; pocket descriptions the share of slots (thing, colour, count, place) that are right; questions 1 or
    0. invented is NaN where nothing can be said.
    """
    by_name = {e.name: e for e in examples}
    table = table.assign(score=np.nan, invented=np.nan)
    for (_, task), rows in table.groupby(["strategy", "task"], sort=False):  # CIDEr's weights count the captions scored together
        found = [by_name[name] for name in rows["sample"]]
        if task == "caption":
            scores = cider(list(rows.answer), [e.references for e in found])
        elif task.startswith("qa_"):
            scores = [exact_match(a, e.references) for a, e in zip(rows.answer, found, strict=True)]
        else:
            scores = [slot_scores(e.scene, a).mean() for a, e in zip(rows.answer, found, strict=True)]
            table.loc[rows.index, "invented"] = [_invented(e, a) for a, e in zip(rows.answer, found, strict=True)]
        table.loc[rows.index, "score"] = scores
    return table


def _invented(example: Example, text: str) -> float:
    """CHAIR's share (arXiv:1809.02156), exact here: of the things that a description names, those that the scene lacks."""
    named = [said["thing"] for said in read_description(text)]
    shown = {group.thing for group in example.scene.groups}
    return float(np.mean([thing not in shown for thing in named])) if named else float("nan")


def compare(table: pd.DataFrame, reference: str = "Full") -> pd.DataFrame:
    """One row for each strategy and task: score with its interval, difference from `reference` on the same samples, cost.

    macs_share: multiply-accumulates of the decoder (prefill and decode) relative to the reference.
    """
    rows = []
    for (label, task), found in table.groupby(["strategy", "task"], sort=False):
        base = table[(table.strategy == reference) & (table.task == task)].set_index("sample")
        mine = found.set_index("sample")
        score = bootstrap(mine.score)
        row = {"strategy": label, "task": task, "n": len(found), **{k: score[k] for k in ("value", "low", "high")}}
        if len(base):
            loss = bootstrap((mine.score - base.score).dropna())
            row |= {f"difference_{k}": loss[k] for k in ("value", "low", "high")}
            decoder = (mine.prefill + mine.decode).mean() / (base.prefill + base.decode).mean()
            row |= {"macs_share": decoder, "prefill_share": mine.prefill.mean() / base.prefill.mean()}
            row |= {"kv_share": mine.kv_bytes.mean() / base.kv_bytes.mean()}
        rows.append(row | {"kept": mine.kept.mean(), "tokens": mine.tokens.mean(), "invented": mine.invented.mean()})
    return pd.DataFrame(rows)


def caption_measures(table: pd.DataFrame, examples: Examples) -> pd.DataFrame:
    """Mean CIDEr, BLEU-4, ROUGE-L and METEOR of the captions of each strategy, all on the same images. table: `scored` rows."""
    references = {e.name: e.references for e in examples}
    # the others score each caption by itself, all at once; CIDEr does not
    names = ("BLEU-4", "ROUGE-L", "METEOR")
    scores = caption_scores(list(table.answer), [references[name] for name in table["sample"]], names)
    found = pd.DataFrame({"strategy": list(table.strategy), "CIDEr": list(table.score), **scores})
    return found.groupby("strategy", sort=False).mean().reset_index()


def method_scores(table: pd.DataFrame, method: str, task: str) -> pd.Series:
    """Score of each sample of a task under one method, mean over its kept shares (the label's second word)."""
    rows = table[(table.task == task) & (table.strategy.str.split().str[0] == method)]
    return rows.groupby("sample").score.mean()


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references, letter case, outer blanks and a final full stop aside (GQA, MMBench)."""

    def plain(text: str) -> str:
        return text.strip().rstrip(".").strip().lower()

    return float(plain(answer) in {plain(r) for r in references})
