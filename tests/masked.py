"""The slow definition of pruning: one eager forward pass over prompt and answer, with an explicit 4-D mask for each layer.

Nothing is dropped here: what a strategy drops is hidden by the mask. Which tokens those are is found
anew, from this pass's own attention matrices, in plain Python.
"""

import math
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from dyrate.engine import decoder_layers
from dyrate.seen import Seen, Vision
from dyrate.segments import Segments, find_segments


@dataclass
class Matrix:
    """Stands for a LayerAttention: attention weights of one layer, (batch, head, query, key), as one step may see them."""

    weights: torch.Tensor
    end: int  # the newest query
    key: torch.Tensor = None  # (batch, kv_head, key, dim)

    @property
    def newest(self):
        return self.weights[:, :, self.end, : self.end + 1]

    def rows(self, queries):
        index = queries[:, None, :, None].expand(-1, self.weights.shape[1], -1, self.weights.shape[-1])
        return self.weights.gather(2, index)[..., : self.end + 1]


@dataclass
class Masked:
    """logits (batch, step, word) and, for each stage, the kept image tokens at each step."""

    logits: torch.Tensor = None
    kept: dict = field(default_factory=dict)


def masked(model, inputs, answers, strategy, image_token_id, examples=None) -> Masked:
    """What `strategy` means for these prompts and their answers (batch, step). examples: of the rows."""
    prompt, real = inputs["input_ids"], inputs["attention_mask"]
    n_prompt, n_steps = prompt.shape[1], answers.shape[1]
    ids = torch.cat([prompt, answers], 1)
    mask = torch.cat([real, torch.ones_like(answers)], 1)
    segments = find_segments(prompt, image_token_id, real)
    image = segments.mask("image")
    positions = image.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(image.sum(1).max())]
    valid = image.gather(1, positions)
    layers = decoder_layers(model)
    stages = list(strategy.stages(len(layers)))
    found, weights, projections, state = Masked(), {}, {}, {}
    cache = DynamicCache()  # filled by one pass over all tokens: to read keys from

    def kept_by(stage, hidden):
        before = found.kept[stages[stages.index(stage) - 1]][0] if stages.index(stage) else valid
        kept, merged = [before], None
        for step in range(n_steps):
            if step and not strategy.each_step:
                kept.append(kept[-1])
                continue
            candidates = valid if strategy.residency == "mask" else kept[-1]
            newest = n_prompt - 1 + step
            keys = cache.layers[stage - 1].keys[:, :, : newest + 1] if stage else None
            observed = {stage - 1: Matrix(weights[stage - 1], newest, keys)} if stage else {}
            seen = Seen(
                step, stage, len(layers), valid, candidates, positions, Segments(segments.kind), observed, examples=examples,
                held=kept[-1],
            )  # fmt: skip
            if step == 0:
                row = torch.arange(len(ids))[:, None]
                seen.read_hidden = lambda at: hidden[row, at]
                seen.read_no_rope = lambda: no_rope(stage - 1)
                seen.read_vision = lambda: vision(model, inputs["pixel_values"], valid)
                seen.norm = model.get_decoder().norm
                seen.read_embedded = lambda at: state["embedded"][row, at]
                seen.read_own = lambda: own(stage, hidden)
            retention, score = strategy.keep(seen), strategy.score(seen)
            chosen = torch.zeros_like(valid)
            for i in range(len(ids)):
                n = int(valid[i].sum())
                rate = 1 - float(retention if isinstance(retention, int | float) else retention[i])
                count = n - math.floor(round(n * rate, 3))
                ranked = sorted((j for j in range(valid.shape[1]) if candidates[i, j]), key=lambda j: -float(score[i, j]))
                chosen[i, ranked[:count]] = True
            if step == 0 and (chosen != before).any():
                merged = strategy.merge(seen, chosen)
            kept.append(chosen)
        found.kept[stage] = kept[1:]
        return merged

    def own(layer, hidden):
        """The attention matrix that a layer would have on the tokens entering it, some of them hidden by earlier stages."""
        module, given = layers[layer], state["given"]
        weights = module.self_attn(
            module.input_layernorm(hidden), attention_mask=given["attention_mask"],
            position_embeddings=given["position_embeddings"], past_key_values=None,
        )[1]  # fmt: skip
        return Matrix(weights, n_prompt - 1)

    def compact(stage, hidden):
        """Rotary embeddings where every token's position is the number of tokens before it that the prefill left."""
        left = mask.bool().clone()
        for i, j in (valid & ~found.kept[stage][0]).nonzero().tolist():
            left[i, positions[i, j]] = False
        renumbered = (left.long().cumsum(1) - 1).clamp(min=0)
        if hasattr(model.model, "rope_deltas"):
            renumbered = renumbered.expand(3, -1, -1)
        return model.get_decoder().rotary_emb(hidden, renumbered)

    def no_rope(layer):
        attention = layers[layer].self_attn
        q, k = (projections[layer][n][:, :n_prompt].unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for n in "qk")
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        logits = (q[:, :, -1:] @ k.transpose(2, 3))[:, :, 0] * attention.scaling
        return logits.masked_fill(real[:, None] == 0, -1e30).softmax(-1)

    def enter(layer):
        def hook(module, args, kwargs):
            hidden = args[0]
            if layer == 0:
                state["embedded"] = hidden
            if "mask" in state:
                kwargs |= {"attention_mask": state["mask"], "position_embeddings": state["rotary"]}
            if layer in stages:
                state["given"] = kwargs
                merged = kept_by(layer, hidden)
                if merged is not None:
                    hidden = hidden.clone()
                    for i, j in found.kept[layer][0].nonzero().tolist():
                        hidden[i, positions[i, j]] = merged[i, j]
                visible = torch.tril(torch.ones(ids.shape[1], ids.shape[1])).bool() & mask[:, None].bool()
                visible = visible.clone()
                for step, kept in enumerate(found.kept[layer]):
                    dropped = valid & ~kept
                    queries = slice(0, n_prompt) if step == 0 else slice(n_prompt - 1 + step, n_prompt + step)
                    for i, j in dropped.nonzero().tolist():
                        visible[i, queries, positions[i, j]] = False
                visible |= torch.eye(ids.shape[1]).bool()
                state["mask"] = torch.zeros(visible.shape).masked_fill(~visible, -1e30)[:, None]
                state["rotary"] = kwargs["position_embeddings"]
                if strategy.positions == "compact" and not torch.equal(found.kept[layer][0], valid):
                    state["rotary"] = compact(layer, hidden)
                kwargs |= {"attention_mask": state["mask"], "position_embeddings": state["rotary"]}
            return (hidden, *args[1:]), kwargs

        return hook

    handles = []
    for i, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(enter(i), with_kwargs=True))
        handles.append(layer.self_attn.register_forward_hook(lambda m, a, out, i=i: weights.__setitem__(i, out[1])))
        for n in "qk":
            projection = getattr(layer.self_attn, f"{n}_proj")
            handles.append(
                projection.register_forward_hook(lambda m, a, out, i=i, n=n: projections.setdefault(i, {}).__setitem__(n, out))
            )
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    extra = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    if "mm_token_type_ids" in extra:
        extra["mm_token_type_ids"] = torch.cat([extra["mm_token_type_ids"], torch.zeros_like(answers)], 1)
    else:
        extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    try:
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=mask, use_cache=True, past_key_values=cache, **extra)
    finally:
        model.set_attn_implementation(usual)
        for handle in handles:
            handle.remove()
    found.logits = out.logits[:, n_prompt - 1 : n_prompt - 1 + n_steps]
    return found


def vision(model, pixels, valid) -> Vision:
    """The tower's features, keys and [CLS] attention, from its own eager outputs."""
    tower, used, projected = model.model.vision_tower, model.config.vision_feature_layer, {}
    layers = getattr(tower, "vision_model", tower).encoder.layers
    handles = [
        getattr(layers[i].self_attn, f"{n}_proj").register_forward_hook(lambda m, a, out, k=(n, i): projected.__setitem__(k, out))
        for n, i in (("k", used), ("q", -1), ("k", -1))
    ]
    try:
        out = tower(pixels, output_attentions=True, output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()

    def by_row(x):
        rows = x.new_zeros(*valid.shape, *x.shape[2:])
        rows[valid] = x.flatten(0, 1)
        return rows

    features = out.hidden_states[used]
    heads = layers[used].self_attn.num_heads
    query, key = projected["q", -1], projected["k", -1]
    joint = (query @ key.transpose(1, 2) / key.shape[-1] ** 0.5).softmax(-1)[:, 0, 1:]
    n_patches, seen_images, first = features.shape[1] - 1, 0, []
    for n in valid.sum(1).tolist():
        first.append(features[seen_images, 0])
        seen_images += n // n_patches
    return Vision(
        by_row(features[:, 1:]), torch.stack(first), by_row(out.attentions[used][:, :, 0, 1:].mean(1)),
        by_row(projected["k", used][:, 1:].unflatten(-1, (heads, -1))), by_row(joint), by_row(key[:, 1:]),
        model.model.multi_modal_projector,
    )  # fmt: skip
