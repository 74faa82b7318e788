"""Chapter 2, a predictor for the rate: trained to budgets, does it meet them, what does it choose, and is it worth it?"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

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
from study.answers import digest, surroundings
from study.book import ROOT, Chapter
from study.examples import examples as study_examples
from study.examples import left_out, model_and_images
from study.intervals import bootstrap, bootstrap_crossed, in_words, interpolated
from study.predictors import training_key
from study.profiles import predictor_name

SHOWN = 0.33  # the budget whose predictor is shown, or the one next to it


@dataclass
class Predictors:
    """What the trained predictors do on unseen examples.

    budget, n_rates: of the predictor shown, the first seed's. measured_on: for captions. place: model and images, for the
    headline. Tables: history: of each budget's first training, one row a step. generated: the mean retention of every greedy
    answer: budget, seed, sequence, retention. answers: every answer under each predictor, teacher-forced: budget, seed, sequence,
    task, loss (nats a token), retention, rate_change (from its first third to its last; NaN in answers of fewer than nine
    tokens). rates: of the predictor shown, at each step. weights: its `slopes`. constant_answers: `under_constants`. gradient:
    `predicted_by_gradient` at the rate that the budget shown leaves. signs: of failure, one row each. four_rates_change: over an
    answer, of a predictor like the one shown with four rates.
    """

    unseen: Examples
    budget: float
    n_rates: int
    measured_on: str
    place: str
    four_rates_change: float
    history: pd.DataFrame
    generated: pd.DataFrame
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
    def seeds(self) -> int:
        """Trainings of each budget."""
        return self.answers.seed.nunique()

    @cached_property
    def retention(self) -> pd.DataFrame:
        """The mean retention of generation under each budget's predictors."""
        return self._over_both(self.generated, "retention")

    @property
    def worst_miss(self) -> float:
        """The largest distance of a predictor's mean retention in generation from its budget, in percentage points."""
        mean = self.generated.groupby(["budget", "seed"], as_index=False).retention.mean()
        return 100 * (mean.retention - mean.budget).abs().max()

    @cached_property
    def constant(self) -> pd.DataFrame:
        """Loss and retention of each constant rate, means over answers, with 95 % intervals of the loss."""
        rows = []
        for _, answers in self.constant_answers.groupby("rate"):
            loss = bootstrap(answers.loss)
            rows.append({"retention": answers.retention.mean(), "loss": loss.pop("value")} | loss)
        return pd.DataFrame(rows)

    @cached_property
    def learned(self) -> pd.DataFrame:
        """The same of each budget's predictors."""
        return self._beside_retention(self.answers, "loss").rename(columns={"value": "loss"})

    @cached_property
    def minus_constant(self) -> pd.DataFrame:
        """Loss of each budget's predictors minus that of a constant rate, interpolated at the retention of each."""
        retention = self.constant_answers.groupby("rate").retention.mean()
        losses, differences = self.constant_answers.pivot(index="sequence", columns="rate", values="loss"), []
        for _, answers in self.answers.groupby(["budget", "seed"]):
            same = interpolated(retention, losses, answers.retention.mean())
            differences.append(answers.assign(minus=answers.loss.to_numpy() - same[answers.sequence].to_numpy()))
        return self._beside_retention(pd.concat(differences), "minus")

    @cached_property
    def rate_change(self) -> pd.DataFrame:
        """Change of the rate from the first third of an answer to the first task to its last, for each budget."""
        return self._over_both(self.answers[self.answers.task == self.task], "rate_change")

    def _beside_retention(self, rows: pd.DataFrame, column: str) -> pd.DataFrame:
        """`_over_both` with the mean retention of each budget's answers."""
        found = self._over_both(rows, column)
        found.insert(1, "retention", self.answers.groupby("budget").retention.mean().to_numpy())
        return found

    @staticmethod
    def _over_both(rows: pd.DataFrame, column: str) -> pd.DataFrame:
        """A column's mean for each budget with its 95 % interval over answers and seeds; answers with a NaN are left out."""
        tables = {budget: of.pivot(index="sequence", columns="seed", values=column) for budget, of in rows.groupby("budget")}
        return pd.DataFrame([{"budget": budget} | bootstrap_crossed(table.dropna()) for budget, table in tables.items()])


def measure(
    *, model: str, source: str, tasks: Sequence[str], n_train: int, n_validation: int, n_test: int, budgets: Sequence[float],
    seeds: int, steps: int, batch: int, accumulate: int, checkpointing: bool, first_pruned_layer: int, residency: str,
    n_rates: int, predictors: str, max_new_tokens: int, batch_size: int, seed: int, device_map: str = "", **_,
) -> Predictors:  # fmt: skip
    """Train `seeds` predictors for each budget and save them, and one with four rates. Parameters: the notebook's.

    An interrupted measurement goes on from the trainings that it finished, and within one.
    """
    learn = study_examples(source, n_train, tasks=tasks, split="train", seed=seed)
    check = study_examples(source, n_validation, tasks=tasks, split="validation", seed=seed + 1)
    unseen = study_examples(source, n_test, tasks=tasks, split="test", seed=seed + 2)
    loaded, processor = dyrate.load(model, device_map=device_map or None)
    shown = Settings(
        budget=min(budgets, key=lambda budget: abs(budget - SHOWN)), steps=steps, batch=batch, accumulate=accumulate,
        checkpointing=checkpointing, first_pruned_layer=first_pruned_layer, residency=residency, n_rates=n_rates, seed=seed,
    )  # fmt: skip
    four = replace(shown, n_rates=4)
    asked = [replace(shown, budget=budget, seed=seed + i) for i in range(seeds) for budget in budgets]
    work = ROOT / predictors / "unfinished"
    with_four, *others = train_all(loaded, processor, [four, *asked], learn, check, batch_size, work)
    four_rates = with_four.predictor
    trained = {(settings.budget, settings.seed): training for settings, training in zip(asked, others, strict=True)}
    for (budget, own), training in trained.items():
        training.predictor.about |= {"model": model, "n_train": len(learn)}
        training.predictor.save_pretrained(ROOT / predictors / predictor_name(residency, budget, own - seed))
    test = prepare_examples(loaded, processor, four_rates, unseen, batch)
    about = describe(loaded)
    measured_on = (
        f"`{model}` ({about['family']}, {about['parameters'] / 1e6:.1f} M parameters), "
        f"{len(learn)} answers to train{left_out(learn)}, {len(check)} to calibrate{left_out(check)}, "
        f"{len(unseen)} unseen to test{left_out(unseen)}, residency {residency}, "
        + (f"seeds {seed} to {seed + seeds - 1}" if seeds > 1 else f"seed {seed}")
    )
    generation = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    predictor = trained[shown.budget, seed].predictor
    forced = {key: _forced(loaded, training.predictor, test) for key, training in trained.items()}
    generated = {key: _generated(loaded, processor, t.predictor, unseen, generation) for key, t in trained.items()}
    measured = Predictors(
        unseen=unseen, budget=shown.budget, n_rates=n_rates, measured_on=measured_on, place=model_and_images(model, unseen),
        four_rates_change=float(np.mean(rate_changes(teacher_forced(loaded, four_rates, test)))),
        history=pd.concat([pd.DataFrame(trained[b, seed].history).assign(budget=b) for b in budgets], ignore_index=True),
        generated=by_budget_and_seed(generated), answers=by_budget_and_seed({key: of for key, (of, _) in forced.items()}),
        rates=forced[shown.budget, seed][1], weights=slopes(predictor),
        constant_answers=under_constants(loaded, predictor, test),
        gradient=_gradient(loaded, predictor, test, shown, {unseen[0].task, "caption"}),
        signs=by_budget_and_seed({key: _signs(training) for key, training in trained.items()}),
    )  # fmt: skip
    shutil.rmtree(work)
    return measured


def by_budget_and_seed(tables: dict[tuple[float, int], pd.DataFrame]) -> pd.DataFrame:
    """Tables below each other, each with its budget and its seed in front."""
    return pd.concat(tables, names=["budget", "seed"]).reset_index(level=[0, 1])


def _generated(model, processor, predictor: RatePredictor, examples: Examples, generation: dict) -> pd.DataFrame:
    """The mean retention of each greedy answer under a predictor: sequence, retention."""
    paths = trajectories(model, processor, DyRate.of(predictor), examples, **generation)
    means = [np.mean(paths[example.name]) for example in examples if example.name in paths]
    return pd.DataFrame({"retention": means}).rename_axis("sequence").reset_index()


def _forced(model, predictor: RatePredictor, prepared: list[Prepared]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every answer under a predictor, teacher-forced, and the rate at each of its steps."""
    answers, rates = [], []
    for i, row in enumerate(teacher_forced(model, predictor, prepared)):
        about = {"sequence": i, "task": row["task"]}
        (change,) = rate_changes([row]) or [np.nan]
        answers.append(about | {"loss": row["loss"], "retention": row["retention"], "rate_change": change})
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


def _signs(trained: Trained) -> pd.DataFrame:
    """Signs of failure of a predictor, one row each."""
    rows = [{"warns": sign.warns} | asdict(sign) for sign in trained.signs]
    return pd.DataFrame(rows).rename(columns={"name": "sign"})[["sign", "measured", "unit", "limit", "above", "warns", "remedy"]]


def train_all(
    model, processor, settings: Sequence[Settings], learn: Examples, check: Examples, batch_size: int, work: Path
) -> list[Trained]:
    """`dyrate.training.train` for each of the settings; neighbours with the same seed share what is prepared.

    work: a folder for what is finished and for the state of what is not, from which an interrupted call goes on.
    """
    trained, batches, held_out = [], {}, None
    around = digest(surroundings(model, processor))[:8]  # what is left of other weights or other code is not gone on from
    for each in settings:
        predictor = untrained(model, each, learn)
        folder = work / f"{training_key(model, each, learn, check)}-{around}"
        if each.seed not in batches:
            batches = {each.seed: batches_to_learn(model, processor, predictor, learn, each)}
        history = Trainer(model, predictor, batches[each.seed], each, work=folder).run()
        if (folder / "config.json").exists():
            predictor = RatePredictor.from_pretrained(folder).to(model.device)
        else:
            calibrate(model, processor, predictor, check, each.retention, batch_size=batch_size)
            predictor.save_pretrained(folder)
        held_out = held_out or prepare_examples(model, processor, predictor, check, each.batch)
        signs = diagnostics.signs(model, processor, predictor, held_out, history, check)
        trained.append(Trained(predictor, history, predictor.about["calibration"], signs))
    return trained


def record(chapter: Chapter, measured: Predictors) -> None:
    """The chapter's headline numbers and sentences."""
    budget = measured.budget
    change, versus = (table.set_index("budget").loc[budget] for table in (measured.rate_change, measured.minus_constant))
    signs = measured.signs[measured.signs.budget == budget].groupby("sign").measured.mean()
    chapter.number("four_rates_change", measured.four_rates_change)
    chapter.number("rate_change", change)
    chapter.number("rate_deviation", measured.rates.rate.std())
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
    chapter.text("diagnosis", diagnosis(measured.signs))
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
        f"unseen answers, {'one training' if measured.seeds == 1 else f'{measured.seeds} trainings'} for each budget. Equal "
        "retention is not equal computation."
    )


def diagnosis(signs: pd.DataFrame) -> str:
    """A sentence for each sign that warns: in how many trainings of which budgets, how far, and the remedy."""
    sentences, seeds = [], signs.seed.nunique()
    for name, found in signs[signs.warns].groupby("sign", sort=False):
        of_budgets = found.groupby("budget").size().items()
        where = ", ".join(f"{budget:g}" + (f" ({n} of {seeds} trainings)" if seeds > 1 else "") for budget, n in of_budgets)
        values = " to ".join(dict.fromkeys(f"{value:.3g}" for value in (found.measured.min(), found.measured.max())))
        first = found.iloc[0]
        side = f"{'above' if first.above else 'below'} {first.limit:.3g}"
        sentences.append(f"{name} at budget {where}: {values} {first.unit}, {side}; {first.remedy}")
    return "It warns: " + ". ".join(sentences) + "." if sentences else "None warns here."


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
