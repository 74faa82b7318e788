"""Observed attention is eager attention, the model is left as found, and errors say what to do."""

import copy

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

import dyrate
from dyrate.segments import PADDING, SEGMENTS, find_segments, segment_shares, system_ids
from study.examples import examples

STEPS = 5


def eager_rows(model, inputs):
    """Rows of the newest query per step and layer, from eager attention with output_attentions: the slow reference."""
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        out = model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, output_attentions=True, return_dict_in_generate=True
        )
    finally:
        model.set_attn_implementation(usual)
    return out.sequences, [[layer[:, :, -1].float() for layer in step] for step in out.attentions]


def observed_rows(model, inputs, layers=None, **generate):
    seen = []
    with dyrate.observe(model, lambda layer, attention: seen.append((layer, attention.newest)), layers):
        tokens = model.generate(**inputs, **({"max_new_tokens": STEPS, "do_sample": False} | generate))
    return tokens, seen


def test_equals_eager_attention(family):
    model, inputs = family
    tokens, seen = observed_rows(model, inputs)
    reference, rows = eager_rows(model, inputs)
    assert torch.equal(tokens, reference)
    n_layers = len(rows[0])
    assert len(seen) == STEPS * n_layers
    for i, (layer, row) in enumerate(seen):
        assert layer == i % n_layers
        assert (row - rows[i // n_layers][layer]).abs().max() < 1e-5


def test_the_comparison_can_fail(family):
    """The negative control: rows of another step are not equal."""
    model, inputs = family
    _, seen = observed_rows(model, inputs)
    _, rows = eager_rows(model, inputs)
    assert (seen[0][1] - rows[0][1]).abs().max() > 1e-4


def test_observing_changes_no_token_and_no_logit(family):
    model, inputs = family
    plain = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with dyrate.observe(model, lambda layer, attention: attention.newest):
        seen = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(plain.sequences, seen.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, seen.logits, strict=True))


@pytest.mark.parametrize("decoding", [{"num_beams": 3}, {"do_sample": True, "top_p": 0.9}], ids=["beam-3", "top-p"])
def test_follows_other_decodings(family, decoding):
    model, inputs = family
    torch.manual_seed(1)
    plain = model.generate(**inputs, max_new_tokens=STEPS, **({"do_sample": False} | decoding))
    torch.manual_seed(1)
    tokens, seen = observed_rows(model, inputs, [1], **decoding)
    assert torch.equal(plain, tokens)
    assert {layer for layer, _ in seen} == {1}
    assert all(torch.allclose(row.sum(-1), torch.ones(row.shape[:2]), atol=1e-5) for _, row in seen)


def snapshot(model):
    modules = {
        name: (
            id(m.config) if hasattr(m, "config") else None,
            sorted(m.__dict__),
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
        )
        for name, m in model.named_modules()
    }
    return modules, copy.deepcopy(sorted(AttentionInterface._global_mapping)), model.config.to_json_string()


def test_leaves_the_model_as_found(family):
    model, inputs = family
    before = snapshot(model)
    observed_rows(model, inputs)
    assert snapshot(model) == before

    def fails(layer, attention):
        raise RuntimeError("stop in the middle")

    with pytest.raises(RuntimeError, match="in the middle"), dyrate.observe(model, fails):
        model.generate(**inputs, max_new_tokens=2)
    assert snapshot(model) == before


def test_observing_twice_is_an_error(family):
    model, _ = family
    before = snapshot(model)
    with dyrate.observe(model, print), pytest.raises(RuntimeError, match="observed already"), dyrate.observe(model, print):
        pass
    assert snapshot(model) == before


def test_pocket_record_equals_eager():
    model, processor = dyrate.load("pocket")
    batch, images = next(examples("pocket", 2, tasks=["description", "qa_colour"]).batches(4))
    prompts = [e.prompt for e in batch]
    recordings = dyrate.record(model, processor, images, prompts, max_new_tokens=STEPS, image_rows=True)
    inputs = dyrate.encode(processor, images, prompts)
    segments = find_segments(inputs["input_ids"], model.config.image_token_id, inputs["attention_mask"], system_ids(processor))
    _, rows = eager_rows(model, inputs)
    for i, recording in enumerate(recordings):
        for step in range(len(recording.tokens)):
            for layer, row in enumerate(rows[step]):
                expected = segment_shares(row, segments)[i].numpy()
                assert np.abs(recording.shares[step, layer] - expected).max() < 1e-5
                image = row[i, :, : inputs["input_ids"].shape[1]][:, segments.mask("image")[i]].mean(0).numpy()
                assert np.abs(recording.image[step, layer] - image).max() < 1e-5
        assert (recording.counts[:, 3] == np.arange(len(recording.tokens))).all()


def test_record_refuses_beams():
    model, processor = dyrate.load("pocket")
    batch, images = next(examples("pocket", 1).batches(1))
    with pytest.raises(ValueError, match="num_beams=1"):
        dyrate.record(model, processor, images, [batch[0].prompt], num_beams=2)


def test_segments_by_hand():
    ids = torch.tensor([[0, 0, 1, 5, 9, 9, 7, 8], [1, 5, 6, 9, 7, 9, 8, 8], [1, 5, 9, 9, 9, 7, 7, 7]])
    mask = (ids != 0).long()
    found = find_segments(ids, 9, mask, system_ids=[1, 5])
    s, i, u, p = 0, 1, 2, PADDING
    assert found.kind.tolist() == [[p, p, s, s, i, i, u, u], [s, s, u, i, u, i, u, u], [s, s, i, i, i, u, u, u]]
    assert found.counts().tolist() == [[2, 2, 2, 0], [2, 2, 4, 0], [2, 3, 3, 0]]
    # without the template's tokens: all before the first image
    assert find_segments(ids, 9, mask).kind[1].tolist() == [s, s, s, i, u, i, u, u]
    first = torch.tensor([[9, 9, 1, 7]])
    assert find_segments(first, 9, system_ids=[1, 5]).kind.tolist() == [[i, i, u, u]]


def test_no_image_is_named():
    with pytest.raises(ValueError, match="prompt 1 has no image token"):
        find_segments(torch.tensor([[1, 9, 2], [1, 3, 2]]), 9)


def test_shares_by_hand():
    segments = find_segments(torch.tensor([[1, 9, 9, 7]]), 9, system_ids=[1])
    row = torch.tensor([[[0.1, 0.2, 0.3, 0.15, 0.25]]])
    assert torch.allclose(segment_shares(row, segments), torch.tensor([[[0.1, 0.5, 0.15, 0.25]]]))
    assert SEGMENTS == ("system", "image", "instruction", "response")
