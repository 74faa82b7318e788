"""Attention masks for layers that hold fewer tokens, in the form that the model's attention function takes."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel


def mask_form(model: PreTrainedModel) -> str:
    """How the decoder's attention function takes its mask: "sdpa" (boolean), "eager" (additive) or "flash" (padding, 2-D)."""
    used = model.config.get_text_config()._attn_implementation
    if used in ("sdpa", "eager"):
        return used
    if used.startswith("flash_attention"):
        return "flash"
    raise ValueError(
        f'attn_implementation="{used}" is not supported with a strategy: load the model with "sdpa", "eager" or '
        '"flash_attention_2"'
    )


def prefill_mask(form: str, alive: Bool[Tensor, "batch slot"], hidden: Tensor) -> Tensor:
    """Causal, and of the slots only those alive; a slot that is not still sees itself."""
    if form == "flash":
        return alive
    n = hidden.shape[1]
    order = torch.arange(n, device=hidden.device)
    visible = (order <= order[:, None]) & alive[:, None, None]
    return _formed(form, visible | torch.eye(n, dtype=torch.bool, device=hidden.device), hidden)


def decode_mask(form: str, alive: Bool[Tensor, "batch slot"], n_keys: int, hidden: Tensor) -> Tensor:
    """For one new token: the prompt's slots that are alive, and all that follow them, `n_keys` in all."""
    visible = F.pad(alive, (0, n_keys - alive.shape[1]), value=True)
    return visible if form == "flash" else _formed(form, visible[:, None, None], hidden)


def _formed(form: str, visible: Tensor, hidden: Tensor) -> Tensor:
    if form == "sdpa":
        return visible
    least = torch.finfo(hidden.dtype).min
    return torch.zeros(visible.shape, dtype=hidden.dtype, device=visible.device).masked_fill(~visible, least)
