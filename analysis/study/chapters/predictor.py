"""Chapter 2, a predictor for the rate: trained to budgets, does it meet them, what does it choose, and is it worth it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

import dyrate
from dyrate import diagnostics
from dyrate.data import Examples
from dyrate.models import describe
from dyrate.predictor import RatePredictor
from dyrate.segments import SEGMENTS
from dyrate.strategies.dyrate import DyRate
from dyrate.teacher_forcing import Prepared, predicted_by_gradient, prepare_examples, rate_changes, teacher_forced
from dyrate.training import Settings, Trained, Trainer, batches_to_learn, calibrate, trajectories, untrained
from study.book import ROOT, Chapter
from study.examples import examples as study_examples
from study.examples import left_out, model_and_images
from study.intervals import bootstrap, in_words, interpolated

SHOWN = 0.33  # the budget whose predictor is shown, or the one next to it


@dataclass
class Predictors:
    """What the trained predictors do on unseen examples.

    budget, n_rates: of the predictor shown. measured_on: for captions. place: model and images, for the headline. Tables:
    history: one row a budget and training step. retention: `met`. answers: every answer under each budget's predictor,
    teacher-forced: budget, sequence, task, loss (nats a token), retention. rates: the rate at each of its steps. weights: of the
    predictor shown, `slopes`. constant_answers: `under_constants`. gradient: `predicted_by_gradient` at the rate that the budget
    shown leaves. signs: of failure, one row each. diagnosis: their warnings in words. four_rates_change: over an answer, of a
    predictor like the one shown with four rates.
    """

    unseen: Examples
    budget: float
    n_rates: int
    measured_on: str
    place: str
    diagnosis: str
    four_rates_change: float
    history: pd.DataFrame
    retention: pd.DataFrame
    answers: pd.DataFrame
    rates: pd.DataFrame
    weights: pd.DataFrame
    constant_answers: pd.DataFrame
    gradient: pd.DataFrame
    signs: pd.DataFrame

    @property
    def task(self) -> str:
        """The first task, which most sentences are about."""
        return self.unseen[0].task

    @property
    def shown_rates(self) -> pd.DataFrame:
        """The rates of the predictor shown: task, sequence, step, rate."""
        return self.rates[self.rates.budget == self.budget].drop(columns="budget")

    @property
    def worst_miss(self) -> float:
        """The largest distance of a measured mean retention from its budget, in percentage points."""
        return 100 * (self.retention.value - self.retention.budget).abs().max()

    @cached_property
    def constant(self) -> pd.DataFrame:
        """Loss and retention of each constant rate, means over answers, with 95 % intervals of the loss."""
        return pd.DataFrame([_mean_loss(rows) for _, rows in self.constant_answers.groupby("rate")])

    @cached_property
    def learned(self) -> pd.DataFrame:
        """The same of each budget's predictor."""
        return pd.DataFrame([{"budget": budget} | _mean_loss(rows) for budget, rows in self.answers.groupby("budget")])

    @cached_property
    def minus_constant(self) -> pd.DataFrame:
        """Loss of each budget's predictor minus that of a constant rate, interpolated at the same retention; over answers."""
        retention = self.constant_answers.groupby("rate").retention.mean()
        losses, rows = self.constant_answers.pivot(index="sequence", columns="rate", values="loss"), []
        for budget, answers in self.answers.groupby("budget"):
            same = interpolated(retention, losses, answers.retention.mean())
            difference = answers.set_index("sequence").loss - same
            rows.append({"budget": budget, "retention": answers.retention.mean()} | bootstrap(difference))
        return pd.DataFrame(rows)

    @cached_property
    def rate_change(self) -> pd.DataFrame:
        """Change of the rate from the first third of an answer to the first task to its last, for each budget."""
        rows = []
        for budget, rates in self.rates[self.rates.task == self.task].groupby("budget"):
            courses = [{"rates": of.to_list()} for _, of in rates.groupby("sequence", sort=False).rate]
            rows.append({"budget": budget} | bootstrap(rate_changes(courses)))
        return pd.DataFrame(rows)


def measure(
    *, model: str, source: str, tasks: Sequence[str], n_train: int, n_validation: int, n_test: int, budgets: Sequence[float],
    steps: int, batch: int, accumulate: int, checkpointing: bool, first_pruned_layer: int, residency: str, n_rates: int,
    predictors: str, max_new_tokens: int, batch_size: int, seed: int, device_map: str = "", **_,
) -> Predictors:  # fmt: skip
    """Train a predictor for each budget and save it, and one with four rates. Parameters: the notebook's."""
    learn = study_examples(source, n_train, tasks=tasks, split="train", seed=seed)
    check = study_examples(source, n_validation, tasks=tasks, split="validation", seed=seed + 1)
    unseen = study_examples(source, n_test, tasks=tasks, split="test", seed=seed + 2)
    loaded, processor = dyrate.load(model, device_map=device_map or None)
    shown = Settings(
        budget=min(budgets, key=lambda budget: abs(budget - SHOWN)), steps=steps, batch=batch, accumulate=accumulate,
        checkpointing=checkpointing, first_pruned_layer=first_pruned_layer, residency=residency, n_rates=n_rates, seed=seed,
    )  # fmt: skip
    four = replace(shown, n_rates=4)
    four_rates = untrained(loaded, four, learn)
    prepared = batches_to_learn(loaded, processor, four_rates, learn, four)  # for every budget the same
    Trainer(loaded, four_rates, prepared, four).run()
    trained = train_all(loaded, processor, [replace(shown, budget=b) for b in budgets], learn, prepared, check, batch_size)
    for budget, training in trained.items():
        training.predictor.about |= {"model": model, "n_train": len(learn)}
        training.predictor.save_pretrained(ROOT / predictors / f"{residency}-{budget:g}")
    test = prepare_examples(loaded, processor, four_rates, unseen, batch)
    about = describe(loaded)
    measured_on = (
        f"`{model}` ({about['family']}, {about['parameters'] / 1e6:.1f} M parameters), "
        f"{len(learn)} answers to train{left_out(learn)}, {len(check)} to calibrate{left_out(check)}, "
        f"{len(unseen)} unseen to test{left_out(unseen)}, residency {residency}, seed {seed}"
    )
    generation = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    answers, rates = _forced(loaded, {b: t.predictor for b, t in trained.items()}, test)
    predictor = trained[shown.budget].predictor
    return Predictors(
        unseen=unseen, budget=shown.budget, n_rates=n_rates, measured_on=measured_on, place=model_and_images(model, unseen),
        diagnosis=diagnostics.warnings_by_sign({b: t.signs for b, t in trained.items()}),
        four_rates_change=float(np.mean(rate_changes(teacher_forced(loaded, four_rates, test)))),
        history=pd.concat([pd.DataFrame(t.history).assign(budget=b) for b, t in trained.items()], ignore_index=True),
        retention=met(loaded, processor, {b: t.predictor for b, t in trained.items()}, unseen, generation),
        answers=answers, rates=rates, weights=slopes(predictor), constant_answers=under_constants(loaded, predictor, test),
        gradient=_gradient(loaded, predictor, test, shown, {unseen[0].task, "caption"}), signs=_signs(trained),
    )  # fmt: skip


def met(model, processor, predictors: dict[float, RatePredictor], examples: Examples, generation: dict) -> pd.DataFrame:
    """The mean retention of greedy generation under each budget's predictor, with 95 % intervals over answers."""
    rows = []
    for budget, predictor in predictors.items():
        paths = trajectories(model, processor, DyRate.of(predictor), examples, **generation)
        rows.append({"budget": budget} | bootstrap([np.mean(path) for path in paths.values()]))
    return pd.DataFrame(rows)


def _forced(model, predictors: dict[float, RatePredictor], prepared: list[Prepared]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every answer under each budget's predictor, and the rate at each of its steps."""
    answers, rates = [], []
    for budget, predictor in predictors.items():
        for i, row in enumerate(teacher_forced(model, predictor, prepared)):
            about = {"budget": budget, "sequence": i, "task": row["task"]}
            answers.append(about | {"loss": row["loss"], "retention": row["retention"]})
            rates += [about | {"step": step, "rate": float(rate)} for step, rate in enumerate(row["rates"])]
    return pd.DataFrame(answers), pd.DataFrame(rates)


def slopes(predictor: RatePredictor) -> pd.DataFrame:
    """How a deviation more attention of a head to a segment moves the choice of rate, one row a head."""
    centred = predictor.rates - predictor.rates.mean()
    slope = (centred @ predictor.linear.weight.detach()).cpu()[: len(SEGMENTS) * predictor.heads]
    by_head = pd.DataFrame(slope.reshape(predictor.heads, len(SEGMENTS)).numpy(), columns=list(SEGMENTS))
    return by_head.rename_axis("head").reset_index()


def under_constants(model, predictor: RatePredictor, prepared: list[Prepared]) -> pd.DataFrame:
    """Every answer under constant rates spread over the predictor's grid: rate, sequence, loss, retention."""
    n_rates, rows = len(predictor.rates), []
    for rate in np.linspace(0, 1 - 1 / n_rates, min(n_rates, 12)):
        answers = pd.DataFrame(teacher_forced(model, predictor, prepared, rate=float(rate)))
        rows.append(answers[["loss", "retention"]].rename_axis("sequence").reset_index().assign(rate=rate))
    return pd.concat(rows, ignore_index=True)


def _gradient(model, predictor: RatePredictor, prepared: list[Prepared], settings: Settings, tasks: set[str]) -> pd.DataFrame:
    """`predicted_by_gradient` for tasks with long answers."""
    batches = [b for b in prepared if tasks & set(b.tasks)]
    rows = predicted_by_gradient(model, predictor, batches, 1 - settings.budget, checkpointing=settings.checkpointing)
    return pd.DataFrame([row for row in rows if row["task"] in tasks])


def _signs(trained: dict[float, Trained]) -> pd.DataFrame:
    """Signs of failure of each budget's predictor, one row each."""
    rows = [{"budget": budget, "warns": sign.warns} | asdict(sign) for budget, t in trained.items() for sign in t.signs]
    return pd.DataFrame(rows).rename(columns={"name": "sign"})[["budget", "sign", "measured", "unit", "limit", "above", "warns"]]


def train_all(
    model, processor, settings: Sequence[Settings], learn: Examples, prepared: list[Prepared], check: Examples, batch_size: int
) -> dict[float, Trained]:
    """`dyrate.training.train` for settings that differ in their budget alone, so that examples are prepared once."""
    held_out = prepare_examples(model, processor, untrained(model, settings[0], learn), check, settings[0].batch)
    trained = {}
    for each in settings:
        predictor = untrained(model, each, learn)
        history = Trainer(model, predictor, prepared, each).run()
        calibration = calibrate(model, processor, predictor, check, each.retention, batch_size=batch_size)
        signs = diagnostics.signs(model, processor, predictor, held_out, history, check)
        trained[each.budget] = Trained(predictor, history, calibration, signs)
    return trained


def _mean_loss(answers: pd.DataFrame) -> dict:
    """Mean retention of some answers, and mean loss with its 95 % interval."""
    loss = bootstrap(answers.loss)
    return {"retention": answers.retention.mean(), "loss": loss.pop("value")} | loss


def record(chapter: Chapter, measured: Predictors) -> None:
    """The chapter's headline numbers and sentences."""
    budget = measured.budget
    change, versus = (table.set_index("budget").loc[budget] for table in (measured.rate_change, measured.minus_constant))
    signs = measured.signs[measured.signs.budget == budget].set_index("sign").measured
    chapter.number("four_rates_change", measured.four_rates_change)
    chapter.number("rate_change", change)
    chapter.number("rate_deviation", measured.shown_rates.rate.std())
    chapter.number("grid_step", 1 / measured.n_rates)
    chapter.number("n_rates", measured.n_rates)
    chapter.number("shown_budget", budget)
    chapter.number("worst_miss_points", measured.worst_miss)
    chapter.number("loss_minus_constant", versus)
    chapter.number("rate_entropy", signs["entropy"])
    chapter.number("information_task", signs["information on the task"])
    chapter.number("information_step", signs["information on the step"])
    chapter.text("shown_task", measured.task.replace("_", " "))
    record_gradient(chapter, measured)
    chapter.text("diagnosis", measured.diagnosis)
    chapter.text("predictor_finding", finding(measured))
    chapter.text("predictor_measured_on", measured.measured_on)


def finding(measured: Predictors) -> str:
    """At every budget: whether it is met, what the predictor's loss is beside a constant's, and whether its rates rise."""
    versus, change = measured.minus_constant, measured.rate_change
    budgets = f"its {len(versus)} budgets" if len(versus) > 1 else "its budget"
    losses = ", ".join(f"{in_words(row, '+.3f')} at {row['budget']:g}" for row in versus.to_dict("records"))
    (lower, higher), (falling, rising) = (((of.high < 0).sum(), (of.low > 0).sum()) for of in (versus, change))
    rates = f"Its rates rise over a {measured.task.replace('_', ' ')} at {rising} and fall at {falling} of them. "
    return (
        f"**With {measured.place}, a linear predictor meets {budgets} within {measured.worst_miss:.1f} points of retention. At "
        f"equal retention its loss is lower than a constant rate's at {lower} and higher at {higher} of {len(versus)}: {losses} "
        f"(predictor minus constant, nats a token).** {rates if change.n.any() else ''}95 % intervals, n = {versus.n.max()} "
        "unseen answers, one seed of training for each budget. Equal retention is not equal computation."
    )


def record_gradient(chapter: Chapter, measured: Predictors) -> None:
    """By how much the loss changes towards the ends of the grid, as measured and as the gradient predicts."""
    start = 1 - measured.budget
    mean = measured.gradient[measured.gradient.task == measured.task].groupby("rate")[["loss", "predicted"]].mean()
    changes = mean - mean.loss.iloc[np.abs(mean.index - start).argmin()]
    ends = {"dropping": changes.iloc[-1], "keeping": changes.iloc[0]}
    chapter.number("gradient_rate", start)
    for end, change in ends.items():
        chapter.number(f"really_{end}", change.loss)
        chapter.number(f"predicted_{end}", change.predicted)
    wrong = [end for end, change in ends.items() if change.loss * change.predicted < 0]
    chapter.text(
        "gradient_verdict",
        f"For {' and '.join(wrong)} it has the wrong sign: the sum of what each token does alone is not what they do together."
        if wrong
        else "Its signs are right.",
    )
