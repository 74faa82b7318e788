"""What a choice among trajectories reaches at a budget: chosen on one half of the answers, scored on the other.

Every policy minimises an estimate of loss + penalty * cost; the penalty is what trades them. As it grows, a policy runs along its
frontier of mean cost and mean loss, of which neighbouring points are mixed to meet a budget: the lower convex hull, seen from the
half that chose. Tasks have equal weight. Intervals are over answers, resampled within their tasks after the choice is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int

PENALTIES = np.concatenate([[0.0], np.geomspace(1e-4, 30, 80)])  # nats a token for the whole cost
RESAMPLES = 1000
RIDGE = 10.0  # in units of a standardised feature's variance over one answer


@dataclass(frozen=True, eq=False)
class Library:
    """Losses and costs of `n` answers under the trajectories (columns) that one ranking and residency admits.

    constant: which columns are constants. task: of each answer, as a number. features: what a predictor sees at step 0.
    """

    loss: Float[np.ndarray, "n trajectory"]
    cost: Float[np.ndarray, "n trajectory"]
    constant: Bool[np.ndarray, " trajectory"]
    task: Int[np.ndarray, " n"]
    features: Float[np.ndarray, "n feature"]

    @property
    def halves(self) -> Int[np.ndarray, " n"]:
        """0 or 1 for each answer: every other one of each task."""
        half = np.zeros(len(self.task), int)
        for task in np.unique(self.task):
            of = self.task == task
            half[of] = np.arange(of.sum()) % 2
        return half


@dataclass(frozen=True)
class Policy:
    """A way to choose. estimate: of `values` (n, trajectory), those of the answers `asked`, from those of the answers `seen`."""

    name: str
    estimate: Callable[[Library, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    constants_only: bool = False


def of_mean(library: Library, values: np.ndarray, seen: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The mean of all tasks."""
    by_task = of_task(library, values, seen, np.unique(library.task, return_index=True)[1])
    return np.broadcast_to(by_task.mean(0), (len(asked), values.shape[1]))


def of_task(library: Library, values: np.ndarray, seen: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The mean of the answer's task."""
    means = {task: values[seen[library.task[seen] == task]].mean(0) for task in np.unique(library.task)}
    return np.stack([means[task] for task in library.task[asked]])


def of_features(library: Library, values: np.ndarray, seen: np.ndarray, asked: np.ndarray, told: bool = False) -> np.ndarray:
    """Ridge regression on the features at step 0. told: and on which task it is."""
    x = library.features
    x = (x - x[seen].mean(0)) / np.maximum(x[seen].std(0), 1e-6)
    if told:
        x = np.hstack([x, library.task[:, None] == np.unique(library.task)])
    mean = values[seen].mean(0)
    gram = x[seen].T @ x[seen] + RIDGE * np.eye(x.shape[1])
    return mean + x[asked] @ np.linalg.solve(gram, x[seen].T @ (values[seen] - mean))


def of_task_and_features(library: Library, values: np.ndarray, seen: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Ridge regression on the features at step 0 and the task."""
    return of_features(library, values, seen, asked, told=True)


def of_answer(library: Library, values: np.ndarray, seen: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The truth."""
    return values[asked]


POLICIES = (
    Policy("constant", of_mean, constants_only=True),
    Policy("constant by task", of_task, constants_only=True),
    Policy("schedule", of_mean),
    Policy("schedule by task", of_task),
    Policy("by features", of_features),
    Policy("by task and features", of_task_and_features),
    Policy("best for each answer", of_answer),
)


@dataclass(frozen=True, eq=False)
class Frontier:
    """Loss and cost of each answer at each penalty (columns), each answer under a choice that the other half made."""

    loss: Float[np.ndarray, "n penalty"]
    cost: Float[np.ndarray, "n penalty"]


def frontier(library: Library, policy: Policy) -> Frontier:
    """What a policy chooses at each penalty, cross-fitted on the two halves."""
    columns = np.flatnonzero(library.constant) if policy.constants_only else np.arange(library.loss.shape[1])
    loss, cost = library.loss[:, columns], library.cost[:, columns]
    choice = np.empty((len(loss), len(PENALTIES)), int)
    for half in (0, 1):
        seen, asked = np.flatnonzero(library.halves != half), np.flatnonzero(library.halves == half)
        both = policy.estimate(library, np.hstack([loss, cost]), seen, asked)
        choice[asked] = choices(*np.split(both, 2, axis=1))
    choice = np.unique(choice, axis=1)  # most penalties choose as their neighbour does
    return Frontier(np.take_along_axis(loss, choice, 1), np.take_along_axis(cost, choice, 1))


def choices(loss: np.ndarray, cost: np.ndarray) -> Int[np.ndarray, "n penalty"]:
    """The trajectory of least loss + penalty * cost at each penalty, from estimates of both (n, trajectory)."""
    return np.stack([(loss + penalty * cost).argmin(1) for penalty in PENALTIES], 1)


def resampled(task: Int[np.ndarray, " n"], resamples: int = RESAMPLES, seed: int = 0) -> Float[np.ndarray, "resample n"]:
    """Weights of the answers: the first row all of them, the others drawn with replacement within each task; rows sum to 1."""
    return _resampled(np.unique(task, return_inverse=True)[1].tobytes(), resamples, seed)


@lru_cache(maxsize=8)
def _resampled(numbers: bytes, resamples: int, seed: int) -> np.ndarray:
    """`resampled` of tasks as numbers, which the libraries of a laboratory share."""
    task = np.frombuffer(numbers, int)
    rng = np.random.default_rng(seed)
    tasks = np.unique(task)
    weights = np.zeros((resamples + 1, len(task)))
    for name in tasks:
        of = np.flatnonzero(task == name)
        weights[0, of] = 1
        weights[1:, of] = rng.multinomial(len(of), np.full(len(of), 1 / len(of)), resamples)
        weights[:, of] /= len(of) * len(tasks)
    weights.flags.writeable = False
    return weights


@dataclass(frozen=True, eq=False)
class Curve:
    """Mean loss and mean cost in each resample along a frontier, the cheapest point first."""

    loss: Float[np.ndarray, "resample point"]
    cost: Float[np.ndarray, "resample point"]

    def at(self, budgets: float | Float[np.ndarray, " resample"]) -> Float[np.ndarray, " resample"]:
        """Loss at a mean cost, one or one a resample: NaN below the cheapest point, and above the dearest that point's."""
        budgets = np.broadcast_to(budgets, len(self.cost))[:, None]
        below = np.clip((self.cost <= budgets).sum(1, keepdims=True) - 1, 0, None)  # the last point that is not dearer
        above = np.minimum(below + 1, self.cost.shape[1] - 1)
        (low, high), (start, end) = ([np.take_along_axis(of, i, 1) for i in (below, above)] for of in (self.cost, self.loss))
        part = np.clip((budgets - low) / np.where(high > low, high - low, 1), 0, None)
        return np.where(budgets < self.cost[:, :1] - 1e-9, np.nan, start + part * (end - start))[:, 0]  # a mean is rounded


def curve(front: Frontier, weights: Float[np.ndarray, "resample n"]) -> Curve:
    """The means of a frontier's answers under each resample's weights."""
    cost, loss = weights @ front.cost, weights @ front.loss
    order = cost.argsort(1, kind="stable")
    return Curve(np.take_along_axis(loss, order, 1), np.take_along_axis(cost, order, 1))


@cache
def curves(library: Library) -> dict[str, Curve]:
    """The curve of every policy."""
    weights = resampled(library.task)
    return {policy.name: curve(frontier(library, policy), weights) for policy in POLICIES}


def number(values: Float[np.ndarray, " resample"], n: int, level: float = 0.95) -> dict:
    """The value (of all answers, in the first place) with its percentile interval: {"value", "low", "high", "n"}."""
    tail = (1 - level) / 2
    low, high = np.nanquantile(values[1:], [tail, 1 - tail]) if np.isfinite(values[1:]).any() else (np.nan, np.nan)
    return {"value": float(values[0]), "low": float(low), "high": float(high), "n": n}


def at_budget(library: Library, budget: float) -> dict[str, dict]:
    """What each policy reaches at a budget, with intervals, and what it gains on a constant rate, answers paired.

    For each policy its loss; "<policy>: gain" in nats a token; "<policy>: share" of what pruning costs under the constant rate;
    "<policy>: captured", of the gain of the best trajectory for each answer. "unpruned": the loss without pruning.
    """
    reached, n = {name: of.at(budget) for name, of in curves(library).items()}, len(library.task)
    unpruned = resampled(library.task) @ library.loss[:, _whole(library)]
    result = {"unpruned": number(unpruned, n)} | {name: number(values, n) for name, values in reached.items()}
    constant = reached["constant"]
    headroom, cost = constant - reached["best for each answer"], constant - unpruned
    for name, values in reached.items():
        gain = constant - values
        for what, of in (("gain", gain), ("share", gain / cost), ("captured", gain / headroom)):
            result[f"{name}: {what}"] = number(of, n)
    return result


def _whole(library: Library) -> int:
    """The column that keeps everything."""
    return int(np.flatnonzero(library.constant & np.isclose(library.cost, 1).all(0))[0])


def against_constant(
    library: Library, loss: Float[np.ndarray, "n seed"], cost: Float[np.ndarray, "n seed"], seed: int = 0
) -> dict[str, dict]:
    """A trained controller against a constant rate and the best trajectory for each answer, each at the controller's own cost.

    loss, cost: of each answer under each training of it. Intervals are over answers and trainings. gain: nats a token.
    """
    weights, (n, seeds) = resampled(library.task), loss.shape
    each = {"controller": weights @ loss, "cost": weights @ cost}
    for name in ("constant", "schedule", "best for each answer"):
        of = curves(library)[name]
        each[name] = np.stack([of.at(each["cost"][:, s]) for s in range(seeds)], 1)
    drawn = over_trainings(seeds, len(weights), seed)
    mean = {name: np.take_along_axis(values, drawn, 1).mean(1) for name, values in each.items()}
    gain, headroom = mean["constant"] - mean["controller"], mean["constant"] - mean["best for each answer"]
    found = mean | {"gain": gain, "headroom": headroom, "captured": gain / headroom}
    return {name: number(values, n) | {"seeds": seeds} for name, values in found.items()}


def over_trainings(seeds: int, resamples: int, seed: int = 0) -> Int[np.ndarray, "resample seed"]:
    """Trainings drawn with replacement in each resample; all of them, once each, in the first."""
    drawn = np.random.default_rng(seed).integers(0, seeds, (resamples, seeds))
    drawn[0] = np.arange(seeds)
    return drawn


def best_of(library: Library, controllers: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, dict]:
    """`against_constant` of the controller that captures most: chosen on one half of the answers, scored on the other.

    controllers: loss and cost of each, (n, seed); the mean over its trainings counts.
    """
    fronts = {name: frontier(library, policy) for policy in POLICIES if (name := policy.name) in ("constant", POLICIES[-1].name)}
    means = {name: (loss.mean(1), cost.mean(1)) for name, (loss, cost) in controllers.items()}
    chosen = np.empty((2, len(library.task)))
    for half in (0, 1):
        weights = resampled(library.task, 0) * (library.halves != half)
        weights /= weights.sum()

        def share(name: str, weights=weights) -> float:
            loss, cost = (weights[0] @ values for values in means[name])
            constant, best = (curve(front, weights).at(cost)[0] for front in fronts.values())
            return np.nan_to_num((constant - loss) / (constant - best), nan=-np.inf)

        asked = library.halves == half
        chosen[:, asked] = np.stack(means[max(controllers, key=share)])[:, asked]
    return against_constant(library, *chosen[:, :, None])
