"""Short answers through lmms-eval, the harness that the paper used: `lmms-eval --model dyrate_llava`.

`strategy_of` reads the model's arguments, `answer` answers a batch. Neither needs lmms-eval; `lmms_plugin` is what it calls.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import NamedTuple

from transformers import GenerationConfig

from dyrate.data import Example
from dyrate.generation import answer_batch, encode_chats
from dyrate.strategies.dyrate import DyRate
from dyrate.strategy import STRATEGIES, Strategy


def strategy_of(name: str, n_layers: int, *, predictor: str | None = None, budget: float | None = None, **given) -> Strategy:
    """The strategy that model arguments mean.

    name: one of STRATEGIES, in any case. given: its fields, lists and mappings as JSON. budget: the retention ratio; it sets
    the rate of a strategy that has one (`Strategy.at_retention`), and must be what a predictor was trained for. predictor:
    DyRate's, a folder or hub name. Raises ValueError for what is unknown, missing or contradicts itself.
    """
    cls = {known.lower(): cls for known, cls in STRATEGIES.items()}.get(str(name).lower())
    if cls is None:
        raise ValueError(f"no strategy is called {name!r}; there are {', '.join(sorted(STRATEGIES))}")
    if "scene" in cls.needs:
        raise ValueError(f"{cls.__name__} needs to know what an image shows, which lmms-eval's tasks do not say")
    if issubclass(cls, DyRate):
        return _trained(predictor, budget, given)
    if predictor is not None:
        raise ValueError(f"predictor={predictor} goes with strategy=dyrate, not with strategy={name}")
    known = [field.name for field in fields(cls)]
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(known)}")
    if budget is not None and cls.at_retention.__func__ is Strategy.at_retention.__func__:
        raise ValueError(f"{cls.__name__} has no rate that budget={budget} could set; it has {', '.join(known)}")
    if budget is not None and not 0 <= budget <= 1:
        raise ValueError(f"budget is the share of image tokens that is kept and lies in [0, 1], not {budget}")
    try:
        given = {key: json.loads(v) if str(v).startswith(("[", "{")) else v for key, v in given.items()}
        return cls(**given) if budget is None else cls.at(budget, n_layers, **given)
    except (TypeError, json.JSONDecodeError) as error:
        wanted = ", ".join(f"{key}={value}" for key, value in given.items())
        beside = "" if budget is None else f" beside budget={budget}, which sets the rate"
        raise ValueError(f"{cls.__name__} cannot have {wanted}{beside}: {error}") from error


def _trained(predictor: str | None, budget: float | None, given: dict) -> DyRate:
    if predictor is None:
        raise ValueError("strategy=dyrate needs predictor=<folder or hub name>; `python -m dyrate.training` makes one")
    if given:
        raise ValueError(f"{', '.join(given)}: strategy=dyrate has these from its predictor; leave them out")
    try:
        strategy = DyRate.from_pretrained(predictor)
    except (OSError, ValueError) as error:
        raise ValueError(f"predictor={predictor} is no folder with a predictor, and the hub does not give it: {error}") from error
    trained = strategy.predictor.about.get("settings", {})
    if budget is not None and budget != trained.get("budget"):
        made = f"{trained['budget']} ({trained['unit']})" if trained else "a budget that it does not state"
        raise ValueError(f"predictor={predictor} was trained for {made}, not for {budget}: name another, or no budget")
    return strategy


class Answer(NamedTuple):
    """tokens: number of them, with the end token. retention: mean over the answer's steps; NaN without an image."""

    text: str
    tokens: int
    retention: float


def answer(
    model, processor, strategy: Strategy, chats: list[list[dict]], examples: Sequence[Example], wanted: dict
) -> list[Answer]:
    """Answer each chat under a strategy; the text ends before the first of the strings in `wanted["until"]`.

    chats: messages as lmms-eval hands them over, images in place, any number or none. examples: the one of each chat, for
    strategies that use it. wanted: lmms-eval's generation_kwargs, understood as its own `llava_hf` does: greedy unless
    temperature > 0, 1024 new tokens unless given, and what `generate` does not know is left out.
    """
    until = [wanted["until"]] if isinstance(wanted.get("until"), str) else wanted.get("until") or []
    settings = {"max_new_tokens": 1024} | _generate_settings(wanted)
    answers: dict[int, Answer] = {}
    images = [_images(chat) for chat in chats]
    for sees in (True, False):
        rows = [i for i, pictures in enumerate(images) if bool(pictures) == sees]
        if not rows:
            continue
        inputs = encode_chats(processor, [chats[i] for i in rows], [picture for i in rows for picture in images[i]])
        applied = strategy if sees else None  # without an image there is nothing to drop
        batch = answer_batch(model, processor, inputs, applied, [examples[i] for i in rows], **settings)
        retention = [float(steps.mean()) for steps in batch.retention()] if sees else [float("nan")] * len(rows)
        for i, ids, text, kept in zip(rows, batch.tokens, batch.texts, retention, strict=True):
            answers[i] = Answer(min((text.partition(stop)[0] for stop in until), key=len, default=text), len(ids), kept)
    return [answers[i] for i in range(len(chats))]


def _generate_settings(wanted: dict) -> dict:
    samples = (wanted.get("temperature") or 0) > 0
    known = set(vars(GenerationConfig())) - ({"do_sample"} if samples else {"do_sample", "temperature", "top_p", "top_k"})
    return {k: v for k, v in wanted.items() if k in known and v is not None} | {"do_sample": samples}


def _images(chat: list[dict]) -> list:
    """A chat's images in reading order."""
    parts = [part for message in chat for part in message["content"]]
    if other := {part["type"] for part in parts} - {"text", "image"}:
        raise ValueError(f"the task shows {', '.join(sorted(other))}: dyrate_llava answers questions about images only")
    return [part["url"] for part in parts if part["type"] == "image"]
