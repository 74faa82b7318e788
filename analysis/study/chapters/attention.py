"""Does attention to the image fade while the answer grows, or is it only diluted by the growing answer?

Three measures of one attention row, per step and layer:
- *raw*: the image's share of all attention, the paper's (Sec. III-A, Fig. 2);
- *undiluted*: its share of the attention that does not go to the response, so that a longer response cannot lower it;
- *per token*: its share per image token, in units of a uniform row (1 = as much as an average token in reach).
"""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from dyrate.recording import Recording
from study.intervals import bootstrap
from study.pocket.language import PLURAL
from study.pocket.scenes import COLOURS, GRID
from dyrate.segments import SEGMENTS

MEASURES = ("raw", "undiluted", "per_token")
FUNCTION_WORDS = set("a an the and or of in on at to with for from by is are was were be it its this that there as".split())
_KINDS = {
    "colour": set(COLOURS), "count": set("a an one two three".split()),
    "place": set("top bottom left right centre middle corner".split()),
    "object": set(" ".join([*PLURAL, *PLURAL.values()]).split()) - {"of"},
}  # fmt: skip


def depths(n_layers: int) -> dict[str, range]:
    """Shallow and deep layers: the first and the second half of the decoder."""
    return {"shallow": range(n_layers // 2), "deep": range(n_layers // 2, n_layers)}


def measures(recording: Recording) -> dict[str, np.ndarray]:
    """The three measures of a recording, each (step, layer), means over heads."""
    shares = recording.shares.mean(2)
    image = shares[..., SEGMENTS.index("image")]
    response = shares[..., SEGMENTS.index("response")]
    in_reach = recording.counts.sum(1, keepdims=True)
    per_token = image * in_reach / recording.counts[:, [SEGMENTS.index("image")]]
    return {"raw": image, "undiluted": image / (1 - response), "per_token": per_token}


def curves(recordings: list[Recording], min_samples: int = 10) -> pd.DataFrame:
    """Mean share of each segment and of each measure, per step and depth, with 95 % intervals over samples.

    Answers end at different steps; steps that fewer than `min_samples` answers reach (or a quarter of all, where there
    are few) are left out, because a mean over the longest answers alone would not compare.
    """
    needed = min(min_samples, max(1, len(recordings) // 4))
    longest = max(len(r.tokens) for r in recordings)
    rows = []
    for depth, layers in depths(recordings[0].shares.shape[1]).items():
        for step in range(longest):
            there = [r for r in recordings if len(r.tokens) > step]
            if len(there) < needed:
                break
            values = {s: [r.shares[step, list(layers)].mean((0, 1))[i] for r in there] for i, s in enumerate(SEGMENTS)}
            for name in MEASURES:
                values[name] = [measures_of[name][step, list(layers)].mean() for measures_of in map(_cached, there)]
            for name, sample in values.items():
                rows.append({"depth": depth, "step": step, "what": name, **bootstrap(sample, resamples=300)})
    return pd.DataFrame(rows)


def trends(recordings: list[Recording], min_steps: int = 9) -> pd.DataFrame:
    """Last third of each answer minus its first third, per measure and depth, relative to the first third.

    value: -0.2 means that the measure is 20 % lower late in the answer; interval over samples. The prefill's own row
    (step 0) is left out, answers shorter than `min_steps` too.
    """
    stacks = depths(recordings[0].shares.shape[1]).items()
    return pd.DataFrame(
        {"depth": depth, "measure": name, **bootstrap(_changes(recordings, name, layers, min_steps))}
        for depth, layers in stacks
        for name in MEASURES
    )


def layer_trends(recordings: list[Recording], min_steps: int = 9) -> pd.DataFrame:
    """`trends` for each single layer: relative change of each measure from the first to the last third of an answer."""
    return pd.DataFrame(
        {"layer": layer, "measure": name, **bootstrap(_changes(recordings, name, [layer], min_steps))}
        for layer in range(recordings[0].shares.shape[1])
        for name in MEASURES
    )


def _changes(recordings: list[Recording], name: str, layers, min_steps: int) -> list[float]:
    """Relative change of one measure, mean over `layers`, from the first to the last third of each answer."""
    found = []
    for r in recordings:
        if len(r.tokens) >= min_steps:
            course = _cached(r)[name][1:, list(layers)].mean(1)
            third = len(course) // 3
            found.append(course[-third:].mean() / course[:third].mean() - 1)
    return found


def course_by_task(recordings: list[Recording], bins: int = 12) -> pd.DataFrame:
    """The undiluted share in deep layers over the relative position in the answer (0 first word, 1 last), per task."""
    rows = []
    for task in dict.fromkeys(r.task for r in recordings):
        binned: list[list[float]] = [[] for _ in range(bins)]
        for r in recordings:
            if r.task == task and len(r.tokens) > bins:
                course = _cached(r)["undiluted"][1:, list(depths(r.shares.shape[1])["deep"])].mean(1)
                for found, part in zip(binned, np.array_split(course, bins), strict=True):
                    found.append(part.mean())
        rows += [{"task": task, "position": (i + 0.5) / bins, **bootstrap(v)} for i, v in enumerate(binned) if v]
    return pd.DataFrame(rows, columns=["task", "position", "value", "low", "high", "n"])


def clock(recordings: list[Recording]) -> dict[str, dict]:
    """How much of a measure's variance over all steps a straight line in the step number explains (R^2), deep layers.

    A feature that is mostly a clock tells a predictor when it is, not what is in the image.
    """
    found = {}
    for name in MEASURES:
        points = []
        for r in recordings:
            layers = list(depths(r.shares.shape[1])["deep"])
            points.append(np.stack([np.arange(1, len(r.tokens)), _cached(r)[name][1:, layers].mean(1)], 1))

        def explained(chosen, points=points):
            x, y = np.concatenate([points[int(i)] for i in chosen]).T
            return np.corrcoef(x, y)[0, 1] ** 2 if len(x) > 2 else np.nan

        found[name] = bootstrap(np.arange(len(points)), lambda drawn, axis: explained(drawn), resamples=300)
    return found


def word_kind(token: str, pocket: bool) -> str:
    """Kind of a generated word: object, colour, count, place or other (pocket); content or function (any other text)."""
    word = token.lower()
    if pocket:
        return next((kind for kind, words in _KINDS.items() if word in words), "other")
    return "function" if word in FUNCTION_WORDS or not re.search(r"\w", word) else "content"


def by_word_kind(recordings: list[Recording], pocket: bool) -> pd.DataFrame:
    """Mean measures in the step that generates each kind of word, per depth, with intervals over samples."""
    rows = []
    kinds = [np.array([word_kind(t, pocket) for t in r.tokens]) for r in recordings]
    for depth, layers in depths(recordings[0].shares.shape[1]).items():
        for kind in sorted({k for one in kinds for k in one}):
            for name in MEASURES:
                per_sample = [
                    _cached(r)[name][1:][:, list(layers)].mean(1)[k[1:] == kind].mean()
                    for r, k in zip(recordings, kinds, strict=True)
                    if (k[1:] == kind).any()
                ]
                rows.append({"depth": depth, "kind": kind, "measure": name, **bootstrap(per_sample)})
    return pd.DataFrame(rows)


def focus(recordings: list[Recording], scenes: list, covers: list[np.ndarray]) -> pd.DataFrame:
    """Where in the image the attention lies while an object's name is generated, per layer, with intervals over samples.

    density: attention per image token on the patches of the named object, of the other objects, and of none, in units
    of the mean over the image (1 = no preference). covers: each scene's (group, 12, 12) patches.
    """
    samples: dict[tuple[int, str], list[float]] = {}
    for recording, scene, cover in zip(recordings, scenes, covers, strict=True):
        where = cover.reshape(len(cover), GRID * GRID)
        name_of = {word: i for i, g in enumerate(scene.groups) for word in _naming(g.thing)}
        found: dict[tuple[int, str], list[float]] = {}
        for step, token in enumerate(recording.tokens):
            group = name_of.get(token.lower())
            if group is None or step == 0:
                continue
            attention = recording.image[step] / recording.image[step].mean(-1, keepdims=True)
            parts = {"named object": where[group], "other objects": where.any(0) & ~where[group], "no object": ~where.any(0)}
            for part, mask in parts.items():
                if mask.any():
                    for layer, density in enumerate(attention[:, mask].mean(1)):
                        found.setdefault((layer, part), []).append(density)
        for key, values in found.items():
            samples.setdefault(key, []).append(float(np.mean(values)))
    return pd.DataFrame(
        {"layer": layer, "patches": part, **bootstrap(values)} for (layer, part), values in sorted(samples.items())
    )


def _naming(thing: str) -> list[str]:
    """The word that names a thing, singular and plural; of "pair of scissors" the last."""
    return [thing.split()[-1], PLURAL[thing].split()[-1]]


def verdict(found: pd.DataFrame) -> str:
    """One sentence: does the raw share fall, and does it still once the growing response is taken out?"""
    if found.n.max() == 0:
        return "**The answers are too short to compare their beginnings with their ends.**"
    parts = []
    for depth in ("shallow", "deep"):
        rows = found[found.depth == depth].set_index("measure")
        raw, undiluted = rows.loc["raw"], rows.loc["undiluted"]
        parts.append(
            f"in {depth} layers the image's share of all attention {_moved(raw)}, and {_moved(undiluted)} once the attention to "
            "the response itself is set aside"
        )
    raw = found[found.measure == "raw"]
    rest = found[found.measure == "undiluted"]
    if (raw.high < 0).any() and not (rest.high < 0).any():
        cause = "**The image's share does not fade here: it is diluted by the growing response.**"
    elif (raw.high < 0).any() and (raw.high < 0).sum() > (rest.high < 0).sum():
        cause = "**Part of the fall is dilution by the growing response, part of it is real.**"
    elif (raw.high < 0).any():
        cause = "**The image's share falls, and dilution alone does not explain it.**"
    else:
        cause = "**The image's share does not fall here.**"
    text = "; ".join(parts)
    return f"{cause} From the first to the last third of an answer, {text} (95 % intervals over {int(raw.n.max())} answers)."


def _moved(row) -> str:
    interval = f"({100 * row.low:+.1f} to {100 * row.high:+.1f} %)"
    if row.low <= 0 <= row.high:
        return f"stays where it was {interval}"
    return f"{'falls' if row.value < 0 else 'rises'} by {abs(100 * row.value):.1f} % {interval}"


def _cached(recording: Recording) -> dict[str, np.ndarray]:
    if "measures" not in recording.__dict__:
        recording.__dict__["measures"] = measures(recording)
    return recording.__dict__["measures"]
