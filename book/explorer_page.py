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

from dyrate.strategies.controls import LinearAnneal, RandomPrune
from study.book import ROOT, shown_table
from study.explorer.stored import kept, read_laboratories, read_scene, slots_right
from study.figures.masks import dimmed
from study.intervals import bootstrap, verdict

TRACES = ROOT / "data" / "explorer"
SHOWN = "pocket-plain", "FastV 0.25"  # what the page opens with
PRINTED = ("FastV", "RandomPrune"), (0.5, 0.25, 0.1)
TENTH = 0.1  # the retention ratio of the sentences and the table
GRID = 12  # image tokens in a row of the picture


def write_parts(book: Path) -> None:
    """Write what explorer.md includes."""
    table = slots_right(TRACES)
    (book / "_explorer.html").write_text(explorer(read_laboratories(TRACES)))
    (book / "_explorer_finding.md").write_text(finding(table) + "\n")
    (book / "_explorer_table.md").write_text(by_method(table) + "\n")
    (book / "_explorer_limits.md").write_text(limits(table) + "\n")


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
    """Head and rows of the table of methods and retention ratios; a method with another ratio has one wide cell."""
    labels = {(c["method"], c["retention"]): c["label"] for c in conditions if c["method"] != "Full"}
    ratios = sorted({x for method, x in labels if method == "FastV"}, reverse=True)
    rows = []
    for method in dict.fromkeys(method for method, _ in labels):
        own = [x for m, x in labels if m == method and x not in ratios]
        cells = [_cell(labels[method, x], f"{method}, retention {x}", chosen, len(ratios) if x in own else 1)
                 for x in own or ratios]  # fmt: skip
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
            mask = kept(answer, GRID**2)[-1]
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


def finding(table: pd.DataFrame) -> str:
    """What FastV's ranking is worth on the laboratory that the page opens with, beside random pruning."""
    name = SHOWN[0]
    mine = table[table.laboratory == name].pivot(index="scene", columns="label", values="right")
    mean = mine.mean()
    fastv, at_random = f"FastV {TENTH:g}", f"RandomPrune {TENTH:g}"
    apart = bootstrap(mine[fastv] - mine[at_random])
    return (
        f"**On the {len(mine)} scenes of this page, with {TENTH:.0%} of the image tokens kept, FastV {verdict(apart)} random "
        f"pruning: {mean[fastv]:.2f} of the slots of {name}'s descriptions are right, {mean[at_random]:.2f} at random and "
        f"{mean.Full:.2f} without pruning (difference from random {apart['value']:+.2f}, 95 % interval {apart['low']:+.2f} to "
        f"{apart['high']:+.2f}).**"
    )


def by_method(table: pd.DataFrame) -> str:
    """A table: the share of right slots of each method at a tenth of the tokens, by laboratory."""
    rows = table[(table.retention == TENTH) | (table.method == "Full")]
    means = {key: bootstrap(right) for key, right in rows.groupby(["method", "laboratory"], sort=False).right}
    text = {key: f"{m['value']:.2f} ({m['low']:.2f} to {m['high']:.2f})" for key, m in means.items()}
    shown = pd.Series(text).unstack(sort=False).rename_axis("method").reset_index()
    n = table.scene.nunique()
    caption = f"Share of slots right at a retention ratio of {TENTH:g}, with 95 % intervals over {n} scenes; Full prunes nothing."
    return str(shown_table(shown, caption, "tab-explorer").data)


def limits(table: pd.DataFrame) -> str:
    """What the traces are, and what they are not."""
    laboratories = read_laboratories(TRACES)
    models = ", ".join(
        f"`{name}` ({about['parameters'] / 1e6:.1f} M parameters, {about['dtype']}, {about['device']}, torch {about['torch']})"
        for name, about in laboratories.items()
    )
    about = laboratories[SHOWN[0]]
    return "\n\n".join([
        f"The scenes are the first {table.scene.nunique()} of the test split, not chosen by what they show. The prompt is "
        f"“{about['prompt']}”, decoding is greedy, with at most {about['max_new_tokens']} tokens. Models: {models}. Random "
        f"pruning is one draw (seed {RandomPrune().seed}), and DyRate one training (seed 0), where a predictor was trained. So "
        "few scenes are for looking at: {ref}`chapter-laboratories` compares methods on more.",
        "A group that an answer names twice is matched once: the words of the second mention are held against a group that "
        "was not named, and are right only where they happen to agree with it. VisionZip's tokens no longer hold what their "
        "patches show alone: some take up what resembles them, and one stands for the whole image. LinearAnneal's ratio is its "
        f"mean over the first {LinearAnneal().steps} tokens: it begins above it and ends below.",
    ])  # fmt: skip
