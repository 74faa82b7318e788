"""The slow definition of pruning: one eager forward pass over prompt and answer, with an explicit 4-D mask for each layer.

Nothing is dropped here and no cache is used: what a strategy drops is hidden by the mask. Which tokens those are is found
anew, from this pass's own attention matrices, in plain Python.
"""

import math
from dataclasses import dataclass, field

import torch

from dyrate.engine import decoder_layers
from dyrate.seen import Seen, Vision
from dyrate.segments import Segments, find_segments


@dataclass
class Matrix:
    """Stands for a LayerAttention: attention weights of one layer, (batch, head, query, key), as one step may see them."""

    weights: torch.Tensor
    end: int  # the newest query

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
    stages = [s for s in strategy.stages(len(layers)) if s < len(layers)]
    found, weights, projections, state = Masked(), {}, {}, {}

    def kept_by(stage, hidden):
        before = found.kept[stages[stages.index(stage) - 1]][0] if stages.index(stage) else valid
        kept, merged = [before], None
        for step in range(n_steps):
            if step and not strategy.each_step:
                kept.append(kept[-1])
                continue
            candidates = valid if strategy.residency == "mask" else kept[-1]
            observed = {stage - 1: Matrix(weights[stage - 1], n_prompt - 1 + step)} if stage else {}
            seen = Seen(
                step, stage, len(layers), valid, candidates, positions, Segments(segments.kind), observed, examples=examples
            )
            if step == 0:
                row = torch.arange(len(ids))[:, None]
                seen.read_hidden = lambda at: hidden[row, at]
                seen.read_no_rope = lambda: no_rope(stage - 1)
                seen.read_vision = lambda: vision(model, inputs["pixel_values"], valid)
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

    def no_rope(layer):
        attention = layers[layer].self_attn
        q, k = (projections[layer][n][:, :n_prompt].unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for n in "qk")
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        logits = (q[:, :, -1:] @ k.transpose(2, 3))[:, :, 0] * attention.scaling
        return logits.masked_fill(real[:, None] == 0, -1e30).softmax(-1)

    def enter(layer):
        def hook(module, args, kwargs):
            hidden = args[0]
            if layer in stages:
                merged = kept_by(layer, hidden)
                if merged is not None:
                    hidden = hidden.clone()
                    for i, j in found.kept[layer][0].nonzero().tolist():
                        hidden[i, positions[i, j]] = merged[i, j]
                state["stage"] = layer
            if "stage" in state:
                visible = torch.tril(torch.ones(ids.shape[1], ids.shape[1])).bool() & mask[:, None].bool()
                visible = visible.clone()
                for step, kept in enumerate(found.kept[state["stage"]]):
                    dropped = valid & ~kept
                    queries = slice(0, n_prompt) if step == 0 else slice(n_prompt - 1 + step, n_prompt + step)
                    for i, j in dropped.nonzero().tolist():
                        visible[i, queries, positions[i, j]] = False
                visible |= torch.eye(ids.shape[1]).bool()
                kwargs["attention_mask"] = torch.zeros(visible.shape).masked_fill(~visible, -1e30)[:, None]
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
            out = model(input_ids=ids, attention_mask=mask, use_cache=False, **extra)
    finally:
        model.set_attn_implementation(usual)
        for handle in handles:
            handle.remove()
    found.logits = out.logits[:, n_prompt - 1 : n_prompt - 1 + n_steps]
    return found


def vision(model, pixels, valid) -> Vision:
    """The tower's [CLS] attention, keys and features, from its own eager outputs."""
    tower, used, keys = model.model.vision_tower, model.config.vision_feature_layer, []
    layers = getattr(tower, "vision_model", tower).encoder.layers
    handle = layers[used].self_attn.k_proj.register_forward_hook(lambda m, a, out: keys.append(out))
    try:
        out = tower(pixels, output_attentions=True, output_hidden_states=True)
    finally:
        handle.remove()

    def by_row(x):
        rows = x.new_zeros(*valid.shape, x.shape[-1])
        rows[valid] = x.flatten(0, 1)
        return rows

    cls = out.attentions[used][:, :, 0, 1:].mean(1)[..., None]
    features = out.hidden_states[used][:, 1:]
    return Vision(by_row(features), by_row(cls)[..., 0], by_row(keys[0][:, 1:]), model.model.multi_modal_projector)
