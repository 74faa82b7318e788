"""Chapter 13, what each way to train a predictor gains, and why. Drawn from committed rows; nothing is measured here.

The rows are those of `study.headroom` (losses and answers of trained predictors) and of `study.gradients`.
"""

from __future__ import annotations

import json
from contextlib import suppress
from functools import cache

import pandas as pd

from study.book import ROOT, Chapter
from study.chapters.headroom import BUDGET, SIGNED, UNIT_NAMES, at_hand, captured_said, dyrate, label, percent
from study.headroom.confirm import EQUAL, MAX_NEW_TOKENS, by_recipe, controllers, generated, questions
from study.headroom.frontier import at_budget
from study.headroom.report import BEST_OTHER, PAPER, Measured, library, recipe_of, spoken
from study.intervals import bootstrap, in_words

DISTANCE = 4  # steps of the grid on both sides over which a slope counts as measured
MEASURED, BACKWARD = "measured", "backward"
OWN = "the paper's"
COULD_LEARN = {  # policies of chapter 12, in words
    "schedule": "one schedule for all", "constant by task": "one constant for each task",
    "schedule by task": "one schedule for each task",
}  # fmt: skip
VARIANTS = {
    "evict_macs": "the paper's with a budget in multiply-accumulates", "evict_mix": "the paper's, trained on all eight tasks",
    "evict_each_task": "the paper's, every task held to the budget",
    "curves": "reads logarithms of attention shares, chooses one rate an answer",
    "curves_shares": "reads attention shares, as the paper", "curves_tokens": "reads the attention of a segment's token",
    "curves_entropy": "reads how even the attention over the image is", "curves_hidden": "reads the newest token's hidden state",
    "curves_each_step": "chooses at every step", "curves_mask": "chooses at every step among all tokens",
    "curves_step": "reads the step alone, chooses at every step: a clock",
    "anneal": "the paper's estimator; the budget falls from all tokens, the teacher is the unpruned model",
    "rloo": "score function with a leave-one-out baseline over sampled trajectories",
    "imitate": "imitates each answer's best trajectory, then as rloo",
}  # fmt: skip


@cache
def losses(laboratories: tuple[Measured, ...]) -> pd.DataFrame:
    """What each recipe gains on the constant of its own mean retention, teacher-forced: rows of chapter 12."""
    table = at_hand(laboratories)
    return table[table.recipe != BEST_OTHER].reset_index(drop=True)


def beside_policies(laboratories: tuple[Measured, ...]) -> pd.DataFrame:
    """Captured headroom of each recipe beside that of what it could have learned: a schedule, a constant or schedule by task."""
    own, rows = _nearest(losses(laboratories)), []
    for lab in laboratories:
        row, reached = {"laboratory": label(lab)}, at_budget(library(lab, "FastV", "evict"), BUDGET)
        for policy, said in COULD_LEARN.items():
            row[said] = percent(*(reached[f"{policy}: captured"][end] for end in ("value", "low", "high")))
        for how, trained_so in _by_training(own[own.laboratory == label(lab)]):
            (it,) = trained_so.itertuples()
            row[how] = captured_said(it)
        rows.append(row)
    return pd.DataFrame(rows)


def by_unit(laboratories: tuple[Measured, ...]) -> pd.DataFrame:
    """What each way to train gains on the constant of its own cost, teacher-forced, for each unit of cost; and that cost."""
    nearest = _nearest(losses(laboratories))
    shown = pd.DataFrame({"laboratory": nearest.laboratory, "recipe": nearest.recipe.map(spoken)})
    for unit, said in UNIT_NAMES.items():
        table = dyrate(laboratories, unit).set_index(["laboratory", "recipe"])
        rows = [table.loc[key] for key in zip(nearest.laboratory, nearest.recipe, strict=True)]
        shown[f"at equal {said}"] = [f"{in_words(row, SIGNED)} at {100 * row.cost:.0f} %" for row in rows]
    return shown


def variants(lab: Measured, residency: str = "evict") -> pd.DataFrame:
    """Rows of chapter 12 for every recipe and choice of features that is trained in a laboratory, the paper's among them.

    Two rows each: against the constant of its own mean retention, and of its own computation (`equal`, as in `answers`).
    least, most: mean retention of the task that keeps least, and of the one that keeps most.
    """
    tables = {equal: dyrate((lab,), unit, residency) for equal, unit in zip(EQUAL, ("retention", "macs"), strict=True)}
    table = pd.concat([table.assign(equal=equal) for equal, table in tables.items()])
    if table.empty:
        return table
    known = table.recipe.map(lambda recipe: bool(PAPER.fullmatch(recipe)) or recipe.split("-")[0] in VARIANTS)
    return table[known].join(_by_task(lab, residency), on="recipe").sort_values("value", ascending=False, ignore_index=True)


def _by_task(lab: Measured, residency: str) -> pd.DataFrame:
    """Of each recipe the smallest and the largest mean retention of a task, teacher-forced, with FastV's ranking."""
    rows = lab.dyrate[(lab.dyrate.ranking == "FastV") & (lab.dyrate.residency == residency)]
    recipe = rows.predictor.map(recipe_of).rename("recipe")
    means = rows.groupby([recipe, "task"]).retention.mean()
    return means.groupby("recipe").agg(["min", "max"]).set_axis(["least", "most"], axis=1)


def variants_shown(table: pd.DataFrame) -> pd.DataFrame:
    """`variants` for the page: what each is, and what it costs, gains and captures at both equalities."""
    same, as_dear = (table[table.equal == equal].set_index("recipe") for equal in EQUAL)
    as_dear = as_dear.loc[same.index]
    return pd.DataFrame({
        "recipe": same.index, "what it is": [VARIANTS.get(recipe.split("-")[0], OWN) for recipe in same.index],
        "retention (tasks)": [f"{row.cost:.2f} ({row.least:.2f} to {row.most:.2f})" for row in same.itertuples()],
        "gain at equal retention": [in_words(row, SIGNED) for row in same.to_dict("records")],
        "captured": [captured_said(row) for row in same.itertuples()], "computation": list(as_dear.cost),
        "gain at equal computation": [in_words(row, SIGNED) for row in as_dear.to_dict("records")],
    })  # fmt: skip


def budget_said(table: pd.DataFrame) -> str:
    """What other budgets, and training on all tasks, change in the paper's recipe. table: `variants`."""
    parts, kept = [], []
    for row in table[table.equal == "computation"].to_dict("records"):
        if PAPER.fullmatch(row["recipe"]):
            said = "as the paper says"
        elif row["recipe"].startswith("evict_"):
            said = VARIANTS[row["recipe"].split("-")[0]].removeprefix(OWN).lstrip(", ")
        else:
            continue
        parts.append(f"{in_words(row, SIGNED)} {said}")
        kept.append(f"{row['least']:.2f} to {row['most']:.2f} {said}")
    return (
        f"What the paper's recipe gains on the constant of its own computation (nats a token): {', '.join(parts)}. What the task "
        f"that keeps least and the one that keeps most keep: {', '.join(kept)}."
    )


def reselectable_said(masked: pd.DataFrame, evicted: pd.DataFrame) -> str:
    """What a choice at every step gains where dropped tokens stay in memory, beside the same recipe where they leave it.

    masked, evicted: `variants` of one laboratory in either residency.
    """
    parts = []
    for table, name, where in (
        (masked, "curves_mask", "stay in memory and are re-selectable"), (evicted, "curves_each_step", "are evicted"),
    ):  # fmt: skip
        own, as_dear = (table[table.recipe.str.fullmatch(rf"{name}-[0-9.]+") & (table.equal == equal)] for equal in EQUAL)
        if own.empty:
            return "No predictor was trained for re-selectable tokens."
        same = _nearest(own).iloc[0]
        as_dear = as_dear.set_index("recipe").loc[same.recipe]
        parts.append(
            f"where dropped tokens {where}, one constant rate has a loss of {same.constant:.3f} nats a token at a mean retention "
            f"of {same.cost:.2f}, and choosing at every step lowers it by {in_words(same, '.3f')}, against the constant of equal "
            f"computation by {in_words(as_dear, '.3f')}"
        )
    return f"On {same.laboratory}, {'; '.join(parts)}. What stays in memory saves neither cache nor prefill."


@cache
def answers(laboratories: tuple[Measured, ...]) -> pd.DataFrame:
    """The same in the score of generated answers; laboratories without any are left out."""
    found = []
    for lab, rows in answered(laboratories).items():
        table = controllers(rows)
        found.append(table.assign(laboratory=label(lab), trained_on=[trained_on(lab, recipe) for recipe in table.recipe]))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=["laboratory", "recipe"])


def trained_on(lab: Measured, recipe: str) -> int | None:
    """How many reference answers a recipe's predictors were trained on; None where they are not among the committed ones."""
    folder = ROOT / "data" / lab.name / ("dyrate" if lab.layer == 2 else f"dyrate_layer{lab.layer}")
    about = next(folder.glob(f"{recipe}-seed*/config.json"), None)
    return about and json.loads(about.read_text())["about"].get("n_train")


@cache
def answered(laboratories: tuple[Measured, ...]) -> dict[Measured, pd.DataFrame]:
    """The generated answers of the laboratories in which trained predictors have some."""
    found = {}
    for lab in laboratories:
        with suppress(FileNotFoundError):
            found[lab] = generated(lab.folder, layer=lab.layer)
    return {lab: rows for lab, rows in found.items() if by_recipe(rows)}


def by_task(lab: Measured) -> pd.DataFrame:
    """Mean retention and score of each recipe's generated answers to each task, beside no pruning and a constant rate."""
    rows = generated(lab.folder, layer=lab.layer)
    columns = {"unpruned": rows[rows.method == "Full"].groupby("task", sort=False).score}
    columns["constant of 25 %"] = rows[rows.label == "constant 0.25"].groupby("task").score
    for recipe, of in by_recipe(rows).items():
        columns |= {f"{recipe}: {what}": of.groupby("task")[what] for what in ("retention", "score")}
    shown = pd.DataFrame({name: of.mean() for name, of in columns.items()}).loc[rows.task.unique()]
    return shown.rename(index=lambda task: task.replace("_", " ")).rename_axis("task").reset_index()


def gradients(lab: Measured, what: str) -> pd.DataFrame:
    """Rows of `study.gradients` of a laboratory. Raises FileNotFoundError that says how to measure them."""
    path = lab.folder / f"gradients_{what}.csv.gz"
    if not path.exists():
        raise FileNotFoundError(f"no {path}: `python -m study.gradients --model {lab.name}` measures it")
    return pd.read_csv(path)


def inert(lab: Measured) -> pd.DataFrame:
    """Share of the steps whose rate evicts nothing under the paper's predictors: by task, and over all, with intervals.

    A share is of one answer, mean over trainings; intervals are over answers.
    """
    rows = gradients(lab, "inert")
    shares = rows.groupby(["task", "answer"], sort=False).inert.mean()
    table = [{"task": task, **bootstrap(of)} for task, of in shares.groupby("task", sort=False)]
    return pd.DataFrame([*table, {"task": "all", **bootstrap(shares)}])


def slopes(lab: Measured) -> pd.DataFrame:
    """Slope of the loss by the drop rate at one rate: measured, and what the gradient says at each temperature; by task."""
    rows = gradients(lab, "slopes")
    rows = rows[(rows.kind == BACKWARD) | ((rows.kind == MEASURED) & (rows["size"] == DISTANCE))]
    groups = rows.groupby(["task", "kind", "size"], sort=False).slope
    return pd.DataFrame([dict(zip(("task", "kind", "size"), key, strict=True)) | bootstrap(of) for key, of in groups])


def wrong_signs(table: pd.DataFrame) -> dict[float, list[str]]:
    """The tasks in which the gradient has another sign than the measured slope, by temperature; table: `slopes`."""
    truth = table[table.kind == MEASURED].set_index("task").value
    rows = table[table.kind == BACKWARD]
    return {size: [t for t, v in zip(of.task, of.value, strict=True) if v * truth[t] < 0] for size, of in rows.groupby("size")}


def answers_shown(table: pd.DataFrame) -> pd.DataFrame:
    """`answers` for the page."""
    if table.empty:
        return pd.DataFrame({"laboratory": ["no answers of trained predictors are generated yet"]})
    same, as_dear = (table[table.equal == equal].reset_index(drop=True) for equal in EQUAL)
    shown = same[["laboratory", "recipe", "trained_on", "n", "score"]]
    shown = shown.rename(columns={"trained_on": "trained on", "n": "answers"})
    for of, cost in zip((same, as_dear), EQUAL, strict=True):
        shown[f"gain at equal {cost}"] = [f"{in_words(row, SIGNED)} at {100 * row[cost]:.0f} %" for row in of.to_dict("records")]
    return shown


def finding(laboratories: tuple[Measured, ...]) -> str:
    """How often each recipe gains in generated answers, and the range of what it captures."""
    table, parts = answers(laboratories), []
    if table.empty:
        return "Trained predictors have not been compared on generated answers."
    for how, of in _by_training(_nearest(losses(laboratories))):
        parts.append(f"{how} captures {_range(of.assign(captured=100 * of.captured), 'captured', '{:.0f} %')}")
    least, most = table.n.min(), table.n.max()
    return (
        f"{counted(table)} Of the headroom in loss (chapter 12) {'; '.join(parts)}. FastV's ranking, evicted; "
        f"n = {least:,} to {most:,} answers a setting, {table.seeds.max()} trainings, 95 % intervals over both."
    )


def _range(rows: pd.DataFrame, column: str, form: str) -> str:
    """The least and the most of a column, each with its laboratory."""
    ends = [rows.loc[rows[column].idxmin()], rows.loc[rows[column].idxmax()]]
    return " to ".join(f"{form.format(end[column])} ({end.laboratory})" for end in ends)


def counted(table: pd.DataFrame) -> str:
    """On how many models each way to train beats a constant rate, and where it gains most; table: `answers`."""
    if table.empty:
        return ""
    parts = []
    for how, of in _by_training(table):
        better, worse = ({equal: int(side[of.equal == equal].sum()) for equal in EQUAL} for side in (of.low > 0, of.high < 0))
        parts.append(
            f"{how[0].upper()}{how[1:]}: better in {better['retention']} and worse in {worse['retention']} of "
            f"{of.laboratory.nunique()} at equal measured retention, {better['computation']} and {worse['computation']} at equal "
            "computation"
        )
    same, as_dear = (table[table.equal == equal].set_index(["laboratory", "recipe"]) for equal in EQUAL)
    laboratory, recipe = most = same.value.idxmax()
    start = f"DyRate's predictor against one constant rate, in generated answers of {table.laboratory.nunique()} settings"
    return (
        f"**{start} (model and first pruned layer). {'. '.join(parts)}.** (*Curves* learns from losses that were measured at "
        f"constant rates.) The largest gain in score, {in_words(same.loc[most], SIGNED)} at equal retention, is that of "
        f"{spoken(recipe)} on {laboratory}; at equal computation it is {in_words(as_dear.loc[most], SIGNED)}."
    )


def _nearest(table: pd.DataFrame) -> pd.DataFrame:
    """Of each laboratory and way to train the row whose mean retention is nearest to the headline's."""
    if table.empty:
        return table
    off = (table.cost - BUDGET).abs()
    return table.loc[off.groupby([table.laboratory, table.recipe.map(spoken)], sort=False).idxmin()]


def _by_training(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each way to train, with its name in words; the paper's first."""
    names = table.recipe.map(spoken)
    order = sorted(names.unique(), key=lambda name: (name != "the paper's recipe", name))
    return [(name, table[names == name]) for name in order]


def reasons(lab: Measured) -> str:
    """What the paper's gradient misses, in numbers."""
    share = inert(lab).set_index("task").loc["all"]
    rows = gradients(lab, "inert")
    still = rows[rows.inert].lower.max()
    table = slopes(lab)
    n = table[table.kind == MEASURED].task.nunique()
    wrong = [f"at temperature {size:g} in {len(tasks)} of {n} tasks" for size, tasks in sorted(wrong_signs(table).items())]
    steepest = table[table.kind == MEASURED].set_index("task").value.idxmax()
    of = table[table.task == steepest].sort_values("size").groupby("kind").last()
    measured, hottest = of.loc[MEASURED], of.loc[BACKWARD]
    return (
        f"On {lab.name} {100 * share.value:.0f} % ({100 * share.low:.0f} to {100 * share.high:.0f}) of an answer's steps evict "
        "nothing, since their rate is not above an earlier one. For these the straight-through gradient towards any lower rate "
        f"is zero (largest found: {still:.2g}): nothing teaches a late step to keep more, and only the highest rate so far "
        "decides. Where rates do decide, the gradient sees little of what they do: in answers to the task "
        f"{steepest.replace('_', ' ')} the loss rises by {in_words(measured)} nats a token for a unit of the drop rate, and the "
        f"gradient at temperature {hottest['size']:g} says {in_words(hottest)}. Its mean over answers has another sign than "
        f"the measured slope {', '.join(wrong)}."
    )


def record(chapter: Chapter, laboratories: tuple[Measured, ...], lab: Measured) -> None:
    """The chapter's headline numbers, sentences and tables. lab: whose gradients are shown."""
    tables = {
        "losses": losses(laboratories), "answers": answers(laboratories), "variants": variants(lab),
        "reselectable": variants(lab, "mask"), "inert": inert(lab), "slopes": slopes(lab),
    }  # fmt: skip
    for name, rows in tables.items():
        if len(rows):
            chapter.table(f"13_recipes_{name}.csv", rows)
    for what in ("losses", "answers"):
        for row in tables[what].to_dict("records"):
            where = " at equal computation" if row.get("equal") == "computation" else ""
            key = f"{row['laboratory']} {row['recipe']} gain in {what}{where}"
            chapter.number(key.replace("-", "_").replace(".", "").replace(" ", "_"), row)
    chapter.number("inert_steps", tables["inert"].set_index("task").loc["all"])
    chapter.text("recipes_finding", finding(laboratories))
    chapter.text("recipes_reasons", reasons(lab))
    chapter.text("recipes_budget", budget_said(tables["variants"]))
    chapter.text("recipes_reselectable", reselectable_said(tables["reselectable"], tables["variants"]))
    chapter.text("front_page", f"How many, and when? {counted(answers(laboratories))}")
    for of, rows in answered(laboratories).items():
        n = rows.groupby("task")["sample"].nunique().max()
        chapter.protocol(questions(of, int(n)), max_new_tokens=MAX_NEW_TOKENS)
    models = ", ".join(dict.fromkeys(f"{of.name} ({of.about['parameters'] / 1e6:.1f} M parameters)" for of in laboratories))
    how = "unseen scenes, float32, three trainings of each recipe where not said otherwise"
    chapter.text("recipes_measured_on", f"{models}; {how}; gradients on {lab.name}")
    chapter.protocol(f"{gradients(lab, 'inert').answer.nunique()} reference answers, {lab.name}", metric="gradients of the loss")
    chapter.close()
