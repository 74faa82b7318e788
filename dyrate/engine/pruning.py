"""Let a strategy drop image tokens from a live model.

A pre-hook on the first pruned layer asks the strategy, and takes the chosen positions out of the hidden states (prefill) or
out of the cached keys and values (decode); pre-hooks on all deeper layers hand in the mask and the rotary embeddings that
fit. Tokens keep their positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from dyrate.engine.cached import PrunedLayer, check_cache_layer, take, take_cached
from dyrate.engine.observing import decoder_layers, observe, observe_modules
from dyrate.engine.static import static_steps
from dyrate.look import Look
from dyrate.segments import Segments, find_segments, system_ids
from dyrate.strategy import Seen, Strategy, Vision, choose, kept_count
from dyrate.trace import Stage, Step, Trace

_SPARE_SLOTS = 16  # evicted tokens are only masked until so many slots, or an eighth of all, can be freed at once


@contextmanager
def prune(model: PreTrainedModel, strategy: Strategy, processor=None, *, static: int = 0) -> Iterator[Trace]:
    """Let `strategy` drop image tokens in every `model.generate` (or forward pass with a cache) until the context is left.

    Works with greedy decoding, sampling and beams, left-padded batches and any number of images a prompt. The trace is
    that of the latest `generate`. static: room of `static_steps`; 0: eager steps. Raises an error before the first token
    for what cannot be pruned, and says what to do.
    """
    layers = decoder_layers(model)
    stages = [s for s in strategy.stages(len(layers)) if s < len(layers)]
    if stages != sorted(set(stages)):
        raise ValueError(f"{strategy}: stages must ascend, not {stages}")
    if any(isinstance(getattr(hook, "__self__", None), _Pruning) for hook in model._forward_pre_hooks.values()):
        raise RuntimeError("a strategy is attached to this model already: leave its `with` block before entering another")
    observed = sorted({*strategy.observes(len(layers)), *(s - 1 for s in stages if s > 0)})
    if stages and observed and observed[-1] >= max(1, stages[-1]):
        raise ValueError(f"{strategy}: layer {observed[-1]} is observed too late for a decision before layer {stages[-1]}")
    run = _Pruning(model, strategy, stages, system_ids(processor) if processor is not None else None)
    with ExitStack() as stack:
        if static:
            stack.enter_context(static_steps(model, stages, run.looks, static))
        stack.enter_context(observe(model, run.look_at, observed))
        handles = [
            model.register_forward_pre_hook(run.begin, with_kwargs=True),
            model.register_forward_hook(run.end),
        ]
        for handle in handles:
            stack.callback(handle.remove)
        for i in range(stages[0] if stages else len(layers), len(layers)):
            stack.callback(layers[i].register_forward_pre_hook(partial(run.enter, i), with_kwargs=True).remove)
        if "no_rope" in strategy.needs:
            for name in ("q_proj", "k_proj"):
                projection = getattr(layers[stages[0] - 1].self_attn, name)
                stack.callback(projection.register_forward_hook(partial(run.project_at, name)).remove)
        if "vision" in strategy.needs:
            projector, attention = _vision_parts(model)
            run.projector = projector
            stack.callback(projector.register_forward_pre_hook(run.features_at).remove)
            stack.enter_context(observe_modules({-1: attention}, run.vision_at))
        yield run.trace


def _vision_parts(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The projector and the attention of the tower's layer whose features are used."""
    inner, used = model.model, getattr(model.config, "vision_feature_layer", None)
    tower = getattr(inner, "vision_tower", None)
    tower = getattr(tower, "vision_model", tower)
    if model.config.model_type != "llava" or not isinstance(used, int) or not hasattr(tower.embeddings, "class_embedding"):
        raise ValueError(
            f"encoder-side strategies need LLaVA-1.5's tower, with one [CLS] an image and one layer of features; this is a "
            f"{model.config.model_type!r} model. Use a strategy that drops inside the decoder, such as FastV"
        )
    n_layers = len(tower.encoder.layers)
    return inner.multi_modal_projector, tower.encoder.layers[used - 1 if used >= 0 else n_layers + used].self_attn


@dataclass
class _Group:
    """Layers first..last-1, which hold the same tokens, and which those are.

    kept (rows, image_token) and counts (rows): the image tokens still there. columns (rows, slots): the prompt position of
    each cached slot, ascending; None while all are there. alive: slots that may be seen; None while the model's own mask
    is right. whole: every slot is alive, so no mask is needed.
    """

    first: int
    last: int
    kept: Tensor | None = None
    counts: list[int] | None = None
    columns: Tensor | None = None
    alive: Tensor | None = None
    whole: bool = False

    def inherit(self, before: _Group) -> None:
        for name in ("kept", "counts", "columns", "alive", "whole"):
            setattr(self, name, getattr(before, name))


class _Pruning:
    """One strategy on one model: the hooks and what they remember from prefill to the last token."""

    def __init__(self, model: PreTrainedModel, strategy: Strategy, stages: list[int], system: list[int] | None):
        self.strategy, self.system = strategy, system
        self.image_token_id = model.config.image_token_id
        self.n_layers = len(decoder_layers(model))
        self.groups = [_Group(*ends) for ends in pairwise([*stages, self.n_layers])]
        self.group_of = {i: group for group in self.groups for i in range(group.first, group.last)}
        self.form = _mask_form(model)
        self.trace = Trace()
        self.looks: dict[int, Look] = {}
        self.shares: dict[int, Tensor | None] = {}
        self.projections: dict[str, Tensor] = {}
        self.projector: nn.Module | None = None
        self.features: Tensor | None = None
        self.merging = False
        self.step = -1

    # -- the whole pass ------------------------------------------------------------------------------------------------

    def begin(self, module, args, kwargs) -> None:
        """Before each forward pass: a prefill starts a new trace, a decode step goes on."""
        if kwargs.get("use_cache") is False:
            raise ValueError("pruning needs the KV cache: call generate without use_cache=False")
        ids = args[0] if args else kwargs.get("input_ids")
        cache = kwargs.get("past_key_values")
        cached = cache.get_seq_length() if cache is not None else 0
        if ids is None:
            raise ValueError("pass input_ids: in inputs_embeds alone the image tokens cannot be told from the others")
        for i in self.group_of:
            if cache is not None and i < len(cache.layers):
                check_cache_layer(cache.layers[i], i)
        if cached == 0:
            self._begin_prompt(ids, kwargs.get("attention_mask"))
        elif ids.shape[1] != 1 or self.step < 0:
            raise ValueError(
                f"{ids.shape[1]} tokens follow a cache of {cached}: chunked prefill, assisted decoding and going on from a "
                "cache made elsewhere are not supported. Give the whole prompt at once, with a fresh cache"
            )
        self.step += 1
        self.looks.clear()
        self.shares = {}

    def _begin_prompt(self, ids: Int[Tensor, "batch prompt"], attention_mask: Tensor | None) -> None:
        real = torch.ones_like(ids) if attention_mask is None else attention_mask
        self.segments = find_segments(ids, self.image_token_id, real, self.system)
        image = self.segments.mask("image")
        self.n_image, self.n_real = image.sum(1).tolist(), real.sum(1).tolist()
        self.positions, self.image = self.segments.positions("image")
        self.real = real.bool()
        self.start = _Group(0, 0, kept=self.image, counts=list(self.n_image))
        for group in self.groups:
            group.inherit(self.start)
        self.step = -1
        self.trace.n_image, self.trace.steps = list(self.n_image), []
        self.trace.n_instruction = self.segments.mask("instruction").sum(1).tolist()
        self.projections.clear()

    def end(self, module, args, output) -> None:
        """After each forward pass: write the record."""
        cache = getattr(output, "past_key_values", None)
        held = [layer.keys for layer in cache.layers] if cache is not None else []
        sizes = [2 * keys.numel() * keys.element_size() for keys in held]
        self.trace.steps.append(Step(self.decided, sizes, [n + self.step for n in self.n_real]))

    @property
    def decided(self) -> list[Stage]:
        nothing = _Group(self.n_layers, self.n_layers, self.image, self.n_image)
        return [Stage(g.first, list(g.counts), g.kept, self.shares.get(g.first)) for g in self.groups or [nothing]]

    def take_rows(self, index: Tensor) -> None:
        """Rows of the batch were reordered, chosen or repeated: follow."""
        rows: list[int] | None = None
        for owner in (self, *self.groups):
            for name, value in vars(owner).items():
                if name in ("kept", "columns", "alive", "image", "positions", "real") and value is not None:
                    setattr(owner, name, value.index_select(0, index.to(value.device)))
                elif name in ("counts", "n_image", "n_real"):
                    if len(set(value)) > 1 and rows is None:
                        rows = index.tolist()
                    setattr(owner, name, [value[i] for i in rows] if len(set(value)) > 1 else value[:1] * len(index))
        self.segments = Segments(self.segments.kind.index_select(0, index.to(self.segments.kind.device)))

    # -- what is seen --------------------------------------------------------------------------------------------------

    def look_at(self, layer: int, look: Look) -> None:
        if self.step == 0 or self.strategy.each_step:
            self.looks[layer] = look

    def project_at(self, name: str, module, args, output) -> None:
        if self.step == 0:
            self.projections[name] = output

    def features_at(self, module, args) -> None:
        if not self.merging:
            self.features = args[0]

    def vision_at(self, layer: int, look: Look) -> None:
        first = torch.zeros(len(look.query), 1, dtype=torch.long, device=look.query.device)
        self.vision_look, self.vision_keys = look.rows(first), look.key

    # -- each pruned layer ---------------------------------------------------------------------------------------------

    def enter(self, layer: int, module, args, kwargs):
        """Before each layer that may miss tokens: decide where a stage begins, then fit its inputs."""
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        group = self.group_of[layer]
        cache = kwargs["past_key_values"]
        if self.step == 0:
            self._own(cache, layer)
            if layer == group.first:
                hidden = self._prefill(group, hidden, kwargs)
        elif layer == group.first:
            if self.strategy.each_step:
                self._decode(group, cache)
            self.mask = self._decode_mask(group, cache, hidden) if group.alive is not None else None
        if group.alive is not None:
            kwargs["attention_mask"] = None if self.mask is None else self.mask.to(hidden.device)
            kwargs["position_ids"] = None
            if self.step == 0 and group.columns is not None:
                kwargs["position_embeddings"] = tuple(x.to(hidden.device) for x in self.rotary)
        return (hidden, *rest), kwargs

    def _own(self, cache, layer: int) -> None:
        if cache is None:
            raise ValueError("pruning needs the KV cache: leave use_cache on")
        while len(cache.layers) <= layer:  # a cache made without a configuration grows as it is filled
            cache.layers.append(DynamicLayer())
        check_cache_layer(cache.layers[layer], layer)
        cache.layers[layer] = PrunedLayer(self if layer == self.groups[0].first else None)

    def _prefill(self, group: _Group, hidden: Tensor, kwargs: dict) -> Tensor:
        """Decide, and take the tokens that stay out of the hidden states."""
        before = self._before(group)
        group.inherit(before)
        seen = self._seen(group, before, hidden)
        kept, counts = self._choose(seen, group)
        if counts == before.counts:
            return hidden
        if (merged := self.strategy.merge(seen, kept)) is not None:
            slots = seen._slots(self.positions.to(hidden.device))
            rows, token = kept.nonzero(as_tuple=True)
            hidden = hidden.clone()
            hidden[rows, slots[rows, token]] = merged[rows, token].to(hidden.dtype)
        group.kept, group.counts = kept, counts
        if self.strategy.residency == "hide":
            group.alive = self._alive(group)
            self.mask = self._hide_mask(group, hidden)
            return hidden
        rotary = kwargs["position_embeddings"] if group.columns is None else self.rotary
        group.alive = self._alive(group)
        index = self._leave_dead(group)
        self.rotary = tuple(take(x.to(hidden.device), index) for x in rotary)
        hidden = take(hidden, index)
        self.mask = self._prefill_mask(group, hidden)
        return hidden

    def _decode(self, group: _Group, cache) -> None:
        """Decide, mark what is dropped, and free its memory when enough has gathered."""
        kept, counts = self._choose(self._seen(group, self._before(group)), group)
        if kept is group.kept:
            return
        group.kept, group.counts = kept, counts
        group.alive, group.whole = self._alive(group), False
        if self.strategy.residency == "hide":
            return
        slots = group.alive.shape[1]
        if slots - max(self._n_alive(counts)) >= max(_SPARE_SLOTS, slots // 8):
            self._compact(group, cache)

    def _compact(self, group: _Group, cache) -> None:
        slots = group.alive.shape[1]
        index = self._leave_dead(group)
        n = index.shape[1]
        answer = cache.layers[group.first].keys.shape[2] - slots
        index = torch.cat([index, (slots + torch.arange(answer, device=index.device)).expand(len(index), -1)], 1)
        for layer in cache.layers[group.first : group.last]:
            layer.keys, layer.values = (take_cached(x, index.to(x.device)) for x in (layer.keys, layer.values))
            layer.evicted += slots - n

    def _leave_dead(self, group: _Group) -> Int[Tensor, "batch n"]:
        """The group shrinks to the slots that may be seen; returns which those are, ascending.

        Rows with less than others are filled up with dead slots.
        """
        n_alive = self._n_alive(group.counts)
        index = (~group.alive).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(n_alive)].sort(1).values
        group.columns = index if group.columns is None else group.columns.gather(1, index)
        group.alive = group.alive.gather(1, index)
        group.whole = len(set(n_alive)) == 1
        return index

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _before(self, group: _Group) -> _Group:
        """The group of the layers below; at first the whole prompt."""
        at = self.groups.index(group)
        return self.groups[at - 1] if at else self.start

    def _seen(self, group: _Group, before: _Group, hidden: Tensor | None = None) -> Seen:
        candidates = self.image if self.strategy.residency == "hide" else group.kept
        seen = Seen(
            self.step, group.first, self.n_layers, self.image, candidates, self.positions, self.segments,
            self.looks.get(group.first - 1), before.columns, self.looks,
        )  # fmt: skip
        if hidden is not None:
            row = torch.arange(len(hidden), device=hidden.device)[:, None]
            seen.read_hidden = lambda slots: hidden[row, slots]
            seen.read_vision = self._vision
            seen.read_no_rope = lambda: self._no_rope(seen.look)
        return seen

    def _choose(self, seen: Seen, group: _Group) -> tuple[Tensor, list[int]]:
        """Ask the strategy: the kept tokens, `group.kept` itself where nothing changes."""
        share = self.strategy.keep(seen)
        self.shares[group.first] = seen.shares if seen.look is not None else None
        shares = share.tolist() if isinstance(share, Tensor) else [share] * len(self.n_image)
        if len(shares) != len(group.counts) or not all(0 <= x <= 1 for x in shares):
            raise ValueError(
                f"{type(self.strategy).__name__}.keep gave {shares} for {len(group.counts)} rows: one share in [0, 1] a row "
                "is needed. If it is NaN, so is the attention it was made from: load the model in bfloat16 or float32"
            )
        counts = [kept_count(n, x) for n, x in zip(self.n_image, shares, strict=True)]
        if self.strategy.residency == "evict":
            counts = [min(pair) for pair in zip(counts, group.counts, strict=True)]
            if counts == group.counts:
                return group.kept, counts
        elif self.step == 0 and counts == group.counts:
            return group.kept, counts
        score = self.strategy.score(seen)
        if self.step == 0 and bool(score[seen.kept].isnan().any()):
            raise ValueError(
                f"the scores of layer {group.first} are NaN: the model overflowed. Load it in bfloat16 or float32 instead of "
                "float16"
            )
        return choose(score, seen.kept, counts), counts

    def _n_alive(self, counts: list[int]) -> list[int]:
        """Prompt tokens of each row that may be seen, where `counts` image tokens are kept."""
        return [n - i + c for n, i, c in zip(self.n_real, self.n_image, counts, strict=True)]

    def _alive(self, group: _Group) -> Bool[Tensor, "batch slot"]:
        """Which of the group's slots may be seen: text, and the image tokens that are kept."""
        alive = self.real & ~self.segments.mask("image")
        alive |= torch.zeros_like(alive).scatter(1, self.positions, group.kept & self.image)
        return alive if group.columns is None else alive.gather(1, group.columns)

    def _prefill_mask(self, group: _Group, hidden: Tensor) -> Tensor | None:
        if group.whole:
            return None  # causal, with all fast kernels eligible
        if self.form == "flash":
            return group.alive
        n = hidden.shape[1]
        order = torch.arange(n, device=hidden.device)
        seen = (order <= order[:, None]) & group.alive[:, None, None]
        return self._formed(seen | torch.eye(n, dtype=torch.bool, device=hidden.device), hidden)

    def _hide_mask(self, group: _Group, hidden: Tensor) -> Tensor:
        if self.form == "flash":
            raise ValueError('residency "hide" needs attn_implementation="sdpa" or "eager": flash attention takes no such mask')
        return self._prefill_mask(group, hidden)

    def _decode_mask(self, group: _Group, cache, hidden: Tensor) -> Tensor | None:
        if group.whole:
            return None
        slots = group.alive.shape[1]
        seen = F.pad(group.alive, (0, cache.layers[group.first].keys.shape[2] + 1 - slots), value=True)
        return seen if self.form == "flash" else self._formed(seen[:, None, None], hidden)

    def _formed(self, seen: Tensor, hidden: Tensor) -> Tensor:
        """A boolean mask as the model's attention function wants it."""
        if self.form == "sdpa":
            return seen
        return torch.zeros(seen.shape, dtype=hidden.dtype, device=seen.device).masked_fill(~seen, torch.finfo(hidden.dtype).min)

    def _no_rope(self, look: Look) -> Float[Tensor, "batch head key"]:
        batch, _, _, dim = look.query.shape
        query, key = (self.projections[n].view(batch, -1, x.shape[1], dim).transpose(1, 2)
                      for n, x in (("q_proj", look.query), ("k_proj", look.key)))  # fmt: skip
        return Look(query, key, look.mask, look.scaling).newest

    def _vision(self) -> Vision:
        n_images, n_patches, _ = self.features.shape
        copies, odd = divmod(sum(self.n_image), n_images * n_patches)  # each row once for every beam
        if copies == 0 or odd:
            raise ValueError(
                f"the tower gave {n_images} x {n_patches} patches for {sum(self.n_image)} image tokens: encoder-side "
                "strategies need one image token a patch, as LLaVA-1.5 has"
            )

        def by_row(x: Tensor) -> Tensor:
            image = self.image[::copies]
            rows = x.new_zeros(*image.shape, x.shape[-1])
            rows[image] = x.flatten(0, 1)
            return rows.repeat_interleave(copies, 0)

        keys = self.vision_keys.transpose(1, 2).flatten(2)[:, 1:]
        cls = self.vision_look.mean(1)[:, 0, 1:, None]
        return Vision(by_row(self.features), by_row(cls)[..., 0], by_row(keys), self._project)

    def _project(self, features: Tensor) -> Tensor:
        self.merging = True  # the projector's own hook must not take this for the tower's
        try:
            return self.projector(features)
        finally:
            self.merging = False


def _mask_form(model: PreTrainedModel) -> str:
    """How the decoder's attention function takes its mask."""
    used = model.config.get_text_config()._attn_implementation
    if used in ("sdpa", "eager"):
        return used
    if used.startswith("flash_attention"):
        return "flash"
    raise ValueError(
        f'attn_implementation="{used}" is not supported with a strategy: load the model with "sdpa", "eager" or '
        '"flash_attention_2"'
    )
