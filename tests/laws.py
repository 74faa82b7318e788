"""What the tests of the laws share: strategies to try, tiny models to try them on, and how to generate with them."""

import dataclasses
import importlib.metadata

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import dyrate
from dyrate.strategies.dyrate import DyRate
from families import IMAGE, TEXT

STUDY = any(importlib.metadata.distributions(name="dyrate-study"))  # the folder tests/study would be found by its name
if STUDY:
    import study.controls  # noqa: F401  (registers the study's strategies, where it is installed)

SUPPRESSED = [IMAGE, 61, 58, 59]  # an image token in an answer would be taken for one in the prompt
STEPS = 5
DECODINGS = {"greedy": {}, "beam-3": {"num_beams": 3}, "top-p": {"do_sample": True, "top_p": 0.9}}
ENCODER_SIDE = ("PruMerge", "PruMergePlus", "VisPruner", "VisionZip")
EXAMPLES = [dyrate.Example(name, "", "", ()) for name in "ab"]


def make(name: str, fields: dict | None = None, retention: float = 0.4, n_layers: int = 5):
    """A strategy that keeps about `retention` where it prunes. Raises TypeError for a field that it does not have."""
    strategy = predicting(retention, n_layers) if name == "DyRate" else dyrate.STRATEGIES[name].at(retention, n_layers)
    return dataclasses.replace(strategy, **fields or {})


def predicting(retention: float, n_layers: int) -> DyRate:
    """A predictor with random weights, or one that always keeps all; of whatever family it is asked."""
    torch.manual_seed(7)
    predictor = dyrate.RatePredictor(4, n_layers, "any", n_rates=8)
    predictor.check_fits = lambda model: None
    if retention == 1:
        predictor.linear.bias.data[0] = 1.0
    else:
        torch.nn.init.normal_(predictor.linear.weight, std=20.0)
        predictor.linear.bias.data[0] = -100.0
    return DyRate.of(predictor)


def examples_for(strategy, n_image: int) -> list[dyrate.Example]:
    """Two examples that the strategy can use; for the one that needs to know what is shown, scenes of the fixture `shown`."""
    if "scene" not in strategy.needs:
        return EXAMPLES
    from study.examples import SceneExample

    return [SceneExample(e.name, "", "", (), scene=(n_image, 3 + i)) for i, e in enumerate(EXAMPLES)]


def fits(strategy, model) -> None:
    """Skip where an encoder-side strategy meets a tower without [CLS]."""
    if type(strategy).__name__ in ENCODER_SIDE and model.config.model_type != "llava":
        pytest.skip("needs one [CLS] an image")


def generate(model, inputs, steps: int = STEPS, **settings):
    torch.manual_seed(1)
    return model.generate(
        **inputs, **({"do_sample": False} | settings), min_new_tokens=steps, max_new_tokens=steps, suppress_tokens=SUPPRESSED,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip


def n_image_of(inputs) -> int:
    return int((inputs["input_ids"][0] == IMAGE).sum())


def first_row(inputs):
    """The first of two rows alone; of flattened patches its half."""
    return {k: v[: len(v) // 2] for k, v in inputs.items()}


def ids_of(cases):
    return [name + "".join(f"-{v}" for v in fields.values()) for name, fields in cases]


def long_images(side: int):
    """(model, inputs) of a tiny LLaVA with side * side image tokens, two left-padded rows."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=4 * side, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=IMAGE)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    rows = [[1, 5, 6, *[IMAGE] * side**2, 7, 8, 9], [0, 0, 1, 5, *[IMAGE] * side**2, 9, 10]]
    ids = torch.tensor(rows)
    return model, {
        "input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": torch.randn(2, 3, 4 * side, 4 * side)
    }  # fmt: skip
