"""The attention weights of a few queries of one layer, computed only when asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass
class LayerAttention:
    """Queries and keys of one attention layer in one forward pass, after rotary embedding; heads may share keys (GQA).

    mask: None, the 4-D boolean or additive mask of the fused kernels, or the 2-D padding mask of flash attention.
    """

    query: Float[Tensor, "batch head query dim"]
    key: Float[Tensor, "batch kv_head key dim"]
    mask: Tensor | None
    scaling: float
    causal: bool = True

    @cached_property
    def newest(self) -> Float[Tensor, "batch head key"]:
        """Attention weights of the last query, in float32."""
        mask = self.mask[:, :, -1:] if self.mask is not None and self.mask.ndim == 4 else self.mask
        return self._weights(self.query[:, :, -1:], mask)[:, :, 0]

    def rows(self, queries: Int[Tensor, "batch n"]) -> Float[Tensor, "batch head n key"]:
        """Attention weights of the queries at these indices, in float32."""
        batch, _, length, dim = self.query.shape
        keys = self.key.shape[2]
        chosen = self.query.gather(2, queries[:, None, :, None].expand(-1, self.query.shape[1], -1, dim))
        if self.mask is not None and self.mask.ndim == 4:
            mask = self.mask.expand(batch, -1, -1, -1).gather(2, queries[:, None, :, None].expand(-1, 1, -1, self.mask.shape[-1]))
        else:
            order = torch.arange(keys, device=queries.device)
            last = queries + keys - length if self.causal else torch.full_like(queries, keys)  # the last query: the last key
            mask = order <= last[:, None, :, None]
            if self.mask is not None:
                mask = mask & self.mask[:, None, None, :keys].bool()
        return self._weights(chosen, mask)

    def _weights(self, queries: Float[Tensor, "batch head n dim"], mask: Tensor | None) -> Float[Tensor, "batch head n key"]:
        batch, heads, n, dim = queries.shape
        kv_heads, keys = self.key.shape[1], self.key.shape[2]
        grouped = (queries * self.scaling).reshape(batch, kv_heads, -1, dim)  # heads that share keys side by side
        logits = (grouped @ self.key.transpose(-1, -2)).reshape(batch, heads, n, keys).float()
        if mask is not None:
            mask = mask[:, None, None] if mask.ndim == 2 else mask
            mask = mask[..., :keys]
            if mask.dtype.is_floating_point:
                logits = logits + mask
            else:
                logits = logits.masked_fill(~mask.bool(), torch.finfo(torch.float32).min)
        return logits.softmax(-1)
