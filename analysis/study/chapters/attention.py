"""Chapter 1, where attention goes: does attention to the image fade while the answer grows, or is it only diluted?

Three measures of one attention row, per step and layer:
- *raw*: the image's share of all attention, the paper's (Sec. III-A, Fig. 2);
- *undiluted*: its share of the attention that does not go to the response, so that a longer response cannot lower it;
- *per token*: its share per image token, in units of a uniform row (1 = as much as an average token in reach).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

import dyrate
from dyrate.data import Examples
from dyrate.models import describe
from dyrate.recording import Recording, record_examples
from dyrate.segments import SEGMENTS
from study.book import Chapter
from study.examples import examples as study_examples
from study.examples import has_scenes, left_out
from study.intervals import bootstrap
from study.pocket.language import PLURAL
from study.pocket.scenes import COLOURS, GRID, render

MEASURES = ("raw", "undiluted", "per_token")
IMAGE = SEGMENTS.index("image")
FUNCTION_WORDS = set("a an the and or of in on at to with for from by is are was were be it its this that there as".split())
_KINDS = {
    "colour": set(COLOURS), "count": set("a an one two three".split()),
    "place": set("top bottom left right centre middle corner".split()),
    "object": set(" ".join([*PLURAL, *PLURAL.values()]).split()) - {"of"},
}  # fmt: skip


@dataclass
class Attention:
    """What the chapter measured, of answers to the first task but for `answers`, `kinds` and `course`, which are of all.

    model: its name and size, for captions. answers: sample, task and tokens of each. curves, trends, layer_trends, layer_steps,
    kinds, course, density (`focus`): what the functions of these names return. heads: mean image share over the steps, a layer
    a row and a head a column. clock: `explained_by_step`. heads_over_steps: of `heads_over_steps`. shown: `shown`.
    """

    model: str
    examples: Examples
    answers: pd.DataFrame
    curves: pd.DataFrame
    trends: pd.DataFrame
    layer_trends: pd.DataFrame
    layer_steps: pd.DataFrame
    heads: pd.DataFrame
    kinds: pd.DataFrame
    course: pd.DataFrame
    density: pd.DataFrame
    clock: pd.DataFrame
    heads_over_steps: float
    shown: dict

    @property
    def scenes(self) -> bool:
        """Whether it is known what the images show."""
        return has_scenes(self.examples)

    @property
    def main(self) -> pd.DataFrame:
        """The answers to the first task."""
        return self.answers[self.answers.task == self.answers.task.iloc[0]]


def measure(
    *, model: str, source: str, tasks: Sequence[str], n: int, max_new_tokens: int, batch_size: int, seed: int,
    device_map: str = "", **_,
) -> Attention:  # fmt: skip
    """Record the attention of answers to `n` images a task. Parameters: the notebook's."""
    examples = study_examples(source, n, tasks=tasks, seed=seed)
    scenes = has_scenes(examples)
    loaded, processor = dyrate.load(model, device_map=device_map or None)
    recordings = record_examples(
        loaded, processor, examples, max_new_tokens=max_new_tokens, batch_size=batch_size, image_rows=scenes
    )
    about = describe(loaded)
    name = f"`{model}` ({about['family']}, {about['parameters'] / 1e6:.1f} M parameters, {about['layers']} layers)"
    answers = pd.DataFrame([{"sample": r.sample, "task": r.task, "tokens": len(r.tokens)} for r in recordings])
    main = [r for r in recordings if r.task == tasks[0]]
    heads = np.mean([r.shares[1:, ..., IMAGE].mean(0) for r in main], 0)
    scene_of = {e.name: e.scene for e in examples} if scenes else {}
    placed = [r for r in main if r.sample in scene_of]
    shows = [scene_of[r.sample] for r in placed]
    density = focus(placed, shows, [render(scene).cover for scene in shows])
    return Attention(
        name, examples, answers, curves(main), trends(main), layer_trends(main), layer_steps(main),
        pd.DataFrame(heads).rename(columns=str),
        token_kinds(recordings, scenes), course_by_task(recordings), density, explained_by_step(main),
        heads_over_steps(main, heads), shown(main[:20] if scenes else recordings[:1], density),
    )  # fmt: skip


def depths(n_layers: int) -> dict[str, list[int]]:
    """Shallow and deep layers: the first and the second half of the decoder."""
    return {"shallow": list(range(n_layers // 2)), "deep": list(range(n_layers // 2, n_layers))}


def measures(recording: Recording) -> dict[str, np.ndarray]:
    """The three measures of a recording, each (step, layer), means over heads."""
    shares = recording.shares.mean(2)
    image = shares[..., IMAGE]
    response = shares[..., SEGMENTS.index("response")]
    in_reach = recording.counts.sum(1, keepdims=True)
    per_token = image * in_reach / recording.counts[:, [IMAGE]]
    return {"raw": image, "undiluted": image / (1 - response), "per_token": per_token}


def curves(recordings: list[Recording], min_samples: int = 10) -> pd.DataFrame:
    """Mean share of each segment and of each measure, per step and depth, with 95 % intervals over samples.

    Answers end at different steps; steps that fewer than `min_samples` answers reach (or a quarter of all, where there
    are few) are left out, because a mean over the longest answers alone would not compare.
    """
    needed = min(min_samples, max(1, len(recordings) // 4))
    longest = max(len(r.tokens) for r in recordings)
    measured = [(r, measures(r)) for r in recordings]
    rows = []
    for depth, layers in depths(_n_layers(recordings)).items():
        for step in range(longest):
            reaching = [(r, m) for r, m in measured if len(r.tokens) > step]
            if len(reaching) < needed:
                break
            shares = [r.shares[step, layers].mean((0, 1)) for r, _ in reaching]
            values = dict(zip(SEGMENTS, np.transpose(shares), strict=True))
            values |= {name: [m[name][step, layers].mean() for _, m in reaching] for name in MEASURES}
            for what, sample in values.items():
                rows.append({"depth": depth, "step": step, "what": what, **bootstrap(sample, resamples=300)})
    return pd.DataFrame(rows)


def trends(recordings: list[Recording], min_steps: int = 9) -> pd.DataFrame:
    """Last third of each answer minus its first third, per measure and depth, relative to the first third.

    value: -0.2 means that the measure is 20 % lower late in the answer; interval over samples. The prefill's own row
    (step 0) is left out, answers shorter than `min_steps` too.
    """
    return _changes(recordings, "depth", depths(_n_layers(recordings)), min_steps)


def layer_trends(recordings: list[Recording], min_steps: int = 9) -> pd.DataFrame:
    """`trends` for each single layer: relative change of each measure from the first to the last third of an answer."""
    return _changes(recordings, "layer", {layer: [layer] for layer in range(_n_layers(recordings))}, min_steps)


def _changes(recordings: list[Recording], column: str, groups: dict, min_steps: int) -> pd.DataFrame:
    """Relative change of each measure, mean over each group of layers, from the first to the last third of each answer."""
    measured = [measures(r) for r in recordings if len(r.tokens) >= min_steps]

    def change(course: np.ndarray) -> float:
        third = len(course) // 3
        return course[-third:].mean() / course[:third].mean() - 1

    return pd.DataFrame(
        {column: group, "measure": name, **bootstrap([change(m[name][1:, layers].mean(1)) for m in measured])}
        for group, layers in groups.items()
        for name in MEASURES
    )


def course_by_task(recordings: list[Recording], bins: int = 12) -> pd.DataFrame:
    """The undiluted share in deep layers over the relative position in the answer (0 first token, 1 last), per task."""
    deep = depths(_n_layers(recordings))["deep"]
    rows = []
    for task in dict.fromkeys(r.task for r in recordings):
        long_enough = [r for r in recordings if r.task == task and len(r.tokens) > bins]
        courses = [np.array_split(measures(r)["undiluted"][1:, deep].mean(1), bins) for r in long_enough]
        for i, parts in enumerate(zip(*courses, strict=True)):
            rows.append({"task": task, "position": (i + 0.5) / bins, **bootstrap([part.mean() for part in parts])})
    return pd.DataFrame(rows, columns=["task", "position", "value", "low", "high", "n"])


def explained_by_step(recordings: list[Recording]) -> pd.DataFrame:
    """How much of a measure's variance over all steps a straight line in the step number explains (R^2), deep layers.

    The more of it, the more a predictor that reads the measure learns when it is, and not what is in the image.
    """
    deep = depths(_n_layers(recordings))["deep"]
    measured = [measures(r) for r in recordings]
    rows = []
    for name in MEASURES:
        points = [np.stack([np.arange(1, len(m[name])), m[name][1:, deep].mean(1)], 1) for m in measured]

        def r_squared(drawn, axis):
            x, y = np.concatenate([points[int(i)] for i in drawn]).T
            return np.corrcoef(x, y)[0, 1] ** 2 if len(x) > 2 else np.nan

        rows.append({"measure": name, **bootstrap(np.arange(len(points)), r_squared, resamples=300)})
    return pd.DataFrame(rows)


def layer_steps(recordings: list[Recording]) -> pd.DataFrame:
    """Raw and undiluted share in every layer and step, a row each: means over answers of at least median length."""
    median = int(np.median([len(r.tokens) for r in recordings]))
    measured = [measures(r) for r in recordings if len(r.tokens) >= median]
    steps = min(len(m["raw"]) for m in measured)
    means = {name: np.mean([m[name][:steps] for m in measured], 0) for name in ("raw", "undiluted")}
    step, layer = np.indices(means["raw"].shape).reshape(2, -1)
    return pd.DataFrame({"step": step, "layer": layer} | {name: mean.ravel() for name, mean in means.items()})


def token_kind(token: str, scenes: bool) -> str:
    """Kind of a generated token: object, colour, count, place or other (scenes); content or function (any other text)."""
    word = token.lower()
    if scenes:
        return next((kind for kind, words in _KINDS.items() if word in words), "other")
    return "function" if word in FUNCTION_WORDS or not re.search(r"\w", word) else "content"


def token_kinds(recordings: list[Recording], scenes: bool) -> pd.DataFrame:
    """Mean measures in the step that generates each kind of token, per depth, with intervals over samples."""
    measured = [measures(r) for r in recordings]
    kinds = [np.array([token_kind(t, scenes) for t in r.tokens[1:]]) for r in recordings]
    rows = []
    for depth, layers in depths(_n_layers(recordings)).items():
        for kind in sorted({token_kind(t, scenes) for r in recordings for t in r.tokens}):
            for name in MEASURES:
                per_sample = [
                    m[name][1:][:, layers].mean(1)[k == kind].mean()
                    for m, k in zip(measured, kinds, strict=True)
                    if (k == kind).any()
                ]
                rows.append({"depth": depth, "kind": kind, "measure": name, **bootstrap(per_sample)})
    return pd.DataFrame(rows)


def focus(recordings: list[Recording], scenes: list, covers: list[np.ndarray]) -> pd.DataFrame:
    """Where in the image the attention lies while an object's name is generated, per layer, with intervals over samples.

    Attention per image token on the patches of the named object, of the other objects, and of none, in units of the mean
    over the image (1 = no preference). covers: each scene's (group, 12, 12) patches.
    """
    samples: dict[tuple[int, str], list[float]] = {}
    for recording, scene, cover in zip(recordings, scenes, covers, strict=True):
        where = cover.reshape(len(cover), GRID * GRID)
        group_of = {name: i for i, g in enumerate(scene.groups) for name in _names(g.thing)}
        densities: dict[tuple[int, str], list[float]] = {}
        for step, token in enumerate(recording.tokens):
            group = group_of.get(token.lower())
            if group is None or step == 0:
                continue
            attention = recording.image[step] / recording.image[step].mean(-1, keepdims=True)
            parts = {"named object": where[group], "other objects": where.any(0) & ~where[group], "no object": ~where.any(0)}
            for part, mask in parts.items():
                if mask.any():
                    for layer, density in enumerate(attention[:, mask].mean(1)):
                        densities.setdefault((layer, part), []).append(density)
        for key, values in densities.items():
            samples.setdefault(key, []).append(float(np.mean(values)))
    rows = [{"layer": layer, "patches": part, **bootstrap(values)} for (layer, part), values in sorted(samples.items())]
    return pd.DataFrame(rows, columns=["layer", "patches", "value", "low", "high", "n"])


def _names(thing: str) -> list[str]:
    """The token that names a thing, singular and plural; of "pair of scissors" the last."""
    return [thing.split()[-1], PLURAL[thing].split()[-1]]


def shown(recordings: list[Recording], density: pd.DataFrame, most: int = 5) -> dict:
    """The answer to draw: the one of these that names the most objects, where they are known, else the first.

    Its sample and text; and of up to `most` tokens that name objects the maps of their attention, (token, patch), in the layer
    that attends most densely to what is named: none where `density` has no rows.
    """
    if density.empty:
        return {"sample": recordings[0].sample, "text": recordings[0].text, "tokens": [], "maps": []}
    answer = max(recordings, key=lambda r: len({t for t in r.tokens if token_kind(t, True) == "object"}))
    naming = [i for i, token in enumerate(answer.tokens) if i and token_kind(token, True) == "object"]
    naming = [i for i in naming if answer.tokens[i] not in ("pair", "pairs")][:most]
    maps = [answer.image[i, focus_layer(density)].round(6).tolist() for i in naming]
    return {"sample": answer.sample, "text": answer.text, "tokens": [answer.tokens[i] for i in naming], "maps": maps}


def focus_layer(density: pd.DataFrame) -> int:
    """The layer that attends most densely to the object being named. density: `focus`, with rows."""
    return int(density[density.patches == "named object"].set_index("layer").value.idxmax())


def image_and_maps(recorded: Attention) -> tuple:
    """The picture to draw with its attention maps: (picture, grids (row, column), tokens)."""
    picture = next(e for e in recorded.examples if e.name == recorded.shown["sample"]).image()
    return picture, [np.reshape(of, (GRID, GRID)) for of in recorded.shown["maps"]], recorded.shown["tokens"]


def heads_over_steps(recordings: list[Recording], heads: np.ndarray) -> float:
    """Standard deviation of the image share between the heads of a layer, over that between the steps of a head; means.

    heads: (layer, head), mean share over the steps.
    """
    between_steps = np.mean([r.shares[1:, ..., IMAGE].std(0).mean() for r in recordings if len(r.tokens) > 2])
    return float(heads.std(1).mean() / between_steps)


def finding(table: pd.DataFrame, place: str) -> str:
    """Does the raw share fall, and does it still once the growing response is taken out? table: `trends`; place: of what."""
    if table.n.max() == 0:
        return f"**With {place}, the answers are too short to compare their beginnings with their ends.**"
    raw, undiluted = (table[table.measure == name] for name in ("raw", "undiluted"))
    falls, left = (raw.high < 0).sum(), (undiluted.high < 0).sum()
    if falls == 0:
        cause = "the image's share of attention does not fall"
    elif left == 0:
        cause = "the image's share of attention does not fade, it is diluted by the growing response"
    elif falls > left:
        cause = "part of the fall of the image's share is dilution by the growing response, part of it is real"
    else:
        cause = "the image's share of attention falls, and dilution alone does not explain it"
    parts = []
    for depth in ("shallow", "deep"):
        rows = table[table.depth == depth].set_index("measure")
        parts.append(
            f"in {depth} layers its share of all attention {_change(rows.loc['raw'])}, of the attention that does not go to the "
            f"response it {_change(rows.loc['undiluted'])}, and of one image token beside an average token it "
            f"{_change(rows.loc['per_token'])}"
        )
    return (
        f"**With {place}, {cause}.** From the first to the last third of an answer, {'; '.join(parts)}: 95 % intervals over "
        f"{int(raw.n.max())} answers."
    )


def front_page(table: pd.DataFrame, place: str) -> str:
    """The front page's answer to whether attention fades: raw, and without dilution, in deep layers. table: `trends`."""
    rows = table[table.depth == "deep"].set_index("measure")
    if table.n.max() == 0:
        return finding(table, place)
    return (
        f"Does attention to the image fade? With {place}, in deep layers the image's share of all attention "
        f"{_change(rows.loc['raw'])} from the first to the last third of an answer; of the attention that does not go to the "
        f"growing answer it {_change(rows.loc['undiluted'])} (95 % intervals, n = {int(rows.n.max())})."
    )


def _change(row) -> str:
    interval = f"({100 * row.low:+.1f} to {100 * row.high:+.1f} %)"
    if row.low <= 0 <= row.high:
        return f"shows no significant change {interval}"
    return f"{'falls' if row.value < 0 else 'rises'} by {abs(100 * row.value):.1f} % {interval}"


def record(chapter: Chapter, recorded: Attention) -> None:
    """The chapter's headline numbers and sentences."""
    for row in recorded.clock.to_dict("records"):
        chapter.number(f"clock_{row['measure']}", row)
    for row in recorded.trends.itertuples():
        percent = {"value": 100 * row.value, "low": 100 * row.low, "high": 100 * row.high, "n": row.n}
        chapter.number(f"{row.depth}_{row.measure}_change_percent", percent)
    at_end = (recorded.curves.what == "response") & (recorded.curves.step == recorded.curves.step.max())
    last = recorded.curves[at_end].set_index("depth").value
    chapter.number("last_response_percent", 100 * last["shallow"])
    chapter.number("last_response_deep_percent", 100 * last["deep"])
    chapter.number("heads_over_steps", recorded.heads_over_steps)
    chapter.number("n_answers", len(recorded.answers))
    chapter.number("n_unreadable", len(recorded.examples.unreadable))
    chapter.number("n_missing", len(recorded.examples.missing))
    chapter.number("mean_answer_tokens", recorded.main.tokens.mean())
    task, images = recorded.main.task.iloc[0].replace("_", " "), "synthetic scenes" if recorded.scenes else "photographs"
    chapter.text("measured_on", _measured_on(recorded))
    chapter.text("measured_main", f"{recorded.model}, {len(recorded.main)} answers ({task})")
    place = f"{recorded.model} on {images} ({task})"
    chapter.text("finding", finding(recorded.trends, place))
    chapter.text("front_page", front_page(recorded.trends, place))
    if len(recorded.density):
        _record_focus(chapter, recorded)
    else:
        why = "No answer names an object" if recorded.scenes else "Nobody knows which patches of a photograph show what"
        chapter.text("where_finding", f"{why}: there is nothing to measure here.")
        chapter.text("hero_caption", f"One of the images, and the model's answer: “{recorded.shown['text']}”")


def _measured_on(recorded: Attention) -> str:
    """Model, answers, images and tasks in words."""
    examples = recorded.examples
    images = "pocket scenes that it has not seen" if recorded.scenes else f"photographs of `{examples.source}`"
    tasks = ", ".join(dict.fromkeys(e.task for e in examples))
    return f"{recorded.model}, {len(recorded.answers)} answers ({tasks}) to {images}{left_out(examples)}, greedy"


def _record_focus(chapter: Chapter, recorded: Attention) -> None:
    """Numbers and sentences on where in a scene attention lies."""
    layer = focus_layer(recorded.density)
    rows = recorded.density[recorded.density.layer == layer].set_index("patches")
    named, rest = rows.loc["named object"], rows.loc["no object"]
    chapter.number("focus_layer", layer)
    chapter.number("focus_named_object", named)
    chapter.number("focus_no_object", rest)
    chapter.text(
        "where_finding",
        f"While an object is named, a patch that shows it receives in layer {layer} **{named.value:.1f} times** the attention "
        f"of an average patch (95 % interval {named.low:.1f} to {named.high:.1f}), and a patch that shows no object "
        f"{rest.value:.2f} times. The renderer of the scenes knows which patches show which object.",
    )
    answers = f"{recorded.model}, {len(recorded.main)} answers"
    chapter.text("focus_caption", f"Attention per image patch while an object's name is generated, {answers}.")
    chapter.text(
        "hero_caption",
        f"Attention of layer {layer} of {recorded.model} to the image while it generates the tokens that name objects, in one "
        f"answer: “{recorded.shown['text']}”",
    )


def _n_layers(recordings: list[Recording]) -> int:
    return recordings[0].shares.shape[1]
