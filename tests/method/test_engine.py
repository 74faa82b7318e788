"""The laws that every strategy obeys, on tiny random models: whatever is registered is tested."""

import copy
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface

import dyrate
import families
from dyrate.engine import cache, decoder_layers, pruning
from dyrate.engine.cache import Slots
from dyrate.engine.kept import PerRow, Rows
from laws import (
    DECODINGS,
    IMAGE,
    STEPS,
    examples_for,
    first_row,
    fits,
    generate,
    ids_of,
    long_images,
    make,
    n_image_of,
)
from masked import masked

pytestmark = pytest.mark.usefixtures("shown")
CASES = [(name, {}) for name in dyrate.STRATEGIES]
CASES += [(name, {"residency": "mask"}) for name in ("Constant", "LinearAnneal", "MeanTrajectory", "DepthPrune", "PyramidDrop")]
CASES += [(name, {"positions": "compact"}) for name in ("FastV", "FastVRerank", "LinearAnneal", "DepthPrune", "DyRate")]
CASES += [(name, {"positions": "kept"}) for name in ("PyramidDrop", "SparseVLM", "VisionZip", "PruMerge", "PruMergePlus")]
CASES += [
    ("LinearAnneal", {"end": 1.0, "steps": 4, "start": 0.3}),
    ("PruMerge", {"retention": None}),
    ("PruMergePlus", {"retention": None}),
    ("SparseVLM", {"shares": (0.9, 0.5, 0.2)}),
]


def applied(strategy, model, inputs):
    """The strategy on the model, told of the examples that it needs; skips what does not fit."""
    fits(strategy, model)
    return strategy(model, examples=examples_for(strategy, n_image_of(inputs))[: len(inputs["input_ids"])])


def compare(out, slow, trace, decoding="greedy"):
    """Logits and kept tokens of every step against the slow definition's."""
    rows = torch.arange(out.logits[0].shape[0])
    for step in range(STEPS):
        row = out.beam_indices[:, step].long() if decoding.startswith("beam") else rows
        assert (out.logits[step][row] - slow.logits[:, step]).abs().max() < 1e-4
        for stage in trace.steps[step].stages:
            assert torch.equal(stage.kept[row], slow.kept[stage.layer][step] if slow.kept else stage.kept[row] | True)
            assert stage.counts == stage.kept.sum(1).tolist()


@pytest.mark.parametrize(("name", "fields"), CASES, ids=ids_of(CASES))
@pytest.mark.parametrize("decoding", DECODINGS)
def test_dropping_equals_masking(family, name, fields, decoding):
    model, inputs = family
    strategy = make(name, fields)
    with applied(strategy, model, inputs) as trace:
        out = generate(model, inputs, **DECODINGS[decoding])
    answers = out.sequences[:, inputs["input_ids"].shape[1] :]
    slow = masked(model, inputs, answers, strategy, IMAGE, examples_for(strategy, n_image_of(inputs)))
    compare(out, slow, trace, decoding)


@pytest.mark.parametrize(("name", "fields"), CASES, ids=ids_of(CASES))
def test_a_batch_of_one(family, name, fields):
    model, inputs = family
    inputs = first_row(inputs)
    strategy = make(name, fields)
    with applied(strategy, model, inputs) as trace:
        out = generate(model, inputs)
    answers = out.sequences[:, inputs["input_ids"].shape[1] :]
    compare(out, masked(model, inputs, answers, strategy, IMAGE, examples_for(strategy, n_image_of(inputs))[:1]), trace)


@pytest.mark.parametrize(("name", "fields"), CASES, ids=ids_of(CASES))
def test_eager_attention_prunes_as_fused_attention_does(name, fields):
    """Rows of one length need no mask in the fused kernels, which are causal by themselves; eager attention is not."""
    model, inputs = long_images(4)
    inputs = first_row(inputs)
    found = []
    for kind in ("sdpa", "eager"):
        model.set_attn_implementation(kind)
        with applied(make(name, fields), model, inputs):
            found.append(generate(model, inputs))
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(found[0].logits, found[1].logits, strict=True))


def test_the_comparison_can_fail(family):
    """The negative control: the mask of a strategy that keeps others gives other logits."""
    model, inputs = family
    with make("FastV")(model):
        out = generate(model, inputs)
    answers = out.sequences[:, inputs["input_ids"].shape[1] :]
    slow = masked(model, inputs, answers, make("WorstFirst"), IMAGE)
    assert (out.logits[0] - slow.logits[:, 0]).abs().max() > 1e-3


def test_a_case_with_an_unknown_field_is_no_case():
    """The negative control of the matrix: a field that a strategy lacks must not be invented."""
    with pytest.raises(TypeError, match="rerank"):
        make("FastV", {"rerank": True})


@pytest.mark.parametrize("name", dyrate.STRATEGIES)
@pytest.mark.parametrize("decoding", DECODINGS)
def test_keeping_all_is_plain_generate(family, name, decoding):
    model, inputs = family
    plain = generate(model, inputs, **DECODINGS[decoding])
    with applied(make(name, retention=1.0), model, inputs) as trace:
        kept = generate(model, inputs, **DECODINGS[decoding])
    assert (trace.retention() == 1).all()
    assert torch.equal(plain.sequences, kept.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, kept.logits, strict=True))


@pytest.mark.parametrize("name", dyrate.STRATEGIES)
def test_evicted_tokens_never_return_and_memory_falls(family, name):
    model, inputs = family
    strategy = make(name, retention=0.25)
    with make("Full")(model) as full:
        generate(model, inputs)
    with applied(strategy, model, inputs) as trace:
        generate(model, inputs)
    for before, after in zip(trace.steps, trace.steps[1:], strict=False):
        for a, b in zip(before.stages, after.stages, strict=True):
            if strategy.residency == "evict":
                assert not (b.kept & ~a.kept).any()
    held, all_held = trace.steps[-1].kv_bytes, full.steps[-1].kv_bytes
    n_layers = len(held)
    first = min(strategy.stages(n_layers), default=n_layers)
    assert held[:first] == all_held[:first]
    if strategy.residency == "evict" and name != "LinearAnneal":  # it frees memory later, on long images
        assert all(a < b for a, b in zip(held[first:], all_held[first:], strict=True))
    assert (trace.frame().groupby("step").kept.sum().diff().dropna() <= 0).all()


@dataclass
class WithOneMore(Rows):
    """What the engine remembers of each row, and a number of its own."""

    number: torch.Tensor = None
    name: list[str] = field(default_factory=list)

    @classmethod
    def of_prompt(cls, *given):
        found = super().of_prompt(*given)
        found.number = torch.arange(len(found.real))
        found.name = [f"row {i}" for i in range(len(found.real))]
        return found


def test_a_new_field_of_a_row_follows_its_beam(family, monkeypatch):
    """Beams change places; whatever is declared beside the others moves with them, and what cannot move is an error."""
    model, inputs = family
    made, moves = [], []
    monkeypatch.setattr(pruning, "Rows", WithOneMore)

    def take(self, index):
        moves.append(index)
        made.append(self)
        PerRow.take(self, index)

    monkeypatch.setattr(WithOneMore, "take", take)
    with make("LinearAnneal", {"steps": 4})(model):
        generate(model, inputs, num_beams=3)
    expected = torch.arange(6)
    for index in moves:
        expected = expected[index]
    assert expected.tolist() != list(range(6))  # beams did change places
    assert made[-1].number.tolist() == expected.tolist()
    assert made[-1].name == [f"row {i}" for i in expected.tolist()]

    @dataclass
    class Odd(PerRow):
        value: dict = None

    with pytest.raises(TypeError, match="value holds a dict"):
        Odd({"a": 1}).take(torch.tensor([0]))


def test_memory_is_freed_while_decoding():
    """Much at once when a schedule falls steeply, and the little that one step drops when it has been read past for long."""
    model, inputs = long_images(8)

    def sizes(rates):
        with dyrate.MeanTrajectory(rates=rates)(model) as trace:
            generate(model, inputs, 20)
        return [step.kv_bytes[-1] for step in trace.steps]

    steep, gentle = sizes((0.0, 0.3, 0.6, 0.9)), sizes((0.0, 0.15))
    assert steep[3] < 0.35 * steep[0]
    token = gentle[1] - gentle[0]
    assert token > 0 and gentle[-1] == gentle[0] + (19 - 9) * token  # 19 tokens added, 9 evicted


@pytest.mark.parametrize("strategy", [
    dyrate.MeanTrajectory(rates=(0.0, 0.3, 0.6, 0.9)), dyrate.LinearAnneal(start=0.1, end=1.0, steps=4),
    dyrate.PyramidDrop(), dyrate.SparseVLM(), dyrate.PruMerge(), dyrate.DepthPrune(),
], ids=repr)  # fmt: skip
@pytest.mark.parametrize("decoding", DECODINGS)
def test_freed_memory_changes_nothing(strategy, decoding):
    """As dropping equals masking, with images long enough that memory is freed between steps, in rows of unequal length."""
    model, inputs = long_images(8)
    with strategy(model) as trace:
        out = generate(model, inputs, **DECODINGS[decoding])
    slow = masked(model, inputs, out.sequences[:, inputs["input_ids"].shape[1] :], strategy, IMAGE)
    for step in range(STEPS):
        row = out.beam_indices[:, step].long() if decoding == "beam-3" else torch.arange(2)
        assert (out.logits[step][row] - slow.logits[:, step]).abs().max() < 1e-4
    assert trace.steps[-1].kv_bytes[-1] // len(trace.n_image) < full_bytes(model, inputs) // 2


RESELECTING = [dyrate.Constant(rate=0.8, residency="mask"), dyrate.DyCoke(rate=0.8), dyrate.DepthPrune(residency="mask")]


@pytest.mark.parametrize("strategy", RESELECTING, ids=repr)
@pytest.mark.parametrize("decoding", DECODINGS)
def test_reading_only_the_selected_keys_changes_nothing(monkeypatch, strategy, decoding):
    """In rows of unequal length; of DepthPrune's layers all but the last are observed, and so read whole."""
    model, inputs = long_images(8)
    taken, real = [], Slots.of
    monkeypatch.setattr(Slots, "of", lambda self, x: taken.append(x.shape[2]) or real(self, x))
    with strategy(model):
        out = generate(model, inputs, **DECODINGS[decoding])
    assert len(taken) >= 2 * (STEPS - 1)  # keys and values, in one layer at least
    slow = masked(model, inputs, out.sequences[:, inputs["input_ids"].shape[1] :], strategy, IMAGE)
    for step in range(STEPS):
        row = out.beam_indices[:, step].long() if decoding == "beam-3" else torch.arange(2)
        assert (out.logits[step][row] - slow.logits[:, step]).abs().max() < 1e-4


@pytest.mark.parametrize("strategy", [dyrate.Full(), dyrate.LinearAnneal(start=0.1, end=1.0, steps=8)], ids=repr)
@pytest.mark.parametrize("decoding", DECODINGS)
def test_buffers_that_are_full_are_made_anew(monkeypatch, strategy, decoding):
    model, inputs = long_images(8)
    with strategy(model):
        roomy = generate(model, inputs, 12, **DECODINGS[decoding])
    monkeypatch.setattr(cache, "ROOM", 2)
    with strategy(model):
        out = generate(model, inputs, 12, **DECODINGS[decoding])
    assert torch.equal(out.sequences, roomy.sequences)
    assert all(torch.equal(a, b) for a, b in zip(out.logits, roomy.logits, strict=True))


def test_buffers_shrink():
    """What is evicted leaves memory, not only the view that attention reads."""
    model, inputs = long_images(24)

    def stored(strategy):
        with strategy(model):
            out = generate(model, inputs)
        return out.past_key_values.layers[-1].keys.untyped_storage().nbytes()

    assert stored(dyrate.MeanTrajectory(rates=(0.0, 0.3, 0.6, 0.9))) < 0.25 * stored(dyrate.Full())


def full_bytes(model, inputs):
    with dyrate.Full()(model) as trace:
        generate(model, inputs)
    return trace.steps[-1].kv_bytes[-1]


def test_several_images_in_a_prompt():
    model, inputs = long_images(4)
    ids = torch.tensor([[1, 5, *[IMAGE] * 16, 7, *[IMAGE] * 16, 8], [0, 0, *[0] * 16, 1, *[IMAGE] * 16, 9]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": torch.randn(3, 3, 16, 16)}
    for strategy in (dyrate.FastV(), dyrate.LinearAnneal(steps=3), dyrate.VisionZip(), dyrate.PruMerge(), dyrate.SparseVLM()):
        for beams in (1, 2):
            with strategy(model) as trace:
                out = generate(model, inputs, num_beams=beams)
            slow = masked(model, inputs, out.sequences[:, ids.shape[1] :], strategy, IMAGE)
            for step in range(STEPS):
                row = out.beam_indices[:, step].long() if beams > 1 else torch.arange(2)
                assert (out.logits[step][row] - slow.logits[:, step]).abs().max() < 1e-4
            assert trace.n_image[0] == 32 and trace.n_image[-1] == 16


def snapshot(model):
    """Configuration, attributes and hooks of every module, and transformers' registry. Two are `generate`'s own."""
    modules = {
        name: (
            id(getattr(m, "config", None)),
            sorted(set(m.__dict__) - {"_cache", "_previous_max_cache_length"}),
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
        )
        for name, m in model.named_modules()
    }
    return modules, sorted(AttentionInterface._global_mapping), copy.deepcopy(model.config.to_dict())


@pytest.mark.parametrize("name", dyrate.STRATEGIES)
def test_the_model_is_left_as_found(family, name):
    model, inputs = family
    plain = generate(model, inputs)  # first: transformers puts hooks of its own into a model at its first forward pass
    before = snapshot(model)
    with applied(make(name), model, inputs):
        generate(model, inputs)
    assert snapshot(model) == before

    class Fails(dyrate.LinearAnneal):
        def keep(self, seen):
            if seen.step == 2:
                raise KeyError("in the middle")
            return super().keep(seen)

    del dyrate.STRATEGIES["Fails"]
    with pytest.raises(KeyError, match="in the middle"), Fails()(model):
        generate(model, inputs)
    assert snapshot(model) == before
    assert torch.equal(generate(model, inputs).sequences, plain.sequences)


def test_after_a_failure_the_same_context_goes_on(family):
    model, inputs = family
    strategy = dyrate.FastV()
    with strategy(model) as trace:
        expected = generate(model, inputs).sequences
        with pytest.raises(ValueError, match="no image token"):
            model.generate(input_ids=torch.tensor([[1, 5, 6]]), max_new_tokens=2)
        assert torch.equal(generate(model, inputs).sequences, expected)
        assert len(trace.steps) == STEPS


def test_a_strategy_in_ten_lines(family):
    """The example of README and book, as written there: defining it is all."""
    source = Path("book/half_life.py").read_text()
    assert source in Path("README.md").read_text()
    model, inputs = family
    found = {"__name__": "half_life"}
    exec(compile(source, "half_life.py", "exec"), found)
    half_life = dyrate.STRATEGIES.pop("HalfLife")
    assert half_life is found["HalfLife"]
    with half_life(half_life=1)(model) as trace:
        generate(model, inputs)
    n = trace.n_image[0]
    assert [round(x * n) for x in trace.retention()[:, 0]] == [n - int(n * (1 - 0.5**t) + 1e-4) for t in range(STEPS)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_cache": False}, "KV cache"),
        ({"cache_implementation": "static"}, "default cache"),
        ({"prefill_chunk_size": 4}, "fresh cache|no image token"),
        ({"prompt_lookup_num_tokens": 2}, "assisted decoding"),
    ],
    ids=["no-cache", "static", "chunked", "assisted"],
)  # fmt: skip
def test_what_is_not_supported_is_named(settings, message):
    model, inputs = long_images(4)
    inputs = first_row(inputs)
    generate(model, inputs)
    before = snapshot(model)
    with pytest.raises((ValueError, NotImplementedError), match=message), dyrate.FastV()(model):
        model.generate(**inputs, max_new_tokens=8, do_sample=False, **settings)
    assert snapshot(model)[:2] == before[:2]


def test_two_strategies_at_once_are_an_error(family):
    model, _ = family
    with (
        dyrate.FastV()(model),
        pytest.raises(RuntimeError, match="attached to this model already"),
        dyrate.Constant(first_pruned_layer=3)(model),
    ):
        pass


def test_no_image_and_nan_are_named():
    model, inputs = long_images(4)
    with pytest.raises(ValueError, match="no image token"), dyrate.FastV()(model):
        model.generate(input_ids=torch.tensor([[1, 5, 6]]), max_new_tokens=2)
    with torch.no_grad():
        model.model.language_model.layers[1].self_attn.q_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"NaN.*bfloat16"), dyrate.FastV()(model):
        model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("strategy", [dyrate.FastV, dyrate.VTW, dyrate.FixedPrune, dyrate.DepthPrune])
def test_layers_that_the_model_lacks_are_named(strategy):
    model, _ = long_images(4)
    n = len(decoder_layers(model))
    for first in (n + 1, n + 7, *([n] if strategy is not dyrate.VTW else [])):
        with pytest.raises(ValueError, match=f"layers 0 to {n - 1}, so none to prune from {first} on"):
            strategy(first_pruned_layer=first)(model).__enter__()
    with dyrate.VTW.at(1.0, n)(model):  # all layers see the image
        pass


def test_a_compiled_model_is_refused():
    model, _ = long_images(4)
    with pytest.raises(ValueError, match="this model is compiled"), dyrate.FastV()(torch.compile(model)):
        pass
    model.compile()
    with pytest.raises(ValueError, match="this model is compiled"), dyrate.FastV()(model):
        pass


def test_a_model_with_a_strategy_cannot_be_copied():
    """The copy would keep the hooks of the first, and half of what they know."""
    model, _ = long_images(4)
    with dyrate.FastV()(model), pytest.raises(RuntimeError, match="leave its `with` block before copying"):
        copy.deepcopy(model)
    assert snapshot(copy.deepcopy(model))[0].keys() == snapshot(model)[0].keys()


@pytest.mark.parametrize("later", ["after the block", "under the next prompt"])
def test_a_pruned_cache_ends_with_its_prompt(later):
    model, inputs = long_images(4)
    step = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": None}
    with dyrate.FastV()(model):
        cache = model(**inputs, use_cache=True).past_key_values
        model(**step, past_key_values=cache)  # the control: within, it goes on
        if later == "under the next prompt":
            model(**inputs, use_cache=True)
            with pytest.raises(RuntimeError, match="this cache was pruned by a strategy that has left it"):
                model(**step, past_key_values=cache)
    with pytest.raises(RuntimeError, match="this cache was pruned by a strategy that has left it"):
        model(**step, past_key_values=cache)


def test_a_class_whose_fields_would_not_be_set_is_refused():
    class Undecorated(dyrate.Strategy, registered=False):
        share: float = 0.5

    with pytest.raises(TypeError, match=r"Undecorated has fields of its own: put @dataclass\(kw_only=True\) above it"):
        Undecorated(share=0.25)
    with pytest.raises(TypeError, match=r"Untyped.residency is a field: give it its type"):

        class Untyped(dyrate.Strategy, registered=False):
            residency = "mask"


def test_padding_on_the_right_is_refused():
    model, inputs = long_images(4)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], inputs["input_ids"][:, -1:]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][:, -1] = 0
    with pytest.raises(ValueError, match="pad on the left"), dyrate.FastV()(model):
        model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("sliding", ["mistral", "gemma3"])
def test_sliding_windows_are_named_before_anything_runs(sliding):
    from transformers import (
        CLIPVisionConfig,
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        LlavaConfig,
        LlavaForConditionalGeneration,
        MistralConfig,
        SiglipVisionConfig,
    )

    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)
    if sliding == "mistral":
        text = MistralConfig(**families.TEXT, sliding_window=8)
        config = LlavaConfig(vision_config=CLIPVisionConfig(**vision), text_config=text, image_token_index=IMAGE)
        model, named = LlavaForConditionalGeneration(config), "layers 2, 3, 4"
    else:  # every second layer slides here; in the released models five of six
        types = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
        text = {**families.TEXT, "head_dim": 8, "layer_types": types, "sliding_window": 8}
        config = Gemma3Config(vision_config=SiglipVisionConfig(**vision).to_dict(), text_config=text, image_token_index=IMAGE)
        model, named = Gemma3ForConditionalGeneration(config), "layers 2, 4"
    with pytest.raises(ValueError, match=rf"{named} .*sliding-window"), dyrate.FastV()(model.eval()):
        pytest.fail("attached")


def test_encoder_side_needs_a_cls():
    with pytest.raises(ValueError, match=r"encoder-side.*idefics3.*FastV"), dyrate.VisionZip()(families.idefics()[0]):
        pass


@pytest.mark.parametrize(("make_bad", "message"), [
    (lambda: dyrate.FastV(rate=1.5), "lies in \\[0, 1\\]"),
    (lambda: dyrate.Constant(residency="keep"), 'residency is "evict" or "mask"'),
    (lambda: dyrate.DepthPrune(rate=0.8, deepest=0.5), "cannot return"),
    (lambda: dyrate.FastV(first_pruned_layer=-1), "no layer"),
], ids=["rate", "residency", "deepest", "layer"])  # fmt: skip
def test_bad_fields_are_named(make_bad, message):
    with pytest.raises(ValueError, match=message):
        make_bad()
