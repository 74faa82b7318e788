"""The ledger gives the papers' figures (see the book's errata), and what torch counts in a real run."""

import pytest
import torch
from test_engine import IMAGE, NOT_SAID, first_row, fits, long_images, make
from torch.utils.flop_counter import FlopCounterMode

import dyrate
from dyrate.cost import LLAVA_7B, LLAVA_13B, kv_bytes, layer_macs, layer_tokens, ledger, prefill_macs, shape_of


def fastv(layers, k, text, share):
    """Tokens in each layer under FastV(K, R) with 576 image tokens; fractions are not rounded, as in their report."""
    return [text + 576] * k + [text + 576 * share] * (layers - k)


@pytest.mark.parametrize(("value", "expected"), [
    (layer_macs(LLAVA_7B, 612, 612, 2), 99.33e9),
    (layer_macs(LLAVA_13B, 612, 612, 2), 154.64e9),
    (prefill_macs(LLAVA_13B, fastv(40, 2, 36, 0.1), 2) / 40, 29.73e9),
    (prefill_macs(LLAVA_13B, fastv(40, 2, 36, 0.25), 2) / 40, 50.18e9),
    (prefill_macs(LLAVA_13B, fastv(40, 2, 36, 0.5), 2) / 40, 84.60e9),
    (prefill_macs(LLAVA_7B, [576] * 32), 3.817e12),
    (prefill_macs(LLAVA_7B, [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8), 1.777e12),
    (prefill_macs(LLAVA_7B, fastv(32, 2, 0, 0.5)), 2.007e12),
    (prefill_macs(LLAVA_7B, fastv(32, 2, 39, 0.5), 2) / prefill_macs(LLAVA_7B, [615] * 32, 2), 0.554),
    (prefill_macs(LLAVA_7B, fastv(32, 3, 55, 0.5), 2) / prefill_macs(LLAVA_7B, [631] * 32, 2), 0.579),
    (prefill_macs(LLAVA_7B, [645] * 16 + [69] * 16, 2) / prefill_macs(LLAVA_7B, [645] * 32, 2), 0.552),
])  # fmt: skip
def test_published_figures(value, expected):
    assert abs(value / expected - 1) < 1e-3


@pytest.mark.parametrize("name", dyrate.STRATEGIES)
@pytest.mark.parametrize("share", [0.25, 0.75])
def test_agrees_with_counted_flops(name, share):
    model, inputs = long_images(8)
    inputs = first_row(inputs)
    strategy = make(name, {}, share=share, n_image=64)
    fits(strategy, model)
    model.set_attn_implementation("eager")  # its products are counted in full, as the ledger counts them
    with strategy(model) as trace, FlopCounterMode(display=False) as counter, torch.no_grad():
        model.generate(**inputs, do_sample=False, min_new_tokens=6, max_new_tokens=6, suppress_tokens=NOT_SAID)
    shape = shape_of(model)
    found = ledger(shape, trace, strategy, itemsize=4).iloc[0]
    counted = counter.get_total_flops() / 2
    assert abs(found.macs / counted - 1) < 0.01
    if strategy.residency == "evict":
        assert sum(trace.steps[0].kv_bytes) == kv_bytes(shape, layer_tokens(trace, shape.layers)[0, 0].tolist(), 4)


def test_a_ledger_without_cache_is_a_sum_of_prefills():
    model, inputs = long_images(4)
    inputs = first_row(inputs)
    strategy = dyrate.Full()
    with strategy(model) as trace:
        model.generate(**inputs, do_sample=False, min_new_tokens=3, max_new_tokens=3, suppress_tokens=NOT_SAID)
    shape, n = shape_of(model), inputs["input_ids"].shape[1]
    found = ledger(shape, trace, strategy, cache=False).iloc[0]
    assert found.decode == sum(prefill_macs(shape, [n + t] * shape.layers) for t in (1, 2))
    images = int((inputs["input_ids"] == IMAGE).sum())
    assert ledger(shape, trace, strategy, text=False).iloc[0].prefill == prefill_macs(shape, [images] * shape.layers)
