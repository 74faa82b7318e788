"""Let a strategy drop image tokens from a live model.

A pre-hook on the first pruned layer asks the strategy, and takes the chosen positions out of the hidden states (prefill) or
out of the cached keys and values (decode); pre-hooks on all deeper layers hand in the mask and the rotary embeddings that
fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from dyrate.attention import LayerAttention
from dyrate.data import Example
from dyrate.engine.cache import ROOM, PrunedLayer, Slots, check_layers, own_layers
from dyrate.engine.deepstack import deepstack
from dyrate.engine.kept import Held, Rows, take
from dyrate.engine.masks import decode_mask, mask_form, prefill_mask
from dyrate.engine.observing import decoder_layers, observe
from dyrate.engine.positions import rotary_at
from dyrate.engine.static import static_steps
from dyrate.engine.vision import Tower
from dyrate.seen import Seen, choose, kept_count
from dyrate.segments import find_segments, system_ids
from dyrate.trace import Stage, Step, Trace

if TYPE_CHECKING:
    from dyrate.strategy import Strategy

_COPY = 2  # a slot is read and written, for what one step reads
_READ_SHARE = 1 / 3  # of the slots: gathering reads, writes and reads again what reading under a mask reads once


@contextmanager
def prune(
    model: PreTrainedModel, strategy: Strategy, processor=None, *, examples: Sequence[Example] | None = None, static: int = 0
) -> Iterator[Trace]:
    """Let `strategy` drop image tokens in every `model.generate` (or forward pass with a cache) until the context is left.

    Works with greedy decoding, sampling and beams, left-padded batches and any number of images a prompt. The trace is
    that of the latest `generate`. examples: of the rows, handed on to the strategy. static: room of `static_steps`; 0: eager
    steps. Raises an error before the first token for what cannot be pruned, and says what to do.
    """
    if any(getattr(module, "_compiled_call_impl", None) or hasattr(module, "_orig_mod") for module in model.modules()):
        raise ValueError("this model is compiled, and strategies cannot enter it: attach them to the model as it was loaded")
    layers = decoder_layers(model)
    stages = list(strategy.stages(len(layers)))
    if outside := [s for s in stages if not 0 <= s < len(layers)]:
        raise ValueError(f"{strategy}: the model has the layers 0 to {len(layers) - 1}, so none to prune from {outside[0]} on")
    if stages != sorted(set(stages)):
        raise ValueError(f"{strategy}: stages must ascend, not {stages}")
    if any(isinstance(getattr(hook, "__self__", None), _Pruning) for hook in model._forward_pre_hooks.values()):
        raise RuntimeError("a strategy is attached to this model already: leave its `with` block before entering another")
    observed = sorted(strategy.observes(len(layers)))
    if stages and observed and observed[-1] >= max(1, stages[-1]):
        raise ValueError(f"{strategy}: layer {observed[-1]} is observed too late for a decision before layer {stages[-1]}")
    run = _Pruning(model, strategy, stages, observed, processor, examples, static)
    check_layers(model, run.stage_of)
    asked = stages if "own_attention" in strategy.needs else []
    with ExitStack() as stack:
        if static:
            stack.enter_context(static_steps(model, stages, run.observed, static))
        stack.enter_context(observe(model, run.observe, sorted({*observed, *asked})))
        stack.enter_context(deepstack(model, run.columns))
        stack.callback(model.register_forward_pre_hook(run.begin, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(run.end).remove)
        if "embeddings" in strategy.needs:
            stack.callback(layers[0].register_forward_pre_hook(run.embed, with_kwargs=True).remove)
        for i in range(stages[0] if stages else len(layers), len(layers)):
            stack.callback(layers[i].register_forward_pre_hook(partial(run.enter, i), with_kwargs=True).remove)
        if "no_rope" in strategy.needs:
            for name in ("q_proj", "k_proj"):
                projection = getattr(layers[stages[0] - 1].self_attn, name)
                stack.callback(projection.register_forward_hook(partial(run.project, name)).remove)
        if "vision" in strategy.needs:
            run.tower = Tower(model)
            stack.enter_context(run.tower.attached())
        stack.callback(run.close_cache)
        yield run.trace


class _Captured(Exception):
    """Carries a layer's attention out of a forward pass that is not wanted further."""

    def __init__(self, attention: LayerAttention):
        self.attention = attention


class _Pruning:
    """One strategy on one model: the hooks, and what they remember from prefill to the last token.

    All that belongs to a row of the batch is in `rows`; the rest is of the whole batch.
    """

    def __init__(
        self, model: PreTrainedModel, strategy: Strategy, stages: list[int], wanted: list[int], processor, examples, static: int
    ):  # fmt: skip
        self.strategy, self.stages, self.wanted, self.examples = strategy, stages, wanted, examples
        self.rotary_of, self.norm = partial(rotary_at, model), model.get_decoder().norm
        self.system = None if processor is None else system_ids(processor)
        self.image_token_id = model.config.image_token_id
        self.n_layers = len(decoder_layers(model))
        self.stage_of = {i: first for first, last in pairwise([*stages, self.n_layers]) for i in range(first, last)}
        self.form = mask_form(model)
        self.trace = Trace(self.n_layers)
        self.observed: dict[int, LayerAttention] = {}
        self.shares: dict[int, Tensor | None] = {}
        self.projections: dict[str, Tensor] = {}
        self.embedded: Tensor | None = None
        self.tower: Tower | None = None
        self.capturing = False
        self.gathers = strategy.residency == "mask" and not static
        self.read: Slots | None = None
        self.step = -1
        self.pruned: WeakSet[PrunedLayer] = WeakSet()  # layers of the cache at work

    def __reduce__(self):
        raise RuntimeError("a strategy is attached to this model: leave its `with` block before copying or pickling the model")

    def close_cache(self) -> None:
        """The cache of the latest prompt, if anyone still has it, takes no more tokens."""
        for layer in self.pruned:
            layer.close()
        self.pruned.clear()

    # -- the whole pass ------------------------------------------------------------------------------------------------

    def begin(self, module, args, kwargs):
        """Before each forward pass: a prefill starts a new trace with a cache of its own kind, a decode step goes on."""
        if kwargs.get("use_cache") is False:
            raise ValueError("pruning needs the KV cache: call generate without use_cache=False")
        ids = args[0] if args else kwargs.get("input_ids")
        cache = kwargs.get("past_key_values")
        cached = cache.get_seq_length() if cache is not None else 0
        if ids is None:
            raise ValueError("pass input_ids: inputs_embeds alone do not say which tokens are the image")
        if cached == 0:
            self._begin_prompt(ids, kwargs.get("attention_mask"))
            cache = DynamicCache() if cache is None else cache
            kwargs["past_key_values"] = cache = own_layers(cache, self.n_layers, sorted(self.stage_of), self.rows.take)
            self.pruned.update(cache.layers[layer] for layer in self.stage_of)
        elif ids.shape[1] != 1 or self.step < 0:
            raise ValueError(
                f"{ids.shape[1]} tokens follow a cache of {cached}: chunked prefill, assisted decoding and going on from a "
                "cache made elsewhere are not supported. Give the whole prompt at once, with a fresh cache"
            )
        self.step += 1
        self.stage = -1
        self.observed.clear()
        self.shares = {}
        return args, kwargs

    def _begin_prompt(self, ids: Tensor, attention_mask: Tensor | None) -> None:
        real = torch.ones_like(ids) if attention_mask is None else attention_mask
        if not bool(real[:, -1].all()):
            raise ValueError('a prompt ends in padding: pad on the left (processor.tokenizer.padding_side = "left")')
        self.close_cache()
        segments = find_segments(ids, self.image_token_id, real, self.system)
        self.rows = Rows.of_prompt(segments, real, self.stages)
        self.step, self.wasted = -1, dict.fromkeys(self.stages, 0)
        self.trace.n_image, self.trace.steps = list(self.rows.n_image), []
        self.trace.n_instruction = segments.mask("instruction").sum(1).tolist()
        self.projections.clear()

    def end(self, module, args, output) -> None:
        """After each forward pass: write the record."""
        cache = getattr(output, "past_key_values", None)
        keys = [layer.keys for layer in cache.layers] if cache is not None else []
        sizes = [2 * k.numel() * k.element_size() for k in keys]
        held = {first: self.rows.held[first] for first in self.stages} or {self.n_layers: self.rows.held[-1]}
        decided = [Stage(first, list(h.counts), h.kept, self.shares.get(first)) for first, h in held.items()]
        self.trace.steps.append(Step(decided, sizes, [n + self.step for n in self.rows.n_real]))

    def columns(self) -> Tensor | None:
        """The prompt position of each token that the layer entered last holds; None while all are there."""
        return self.rows.held[self.stage].columns

    # -- what is observed ----------------------------------------------------------------------------------------------

    def observe(self, layer: int, attention: LayerAttention) -> None:
        if self.capturing:
            raise _Captured(attention)
        if layer in self.wanted and (self.step == 0 or self.strategy.each_step):
            self.observed[layer] = attention

    def embed(self, module, args, kwargs) -> None:
        if self.step == 0:
            self.embedded = args[0] if args else kwargs["hidden_states"]

    def project(self, name: str, module, args, output) -> None:
        if self.step == 0:
            self.projections[name] = output

    # -- each pruned layer ---------------------------------------------------------------------------------------------

    def enter(self, layer: int, module, args, kwargs):
        """Before each layer that may miss tokens: decide where a stage begins, then fit its inputs."""
        hidden = args[0] if args else kwargs["hidden_states"]
        stage, cache = self.stage_of[layer], kwargs["past_key_values"]
        held = self.rows.held[stage]
        self.stage = stage
        if layer == stage:
            if self.step == 0:
                hidden = self._prefill(stage, held, module, hidden, kwargs)
            else:
                self._decode(stage, held, hidden, cache)
        if held.alive is None:
            return None
        observed = layer in self.wanted  # whoever observes a layer looks for all its keys
        cache.layers[layer].read = None if observed else self.read
        mask = self.mask if observed or self.read is None else self.read_mask
        kwargs |= {"attention_mask": None if mask is None else mask.to(hidden.device), "position_ids": None}
        if self.rotary is not None:
            kwargs["position_embeddings"] = tuple(x.to(hidden.device) for x in self.rotary)
        if args:
            return (hidden, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": hidden}

    def _prefill(self, stage: int, held: Held, module: nn.Module, hidden: Tensor, kwargs: dict) -> Tensor:
        """Decide, and take the tokens that stay out of the hidden states."""
        before = self._before(stage)
        if stage == self.stages[0]:
            self.mask, self.rotary = None, None
        for field in fields(held):
            setattr(held, field.name, getattr(before, field.name))
        rotary = kwargs["position_embeddings"] if self.rotary is None else self.rotary
        mask = kwargs["attention_mask"] if held.alive is None else self.mask
        seen = self._seen(stage, held, hidden)
        seen.read_own = partial(self._own_attention, module, hidden, mask, rotary)
        kept, counts = self._choose(seen, held)
        if counts == before.counts:
            return hidden
        if (merged := self.strategy.merge(seen, kept)) is not None:
            slots = seen.slots(self.rows.positions.to(hidden.device))
            rows, token = kept.nonzero(as_tuple=True)
            hidden = hidden.clone()
            hidden[rows, slots[rows, token]] = merged[rows, token].to(hidden.dtype)
        self.rows.see_only(held, kept, counts)
        if self.strategy.residency == "evict":
            index = self.rows.shrink(held)
            self.rotary = tuple(take(x.to(hidden.device), index) for x in rotary)
            hidden = take(hidden, index)
        elif self.form == "flash":
            raise ValueError('residency "mask" needs attn_implementation="sdpa" or "eager": flash attention takes no such mask')
        if self.strategy.positions == "compact":
            held.shift = [n - left for n, left in zip(self.rows.n_real, self.rows.n_alive(counts), strict=True)]
            self.rotary = self.rotary_of(hidden, held.alive.long().cumsum(1).sub(1).clamp(min=0))
        # without a mask the fused kernels are causal, and all of them eligible; eager attention would see everything
        needed = self.form == "eager" or not self.rows.whole(held)
        self.mask = prefill_mask(self.form, held.alive, hidden) if needed else None
        return hidden

    def _decode(self, stage: int, held: Held, hidden: Tensor, cache) -> None:
        """Decide, and say what the layers of this stage attend to."""
        if self.strategy.each_step:
            kept, counts = self._choose(self._seen(stage, held, hidden), held)
            if kept is not held.kept:
                self.rows.see_only(held, kept, counts)
        if held.alive is None:
            return
        if self.strategy.residency == "evict":
            self._free(stage, held, cache)
        slots = held.alive.shape[1]
        self.mask = None if self.rows.whole(held) else decode_mask(self.form, held.alive, slots + self.step, hidden)
        self.rotary, self.read = self._moved_up(held, hidden), None
        if self.gathers and max(seen := self.rows.n_alive(held.counts)) <= _READ_SHARE * slots:
            index = self.rows.seen_slots(held)
            self.read = Slots(self._and_answer(index, slots, self.step))
            ragged, alive = len(set(seen)) > 1, held.alive.gather(1, index)
            self.read_mask = decode_mask(self.form, alive, index.shape[1] + self.step, hidden) if ragged else None

    def _free(self, stage: int, held: Held, cache) -> None:
        """Free the memory of what is not seen, when reading past it has cost as much as copying what stays."""
        slots, left = held.alive.shape[1], max(self.rows.n_alive(held.counts))
        self.wasted[stage] += slots - left
        if slots == left or self.wasted[stage] < _COPY * left:
            return
        self.wasted[stage] = 0
        index = self._and_answer(self.rows.shrink(held), slots, self.step - 1)
        staying, length = Slots(F.pad(index, (0, ROOM))), index.shape[1]  # the room behind may hold anything
        for layer in (i for i, first in self.stage_of.items() if first == stage):
            cache.layers[layer].compact(staying, length)

    def _and_answer(self, index: Tensor, slots: int, tokens: int) -> Tensor:
        """These of the prompt's `slots`, and those of as many tokens of the answer behind them."""
        return torch.cat([index, torch.arange(slots, slots + tokens, device=index.device).expand(len(index), -1)], 1)

    def _moved_up(self, held: Held, hidden: Tensor) -> tuple[Tensor, ...] | None:
        """Rotary embeddings of the new token where the prompt was renumbered; None where the model's own are right."""
        if held.shift is None:
            return None
        position = [n - moved + self.step - 1 for n, moved in zip(self.rows.n_real, held.shift, strict=True)]
        return self.rotary_of(hidden, torch.tensor(position, device=hidden.device)[:, None])

    # -- the decision --------------------------------------------------------------------------------------------------

    def _before(self, stage: int) -> Held:
        """What the layers below hold; before the first stage the whole prompt."""
        at = self.stages.index(stage)
        return self.rows.held[self.stages[at - 1] if at else -1]

    def _seen(self, stage: int, held: Held, hidden: Tensor) -> Seen:
        rows = self.rows
        candidates = rows.image if self.strategy.residency == "mask" else held.kept
        seen = Seen(
            self.step, stage, self.n_layers, rows.image, candidates, rows.positions, rows.segments, self.observed,
            self._before(stage).columns, self.examples, held=held.kept, newest_hidden=hidden[:, -1],
        )  # fmt: skip
        if self.step == 0:
            row = torch.arange(len(hidden), device=hidden.device)[:, None]
            seen.read_hidden = lambda slots: hidden[row, slots]
            seen.norm = self.norm
            seen.read_embedded = lambda positions: self.embedded[row, positions.to(hidden.device)]
            seen.read_vision = lambda: self.tower.vision(rows.image, rows.n_image)
            seen.read_no_rope = lambda: self._no_rope(self.observed[stage - 1])
        return seen

    def _choose(self, seen: Seen, held: Held) -> tuple[Tensor, list[int]]:
        """Ask the strategy: the kept tokens, `held.kept` itself where nothing changes."""
        retention = self.strategy.keep(seen)
        self.shares[seen.layer] = seen.shares if seen.layer - 1 in self.observed else None
        n_image = self.rows.n_image
        if isinstance(retention, Tensor):
            retention = retention.tolist()
        each = [retention] * len(n_image) if isinstance(retention, int | float) else list(retention)
        if len(each) != len(n_image) or not all(0 <= x <= 1 for x in each):
            raise ValueError(
                f"{type(self.strategy).__name__}.keep gave {each} for {len(n_image)} rows: one retention ratio in [0, 1] a row "
                "is needed. If it is NaN, so is the attention it was made from: load the model in bfloat16 or float32"
            )
        counts = [kept_count(n, x) for n, x in zip(n_image, each, strict=True)]
        if self.strategy.residency == "evict":
            counts = [min(pair) for pair in zip(counts, held.counts, strict=True)]
        if counts == held.counts and (self.strategy.residency == "evict" or self.step == 0):
            return held.kept, counts
        score = self.strategy.score(seen)
        if self.step == 0 and bool(score[seen.kept].isnan().any()):
            raise ValueError(
                f"the scores of layer {seen.layer} are NaN: the model overflowed. Load it in bfloat16 or float32 instead of "
                "float16"
            )
        return choose(score, seen.kept, counts), counts

    def _own_attention(self, module: nn.Module, hidden: Tensor, mask, rotary) -> LayerAttention:
        """What this layer's attention would be on the tokens that enter it, found by running it up to its softmax."""
        self.capturing = True
        try:
            module.self_attn(
                module.input_layernorm(hidden), attention_mask=mask, position_embeddings=rotary, past_key_values=None
            )
        except _Captured as captured:
            return captured.attention
        finally:
            self.capturing = False
        raise TypeError(f"{type(module).__name__} does not compute attention in a way that can be observed")

    def _no_rope(self, attention: LayerAttention) -> Float[Tensor, "batch head key"]:
        """The newest query's weights from the projections before rotary embedding."""
        batch, _, _, dim = attention.query.shape
        query, key = (self.projections[n].view(batch, -1, x.shape[1], dim).transpose(1, 2)
                      for n, x in (("q_proj", attention.query), ("k_proj", attention.key)))  # fmt: skip
        return LayerAttention(query, key, attention.mask, attention.scaling).newest
