"""Chapter 3, what dropping image tokens costs: every strategy at several retention ratios, against the unpruned model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

import dyrate
from dyrate.data import Examples
from dyrate.generation import encode
from dyrate.models import describe
from dyrate.strategy import STRATEGIES, retention_of
from study import controls  # noqa: F401  (registers its strategies)
from study.answers import Condition, answer_all
from study.book import ROOT, Chapter
from study.examples import examples as study_examples
from study.examples import has_scenes
from study.intervals import bootstrap, verdict
from study.lmms_results import read_results, table_1
from study.predictors import condition_of
from study.scores import caption_measures, compare, method_scores, scored

UNITS = {"caption": "CIDEr (1 = what papers print as 100)", "questions": "right answers (share)"}
RANKED_OTHERWISE = {  # than FastV does: methods, and their names in a sentence
    "random": ("RandomPrune", "random pruning"), "worst": ("WorstFirst", "keeping the tokens with the least attention"),
    "rerank": ("FastVRerank", "ranking anew at every token, where dropped tokens are re-selectable"),
}  # fmt: skip
INTERVAL = ["value", "low", "high", "n"]


@dataclass
class Comparison:
    """What the chapter measured. about: `dyrate.models.describe` of the model; rows: `scored` answers of all conditions.

    retentions: the ratios compared, ascending.
    """

    about: dict
    examples: Examples
    rows: pd.DataFrame
    retentions: Sequence[float] = ()

    @cached_property
    def by_task(self) -> pd.DataFrame:
        """`compare` of every condition on every task."""
        return compare(self.rows)

    @cached_property
    def by_group(self) -> pd.DataFrame:
        """`compare` of every condition on descriptions, captions and all questions together."""
        return compare(self.rows.assign(task=self.rows.task.map(group_of)))

    @property
    def units(self) -> dict[str, str]:
        """What the score is of each group of tasks."""
        return {group: UNITS.get(group, "right slots (share)") for group in dict.fromkeys(self.by_group.task)}

    def captions(self, retention: float) -> pd.DataFrame:
        """The caption field's measures of each strategy at one retention ratio, and of the unpruned model."""
        at = (self.rows.budget == retention) | (self.rows.method == "Full")
        return caption_measures(self.rows[at & (self.rows.task == "caption")], self.examples)

    @property
    def n_captions(self) -> int:
        """How many captions each strategy wrote."""
        return sum(e.task == "caption" for e in self.examples)

    def difference(self, one: str, other: str, task: str) -> dict:
        """Paired difference in score between two methods on a task, mean over retention ratios, with its interval."""
        return bootstrap((method_scores(self.rows, one, task) - method_scores(self.rows, other, task)).dropna())

    def ranked(self, task: str, retention: float) -> pd.DataFrame:
        """Rows of `by_group` for a task's group at one retention ratio, highest score first; without the oracle."""
        at = self.by_group[(self.by_group.task == group_of(task)) & (self.by_group.budget == retention)]
        return at[at.method != "Oracle"].sort_values("value", ascending=False)

    def unpruned(self, task: str) -> pd.Series:
        """The row of `by_group` for a task's group without pruning."""
        return self.by_group[(self.by_group.task == group_of(task)) & (self.by_group.method == "Full")].iloc[0]


def measure(
    *, model: str, source: str, tasks: Sequence[str], n: int, retentions: Sequence[float], strategies: Sequence[str],
    predictors: str, pattern: str, max_new_tokens: int, batch_size: int, seed: int, store: str, device_map: str = "", **_,
) -> Comparison:  # fmt: skip
    """Answers under every strategy at every retention ratio, and under the trained predictors. Parameters: the notebook's."""
    examples = study_examples(source, n, tasks=tasks, seed=seed)
    loaded, processor = dyrate.load(model, device_map=device_map or None)
    about = describe(loaded)
    if any(x > 1 for x in retentions):
        tokens = image_tokens(loaded, processor, examples)
        retentions = [retention_of(x, tokens) for x in retentions]
    conditions = lineup(retentions, about["layers"], strategies, scenes=has_scenes(examples))
    if predictors:
        conditions += [condition_of(folder) for folder in sorted((ROOT / predictors).glob(pattern))]
    answers = answer_all(
        loaded, processor, conditions, examples, ROOT / store, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed
    )
    return Comparison(about, examples, scored(answers, examples), sorted(retentions))


def image_tokens(model, processor, examples: Examples) -> int:
    """Tokens of an image, of which a budget in tokens is a share. Raises ValueError where images take unequal numbers."""
    counts = set()
    for batch, images in examples.batches(8):
        ids = encode(processor, images, [e.prompt for e in batch])["input_ids"]
        counts |= set((ids == model.config.image_token_id).sum(1).tolist())
    if len(counts) != 1:
        raise ValueError(
            f"these images take {min(counts)} to {max(counts)} tokens each in this {model.config.model_type!r} model, so that a "
            "number of tokens is no one share: give retentions as shares in (0, 1]"
        )
    return counts.pop()


def lineup(retentions: Sequence[float], n_layers: int, names: Sequence[str] = (), *, scenes: bool = True) -> list[Condition]:
    """Strategies to compare: Full, and each of `names` (default: all that are `compared`) at each retention ratio.

    scenes: False for photographs, of which nobody knows what they show: without the strategies that need to. Raises
    ValueError for a name that no strategy has.
    """
    conditions = [Condition("Full", STRATEGIES["Full"](), "Full")]
    for name in methods(names, scenes=scenes):
        conditions += [Condition(f"{name} {x:g}", STRATEGIES[name].at(x, n_layers), name, x) for x in retentions]
    return conditions


def methods(names: Sequence[str] = (), *, scenes: bool = True) -> list[str]:
    """The strategies beside Full in `lineup`, by name."""
    if unknown := set(names) - set(STRATEGIES):
        raise ValueError(f"no strategy is called {sorted(unknown)}; there are {sorted(STRATEGIES)}")
    every = [name for name, cls in STRATEGIES.items() if cls.compared and (scenes or "scene" not in cls.needs)]
    return list(names) or [name for name in every if name != "Full"]


def group_of(task: str) -> str:
    """The group of tasks that share a panel: all questions, or the task itself."""
    return "questions" if task.startswith("qa_") else task


def short_answers(folder: str) -> tuple[pd.DataFrame, pd.DataFrame | None, str]:
    """The paper's Table I as reported, with a run of lmms-eval below it: the table, that run's results, the table's caption.

    folder: of lmms-eval's results, relative to the repository; "": none, and None for its results.
    """
    table = pd.read_csv(ROOT / "data/reported/table1_short_generation.csv", dtype=str).drop(columns="blank_cells_inferred")
    caption = "Reported (arXiv:2501.14204, Table I): short answers. Blank: not printed."
    if not folder:
        return table, None, caption
    measured = read_results(ROOT / folder)
    table = pd.concat([table.assign(source="reported"), table_1(measured).assign(source="measured")], ignore_index=True)
    harnesses = ", ".join(measured.harness.unique())
    return table, measured, f"{caption} Rows marked measured: {harnesses}; samples and prompts are in the results' CSV."


def record_ranking(chapter: Chapter, measured: Comparison, task: str) -> None:
    """Numbers and a sentence on FastV's difference in score from what was measured with it of `RANKED_OTHERWISE`."""
    there, parts = set(measured.rows.method), []
    for key, (method, name) in RANKED_OTHERWISE.items():
        if {"FastV", method} <= there:
            d = measured.difference("FastV", method, task)
            chapter.number(f"fastv_minus_{key}", d)
            parts.append(f"from {name} by {d['value']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})")
    sentence = (
        f"With the same number kept, on the same prompts ({task.replace('_', ' ')}), its score differs {', '.join(parts)}: "
        f"{measured.units[group_of(task)]}, mean over the retention ratios, 95 % intervals of paired differences."
    )
    nothing = "This needs FastV and what ranks otherwise among the strategies: it was not measured here."
    chapter.text("fastv_ranking", sentence if parts else nothing)


def relevance_sentence(measured: Comparison, task: str) -> str:
    """What CDPruner gains by the relevance that stands here in place of its authors', where both were compared."""
    if not {"CDPruner", "DiversityAlone"} <= set(measured.rows.method):
        return "What CDPruner's relevance is worth was not measured in this run."
    gain = measured.difference("CDPruner", "DiversityAlone", task)
    return (
        "CDPruner's relevance is another here than its authors', who ask CLIP's text tower: from the instruction's embeddings it "
        f"{verdict(gain)} the same selection without relevance ({gain['value']:+.3f}, {gain['low']:+.3f} to {gain['high']:+.3f})."
    )


def finding(measured: Comparison, task: str, retention: float) -> str:
    """Which strategy scores highest at one retention ratio, and whether FastV's ranking and others beat random pruning."""
    ranked, full = measured.ranked(task, retention), measured.unpruned(task)
    best, worst = ranked.iloc[0], ranked.iloc[-1]
    group = best.task.replace("_", " ")
    text = (
        f"At a retention ratio of {100 * retention:.0f} % {best.method} scores highest on {group.removesuffix('s')}s: "
        f"{best.value:.2f} against {full.value:.2f} unpruned (lowest: {worst.method}, {worst.value:.2f})"
    )
    if {"FastV", "RandomPrune"} <= set(ranked.method):
        ranking = measured.difference("FastV", "RandomPrune", task)
        published = ranked[[not STRATEGIES[method].control for method in ranked.method]]
        below = list(published.method[published.value < ranked.value[ranked.method == "RandomPrune"].item()])
        listed = f" ({', '.join(below)})" if below else ""
        text += (
            f". Over all retention ratios FastV's ranking {verdict(ranking)} random pruning ({ranking['value']:+.3f}, 95 % "
            f"interval {ranking['low']:+.3f} to {ranking['high']:+.3f}); {len(below)} of {len(published)} published methods "
            f"score below random pruning{listed}, each at its own computation"
        )
    return f"**{text}.**"
