"""Tiny random models of the supported families: what holds for them holds for any weights."""

import torch
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

TEXT = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
IMAGE = 60


def llava():
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=IMAGE, image_seq_length=16)
    return LlavaForConditionalGeneration(config), 16, lambda rows: {"pixel_values": torch.randn(rows, 3, 16, 16)}


def _of_qwen(config_class, model_class, vision):
    """Both Qwen families: 3-D rotary positions, and patches flattened over all images."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    config = config_class(
        text_config={**TEXT, "rope_scaling": rope, "rope_parameters": {**rope, "rope_theta": 10000.0}},
        vision_config=vision, image_token_id=IMAGE, video_token_id=61, vision_start_token_id=58, vision_end_token_id=59,
    )  # fmt: skip

    def images(rows):
        grid = torch.tensor([[1, 8, 8]] * rows)
        return {"pixel_values": torch.randn(64 * rows, 3 * 2 * 16), "image_grid_thw": grid}

    return model_class(config), 16, images


def qwen():
    vision = dict(depth=2, embed_dim=32, num_heads=4, patch_size=4, spatial_merge_size=2, hidden_size=32, mlp_ratio=2)
    return _of_qwen(Qwen2VLConfig, Qwen2VLForConditionalGeneration, vision)


def idefics():
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)
    text = {**TEXT, "model_type": "llama"}
    config = Idefics3Config(vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=2, pad_token_id=0)
    return Idefics3ForConditionalGeneration(config), 4, lambda rows: {"pixel_values": torch.randn(rows, 1, 3, 16, 16)}


def llava_next():
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
    )
    config = LlavaNextConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=IMAGE, image_grid_pinpoints=[[32, 32]]
    )

    def images(rows):  # the whole picture and four crops: 16 + 8 x 8 tokens and 8 line ends
        return {"pixel_values": torch.randn(rows, 5, 3, 16, 16), "image_sizes": torch.tensor([[32, 32]] * rows)}

    return LlavaNextForConditionalGeneration(config), 88, images


def qwen_2_5():
    vision = dict(
        depth=2, hidden_size=32, num_heads=4, patch_size=4, spatial_merge_size=2, out_hidden_size=32, intermediate_size=48,
        window_size=16, fullatt_block_indexes=[1],
    )  # fmt: skip
    return _of_qwen(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, vision)


def smolvlm():
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)
    text = {**TEXT, "model_type": "llama"}
    config = SmolVLMConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=2, pad_token_id=0)
    return SmolVLMForConditionalGeneration(config), 4, lambda rows: {"pixel_values": torch.randn(rows, 1, 3, 16, 16)}


def qwen_3():
    """Features of three tower layers are added to the image tokens after the first three decoder layers (DeepStack)."""
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 10000.0}
    vision = dict(
        depth=3, hidden_size=32, num_heads=4, patch_size=4, spatial_merge_size=2, out_hidden_size=32, intermediate_size=48,
        temporal_patch_size=2, num_position_embeddings=64, deepstack_visual_indexes=[0, 1, 2],
    )  # fmt: skip
    config = Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 8, "rope_parameters": rope, "rope_scaling": rope}, vision_config=vision,
        image_token_id=IMAGE, video_token_id=61, vision_start_token_id=58, vision_end_token_id=59,
    )  # fmt: skip

    def images(rows):
        return {"pixel_values": torch.randn(64 * rows, 3 * 2 * 16), "image_grid_thw": torch.tensor([[1, 8, 8]] * rows)}

    return Qwen3VLForConditionalGeneration(config), 16, images


def llava_onevision():
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
    )
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config={**TEXT, "model_type": "qwen2"}, image_token_index=IMAGE, video_token_index=61,
        image_grid_pinpoints=[[32, 32]], vision_feature_layer=-1,
    )  # fmt: skip

    def images(rows):
        return {"pixel_values": torch.randn(rows, 5, 3, 16, 16), "image_sizes": torch.tensor([[32, 32]] * rows)}

    return LlavaOnevisionForConditionalGeneration(config), 88, images


def internvl():
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=[16, 16], patch_size=[4, 4]
    )
    text = {**TEXT, "model_type": "qwen2"}
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, downsample_ratio=0.5)
    return InternVLForConditionalGeneration(config), 4, lambda rows: {"pixel_values": torch.randn(rows, 3, 16, 16)}


FAMILIES = (llava, llava_next, llava_onevision, qwen, qwen_2_5, qwen_3, idefics, smolvlm, internvl)


def ready(make):
    """(model, inputs of a ragged left-padded batch of two)."""
    torch.manual_seed(0)
    model, n_image, images = make()
    model.eval()
    model.generation_config.eos_token_id = None
    rows = [[1, 5, 6, *[IMAGE] * n_image, 7, 8, 9], [0, 0, 1, 5, *[IMAGE] * n_image, 9, 10]]
    ids = torch.tensor(rows)
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), **images(2)}
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    return model, inputs
