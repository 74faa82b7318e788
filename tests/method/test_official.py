"""Published methods against their authors' rules, on 576 image tokens: the same tokens, merged alike, in the same order."""

from itertools import pairwise

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import dyrate
import official
from dyrate.engine import decoder_layers
from families import TEXT
from laws import IMAGE

CASES = {
    "FastV": (dyrate.FastV(rate=0.5), official.fastv, {}),
    "PyramidDrop": (dyrate.PyramidDrop(), official.pyramiddrop, {}),
    "SparseVLM": (dyrate.SparseVLM(), official.sparsevlm, {}),
    "VisionZip": (dyrate.VisionZip(rate=1 - 64 / 576), official.visionzip, {}),
    "PruMerge": (dyrate.PruMerge(), official.prumerge, {}),
    "PruMergePlus": (dyrate.PruMergePlus(), official.prumerge, {"plus": True}),
    "DivPrune": (dyrate.DivPrune(rate=1 - 64 / 576), official.divprune, {}),
    "VisPruner": (dyrate.VisPruner(rate=1 - 64 / 576), official.vispruner, {}),
    "FasterVLM": (dyrate.VisPruner(rate=1 - 64 / 576, important=1), official.vispruner, {"important": 1}),
    "CDPruner": (dyrate.CDPruner(rate=1 - 24 / 576), official.cdpruner, {}),  # the kernel's rank is the width, 32
    "DART": (dyrate.DART(rate=1 - 132 / 576), official.dart, {}),  # its code keeps four pivots beside 128 tokens
}
OTHERS = {
    "FastV": dyrate.WorstFirst(rate=0.5), "PyramidDrop": dyrate.PyramidDrop(positions="kept"),
    "SparseVLM": dyrate.SparseVLM(positions="kept"), "VisionZip": dyrate.VisionZip(rate=1 - 64 / 576, contextual=0.2),
    "PruMerge": dyrate.PruMerge(neighbours=31), "PruMergePlus": dyrate.PruMerge(),
    "DivPrune": dyrate.CDPruner(rate=1 - 64 / 576), "VisPruner": dyrate.VisPruner(rate=1 - 64 / 576, important=0.4),
    "FasterVLM": dyrate.VisPruner(rate=1 - 64 / 576), "CDPruner": dyrate.DiversityAlone(rate=1 - 24 / 576),
    "DART": dyrate.DART(rate=1 - 132 / 576, pivots=3),
}  # fmt: skip


@pytest.fixture(scope="module")
def llava():
    """24 x 24 patches, 8 layers, eager: attention matrices are there to be read."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=96, patch_size=4,
        initializer_range=0.3,
    )  # fmt: skip
    text = LlamaConfig(**(TEXT | {"num_hidden_layers": 8, "initializer_range": 0.2}))
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=576)
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")
    return model


def entering(model, strategy, ids, pixels) -> dict[int, torch.Tensor]:
    """The hidden states (token, width) that enter each stage's layer, after the drop."""
    layers, found, handles = decoder_layers(model), {}, []

    def note(layer):
        def hook(module, args, kwargs):
            found[layer] = (args[0] if args else kwargs["hidden_states"])[0]

        return hook

    with strategy(model), torch.no_grad():  # hooks run in the order of their registration: these after the engine's
        for stage in strategy.stages(len(layers)):
            handles.append(layers[stage].register_forward_pre_hook(note(stage), with_kwargs=True))
        try:
            model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], pixel_values=pixels, use_cache=True)
        finally:
            for handle in handles:
                handle.remove()
    return found


def prompt(seed: int):
    """A prompt with 576 image tokens among text of its own, and an image."""
    generator = torch.Generator().manual_seed(seed)
    before, after = (torch.randint(3, 57, (n,), generator=generator) for n in (3, 9))
    loud = torch.randn(1, 1, 24, 24, generator=generator).exp().repeat_interleave(4, 2).repeat_interleave(4, 3)
    pixels = loud * torch.randn(1, 3, 96, 96, generator=generator)  # some patches stand out, as in photographs
    return torch.cat([before, torch.full((576,), IMAGE), after]), pixels


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(6))
def test_the_same_tokens_as_the_authors(llava, name, seed):
    strategy, rule, settings = CASES[name]
    ids, pixels = prompt(seed)
    with torch.no_grad():
        expected = rule(llava, ids, pixels, **settings)
    found = entering(llava, strategy, ids, pixels)
    assert found.keys() == expected.keys()
    for layer, hidden in expected.items():
        assert found[layer].shape == hidden.shape
        assert (found[layer] - hidden).abs().max() < 1e-5 * max(1.0, float(hidden.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_the_comparison_can_fail(llava, name):
    """The negative control: a choice made otherwise is seen."""
    ids, pixels = prompt(0)
    _, rule, settings = CASES[name]
    with torch.no_grad():
        expected = rule(llava, ids, pixels, **settings)
    found = entering(llava, OTHERS[name], ids, pixels)
    last = max(expected)
    assert found[last].shape != expected[last].shape or (found[last] - expected[last]).abs().max() > 1e-4


@pytest.mark.parametrize("caught", [0.0, 0.97, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_re_selection_swaps_when_a_token_looks_elsewhere(llava, caught, seed):
    ids, pixels = prompt(seed)
    with dyrate.DSTP(caught=caught)(llava) as trace:
        out = llava.generate(
            input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], pixel_values=pixels, do_sample=False,
            min_new_tokens=8, max_new_tokens=8, suppress_tokens=[IMAGE],
        )  # fmt: skip
    with torch.no_grad():
        expected = official.dstp(llava, ids, pixels, out[0, len(ids) :], caught=caught)
    assert [set(step.stages[0].kept[0].nonzero()[:, 0].tolist()) for step in trace.steps] == expected
    swaps = sum(a != b for a, b in pairwise(expected))
    assert {0.0: swaps == 0, 0.97: 0 < swaps < 7, 1.0: swaps == 7}[caught]  # the negative control: each rule makes its own
