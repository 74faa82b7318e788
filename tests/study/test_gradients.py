"""Rates that decide nothing, and slopes of the loss by the drop rate."""

import pytest
import torch

from dyrate.predictor import RatePredictor, rate_grid
from dyrate.teacher_forcing import prepare_tokens
from laws import long_images
from study.gradients import _shift, gradient_of_choices, inert, inert_rows, slope_rows


def prepared_and_predictor():
    model, inputs = long_images(4)
    predictor = RatePredictor(4, 5, "llava", n_rates=8)
    prepared = prepare_tokens(model, predictor, inputs, [[5, 9, 11, 30, 7, 2], [8, 40, 2]])
    prepared.tasks = ["a", "b"]
    return model, predictor, prepared


def test_a_rate_is_inert_unless_it_is_the_highest_so_far():
    assert inert(torch.tensor([[3, 5, 5, 2, 6], [0, 0, 1, 0, 1]])).tolist() == [
        [False, False, True, True, False], [False, True, False, True, True],
    ]  # fmt: skip


def test_no_lower_rate_has_another_gradient_where_the_rate_is_inert():
    model, predictor, prepared = prepared_and_predictor()
    predictor.linear.bias.data[4] = 9
    assert list(inert_rows(model, predictor, [prepared, prepared]).answer.unique()) == [0, 1, 2, 3]
    rows = inert_rows(model, predictor, [prepared])
    assert list(rows.answer) == [0] * 6 + [1] * 3
    assert list(rows.inert) == [False] + [True] * 5 + [False] + [True] * 2
    assert rows[rows.inert].lower.max() < 1e-7 < rows[~rows.inert].lower.min()


def test_a_shift_moves_the_mean_rate_by_one_and_is_local_where_it_is_cold():
    grid = rate_grid(32)
    for temperature in (0.01, 1.0, 8.0):
        shift = _shift(grid, 12, temperature)
        assert float(shift.sum()) == pytest.approx(0, abs=1e-4) and float(shift @ grid) == pytest.approx(1, abs=1e-4)
    cold = _shift(grid, 12, 0.01)
    assert cold.abs()[[11, 13]].sum() > 0.99 * cold.abs().sum()


def test_slopes_are_those_of_the_gradient_and_of_the_losses():
    model, predictor, prepared = prepared_and_predictor()
    rows = slope_rows(model, predictor, [prepared], 0.5, temperatures=(0.02,), distances=(1,))
    gradient = gradient_of_choices(model, predictor, prepared, torch.full_like(prepared.labels, 4)).sum(1)
    predicted = rows[rows.kind == "predicted"].slope.tolist()
    assert predicted == pytest.approx(((gradient[:, 5] - gradient[:, 3]) / (2 / 8)).tolist(), rel=1e-4, abs=1e-6)
    assert rows[rows.kind == "backward"].slope.tolist() == pytest.approx(predicted, rel=1e-2, abs=1e-4)
    assert rows[rows.kind == "measured"].slope.abs().max() > 0
