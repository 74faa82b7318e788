"""The page that says where every number comes from: parameters, protocols, versions, and how the pocket LLaVA was trained."""

from __future__ import annotations

import json

import nbformat
import pandas as pd

from study.book import ROOT, shown_table
from study.profiles import NOTEBOOKS
from study.protocol import reported
from study.quality import BARS


def title(notebook) -> str:
    """A notebook's first heading."""
    first = next(c.source for c in notebook.cells if c.cell_type == "markdown" and "# " in c.source)
    return next(line[2:] for line in first.splitlines() if line.startswith("# "))


def not_run(stems: set[str]) -> str:
    """A section for each chapter that this profile did not run, so that what refers to it leads somewhere."""
    lines = []
    for source in [notebook for notebook in NOTEBOOKS if notebook.stem not in stems]:
        notebook = nbformat.read(source, 4)
        label = notebook.cells[0].source.splitlines()[0]
        lines += [label, f"## {title(notebook)}", "", f"Not run with this profile: `--only {source.name[:2]}` runs it.", ""]
    return "\n".join(lines)


def how_made(made: list, remeasured: str) -> str:
    """The page that says where every number comes from. remeasured: its section on what was measured again."""
    lines = [
        "(how-made)=", "# How this was made", "",
        "Each chapter is a notebook that papermill executed with the parameters below; the book executes nothing. Headline "
        "numbers are in `data/results/`, with 95 % bootstrap intervals. Chapters that measure draw what their reference run "
        "measured from its rows, which are there too.", "", remeasured,
    ]  # fmt: skip
    lines += protocol_section(made)
    for name, heading, content in made:
        about = content["provenance"]
        packages = ", ".join(f"{k} {v}" for k, v in about["packages"].items())
        changed = " with uncommitted changes" if about["uncommitted_changes"] else ""
        lines += [
            f"## {heading}", "", "| | |", "|---|---|",
            f"| notebook | `analysis/{name}.ipynb` |", f"| profile | `{about['profile']}` |",
            f"| parameters | `{json.dumps(about['parameters'])}` |",
            f"| commit | `{(about['commit'] or 'none')[:12]}`{changed} |",
            f"| device | {about['device']} |", f"| duration | {about['seconds']:.0f} s |",
            f"| versions | Python {about['python']}, {packages} |",
        ]  # fmt: skip
        if lost := content.get("left_out"):
            shown = "; ".join(lost[:5]).replace("|", "/") + (f"; all {len(lost)} in `{name}.json`" if len(lost) > 5 else "")
            lines.append(f"| left out | {shown} |")
        lines.append("")
    lines += pocket_section()
    return "\n".join(lines) + "\n"


def protocol_section(made: list) -> list[str]:
    """The protocol ledger: under which conditions each chapter's numbers, and each reported figure, were made."""
    measured = pd.DataFrame([{"chapter": name} | row for name, _, content in made for row in content["protocol"]])
    cited = reported("protocols").drop(columns="file").rename(columns={"rows": "of the rows"})
    cited["of the rows"] = cited["of the rows"].map(lambda query: f"`{query}`" if query else "all")
    return [
        "(protocols)=", "## Protocols", "",
        "A number compares with another only where both were made alike. {numref}`tab-protocols-measured` says how each "
        "chapter's numbers were made, {numref}`tab-protocols-reported` how the figures that the book cites were: *stated* is "
        "what a paper says, *inferred* what we conclude, with the reason. The tables scroll sideways.", "",
        shown_table(measured, "Measured here: one row for each chapter and task.", "tab-protocols-measured").data, "",
        shown_table(cited, "Reported: one row for each group of figures in `data/reported/`.", "tab-protocols-reported").data, "",
    ]  # fmt: skip


def pocket_section() -> list[str]:
    """How the pocket LLaVA was trained and what quality it reaches, from the records that its programs wrote."""
    record = json.loads((ROOT / "data" / "pocket" / "training.json").read_text())
    lines = [
        "## The pocket LLaVA", "",
        f"Trained by `make pocket` on {record['scenes_seen']:,} rendered scenes in {record['hours']} hours on "
        f"{record['device']} (seed {record['config']['seed']}).", record.get("notes", ""), "",
    ]  # fmt: skip
    quality = ROOT / "data" / "results" / "pocket" / "pocket_quality.json"
    if quality.exists():
        measured = json.loads(quality.read_text())
        n = measured["cider_short"]["n"]
        lines += [
            f"Measured on {n:,} scenes that it was not trained on; *cider short* in units where papers print 100 for 1.0.", "",
            "| measure | measured | 95 % interval | bar | |", "|---|---|---|---|---|",
        ]  # fmt: skip
        for name, bar in BARS.items():
            m = measured[name]
            met = "met" if m["value"] >= bar else "missed"
            lines.append(f"| {name.replace('_', ' ')} | {m['value']:.3f} | {m['low']:.3f} to {m['high']:.3f} | {bar} | {met} |")
    return [*lines, ""]
