"""Controls that know more than a model does: what an image shows, which task is asked, what rates another input had."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import torch

from dyrate.strategies.fastv import FastV
from dyrate.strategy import Strategy
from study.examples import SceneExample
from study.pocket.scenes import render


@dataclass(kw_only=True)
class TaskConstant(Strategy):
    """One rate for each kind of task: what knowing the task alone is worth."""

    rates: dict[str, float] = field(default_factory=dict)
    compared = False
    control = True

    def keep(self, seen):
        tasks = [e.task for e in seen.example_of_each_row()]
        if missing := set(tasks) - set(self.rates):
            raise ValueError(f"TaskConstant has no rate for the tasks {sorted(missing)}")
        return [1 - self.rates[task] for task in tasks]

    @classmethod
    def at_retention(cls, retention, n_layers, **fields):
        return cls(rates={"": 1 - retention}, **fields)


@dataclass(kw_only=True)
class TaskSchedule(Strategy):
    """One schedule for each kind of task: rates[task][step], the last one from then on."""

    rates: dict[str, tuple[float, ...]] = field(default_factory=dict)
    compared = False
    control = True

    def keep(self, seen):
        tasks = [e.task for e in seen.example_of_each_row()]
        if missing := set(tasks) - set(self.rates):
            raise ValueError(f"TaskSchedule has no rates for the tasks {sorted(missing)}")
        return [1 - self.rates[task][min(seen.step, len(self.rates[task]) - 1)] for task in tasks]

    @classmethod
    def at_retention(cls, retention, n_layers, **fields):
        return cls(rates={"": (1 - retention,)}, **fields)


@dataclass(kw_only=True)
class ShuffledRates(Strategy):
    """Each example gets rates that another one had: rates[k][step], k drawn by its name. Is the rate made for its input?"""

    rates: tuple[tuple[float, ...], ...] = ((0.0, 0.5), (0.25, 0.75))
    compared = False
    control = True

    def keep(self, seen):
        drawn = [self.rates[zlib.crc32(e.name.encode()) % len(self.rates)] for e in seen.example_of_each_row()]
        return [1 - rates[min(seen.step, len(rates) - 1)] for rates in drawn]

    @classmethod
    def at_retention(cls, retention, n_layers, **fields):
        return cls(rates=((1 - retention,),), **fields)


@dataclass(kw_only=True)
class Oracle(FastV):
    """Knows which patches show something (scenes only): keeps those first, by attention among equals."""

    needs = frozenset({"scene"})
    control = True

    def score(self, seen):
        examples = seen.example_of_each_row()
        if not all(isinstance(e, SceneExample) for e in examples):
            raise ValueError("Oracle needs to know what an image shows: use it on scenes of a laboratory")
        shown = torch.stack([torch.from_numpy(render(e.scene).shown) for e in examples])
        return super().score(seen) + shown.to(seen.image.device).float()  # attention is at most 1
