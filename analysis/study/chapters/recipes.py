"""Chapter 13, why the paper's recipe gains nothing, and which one does. Drawn from committed rows; nothing is measured here.

The rows are those of `study.headroom` (losses and answers of trained predictors) and of `study.gradients`.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache

import pandas as pd

from study.book import Chapter
from study.chapters.headroom import SIGNED, at_hand, label, percent
from study.headroom.confirm import MAX_NEW_TOKENS, by_recipe, controllers, generated, questions
from study.headroom.report import BEST_OTHER, PAPER, Measured
from study.intervals import bootstrap, in_words

DISTANCE = 4  # steps of the grid on both sides over which a slope counts as measured
MEASURED, BACKWARD = "measured", "backward"


@cache
def losses(laboratories: tuple[Measured, ...]) -> pd.DataFrame:
    """What each recipe gains on the constant of its own mean retention, teacher-forced: rows of chapter 12."""
    table = at_hand(laboratories)
    return table[table.recipe != BEST_OTHER].reset_index(drop=True)


@cache
def answers(laboratories: tuple[Measured, ...]) -> pd.DataFrame:
    """The same in the score of generated answers; laboratories without any are left out."""
    found = [controllers(rows).assign(laboratory=label(lab)) for lab, rows in answered(laboratories).items()]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=["laboratory", "recipe"])


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


def losses_shown(table: pd.DataFrame) -> pd.DataFrame:
    """`losses` for the page."""
    if table.empty:
        return pd.DataFrame({"laboratory": ["no predictor is trained for these models yet"]})
    captured = [percent(row.captured, row.captured_low, row.captured_high) for row in table.itertuples()]
    return _gains_shown(table, table.controller).assign(**{"captured headroom": captured})


def answers_shown(table: pd.DataFrame) -> pd.DataFrame:
    """`answers` for the page."""
    if table.empty:
        return pd.DataFrame({"laboratory": ["no answers of trained predictors are generated yet"]})
    return _gains_shown(table, table.score)


def _gains_shown(table: pd.DataFrame, reached: pd.Series) -> pd.DataFrame:
    """Each recipe beside its constant. reached: what DyRate reaches, in the unit of the constant's column."""
    return pd.DataFrame({
        "laboratory": table.laboratory, "recipe": table.recipe, "trainings": table.seeds, "answers": table.n,
        "measured retention": table.retention, "constant": table.constant, "DyRate": reached,
        "gain on the constant": [in_words(row, SIGNED) for row in table.to_dict("records")],
    })  # fmt: skip


def finding(laboratories: tuple[Measured, ...]) -> str:
    """What each recipe gains in losses and in answers, and why the paper's gains nothing."""
    parts = [f"{_loss_said(row)} on {row['laboratory']}" for row in losses(laboratories).to_dict("records")]
    text = "**Against one constant rate of the same measured mean retention, with FastV's ranking and eviction, "
    text += f"{'; '.join(parts)}.**" if parts else "nothing has been trained yet.**"
    for row in answers(laboratories).to_dict("records"):
        better = "higher" if row["low"] > 0 else "lower" if row["high"] < 0 else "not significantly different"
        text += (
            f" In {row['n']} generated answers on {row['laboratory']} the score of {_name(row['recipe'])} is {better}: "
            f"{row['score']:.3f} against {row['constant']:.3f} at a measured mean retention of {row['retention']:.3f}, "
            f"{in_words(row, SIGNED)}."
        )
    return text


def front_page(laboratories: tuple[Measured, ...]) -> str:
    """What the front page says of DyRate: each recipe against a constant, in answers where there are some, else in losses."""
    table = answers(laboratories)
    what, unit = ("score of generated answers", "") if len(table) else ("gain in teacher-forced loss", " nats a token")
    table = table if len(table) else losses(laboratories)
    parts = [
        f"{_name(row['recipe'])} {in_words(row, SIGNED)}{unit} on {row['laboratory']} at a measured mean retention of "
        f"{row['retention']:.2f} ({row['n']} answers, {row['seeds']} trainings)"
        for row in table.to_dict("records")
    ]
    if not parts:
        return "Ways to train the predictor have not been compared."
    return f"DyRate minus one constant rate that keeps as much ({what}, FastV's ranking, evicted): {'; '.join(parts)}."


def _loss_said(row: dict) -> str:
    side = "lowers" if row["low"] > 0 else "raises" if row["high"] < 0 else "does not significantly change"
    return (
        f"{_name(row['recipe'])} {side} the loss (gain {in_words(row, SIGNED)} nats a token at a retention of "
        f"{row['retention']:.2f}, n = {row['n']}, {row['seeds']} trainings; {100 * row['captured']:.0f} % of the headroom)"
    )


def _name(recipe: str) -> str:
    return f"the paper's recipe (`{recipe}`)" if PAPER.fullmatch(recipe) else f"`{recipe}`"


def reasons(lab: Measured) -> str:
    """Why the paper's recipe gains nothing, in numbers."""
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
    tables = {"losses": losses(laboratories), "answers": answers(laboratories), "inert": inert(lab), "slopes": slopes(lab)}
    for name, rows in tables.items():
        if len(rows):
            chapter.table(f"13_recipes_{name}.csv", rows)
    for what in ("losses", "answers"):
        for row in tables[what].to_dict("records"):
            key = f"{row['laboratory']} {row['recipe']} gain in {what}".replace("-", "_").replace(".", "").replace(" ", "_")
            chapter.number(key, row)
    chapter.number("inert_steps", tables["inert"].set_index("task").loc["all"])
    chapter.text("recipes_finding", finding(laboratories))
    chapter.text("recipes_reasons", reasons(lab))
    chapter.text("front_page", front_page(laboratories))
    about = lab.about
    for of, rows in answered(laboratories).items():
        n = rows.groupby("task")["sample"].nunique().max()
        chapter.protocol(questions(of, int(n)), max_new_tokens=MAX_NEW_TOKENS)
    chapter.text(
        "recipes_measured_on",
        f"{lab.name} ({about['parameters'] / 1e6:.1f} M parameters), unseen scenes, float32, three trainings of each recipe",
    )
    chapter.protocol(f"{gradients(lab, 'inert').answer.nunique()} reference answers, {lab.name}", metric="gradients of the loss")
    chapter.close()


