"""Static steps say what eager steps say: on tiny random models, with a stand-in for CUDA graphs and without."""

import pytest
import torch

import dyrate
from dyrate.engine import decoder_layers, static, static_steps
from dyrate.strategy import Strategy
from laws import DECODINGS, first_row, fits, generate, ids_of, long_images, make

STEPS = 40  # past a bucket's end
CASES = [(name, {}) for name in ("Full", "FastV", "FastVRerank", "PyramidDrop", "VisionZip", "DyRate")]
CASES += [("LinearAnneal", {"end": 1.0, "steps": 30, "start": 0.3})]


def stand_in(recordings):
    """Like a CUDA graph, a replay writes where the recording did, and Python in the model does not see it."""

    def record(run):
        observed = run.func.__self__.observed
        output = run()
        seen = dict(observed)
        recordings.append(output)

        def replay():
            before = dict(observed)
            output.copy_(run())
            for i in seen:
                seen[i].query.copy_(observed[i].query)
            observed.clear()
            observed.update(before)

        return replay, output

    return record


@pytest.mark.parametrize(("name", "fields"), CASES, ids=ids_of(CASES))
def test_static_steps_equal_eager_ones(family, monkeypatch, name, fields):
    model, inputs = family
    strategy = make(name, fields)
    fits(strategy, model)
    recordings = []
    monkeypatch.setitem(static.RECORDERS, "cpu", stand_in(recordings))
    with strategy(model) as trace:
        plain = generate(model, inputs, STEPS)
    with strategy(model, static=64) as static_trace:
        for _ in range(2):  # the second time over the first one's buffers and recordings
            before = len(recordings)
            out = generate(model, inputs, STEPS)
    assert torch.equal(out.sequences, plain.sequences)
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(out.logits, plain.logits, strict=True))
    assert [s.kv_bytes for s in static_trace.steps] == [s.kv_bytes for s in trace.steps]
    assert all(torch.equal(a.kept, b.kept) for s, t in zip(static_trace.steps, trace.steps, strict=True)
               for a, b in zip(s.stages, t.stages, strict=True))  # fmt: skip
    assert 0 < before == len(recordings)  # nothing is recorded twice


@pytest.mark.parametrize("decoding", DECODINGS)
def test_other_decodings(family, decoding):
    model, inputs = family
    strategy = make("LinearAnneal", {"end": 1.0, "steps": 4, "start": 0.3})
    with strategy(model):
        plain = generate(model, inputs, STEPS, **DECODINGS[decoding])
    with strategy(model, static=64):
        out = generate(model, inputs, STEPS, **DECODINGS[decoding])
    assert torch.equal(out.sequences, plain.sequences)


def test_buffers_grow_and_shrink(monkeypatch):
    model, inputs = long_images(8)  # 64 image tokens, dropped bit by bit
    monkeypatch.setattr(static, "BUCKET", 8)
    strategy = dyrate.LinearAnneal(start=0.1, end=0.9, steps=30)
    with strategy(model) as trace:
        plain = generate(model, inputs, STEPS)
    stages = strategy.stages(len(decoder_layers(model)))
    assert trace.steps[-1].kv_bytes[-1] < trace.steps[1].kv_bytes[-1] < trace.steps[1].kv_bytes[0]
    with strategy(model, static=64):
        out = generate(model, inputs, STEPS)
    assert torch.equal(out.sequences, plain.sequences)
    plain = generate(model, inputs, STEPS)
    for cuts in ((), stages):
        with static_steps(model, cuts, room=4):
            out = generate(model, inputs, STEPS)
        assert torch.equal(out.sequences, plain.sequences)


def test_the_model_is_left_as_found(family):
    model, inputs = family
    with pytest.raises(ValueError, match="keep gave"), Broken()(model, static=64):
        generate(model, first_row(inputs))
    assert all("forward" not in vars(layer) for layer in decoder_layers(model))
    model.set_attn_implementation("eager")
    try:
        with pytest.raises(ValueError, match='need attn_implementation="sdpa"'), static_steps(model):
            pass
    finally:
        model.set_attn_implementation("sdpa")


class Broken(Strategy):
    compared = False

    def keep(self, seen):
        return 1.0 if seen.step == 0 else 2.0


del dyrate.STRATEGIES["Broken"]  # no other test is to find it
