"""The parts of the page "What does a pruned model see": controls, computed sentences, and the pictures for paper.

All of it is read from the committed traces in data/explorer; `python -m study.explorer` measures them.
"""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

import pandas as pd
from PIL import Image

from dyrate.atomic import write_whole
from dyrate.strategies.controls import LinearAnneal, RandomPrune
from study.book import ROOT, shown_table
from study.explorer.findings import LITTLE, by_group, seen_and_right
from study.explorer.stored import kept, read_laboratories, read_scene
from study.figures.masks import dimmed
from study.intervals import bootstrap, in_words

TRACES = ROOT / "data" / "explorer"
SHOWN = "pocket-plain", "FastV 0.25"  # what the page opens with
PRINTED = ("FastV", "RandomPrune"), (0.5, 0.25, 0.1)
TENTH = 0.1  # the retention ratio at which methods stand side by side
GRID = 12  # image tokens in a row of the picture


def write_parts(book: Path) -> None:
    """Write what explorer.md includes."""
    groups = by_group(TRACES)
    pruned_at_random = groups[groups.method == "RandomPrune"]
    seen = {name: seen_and_right(rows) for name, rows in pruned_at_random.groupby("laboratory")}
    write = {
        "_explorer.html": explorer(read_laboratories(TRACES)), "_explorer_finding.md": finding(seen),
        "_explorer_seen.md": seen_table(seen), "_explorer_methods.md": by_method(groups), "_explorer_limits.md": limits(groups),
    }  # fmt: skip
    for name, text in write.items():
        write_whole(book / name, text + "\n")


def explorer(laboratories: dict[str, dict]) -> str:
    """The controls, filled with what was measured, and the pictures for paper."""
    name, chosen = SHOWN
    scenes = laboratories[name]["scenes"]
    groups = {scene: read_scene(TRACES / name / f"{scene}.js")["groups"] for scene in scenes}
    names = [*dict.fromkeys([name, *laboratories])]
    filled = {
        "laboratories": "".join(f"<option>{html.escape(name)}</option>" for name in names),
        "scenes": "".join(_scene(scene, groups[scene], scene == scenes[0]) for scene in scenes),
        **_choices([c for lab in laboratories.values() for c in lab["conditions"]], chosen),
        "print": _print(name, scenes[0]),
    }
    page = Path(__file__).with_name("explorer.html").read_text(encoding="utf-8")
    for key, value in filled.items():
        page = page.replace(f"{{{key}}}", value)
    return page


def _scene(scene: str, groups: list[dict], checked: bool) -> str:
    shown = html.escape(", ".join(group["text"] for group in groups))
    radio = f'<input type="radio" name="scene" value="{scene}"{" checked" if checked else ""}>'
    return f'<label>{radio}<img src="_static/scenes/{scene}.webp" width="50" height="50" alt="{shown}"></label>'


def _choices(conditions: list[dict], chosen: str) -> dict[str, str]:
    """Head and rows of the table of methods and retention ratios; a method of one budget has one wide cell."""
    labels = {(c["method"], c["retention"]): c["label"] for c in conditions if c["method"] != "Full"}
    ratios = sorted({x for method, x in labels if method == "FastV"}, reverse=True)
    rows = []
    for method in dict.fromkeys(method for method, _ in labels):
        has = [x for m, x in labels if m == method]
        own = [] if set(has) == set(ratios) else has
        cells = [_cell(labels[method, x], f"{method}, retention {x}", chosen, len(ratios) if own else 1) for x in own or ratios]
        note = f" (budget {own[0]:g})" if own else ""
        rows.append(f'<tr><th scope="row">{method}{note}</th>{"".join(cells)}</tr>')
    return {"retentions": "".join(f'<th scope="col">{x:g}</th>' for x in ratios), "methods": "".join(rows)}


def _cell(label: str, name: str, chosen: str, columns: int) -> str:
    checked = " checked" if label == chosen else ""
    radio = f'<input type="radio" name="condition" value="{label}" aria-label="{name}"{checked}>'
    return f'<td colspan="{columns}"><label>{radio}<span></span></label></td>'


def _print(laboratory: str, scene: str) -> str:
    """One scene under two methods at three retention ratios: the patches kept at the last token, and the answer."""
    stored = read_scene(TRACES / laboratory / f"{scene}.js")
    picture = Image.open(TRACES / "scenes" / f"{scene}.webp")
    methods, ratios = PRINTED
    rows = []
    for method in methods:
        cells = []
        for ratio in ratios:
            answer = stored["answers"][f"{method} {ratio:g}"]
            mask = kept(answer)[-1]
            alt = f"{method}, retention ratio {ratio:g}: {mask.sum()} of {mask.size} patches kept"
            source = _webp(dimmed(picture, mask.reshape(GRID, GRID)))
            cells.append(f'<td><img src="{source}" alt="{alt}" width="168"><p>{_marked(answer)}</p></td>')
        rows.append(f'<tr><th scope="row">{method}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{ratio:g}</th>' for ratio in ratios)
    caption = f"{laboratory}, the first scene: patches kept at the last token and answers, by method and retention ratio."
    body = f"<thead><tr><th>method</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f"<table><caption>{caption}</caption>{body}</table><p>Unpruned: {_marked(stored['answers']['Full'])}</p>"


def _marked(answer: dict) -> str:
    """An answer as HTML, its right and wrong words marked."""
    pieces = [html.escape(piece) for piece in answer["pieces"]]
    for first, behind, *_, right in answer["marks"]:
        space = " " if pieces[first].startswith(" ") else ""
        pieces[first] = f'{space}<mark class="{"right" if right else "wrong"}">{pieces[first].lstrip()}'
        pieces[behind - 1] += "</mark>"
    return "".join(pieces).strip()


def _webp(pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray((255 * pixels).round().astype("uint8")).save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def finding(seen: dict[str, dict]) -> str:
    """What a kept patch is worth, in the laboratory that the page opens with."""
    some, none, apart = (seen[SHOWN[0]][part] for part in ("some", "none", "apart"))
    answer = "It describes best what it still sees" if apart["low"] > 0 else "What it still sees makes no difference"
    return (
        f"**{answer}: of a group of things with at least one patch kept by random pruning, {SHOWN[0]} gets {some['value']:.2f} "
        f"of the slots right, of one with none {none['value']:.2f} (difference {apart['value']:.2f}, 95 % interval "
        f"{apart['low']:.2f} to {apart['high']:.2f}; retention ratios of {LITTLE:g} or less).**"
    )


def seen_table(seen: dict[str, dict]) -> str:
    """`seen_and_right` for each laboratory."""
    rows = [
        {"laboratory": name, "at least one patch kept": f"{in_words(x['some'])}, {x['some']['n']} groups",
         "no patch kept": f"{in_words(x['none'])}, {x['none']['n']} groups", "difference": in_words(x["apart"])}
        for name, x in seen.items()
    ]  # fmt: skip
    caption = (
        "Share of a group's slots right by whether random pruning keeps any of its patches, at retention ratios of "
        f"{LITTLE:g} or less, with 95 % intervals that resample scenes."
    )
    return str(shown_table(pd.DataFrame(rows), caption, "tab-explorer-seen").data)


def by_method(groups: pd.DataFrame) -> str:
    """The share of right slots of each method at a tenth of the tokens, by laboratory."""
    rows = groups[(groups.retention == TENTH) | (groups.method == "Full")]
    by_scene = rows.groupby(["method", "laboratory", "scene"], sort=False).right.mean()
    text = {key: in_words(bootstrap(right)) for key, right in by_scene.groupby(level=[0, 1], sort=False)}
    shown = pd.Series(text).unstack(sort=False).rename_axis("method").reset_index()
    caption = (
        f"Share of slots right at a retention ratio of {TENTH:g}, with 95 % intervals over {groups.scene.nunique()} scenes; Full "
        "prunes nothing."
    )
    return str(shown_table(shown, caption, "tab-explorer-methods").data)


def limits(groups: pd.DataFrame) -> str:
    """What the traces are, and what they are not."""
    laboratories = read_laboratories(TRACES)
    models = ", ".join(
        f"`{name}` ({about['parameters'] / 1e6:.1f} M parameters, {about['dtype']}, {about['device']}, torch {about['torch']})"
        for name, about in laboratories.items()
    )
    about = laboratories[SHOWN[0]]
    return "\n\n".join([
        f"The scenes are the first {groups.scene.nunique()} of the test split, not chosen by what they show. The prompt is "
        f"“{about['prompt']}”, decoding is greedy, with at most {about['max_new_tokens']} tokens. Models: {models}. Random "
        f"pruning is one draw (seed {RandomPrune().seed}), and DyRate one training (seed 0), where a predictor was trained. So "
        "few scenes are for looking at: {ref}`chapter-laboratories` compares methods on more.",
        "A dropped patch is not unseen: the vision tower has mixed what patches show, and all methods but VisionZip let the "
        "first layers of the decoder see every image token. Of a group without a kept patch some slots are right by chance, too. "
        "A group with many patches keeps one more often than a small one.",
        "A group that an answer names twice is matched once: the words of the second mention are held against a group that "
        "was not named, and are right only where they happen to agree with it. VisionZip's tokens no longer hold what their "
        "patches show alone: some take up what resembles them, and one stands for the whole image. LinearAnneal's ratio is its "
        f"mean over the first {LinearAnneal().steps} tokens: it begins above it and ends below.",
    ])  # fmt: skip
