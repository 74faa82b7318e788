"""The pocket LLaVA: a real `LlavaForConditionalGeneration` and its processor, built small and untrained.

About 6 million parameters: a CLIP tower (5 layers, the fourth's patches are used, as LLaVA uses the last but one), a
two-layer projector and a Llama decoder of 8 layers with 6 heads. Trained by `study.pocket.train`.
"""

from __future__ import annotations

import math
import string

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from study.pocket.language import vocabulary
from study.pocket.scenes import GRID, PATCH, SIDE

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
SYSTEM = "A chat between a curious person and a helpful assistant."
TEMPLATE = (
    "{{ '" + SYSTEM + " ' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}{% else %}{{ 'ASSISTANT: ' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the laboratory's language; any other ASCII word falls apart into characters."""
    words = {*vocabulary(), *SYSTEM.replace(".", "").split(), "USER", "ASSISTANT"}
    characters = [c for c in string.printable if not c.isspace()]
    pieces = [*SPECIAL, *sorted(words | set(characters)), *(f"##{c}" for c in characters)]
    model = models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(cleanup=True), decoders.Replace(" :", ":")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", pieces.index("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="left", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def build_processor(tokenizer: PreTrainedTokenizerFast | None = None, template: str = TEMPLATE) -> LlavaProcessor:
    """The processor that a user loads with `AutoProcessor.from_pretrained`. tokenizer: default the laboratory's own."""
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    return LlavaProcessor(
        images, tokenizer or build_tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default",
        chat_template=template, num_additional_image_tokens=1,
    )  # fmt: skip


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The untrained model. Its width (192) suffices for these scenes, and is cheap on two cores."""
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=192, intermediate_size=768, num_hidden_layers=5, num_attention_heads=6,
            image_size=SIDE, patch_size=PATCH, projection_dim=128,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=8,
            num_attention_heads=6, max_position_embeddings=1024, tie_word_embeddings=True, **ids,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=GRID * GRID, tie_word_embeddings=True, **ids,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    embeddings = model.model.vision_tower.embeddings
    with torch.no_grad():
        embeddings.position_embedding.weight[1:] += place_waves(config.vision_config.hidden_size)
    return model


def place_waves(width: int, amplitude: float = 0.7) -> Tensor:
    """Sines and cosines of each patch's row and column, (144, width).

    With small random position embeddings the tower names things well and forgets where they are: after 100,000 scenes
    left and right could not be distinguished from a projected patch.
    """
    rate = torch.logspace(math.log10(math.pi / 24), math.log10(math.pi), width // 4)
    angle = torch.arange(GRID)[:, None] * rate
    waves = amplitude * torch.cat([angle.sin(), angle.cos()], 1)  # (12, width / 2)
    rows, columns = waves[:, None].expand(-1, GRID, -1), waves[None].expand(GRID, -1, -1)
    return torch.cat([rows, columns], -1).reshape(GRID * GRID, width)
