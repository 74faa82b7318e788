"""From a name or a folder to a vision-language model and its processor."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

POCKET = Path(__file__).resolve().parent.parent / "data" / "pocket"
FAMILIES = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "idefics3", "smolvlm")
# A hub checkpoint may change under its name; the study names the state that it was written for.
REVISIONS = {"llava-hf/llava-1.5-7b-hf": "b234b804b114d9e37bb655e11cbbb5f5e971b7a9"}


def load(name: str | Path = "pocket", *, revision: str | None = None, dtype=None, device_map=None, device=None):
    """Load a vision-language model for inference: returns (model, processor).

    name: "pocket" (the built-in LLaVA), a folder in Hugging Face format, or a hub name. revision: of a hub name; pinned by
    default for the study's checkpoints. dtype: default bfloat16 on a GPU, float32 on a CPU. device: default the first
    GPU, else the CPU; device_map is passed on to transformers instead. Nothing downloaded is executed.

    Raises FileNotFoundError (no such folder, or a hub checkpoint that is not at hand offline) and ValueError (not a
    vision-language model, or a family that dyrate does not know).
    """
    source = _source(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = (device_map is not None and torch.cuda.is_available()) or str(device).startswith("cuda")
    dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
    local = isinstance(source, Path)
    where = {"revision": None if local else revision or REVISIONS.get(str(name)), "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(source, **where)
        _check_family(config, name)
        processor = AutoProcessor.from_pretrained(source, **where)
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, device_map=device_map, **where)
    except OSError as error:
        if local:
            raise FileNotFoundError(f"{source} is not a complete checkpoint in Hugging Face format: {error}") from error
        raise FileNotFoundError(
            f"cannot reach {name!r} on the Hugging Face hub, and it is not in the local cache. Download it once where there "
            f"is a network, with `hf download {name}"
            f"{' --revision ' + where['revision'] if where['revision'] else ''}`, or pass the folder of a local copy."
        ) from error
    if device_map is None:
        model = model.to(device)
    return model.eval(), processor


def _source(name: str | Path) -> str | Path:
    """The folder to load from, or the hub name."""
    if str(name) == "pocket":
        if not (POCKET / "config.json").exists():
            raise FileNotFoundError(
                f"the pocket checkpoint is missing at {POCKET}: install dyrate from its repository with `pip install -e .`, "
                "or train it with `make pocket`"
            )
        return POCKET
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise FileNotFoundError(f"{path} has no config.json: it is not a checkpoint in Hugging Face format")
        return path
    is_path = isinstance(name, Path) or path.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1
    if is_path or path.parent.is_dir():
        raise FileNotFoundError(f'no such folder: {path}. Name a folder, a hub checkpoint as "owner/name", or "pocket"')
    return str(name)


def _check_family(config, name) -> None:
    if config.model_type in FAMILIES:
        return
    if not hasattr(config, "vision_config"):
        raise ValueError(f"{name} is a {config.model_type!r} model, which sees no images: dyrate needs a vision-language model")
    raise ValueError(
        f"{name} is of the family {config.model_type!r}, which dyrate does not support; supported: {', '.join(FAMILIES)}"
    )


def describe(model: PreTrainedModel) -> dict:
    """What a caption or a provenance record says of a model."""
    text = model.config.get_text_config()
    return {
        "family": model.config.model_type, "parameters": sum(p.numel() for p in model.parameters()),
        "layers": text.num_hidden_layers, "heads": text.num_attention_heads,
        "dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device),
        "revision": getattr(model.config, "_commit_hash", None),
    }  # fmt: skip
