"""Chapter 3, what dropping image tokens costs: every strategy at several retention ratios, against the unpruned model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pandas as pd

import dyrate
from dyrate.data import Examples
from dyrate.generation import encode
from dyrate.models import describe
from dyrate.strategy import STRATEGIES, retention_of
from study.answers import answer_all
from study.book import ROOT, Chapter
from study.compared import lineup
from study.examples import examples as study_examples
from study.examples import has_scenes
from study.intervals import bootstrap, in_words, interpolated, verdict
from study.lmms_results import read_results, table_1
from study.predictors import condition_of
from study.scores import caption_measures, compare, method_scores, scored

UNITS = {"caption": "CIDEr (1 = what papers print as 100)", "questions": "right answers (share)"}
RANKED_OTHERWISE = {  # than FastV does: methods, and their names in a sentence
    "random": ("RandomPrune", "random pruning"), "worst": ("WorstFirst", "keeping the tokens with the least attention"),
    "rerank": ("FastVRerank", "ranking anew at every token, where dropped tokens are re-selectable"),
}  # fmt: skip
EQUAL = {"retention": "measured retention", "macs": "multiply-accumulates"}  # kinds of cost, and their names
TABLE_2 = (None, None, ("FastV", 0.5), ("VTW", 0.5), ("DyRate", 0.33))  # method and budget here that are like each of its rows
INTERVAL = ["value", "low", "high", "n"]


@dataclass
class Comparison:
    """What the chapter measured. about: `dyrate.models.describe` of the model; rows: `scored` answers of all conditions.

    retentions: the ratios compared, ascending. captions: `caption_measures` of each strategy at the middle one.
    """

    about: dict
    examples: Examples
    rows: pd.DataFrame
    retentions: Sequence[float] = ()
    captions: pd.DataFrame = field(default_factory=pd.DataFrame)

    @cached_property
    def by_task(self) -> pd.DataFrame:
        """`compare` of every condition on every task."""
        return compare(self.rows)

    @cached_property
    def by_group(self) -> pd.DataFrame:
        """`compare` of every condition on descriptions, captions and all questions together."""
        return compare(self.rows.assign(task=self.rows.task.map(group_of)))

    @cached_property
    def against_random(self) -> pd.DataFrame:
        """`against_random` of the rows."""
        return against_random(self.rows)

    @property
    def units(self) -> dict[str, str]:
        """What the score is of each group of tasks."""
        return {group: UNITS.get(group, "right slots (share)") for group in dict.fromkeys(self.by_group.task)}

    @property
    def middle(self) -> float:
        """The retention ratio of which pages show one."""
        return middle(self.retentions)

    def beside_reported_captions(self) -> pd.DataFrame:
        """The paper's Table II for the smaller model with this run's caption scores beside it; blank where none is alike.

        All CIDEr as a share of the same table's unpruned, in percent, since data and models differ.
        """
        reported = pd.read_csv(ROOT / "data" / "reported" / "table2_caption_cider.csv", dtype=str)
        reported = reported[reported.model == reported.model.iloc[0]].reset_index(drop=True)
        data = [column for column in reported if column.endswith("_cider")]
        scores = reported[data].astype(float)
        shares = (100 * scores / scores[reported.method == "Original"].iloc[0]).round(1)
        shares.columns = [f"reported: {column.removesuffix('_cider')} (%)" for column in data]
        captions = self.by_task[self.by_task.task == "caption"]
        unpruned, rows = captions[captions.method == "Full"].value, []
        for alike in TABLE_2:
            found = captions[(captions.method == alike[0]) & (captions.budget == alike[1])] if alike else captions[:0]
            here = {"here: CIDEr (%)": "", "here: retention": float("nan"), "here: computation": float("nan")}
            if len(found):
                row = found.iloc[0]
                share = {end: 100 * row[end] / unpruned.item() for end in ("value", "low", "high")}
                here = dict(zip(here, (in_words(share, ".1f"), row.retention, row.macs_share), strict=True))
            rows.append(here)
        return pd.concat([reported[["method", "K", "R"]], shares, pd.DataFrame(rows)], axis=1)

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
    predictors: str, patterns: Sequence[str], max_new_tokens: int, batch_size: int, seed: int, store: str,
    device_map: str = "", **_,
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
        conditions += [condition_of(folder) for p in patterns for folder in sorted((ROOT / predictors).glob(p))]
    answers = answer_all(
        loaded, processor, conditions, examples, ROOT / store, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed
    )
    rows = scored(answers, examples)
    at = (rows.budget == middle(retentions)) | (rows.method == "Full")
    captions = caption_measures(rows[at & (rows.task == "caption")], examples)
    return Comparison(about, examples, rows, sorted(retentions), captions)


def middle(retentions: Sequence[float]) -> float:
    """The middle one of some retention ratios; of an even number the upper."""
    return sorted(retentions)[len(retentions) // 2]


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


def group_of(task: str) -> str:
    """The group of tasks that share a panel: all questions, or the task itself."""
    return "questions" if task.startswith("qa_") else task


def with_latency(summary: pd.DataFrame, path: Path) -> tuple[pd.DataFrame, str]:
    """Rows of `compare` whose setting was timed, with `latency`, its time relative to no pruning; and what that says.

    path: written by `python -m study.bench latency`; where there is none no row is left.
    """
    if not path.is_file():
        return summary[:0].assign(latency=0.0), "Times were not measured for this run; `python -m study.bench latency` does."
    content = json.loads(path.read_text(encoding="utf-8"))
    about, times = content["about"], pd.DataFrame(content["table"]).set_index("label")
    timed = summary[summary.label.isin(times.index)]
    timed = timed.assign(latency=timed.label.map(times.value))
    ours = times[times.method.map(published)]
    faster, slower = ours[ours.high < 1], ours[ours.low > 1]
    macs = timed.drop_duplicates("label").set_index("label").macs_share
    text = (
        f"Of {len(ours)} settings of published methods {len(faster)} answer faster than the unpruned model and {len(slower)} "
        f"slower (95 % intervals over {about['repeats']} repeats). "
    )
    if len(faster):
        best = faster.loc[faster.value.idxmin()]
        share = f", where it computes {macs[best.name]:.2f} of the multiply-accumulates" if best.name in macs else ""
        text += f"The fastest, {best.name}, takes {in_words(best)} of the time{share}. "
    return timed, (
        f"{text}{about['parameters'] / 1e6:.1f} M parameters, batch {about['batch']}, {about['new_tokens']} tokens in every "
        f"answer, {about['device']}: on a small model what a method does itself, and Python, weigh more than on a large one."
    )


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
    """Numbers on what stands against random pruning and on FastV's ranking, and a sentence on `RANKED_OTHERWISE`."""
    for row in measured.against_random[measured.against_random.method.isin(("FastV", "DyRate"))].to_dict("records"):
        chapter.number(f"{row['method'].lower()}_minus_random_{row['group']}_equal_{row['cost']}", row)
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


def against_random(rows: pd.DataFrame) -> pd.DataFrame:
    """Each published method minus random pruning of the same cost: one row for each method, group of tasks and kind of cost.

    cost: "retention" or "macs", both as measured; random pruning's score is interpolated between its own costs, up to no pruning.
    value: mean over a method's settings and over scenes, for several questions may ask about one scene; low, high: of an interval
    that holds for all methods of a group at once (Bonferroni's correction). settings, compared: how many of them random
    pruning is measured on both sides of; without any the method has no row. Empty without random pruning.
    """
    rows = rows.assign(macs=rows.prefill + rows.decode, group=rows.task.map(group_of))
    differences = [_minus_random(of, cost) for _, of in rows.groupby("task", sort=False) for cost in ("retention", "macs")]
    by_setting = pd.concat(differences).groupby(["cost", "group", "method", "label", "scene"], sort=False).difference.mean()
    table = []
    for (cost, group), of in by_setting.groupby(["cost", "group"], sort=False):
        methods = of.groupby("method", sort=False)
        for method, mine in methods:
            scenes = mine.groupby("scene").mean()
            interval = bootstrap(scenes, level=1 - 0.05 / methods.ngroups, resamples=20_000)
            compared = mine.index.unique("label").size
            every = rows[(rows.group == group) & (rows.method == method)].label.nunique()
            table.append({"cost": cost, "group": group, "method": method, **interval, "compared": compared, "settings": every})
    return pd.DataFrame(table, columns=["cost", "group", "method", *INTERVAL, "compared", "settings"])


def _minus_random(rows: pd.DataFrame, cost: str) -> pd.DataFrame:
    """Each published method's score on one task minus random pruning's at the same cost, one row a setting and sample."""
    random = rows[rows.method == "RandomPrune"]
    base = pd.concat([random, rows[rows.method == "Full"]]) if len(random) else random
    costs, scores = base.groupby("label")[cost].mean(), base.pivot(index="sample", columns="label", values="score")
    parts = [pd.DataFrame(columns=["cost", "group", "method", "label", "scene", "difference"]).astype({"difference": float})]
    for _, mine in rows[rows.method.map(published)].groupby("label", sort=False):
        same = interpolated(costs, scores, mine[cost].mean())
        part = mine.assign(cost=cost, difference=mine.score - mine["sample"].map(same))
        parts.append(part[parts[0].columns].dropna(subset="difference"))
    return pd.concat(parts)


def against_random_shown(table: pd.DataFrame) -> pd.DataFrame:
    """`against_random` for the page: a method a row, a group of tasks and kind of cost a column; blank: not compared."""
    if table.empty:
        return pd.DataFrame({"method": ["none was compared"]})
    text = [in_words(row, "+.2f") for row in table.to_dict("records")]
    shown = table.assign(text=text).pivot(index="method", columns=["group", "cost"], values="text")
    columns = [(group, cost) for group in table.group.unique() for cost in EQUAL if (group, cost) in shown]
    shown = shown.reindex(index=table.method.unique(), columns=columns)
    return shown.set_axis([f"{_plural(group)}, equal {EQUAL[cost]}" for group, cost in columns], axis=1).reset_index()


def published(method: str) -> bool:
    """Whether a strategy is a published way to prune: no control, and not FastV ranked anew, which this study adds."""
    return method in STRATEGIES and method not in ("Full", "FastVRerank") and not STRATEGIES[method].control


def finding(measured: Comparison, place: str, dropped: bool) -> str:
    """How many published methods beat random pruning of the same cost on each group of tasks, and how DyRate does.

    place: model and images in words. dropped: whether the model was trained with random dropping.
    """
    table = measured.against_random
    if table.empty:
        return f"**{_against_unpruned(measured.by_group, place)}**"
    start = f"{place} was trained with random dropping, which favours random pruning:" if dropped else f"With {place},"
    counts = "; ".join(f"{_counted(of)} at equal {EQUAL[cost]}" for cost, of in table.groupby("cost", sort=False))
    kept = measured.rows[measured.rows.method.isin(table.method)].groupby(["label", "task"]).retention.mean()
    return (
        f"**{start} the published methods that score lower than random pruning are {counts}.** {_of_dyrate(table)}Each method "
        f"counts by the mean of its settings, which keep {kept.min():.2f} to {kept.max():.2f} of the image tokens, over "
        f"{_span(table.n)} scenes; intervals hold for all methods of a group of tasks at once."
    )


def _counted(table: pd.DataFrame) -> str:
    """Of how many methods the interval lies below zero, and above it, on each group of tasks."""
    marks = table.assign(lower=table.high < 0, higher=table.low > 0, of=1)
    counts = marks.groupby("group", sort=False)[["lower", "higher", "of"]].sum().rename(index=_plural)
    lower = ", ".join(f"{row.lower} of {row.of} on {name}" for name, row in counts.iterrows())
    higher = ", ".join(f"{row.higher} on {name}" for name, row in counts.iterrows() if row.higher) or "none"
    return f"{lower} (higher: {higher})"


def _of_dyrate(table: pd.DataFrame) -> str:
    """DyRate's own differences on the first group of tasks, in words; nothing where it was not compared."""
    of = table[(table.method == "DyRate") & (table.group == table.group.iloc[0])]
    parts = [f"{in_words(row, '+.2f')} at equal {EQUAL[row['cost']]}" for row in of.to_dict("records")]
    return f"DyRate minus random pruning on {_plural(table.group.iloc[0])}: {', '.join(parts)}. " if parts else ""


def _against_unpruned(table: pd.DataFrame, place: str) -> str:
    """What is said where nothing was compared with random pruning: how many settings score lower than no pruning.

    table: `by_group`.
    """
    pruned = table[table.method != "Full"]
    parts = [
        f"{(of.difference_high < 0).sum()} of {len(of)} settings score significantly lower on {_plural(group)}"
        for group, of in pruned.groupby("task", sort=False)
    ]
    return (
        f"No published method was compared with random pruning on {place}. Against no pruning {', '.join(parts)} "
        f"(95 % intervals, {_span(table.n)} answers)."
    )


def _plural(group: str) -> str:
    return f"{group.replace('_', ' ').removesuffix('s')}s"


def _span(numbers: pd.Series) -> str:
    """A number, or the least and the largest of several."""
    least, most = numbers.min(), numbers.max()
    return f"{least}" if least == most else f"{least} to {most}"
