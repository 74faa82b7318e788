"""Chapter 10, fine-grained tasks: what dropping costs where details are needed, drawn from the laboratories' reference rows.

Constants are FastV and random pruning, which keep one share of the image at every step; between the measured ones each answer's
score is interpolated, so that another method meets a constant of exactly its own retention ratio, or of its own computation.
"""

from __future__ import annotations

from functools import cache

import pandas as pd

from study.book import Chapter
from study.chapters.laboratories import RETENTION, TASK, Laboratory, dynamic
from study.compared import LATE, QUESTIONS, RETENTIONS
from study.intervals import bootstrap, bootstrap_crossed, in_words, interpolated

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


@cache
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
                lost = bootstrap(pairs, of_means=lambda x: 1 - x[..., 1] / x[..., 0]) if full.mean() >= ENOUGH else {}
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


@cache
def predicted(laboratories: tuple[Laboratory, ...]) -> pd.DataFrame:
    """DyRate minus a constant, by laboratory, task and basis, over samples and seeds.

    At equal retention the constant was measured at the retention of each predictor on the task; at equal computation FastV's
    measured constants are interpolated at each predictor's own.
    """
    rows = []
    for lab in laboratories:
        for _, row in dynamic(lab).iterrows():
            of = lab.rows("constants")
            of = of[of.task == row.task]
            macs = of.prefill + of.decode
            mine = of.assign(computation=macs / macs[of.method == "Full"].mean())[of.method == "DyRate"]
            kept = {"laboratory": lab.name, **row, "computation": mine.computation.mean()}
            rows.append(kept | {"basis": "retention"})
            pairs = {}
            for seed, answers in mine.groupby("seed"):
                constant = constant_at(lab, row.task, "FastV", "computation", answers.computation.mean())
                pairs[seed] = answers.set_index("sample").score - constant
            difference = pd.DataFrame(pairs).dropna().to_numpy()
            rows.append(kept | {"basis": "computation"} | bootstrap_crossed(difference))
    return pd.DataFrame(rows)


def predicted_shown(table: pd.DataFrame) -> pd.DataFrame:
    """`predicted` as a table for the page: both differences in one row for each laboratory and task."""
    keys = ["laboratory", "task"]
    text = [in_words(row, SIGNED) for row in table.to_dict("records")]
    wide = table.assign(text=text).pivot(index=keys, columns="basis", values="text")[list(BASES)].rename(columns=BASES)
    costs = table.drop_duplicates(keys).set_index(keys)[["DyRate", *BASES]]
    shown_as = {"retention": "measured retention", "computation": "share of computation"}
    return costs.rename(columns=shown_as).join(wide).reset_index().assign(task=lambda x: x.task.map(shown))


def predicted_said(table: pd.DataFrame) -> str:
    """In how many settings DyRate scores higher than a constant, and lower, at both equalities."""
    sides = []
    for basis, name in BASES.items():
        of = table[table.basis == basis]
        higher, lower = int((of.low > 0).sum()), int((of.high < 0).sum())
        sides.append(f"at {name} in {higher} and {lower} of {len(of)}")
    return f"DyRate scores higher than the constant, and lower: {', '.join(sides)} models and tasks (95 % intervals, each alone)."


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
    """Which details cost most and least on each model, and what a schedule gains where they come late."""
    table = able(losses(laboratories))
    parts = []
    for lab in laboratories:
        of = table[(table.laboratory == lab.name) & (table.method == "FastV")].sort_values("value")
        least, most = of.iloc[0], of.iloc[-1]
        parts.append(f"from {_share(least)} ({shown(least.task)}) to {_share(most)} ({shown(most.task)}) on {lab.name}")
    return (
        f"**What dropping costs depends on the detail that is asked for: with {100 * RETENTION:.0f} % of the tokens kept by "
        f"FastV a task loses of its unpruned score {', '.join(parts)}.** {late_said(laboratories)}"
    )


def late_said(laboratories: tuple[Laboratory, ...]) -> str:
    """The rate that rises over an answer against a constant, where the details are needed late, by model."""
    table = against_constants(laboratories)
    table = table[(table.method == "LinearAnneal") & (table.task == LATE[0]) & (table.budget == RETENTION)]
    sides = []
    for basis, name in BASES.items():
        of = table[table.basis == basis].set_index("laboratory")
        each = [f"{in_words(of.loc[lab.name], '+.2f')} on {lab.name}" for lab in laboratories if lab.name in of.index]
        sides.append(f"at {name} {', '.join(each)}")
    return (
        f"Where the last thing of the picture is asked for ({shown(LATE[0])}), a rate that rises over the answer gains against a "
        f"constant one (right slots): {'; '.join(sides)}."
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
    wide = costs.join(wide.reindex(columns=list(BASES)).rename(columns=BASES).fillna("none measured"))
    return wide.reset_index().assign(task=lambda x: x.task.map(shown)).rename(columns={"retention": "measured retention"})


def record(chapter: Chapter, laboratories: tuple[Laboratory, ...]) -> None:
    """The chapter's headline numbers, sentences and tables."""
    lost, compared = losses(laboratories), against_constants(laboratories)
    chapter.table("10_fine_grained_losses.csv", lost)
    chapter.table("10_fine_grained_against_constants.csv", compared)
    for row in able(lost)[lambda x: x.method == "FastV"].to_dict("records"):
        chapter.number(f"{row['laboratory'].replace('-', '_')}_{row['task']}_lost", row)
    chapter.text("fine_finding", finding(laboratories))
    chapter.table("10_fine_grained_dyrate.csv", predicted(laboratories))
    chapter.text("fine_dyrate", predicted_said(predicted(laboratories)))
    easy = able(lost)[lambda x: (x.method == "RandomPrune") & (x.low <= 0)]
    unable = lost[(lost.unpruned < ENOUGH) & (lost.method == "FastV")]
    chapter.text("fine_unmoved", _listed(easy))
    chapter.text("fine_unable", _listed(unable))


def _listed(rows: pd.DataFrame) -> str:
    return "; ".join(f"{name}: {', '.join(map(shown, of.task))}" for name, of in rows.groupby("laboratory")) or "none"
