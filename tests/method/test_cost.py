"""The ledger gives the papers' figures (see the book's errata), and what torch counts in a real run."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dyrate
from dyrate.cost import (
    LLAVA_7B,
    LLAVA_13B,
    Shape,
    kv_bytes,
    layer_macs,
    layer_tokens,
    ledger,
    prefill_macs,
    remaining,
    shape_of,
)
from laws import IMAGE, SUPPRESSED, examples_for, first_row, fits, long_images, make, n_image_of


def fastv(layers, k, text, retention):
    """Tokens in each layer under FastV(K, R) with 576 image tokens; fractions are not rounded, as in their report."""
    return [text + 576] * k + [text + 576 * retention] * (layers - k)


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


@pytest.mark.usefixtures("shown")
@pytest.mark.parametrize("name", dyrate.STRATEGIES)
@pytest.mark.parametrize("retention", [0.25, 0.75])
def test_agrees_with_counted_flops(name, retention):
    model, inputs = long_images(8)
    inputs = first_row(inputs)
    strategy = make(name, retention=retention)
    fits(strategy, model)
    model.set_attn_implementation("eager")  # its products are counted in full, as the ledger counts them
    examples = examples_for(strategy, n_image_of(inputs))[:1]
    with strategy(model, examples=examples) as trace, FlopCounterMode(display=False) as counter, torch.no_grad():
        model.generate(**inputs, do_sample=False, min_new_tokens=6, max_new_tokens=6, suppress_tokens=SUPPRESSED)
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
        model.generate(**inputs, do_sample=False, min_new_tokens=3, max_new_tokens=3, suppress_tokens=SUPPRESSED)
    shape, n = shape_of(model), inputs["input_ids"].shape[1]
    found = ledger(shape, trace, strategy, cache=False).iloc[0]
    assert found.decode == sum(prefill_macs(shape, [n + t] * shape.layers) for t in (1, 2))
    images = int((inputs["input_ids"] == IMAGE).sum())
    assert ledger(shape, trace, strategy, text=False).iloc[0].prefill == prefill_macs(shape, [images] * shape.layers)


def test_what_remains_by_hand():
    shape = Shape(layers=4, width=8, heads=2, kv_heads=2, inner=16, vocabulary=10)
    kept, n, text = torch.tensor([[8.0, 4.0, 0.0]]), torch.tensor([8]), torch.tensor([2])
    valid = torch.tensor([[True, True, False]])
    assert remaining("retention", shape, kept, n, text, valid, 1).item() == pytest.approx((1 + 0.5) / 2)
    # cache bytes read: layer 0 whole, three layers pruned: step 0 holds 10 and 10, step 1 holds 11 and 7
    assert remaining("kv_bytes", shape, kept, n, text, valid, 1).item() == pytest.approx((10 + 30 + 11 + 21) / (40 + 44))
    assert remaining("macs", shape, n.float()[None].expand(1, 3), n, text, valid, 1).item() == pytest.approx(1)
    assert remaining("macs_uncached", shape, kept, n, text, valid, 1) < 1
