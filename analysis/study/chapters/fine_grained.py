"""Chapter 10, fine-grained tasks: what dropping costs where details are needed, drawn from the laboratories' reference rows.

Constants are FastV and random pruning, which keep one share of the image at every step; between the measured ones each answer's
score is interpolated, so that another method meets a constant of exactly its own retention ratio, or of its own computation.
"""

from __future__ import annotations

from functools import cache

import pandas as pd

from study.book import Chapter
from study.chapters.laboratories import RETENTION, TASK, Laboratory, dynamic_said
from study.compared import LATE, QUESTIONS, RETENTIONS
from study.intervals import bootstrap, in_words, interpolated

CONSTANTS = ("FastV", "RandomPrune")
SCHEDULES = ("LinearAnneal", "PyramidDrop", "FastVRerank")  # that do not keep one set of tokens throughout
BASES = {"retention": "equal retention", "computation": "equal computation"}
TASKS = (TASK, *LATE, *QUESTIONS)
LAYER = 2  # the first pruned layer of the constants
SIGNED = "+.3f"  # the format of a difference
ENOUGH = 0.5  # a task of which the unpruned model does less measures nothing on that model


@cache
def measured(lab: Laboratory, task: str) -> pd.DataFrame:
    """Rows of one task with both costs: retention, and computation, the decoder's multiply-accumulates over the unpruned ones.

    The unpruned model's budget is 1. From the part that asks most of it; the scan of layers has the constants of some
    questions. Empty where none asks it.
    """
    for part in ("methods", "late", "questions", "layers"):
        if lab.has(part) and (lab.rows(part).task == task).any():
            rows = lab.rows(part)
            rows = rows[rows.task == task].copy()
            if part == "layers":
                rows = rows[(rows.method == "Full") | (rows.first_pruned_layer == LAYER)]
            macs = rows.prefill + rows.decode
            rows["computation"] = macs / macs[rows.method == "Full"].mean()
            return rows.assign(budget=rows.budget.fillna(1.0))
    return pd.DataFrame(columns=["task", "sample", "method", "budget", "score", *BASES])


def constant_at(lab: Laboratory, task: str, method: str, basis: str, cost: float) -> pd.Series | None:
    """Each answer's score under a constant method of this cost, between the two nearest measured; None below the cheapest."""
    rows = measured(lab, task)
    rows = rows[rows.method.isin([method, "Full"])]
    scores = rows.pivot(index="sample", columns="budget", values="score").dropna()
    found = interpolated(rows.groupby("budget")[basis].mean(), scores, cost)
    return None if found.isna().any() else found


def losses(laboratories: tuple[Laboratory, ...], retention: float = RETENTION) -> pd.DataFrame:
    """What the two constants lose of each task's unpruned score at one retention ratio, as a share of it, with intervals."""
    rows = []
    for lab in laboratories:
        for task in TASKS:
            of = measured(lab, task)
            if of.empty:
                continue
            full = of[of.method == "Full"].set_index("sample").score
            for method in CONSTANTS:
                mine = of[(of.method == method) & (of.budget == retention)].set_index("sample")
                pairs = pd.DataFrame({"full": full, "mine": mine.score}).dropna().to_numpy()
                lost = bootstrap(pairs, lambda x, axis: 1 - x.sum(axis)[1] / x.sum(axis)[0]) if full.mean() >= ENOUGH else {}
                row = {"laboratory": lab.name, "task": task, "method": method, "unpruned": full.mean()}
                rows.append(row | {"score": mine.score.mean(), "measured retention": mine.retention.mean()} | lost)
    return pd.DataFrame(rows)


def able(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `losses` whose task the unpruned model can do."""
    return table[table.unpruned >= ENOUGH]


@cache
def against_constants(laboratories: tuple[Laboratory, ...]) -> pd.DataFrame:
    """Methods that change what is read minus FastV's constant of their own measured retention, and of their own computation."""
    rows = []
    for lab in laboratories:
        for task in (TASK, *LATE):
            of = measured(lab, task)
            for method in SCHEDULES:
                for budget in RETENTIONS:
                    mine = of[(of.method == method) & (of.budget == budget)]
                    if mine.empty:
                        continue
                    row = {"laboratory": lab.name, "task": task, "method": method, "budget": budget, "score": mine.score.mean()}
                    row |= {basis: mine[basis].mean() for basis in BASES}
                    for basis in BASES:
                        constant = constant_at(lab, task, "FastV", basis, row[basis])
                        if constant is not None:
                            difference = (mine.set_index("sample").score - constant).dropna()
                            rows.append(row | {"basis": basis, "constant": constant.mean(), **bootstrap(difference)})
    return pd.DataFrame(rows)


def curves(laboratories: tuple[Laboratory, ...], tasks: tuple[str, ...], methods: tuple[str, ...]) -> pd.DataFrame:
    """Score, with its interval, against measured retention: a row for each laboratory, task, method and budget."""
    rows = []
    for lab in laboratories:
        for task in tasks:
            of = measured(lab, task)
            for method in methods:
                for budget, mine in of[of.method.isin([method, "Full"])].groupby("budget"):
                    row = {"laboratory": lab.name, "task": task, "method": method, "budget": budget}
                    row |= {basis: mine[basis].mean() for basis in BASES}
                    rows.append(row | bootstrap(mine.score))
    return pd.DataFrame(rows)


def finding(laboratories: tuple[Laboratory, ...]) -> str:
    """Which details cost most on each model, and what a schedule loses where they come late."""
    table = able(losses(laboratories))
    parts = []
    for lab in laboratories:
        of = table[(table.laboratory == lab.name) & (table.method == "FastV")].sort_values("value")
        described = of[of.task == TASK].iloc[0]
        most = of[of.task != TASK].iloc[-1]
        least = of[of.task != TASK].iloc[0]
        parts.append(
            f"on {lab.name} a description loses {_share(described)}, {shown(most.task)} {_share(most)} and {shown(least.task)} "
            f"{_share(least)}"
        )
    return (
        f"**What dropping costs depends on the detail that is asked for. With {100 * RETENTION:.0f} % of the tokens kept by "
        f"FastV, {'; '.join(parts)} of the unpruned score.** {late_said(laboratories)}"
    )


def late_said(laboratories: tuple[Laboratory, ...]) -> str:
    """The rate that rises over an answer against a constant, where the details are needed late, by model."""
    table = against_constants(laboratories)
    table = table[(table.method == "LinearAnneal") & (table.task == LATE[0]) & (table.budget == RETENTION)]
    said = []
    for lab in laboratories:
        of = table[table.laboratory == lab.name].set_index("basis")
        if of.empty:
            continue
        said.append(f"{lab.name} {'; '.join(f'{in_words(of.loc[b], SIGNED)} at {BASES[b]}' for b in BASES if b in of.index)}")
    return (
        f"A rate that rises over the answer (LinearAnneal) minus a constant one (FastV) where the last thing of the picture is "
        f"asked for ({shown(LATE[0])}): {', '.join(said)}."
    )


def shown(task: str) -> str:
    """A task's name in a sentence."""
    return task.removeprefix("qa_").replace("_", " ")


def _share(row) -> str:
    return f"{100 * row['value']:.0f} % ({100 * row['low']:.0f} to {100 * row['high']:.0f})"


def losses_shown(table: pd.DataFrame) -> pd.DataFrame:
    """`losses` for the page: a row for each task and constant, a column for each laboratory."""

    def told(row) -> str:
        lost = "too low to lose" if row["unpruned"] < ENOUGH else f"{row['score']:.2f}, loses {_share(row)}"
        return f"{row['unpruned']:.2f}; {lost}"

    text = [told(row) for row in table.to_dict("records")]
    table = table.assign(text=text, task=table.task.map(shown))
    wide = table.pivot(index=["task", "method"], columns="laboratory", values="text")
    order = list(dict.fromkeys(zip(table.task, table.method, strict=True)))
    return wide.loc[order, list(dict.fromkeys(table.laboratory))].fillna("not measured").reset_index()


def compared_shown(table: pd.DataFrame, laboratory: str) -> pd.DataFrame:
    """`against_constants` of one model for the page: both differences in one row for each task, method and budget."""
    of = table[table.laboratory == laboratory]
    keys = ["task", "method", "budget"]
    wide = of.assign(text=[in_words(row, SIGNED) for _, row in of.iterrows()]).pivot(index=keys, columns="basis", values="text")
    costs = of.drop_duplicates(keys).set_index(keys)[["score", *BASES]].rename(columns={"computation": "share of computation"})
    wide = costs.join(wide.reindex(columns=list(BASES)).rename(columns=BASES).fillna("cheaper than any constant measured"))
    return wide.reset_index().assign(task=lambda x: x.task.map(shown)).rename(columns={"retention": "measured retention"})


def record(chapter: Chapter, laboratories: tuple[Laboratory, ...]) -> None:
    """The chapter's headline numbers, sentences and tables."""
    lost, compared = losses(laboratories), against_constants(laboratories)
    chapter.table("10_fine_grained_losses.csv", lost)
    chapter.table("10_fine_grained_against_constants.csv", compared)
    for row in able(lost)[lambda x: x.method == "FastV"].to_dict("records"):
        chapter.number(f"{row['laboratory'].replace('-', '_')}_{row['task']}_lost", row)
    chapter.text("fine_finding", finding(laboratories))
    chapter.text("fine_dyrate", dynamic_said(laboratories))
    easy = able(lost)[lambda x: (x.method == "RandomPrune") & (x.low <= 0)]
    unable = lost[(lost.unpruned < ENOUGH) & (lost.method == "FastV")]
    chapter.text("fine_unmoved", _listed(easy))
    chapter.text("fine_unable", _listed(unable))


def _listed(rows: pd.DataFrame) -> str:
    return "; ".join(f"{name}: {', '.join(map(shown, of.task))}" for name, of in rows.groupby("laboratory")) or "none"
