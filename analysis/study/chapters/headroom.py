"""Chapter 12, what could a perfect controller gain? Drawn from stored losses (`python -m study.headroom`); measures nothing."""

from __future__ import annotations

from functools import cache

import pandas as pd

from study.book import ROOT, Chapter
from study.examples import examples
from study.headroom.confirm import MAX_NEW_TOKENS, confirmed, generated, questions
from study.headroom.frontier import POLICIES, at_budget, curves, number
from study.headroom.library import LIBRARIES, UNITS
from study.headroom.report import BEST_OTHER, EVERYWHERE, PAPER, Measured, captured, cost_of_constant, library
from study.intervals import MATTERS, against_bound, in_words

BUDGET = 0.25  # of the headline
SHOWN = (0.0625, 0.125, 0.1875, 0.25, 0.33, 0.4, 0.5, 0.65, 0.8, 1.0)  # costs at which curves are drawn
SIGNED = "+.3f"  # the format of a gain
BEST = "best for each answer"
GAINING = tuple(policy.name for policy in POLICIES if policy.name != "constant")
TOLD = ("schedule", "schedule by task", "by features", BEST)  # ways to choose in the finding and its table; the others: CSV
SAID = {
    "schedule": "one schedule for all", "schedule by task": "one for each task",
    "by features": "one chosen by the predictor's features",
}  # fmt: skip
RANKING_NAMES = {"FastV": "FastV's ranking", "random": "random ranking", "importance": "the ranking by true importance"}
UNIT_NAMES = {"retention": "mean retention", "macs": "multiply-accumulates", "kv_bytes": "cache bytes read"}


@cache
def read(folder: str) -> tuple[Measured, ...]:
    """Every laboratory and first pruned layer with measured losses below a folder, relative to the repository."""
    paths = sorted((ROOT / folder).glob("*/headroom_layer*_about.json"))
    if not paths:
        raise FileNotFoundError(f"no measured losses below {folder}: `python -m study.headroom measure` makes them")
    return tuple(Measured(path.parent, int(path.name.split("_")[1].removeprefix("layer"))) for path in paths)


def label(measured: Measured) -> str:
    """A laboratory's name, with the first pruned layer where that is not 2."""
    return measured.name if measured.layer == 2 else f"{measured.name} from layer {measured.layer}"


@cache
def losses(laboratories: tuple[Measured, ...], ranking: str = "FastV", residency: str = "evict") -> pd.DataFrame:
    """Loss of each policy along its curve: laboratory, policy, cost, value, low, high, n."""
    rows = []
    for lab in laboratories:
        asked = library(lab, ranking, residency)
        for name, curve in curves(asked).items():
            where = {"laboratory": label(lab), "policy": name}
            rows += [where | {"cost": cost} | number(curve.at(cost), len(asked.task)) for cost in SHOWN]
    return pd.DataFrame(rows)


@cache
def gains(laboratories: tuple[Measured, ...], budget: float = BUDGET) -> pd.DataFrame:
    """What each policy gains on a constant rate: laboratory, ranking, residency, policy, and the gain in nats a token.

    loss: of the policy; constant, unpruned: of those. share, captured: the gain as a share of what the constant rate costs, and
    of the gain of the best trajectory for each answer.
    """
    rows = []
    for lab in laboratories:
        for ranking in lab.about["rankings"]:
            for residency in LIBRARIES:
                found = at_budget(library(lab, ranking, residency), budget)
                where = {"laboratory": label(lab), "ranking": ranking, "residency": residency}
                where |= {what: found[what]["value"] for what in ("constant", "unpruned")}
                for policy in GAINING:
                    row = where | {"policy": policy, "loss": found[policy]["value"]} | found[f"{policy}: gain"]
                    for what in ("share", "captured"):
                        of = found[f"{policy}: {what}"]
                        row |= {what: of["value"], f"{what}_low": of["low"], f"{what}_high": of["high"]}
                    rows.append(row)
    return pd.DataFrame(rows)


def dyrate(laboratories: tuple[Measured, ...], unit: str = "retention", residency: str = "evict") -> pd.DataFrame:
    """Trained predictors at their own mean cost in a unit: what they gain on a constant rate, of how much, in nats a token.

    cost: that mean, a share of the unpruned. With FastV's ranking; `headroom.json` has the rest.
    paper: whether the recipe is the paper's, with nothing changed but the budget.
    """
    rows = [row for lab in laboratories for row in _trained_in(lab, unit, residency)]
    return pd.DataFrame(rows, columns=None if rows else ["laboratory", "recipe", "paper"])


@cache
def _trained_in(lab: Measured, unit: str, residency: str) -> list[dict]:
    """The rows of `dyrate` of one laboratory, which several tables need."""
    rows = []
    for recipe, found in captured(lab, "FastV", residency, unit).items():
        row = {"laboratory": label(lab), "recipe": recipe, "paper": bool(PAPER.fullmatch(recipe))}
        row |= {"cost": found["cost"]["value"]}
        row |= {what: found[what]["value"] for what in ("constant", "controller", BEST)}
        for what in ("headroom", "captured"):
            row |= {what: found[what]["value"]} | {f"{what}_{end}": found[what][end] for end in ("low", "high")}
        rows.append(row | {k: found["gain"][k] for k in ("value", "low", "high", "n", "seeds")})
    return rows


def at_hand(laboratories: tuple[Measured, ...]) -> pd.DataFrame:
    """Of `dyrate` what is shown of every laboratory: the recipes that are trained for all, and the best but the paper's."""
    table = dyrate(laboratories)
    return table[table.recipe.str.fullmatch(rf"({'|'.join(EVERYWHERE)})-[0-9.]+") | (table.recipe == BEST_OTHER)]


@cache
def scores(laboratories: tuple[Measured, ...]) -> pd.DataFrame:
    """`confirmed` of each laboratory and residency that has generated answers; empty without any."""
    tables = []
    for lab in laboratories:
        for residency in LIBRARIES:
            if list(lab.folder.glob(f"headroom_layer{lab.layer}_generated_{residency}.csv.gz")):
                table = confirmed(generated(lab.folder, layer=lab.layer, residency=residency))
                tables.append(table.assign(laboratory=label(lab), residency=residency))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def gains_shown(table: pd.DataFrame) -> pd.DataFrame:
    """`gains` for the page, where tokens are evicted: a row for each laboratory and ranking, a column for each of TOLD."""
    rows = table[table.residency == "evict"]
    rows = rows.assign(text=[in_words(row, SIGNED) for row in rows.to_dict("records")])
    keys = ["laboratory", "ranking"]
    shown = rows.pivot(index=keys, columns="policy", values="text")[list(TOLD)]
    whole = rows.drop_duplicates(keys).set_index(keys)[["unpruned", "constant"]]
    return whole.join(shown).reset_index()


def units_shown(laboratories: tuple[Measured, ...]) -> pd.DataFrame:
    """The gains at equal cost in each unit, FastV's ranking, evicted: the budget is what the headline's constant rate costs."""
    rows = []
    for lab in laboratories:
        for unit in UNITS:
            budget = cost_of_constant(lab, "evict", BUDGET, unit)
            found = at_budget(library(lab, "FastV", "evict", unit), budget)
            row = {"laboratory": label(lab), "equal": UNIT_NAMES[unit], "share of the unpruned": budget}
            rows.append(row | {policy: in_words(found[f"{policy}: gain"], SIGNED) for policy in GAINING})
    return pd.DataFrame(rows)


def dyrate_shown(table: pd.DataFrame) -> pd.DataFrame:
    """`at_hand` for the page."""
    if table.empty:
        return pd.DataFrame({"laboratory": ["no predictor is trained for these models yet"]})
    return pd.DataFrame({
        "laboratory": table.laboratory, "recipe": table.recipe, "trainings": table.seeds, "retention": table.cost,
        "constant": table.constant, "DyRate": table.controller, BEST: table[BEST],
        "gain on the constant": [in_words(row, SIGNED) for row in table.to_dict("records")],
        "captured headroom": [captured_said(row) for row in table.itertuples()],
    })  # fmt: skip


def scores_shown(table: pd.DataFrame) -> pd.DataFrame:
    """`scores` for the page: the gain of each schedule in the score, and what it says."""
    if table.empty:
        return pd.DataFrame({"laboratory": ["no answers are generated yet"]})
    rows = table[table.method != "constant"]
    constant = table[table.method == "constant"].set_index(["laboratory", "residency", "budget"]).score
    return pd.DataFrame({
        "laboratory": rows.laboratory, "residency": rows.residency, "retention": rows.retention, "unpruned": rows.unpruned,
        "constant": [constant[key] for key in zip(rows.laboratory, rows.residency, rows.budget, strict=True)],
        "method": rows.method, "score": rows.score,
        "gain on the constant": [in_words(row, SIGNED) for row in rows.to_dict("records")],
        "against the bound": [against_bound(row) for row in rows.to_dict("records")],
    })  # fmt: skip


def percent(value: float, low: float, high: float) -> str:
    """A share with its interval, in percent."""
    return f"{100 * value:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def captured_said(row) -> str:
    """The captured headroom of a row of `gains` or `dyrate`, with its interval, in percent."""
    return percent(row.captured, row.captured_low, row.captured_high)


def finding(laboratories: tuple[Measured, ...]) -> str:
    """How much there is to gain, where most, what a schedule and the predictor's features get of it, and the paper's recipe."""
    table = gains(laboratories)
    headline = table[(table.ranking == "FastV") & (table.residency == "evict")].set_index(["laboratory", "policy"])
    most = headline.xs(BEST, level="policy").value.idxmax()
    best, parts = headline.loc[(most, BEST)], []
    for policy in TOLD[:-1]:
        row = headline.loc[(most, policy)]
        parts.append(f"{SAID[policy]} captures {captured_said(row)}")
    lost = best.constant - best.unpruned
    return (
        f"**The best trajectory for each answer, chosen by someone who knows the answer, would regain "
        f"{percent(best.share, best.share_low, best.share_high)} of what a constant rate loses: {in_words(best, '.2f')} of "
        f"{lost:.2f} nats a token on {most}, at a mean retention of {100 * BUDGET:.0f} % (FastV's ranking, evicted). Of this "
        f"headroom {'; '.join(parts)}; {recipe_said(laboratories, most)}.** {score_said(laboratories)}"
    )


def recipe_said(laboratories: tuple[Measured, ...], name: str) -> str:
    """What the paper's recipe, and the best other one, captures in a laboratory, in words."""
    table = at_hand(laboratories)
    rows = table[table.laboratory == name]
    parts = []
    for what, of in (
        ("the paper's recipe", rows[rows.paper.astype(bool)]),
        (f"the {BEST_OTHER}", rows[rows.recipe == BEST_OTHER]),
    ):
        if len(of):
            row = of.loc[(of.cost - BUDGET).abs().idxmin()]
            parts.append(f"{what} {captured_said(row)} (at its own mean retention, {row.cost:.2f})")
    return " and ".join(parts) or "no predictor is trained for this model yet"


def elsewhere(table: pd.DataFrame) -> str:
    """The headroom of every ranking, residency and laboratory, from most to least, in words."""
    rows = table[table.policy == BEST].sort_values("value", ascending=False)
    ends = [f"{row.value:.3f} ({row.low:.3f} to {row.high:.3f}) on {_where(row)}" for row in (rows.iloc[0], rows.iloc[-1])]
    return f"Over all rankings and residencies the headroom runs from {ends[1]} to {ends[0]}, in nats a token."


def _where(row) -> str:
    return f"{row.laboratory} with {RANKING_NAMES[row.ranking]}, {'evicted' if row.residency == 'evict' else 're-selectable'}"


def score_said(laboratories: tuple[Measured, ...]) -> str:
    """Whether the headroom that a schedule reaches shows in generated answers, held against the bound that was set before."""
    table = scores(laboratories)
    if table.empty:
        return "No answers have been generated under these schedules yet."
    rows = table[(table.method != "constant") & (table.budget == BUDGET) & (table.residency == "evict")]
    verdicts, parts = pd.Series([against_bound(row) for row in rows.to_dict("records")], rows.index), []
    for method, of in rows.groupby("method", sort=False):
        counts = ", ".join(f"{n} {verdict}" for verdict, n in verdicts[of.index].value_counts().items())
        least, most = of.loc[of.value.idxmin()], of.loc[of.value.idxmax()]
        ends = f"{least.value:+.3f} on {least.laboratory} to {most.value:+.3f} on {most.laboratory}"
        parts.append(f"{SAID[method]} gains {ends} ({counts})")
    said = f"In the score of generated answers, where {MATTERS:g} was set beforehand as the least that matters"
    return f"{said}, against a constant rate: {'; '.join(parts)}."


def record(chapter: Chapter, laboratories: tuple[Measured, ...]) -> None:
    """The chapter's headline numbers, sentences and tables, and the protocol of what was measured."""
    table = gains(laboratories)
    tables = {"curves": losses(laboratories), "gains": table, "dyrate": dyrate(laboratories), "scores": scores(laboratories)}
    for name, rows in tables.items():
        if len(rows):
            chapter.table(f"12_headroom_{name}.csv", rows)
    for row in table[(table.ranking == "FastV") & (table.residency == "evict")].to_dict("records"):
        key = f"{row['laboratory']} {row['policy']}".replace("-", "_").replace(" ", "_")
        chapter.number(f"{key}_gain", row)
    chapter.text("headroom_finding", finding(laboratories))
    chapter.text("headroom_elsewhere", elsewhere(table))
    chapter.text("headroom_measured_on", measured_on(laboratories))
    for lab in laboratories:
        asked = examples(lab.about["source"], lab.about["n"], tasks=lab.about["tasks"])
        chapter.protocol(asked, metric="teacher-forced loss (nats a token)")
    if len(table := scores(laboratories)):
        lab = next(lab for lab in laboratories if label(lab) == table.laboratory.iloc[0])
        chapter.protocol(questions(lab, int(table.n.iloc[0]) // len(lab.about["tasks"])), max_new_tokens=MAX_NEW_TOKENS)
    chapter.close()


def measured_on(laboratories: tuple[Measured, ...]) -> str:
    """Models, answers and device, in words."""
    parts = [
        f"{label(lab)} ({len(lab.answers)} reference answers to {lab.answers.task.nunique()} tasks, {lab.about['device']})"
        for lab in laboratories
    ]
    return f"{'; '.join(parts)}; float32, unseen scenes"
