"""The losses that train the pocket LLaVA, each with scores to watch: of the tower, the projector, the nouns and the text.

The text's loss alone falls while binding is not learned. The other objectives ask for its steps one by one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from study.pocket.batches import IGNORE, N_PATCHES, PAINTED, SLOTS
from study.pocket.scenes import COLOURS, PLACES, THINGS
from study.pocket.vlm import build_model


def plain_attention(module, query, key, value, attention_mask, scaling, **_):
    """Two matrix products: in bfloat16 on a CPU, at this size, twice as fast as the fused kernel with its backward."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = (query * scaling) @ key.transpose(-1, -2)
    if attention_mask is not None:
        scores += attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def fast_bfloat16(device: str) -> bool:
    """Whether the processor multiplies in bfloat16; emulated, as on a CPU that does not, it is ten times slower than float32."""
    return not device.startswith("cpu") or torch.cpu._is_avx512_bf16_supported()


def autocast(device: str) -> torch.autocast:
    """Matrix products in bfloat16 where that is fast; the rest stays in float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=fast_bfloat16(device))


class Lab(nn.Module):
    """The model with what only training needs: a probe of each patch and a small text tower for the captions."""

    def __init__(self, processor, device: str):
        super().__init__()
        self.model = build_model(processor.tokenizer)
        if device == "cpu":
            AttentionInterface.register("pocket_training", plain_attention)
            for config in (self.model.config.text_config, self.model.config.vision_config):
                config._attn_implementation = "pocket_training"
        width = self.model.config.vision_config.hidden_size
        self.probe = nn.ModuleDict({
            "object": nn.Linear(width, len(THINGS) + 1), "colour": nn.Linear(width, len(COLOURS)),
            "count": nn.Linear(width, 3), "place": nn.Linear(width, len(PLACES)), "word": nn.Linear(width, len(PAINTED) + 1),
        })  # fmt: skip
        self.text = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 128))
        self.words = nn.Embedding(len(processor.tokenizer), width, padding_idx=processor.tokenizer.pad_token_id)
        self.cls = nn.Linear(width, 128)
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.align = nn.RMSNorm(self.model.config.text_config.hidden_size)
        self.align_noun = nn.RMSNorm(self.model.config.text_config.hidden_size)
        self.noun_layer = self.model.config.text_config.num_hidden_layers // 2 - 1

    @property
    def _embeddings(self) -> Tensor:
        return self.model.model.language_model.embed_tokens.weight

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (batch, 3, 168, 168) -> patches (batch, 144, width) of the used layer, pooled [CLS] (batch, width)."""
        out = self.model.model.vision_tower(pixels, output_hidden_states=True)
        return out.hidden_states[self.model.config.vision_feature_layer][:, 1:], out.pooler_output

    def tower_loss(self, patches: Tensor, pooled: Tensor, batch: dict) -> tuple[Tensor, dict]:
        """Dense objective on the patches and contrastive objective on [CLS]."""
        losses, scores = [], {}
        for name, head in self.probe.items():
            target = batch[f"patch_{name}"].flatten()
            logits = head(patches).flatten(0, 1)
            weight = torch.full((logits.shape[-1],), 2.0 if name in ("object", "word") else 1.0, device=logits.device)
            if name in ("object", "word"):
                weight[-1] = 0.3  # "none", the last class, is almost everywhere
            losses.append(F.cross_entropy(logits.float(), target, weight, ignore_index=IGNORE))
            counted = (target != IGNORE) & (target != len(weight) - 1 if name in ("object", "word") else target >= 0)
            scores[name] = (logits.argmax(-1) == target)[counted].float().mean()
        caption = batch["caption"]
        bag = self.words(caption).sum(1) / (caption > 0).sum(1, keepdim=True)
        images, texts = F.normalize(self.cls(pooled).float(), dim=-1), F.normalize(self.text(bag).float(), dim=-1)
        similarity = images @ texts.T * self.scale.exp().clamp(max=100)
        same = torch.arange(len(caption), device=caption.device)
        scores["cls"] = (similarity.argmax(1) == same).float().mean()
        contrast = (F.cross_entropy(similarity, same) + F.cross_entropy(similarity.T, same)) / 2
        return sum(losses) + 0.2 * contrast, scores

    def word_loss(self, patches: Tensor, words: Tensor) -> Tensor:
        """A dense objective in the decoder's vocabulary: projected patches should resemble the tokens that describe their group.

        words (batch, 144, 6): tokens of count, colour, thing and place. Without it the tower forgets where a patch is,
        and the tokens for places stay at chance long after those for things are right.
        """
        shown = (words != IGNORE).any(-1)
        features = self.align(self.model.model.multi_modal_projector(patches[shown]).float())
        return resembles(features, words[shown], self._embeddings)[0]

    def language_loss(self, patches: Tensor, batch: dict, n_kept: int, drop_layer: int) -> tuple[Tensor, dict]:
        """Next-token loss over all packed turns. n_kept: image tokens that layers >= drop_layer see.

        Beside it, at half depth: the noun of a question should predict its group's properties. An answer needs two steps,
        finding the group by its name and reading one property; left alone neither is learned, for each is of no use
        without the other.
        """
        inner = self.model.model
        ids, turn, positions = batch["ids"], batch["turn"], batch["positions"]
        hidden = inner.language_model.embed_tokens(ids)
        image = ids == self.model.config.image_token_id
        features = inner.multi_modal_projector(patches)
        hidden = torch.where(image[..., None], torch.zeros_like(hidden), hidden)
        first = int(image[0].nonzero()[0])  # the image stands at the same place in every row
        hidden = with_image(hidden, features, first)
        bias = packed_bias(turn, features.dtype)
        cos, sin = inner.language_model.rotary_emb(hidden, positions)
        for i, layer in enumerate(inner.language_model.layers):
            if i == drop_layer and n_kept < N_PATCHES:
                kept = _kept_columns(len(ids), ids.shape[1], first, n_kept, ids.device)
                hidden, cos, sin = (x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1])) for x in (hidden, cos, sin))
                rows = torch.arange(len(ids), device=ids.device)[:, None, None]
                bias = bias[rows, kept[:, :, None], kept[:, None, :]]
                batch = {**batch, **{k: batch[k].gather(1, kept) for k in ("labels", "weight", "slot")}}
                batch["noun"] = batch["noun"].gather(1, kept[..., None].expand(-1, -1, batch["noun"].shape[-1]))
            hidden = layer(hidden, attention_mask=bias[:, None], position_embeddings=(cos, sin))
            if i == self.noun_layer:
                noun = (batch["noun"] != IGNORE).any(-1)
                noun_loss, noun_hits = resembles(self.align_noun(hidden[noun].float()), batch["noun"][noun], self._embeddings)
        wanted = batch["labels"] != IGNORE
        logits = self.model.lm_head(inner.language_model.norm(hidden[wanted])).float()
        labels, weight, slot = batch["labels"][wanted], batch["weight"][wanted], batch["slot"][wanted]
        loss = (F.cross_entropy(logits, labels, reduction="none") * weight).sum() / weight.sum()
        right = (logits.argmax(-1) == labels).float()
        scores = {"lm": loss.detach(), "noun": noun_hits}
        for i, name in enumerate(SLOTS):
            for prefix, code in (("", i + 1), ("qa_", -(i + 1))):
                if (here := slot == code).any():
                    scores[prefix + name] = right[here].mean()
        return loss + 0.3 * noun_loss, scores


def packed_bias(turn: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the attention scores of packed turns (row, length): each sees the shared prefix (turn 0) and itself."""
    order = torch.arange(turn.shape[1], device=turn.device)
    allowed = (order[:, None] >= order) & ((turn[:, None, :] == 0) | (turn[:, :, None] == turn[:, None, :]))
    return torch.zeros(allowed.shape, dtype=dtype, device=turn.device).masked_fill(~allowed, -1e4)


def with_image(hidden: Tensor, features: Tensor, first: int) -> Tensor:
    """Embeddings (row, length, width) with the projected patches in place of the image tokens, which begin at `first`."""
    return torch.cat([hidden[:, :first], features.to(hidden.dtype), hidden[:, first + N_PATCHES :]], 1)


def resembles(features: Tensor, words: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of predicting each of `words` (n, any number) from features (n, width), and the share among the likeliest."""
    wanted = words != IGNORE
    logits = (features @ embeddings.T).float()
    chances = logits.log_softmax(-1).gather(1, words.clamp(min=0))
    least = logits.topk(words.shape[1]).values[:, -1:]
    hits = logits.gather(1, words.clamp(min=0)) >= least
    return -chances[wanted].mean(), hits[wanted].float().mean()


@torch.no_grad()
def condition_projector(projector: nn.Module, patches: Tensor, embeddings: Tensor) -> None:
    """Start a projector from the trained tower's features: whitened, centred, as large as a token's embedding.

    The tower's patches share a constant part many times larger than what distinguishes them. Left in, it makes all
    image tokens nearly equal for the decoder: position does not pass, and binding is learned late or never.
    """
    x = patches.flatten(0, 1).float()
    values, vectors = torch.linalg.eigh(x.T.cov())
    whiten = vectors @ torch.diag((values + 0.02 * values.mean()).rsqrt()) @ vectors.T
    nn.init.orthogonal_(projector.linear_1.weight)
    projector.linear_1.weight.copy_(projector.linear_1.weight @ whiten)
    projector.linear_1.bias.copy_(-(projector.linear_1.weight @ x.mean(0)))
    nn.init.orthogonal_(projector.linear_2.weight)
    projector.linear_2.bias.zero_()
    y = projector(x)
    scale = embeddings.std() / y.std(0).mean()
    projector.linear_2.weight.mul_(scale)
    projector.linear_2.bias.copy_(-scale * y.mean(0))


def _kept_columns(n_rows: int, length: int, first: int, n_kept: int, device) -> Tensor:
    """Columns (rows, length - dropped) that are kept: all text and a random `n_kept` of each row's image tokens."""
    chosen = torch.rand(n_rows, N_PATCHES, device=device).argsort(1)[:, :n_kept].sort(1).values + first
    before = torch.arange(first, device=device).expand(n_rows, -1)
    after = torch.arange(first + N_PATCHES, length, device=device).expand(n_rows, -1)
    return torch.cat([before, chosen, after], 1)
