"""A tiny random LLaVA saved as the real checkpoints are: weights, tokenizer, processor and chat template in one folder."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

WORDS = "a the one sentence caption for provided image two dogs cat runs on grass red blue big USER ASSISTANT : .".split()
TEMPLATE = (  # LLaVA-1.5's: no system prompt
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' }}{% else %}{{ 'ASSISTANT: ' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def save_tiny_llava(folder: Path, side: int = 4, layers: int = 6) -> Path:
    """side * side image tokens. Returns the folder."""
    torch.manual_seed(0)
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<image>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="left",
    )  # fmt: skip
    size = {"height": 7 * side, "width": 7 * side}
    LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size), fast, patch_size=7, vision_feature_select_strategy="default",
        chat_template=TEMPLATE, num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=7 * side, patch_size=7
    )
    text = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, **ids
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=words["<image>"], image_seq_length=side**2, **ids
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder
