"""Controls that know more than a model does, on attention made by hand."""

import pytest
import torch

import dyrate
from by_hand import HEADS, kept, seen
from study import controls
from study.controls import Oracle, ShuffledRates, TaskConstant, TaskSchedule
from study.examples import examples

ONE = [dyrate.Example("a", "caption", "", ())]


def test_shuffled_rates_are_another_examples():
    strategy = ShuffledRates(rates=((0.1, 0.2), (0.3, 0.4)))
    with pytest.raises(ValueError, match="examples=batch"):
        strategy.keep(seen(HEADS))
    rates = [round(1 - strategy.keep(seen(HEADS, step=t, examples=ONE))[0], 6) for t in range(3)]
    assert rates in ([0.1, 0.2, 0.2], [0.3, 0.4, 0.4])


def test_one_rate_for_each_task():
    assert kept(TaskConstant(rates={"caption": 0.75}), seen(HEADS, examples=ONE)) == [1]
    with pytest.raises(ValueError, match=r"no rate for the tasks \['caption'\]"):
        TaskConstant(rates={"recap": 0.5}).keep(seen(HEADS, examples=ONE))


def test_one_schedule_for_each_task():
    strategy = TaskSchedule(rates={"caption": (0.25, 0.75)})
    assert [strategy.keep(seen(HEADS, step=t, examples=ONE)) for t in range(3)] == [[0.75], [0.25], [0.25]]
    with pytest.raises(ValueError, match=r"no rates for the tasks \['caption'\]"):
        TaskSchedule(rates={"recap": (0.5,)}).keep(seen(HEADS, examples=ONE))


def test_oracle_puts_shown_patches_first(monkeypatch):
    scenes = list(examples("pocket", 1))
    shown = torch.tensor([True, False, True, False])
    monkeypatch.setattr(controls, "render", lambda scene: type("Picture", (), {"shown": shown.numpy()}))
    assert kept(Oracle(rate=0.5), seen(HEADS, examples=scenes)) == [0, 2]
    assert kept(Oracle(rate=0.25), seen(HEADS, examples=scenes)) == [0, 1, 2]
    with pytest.raises(ValueError, match="use it on scenes"):
        Oracle().score(seen(HEADS, examples=ONE))
