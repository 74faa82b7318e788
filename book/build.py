"""Build the book from executed notebooks: python book/build.py --profile pocket

Takes the notebooks that analysis/run.py executed for a profile, writes the page that says how each was made, and renders
everything with warnings as errors into book/_build/html. Nothing is executed here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import explorer_page
import model_matrix
import nbformat
import pandas as pd
import yaml

from study.book import ROOT, shown_table
from study.profiles import NOTEBOOKS
from study.protocol import reported
from study.quality import BARS

BOOK = Path(__file__).resolve().parent


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--profile", default="pocket", help="whose executed notebooks to show")
    parser.add_argument("--repository", default=os.environ.get("GITHUB_REPOSITORY"), help="owner/name on GitHub, for links")
    parser.add_argument("--out", type=Path, default=BOOK / "_build")
    given = parser.parse_args(argv)
    executed = ROOT / "build" / "analysis" / given.profile
    pages = sorted(executed.glob("[0-9][0-9]_*.ipynb"))
    pages = [p for p in pages if not p.name.endswith((".failed.ipynb", ".part.ipynb"))]
    if not pages:
        print(f"error: no executed notebook for profile {given.profile}: run `python analysis/run.py --profile {given.profile}`")
        return 2
    if failed := sorted(executed.glob("*.failed.ipynb")):
        print(f"error: {failed[0].relative_to(ROOT)} failed; repair it and run it again before building the book")
        return 2
    toc = write_pages(pages, given.repository)
    program = "from jupyter_book.cli.main import main; main()"  # the command of this interpreter, wherever PATH leads
    options = ["--path-output", str(given.out.parent), "--toc", str(toc), "-W", "-n", "--keep-going", "-q"]
    command = [sys.executable, "-c", program, "build", str(BOOK), *options]
    shutil.rmtree(given.out, ignore_errors=True)
    done = subprocess.run(command, cwd=ROOT).returncode
    if done == 0:
        print(f"the book: {given.out / 'html' / 'index.html'}")
    return done


def write_pages(executed: list[Path], repository: str | None) -> Path:
    """Write executed notebooks, and the pages that follow from their results, into the book; return its table of contents."""
    shutil.rmtree(BOOK / "analysis", ignore_errors=True)
    (BOOK / "analysis").mkdir()
    (BOOK / "_assets" / "hero.png").unlink(missing_ok=True)
    made = []
    for page in executed:
        notebook = nbformat.read(page, 4)
        results = ROOT / parameter(notebook, "results")
        nbformat.write(with_links(notebook, page.name, repository), BOOK / "analysis" / page.name)
        made.append((page.stem, title(notebook), json.loads((results / f"{page.stem}.json").read_text())))
        for picture in results.glob("*_words.png"):
            shutil.copy(picture, BOOK / "_assets" / "hero.png")
    (BOOK / "made.md").write_text(how_made(made) + not_run({page.stem for page in executed}))
    (BOOK / "_found.md").write_text(findings(made))
    beside = "".join(f"\n{content['texts']['front_page']}\n" for _, _, content in made if "front_page" in content["texts"])
    (BOOK / "_finding.md").write_text(f":::{{div}} finding\n{finding_of(made[0][2])}\n:::\n{beside}")
    (BOOK / "_hero.md").write_text(hero(made))
    (BOOK / "models.md").write_text(model_matrix.page())
    explorer_page.write_parts(BOOK)
    toc = BOOK / "_toc.generated.yml"
    toc.write_text(yaml.safe_dump(with_pages(yaml.safe_load((BOOK / "_toc.yml").read_text()), {p.stem for p in executed})))
    return toc


def with_pages(toc: dict, stems: set[str]) -> dict:
    """The table of contents without the chapters that this profile did not run."""
    for part in toc["parts"]:
        part["chapters"] = [c for c in part["chapters"] if not c["file"].startswith("analysis/") or Path(c["file"]).name in stems]
    return toc


def parameter(notebook, name: str):
    """The value with which papermill ran a notebook."""
    return notebook.metadata["papermill"]["parameters"][name]


def title(notebook) -> str:
    """A notebook's first heading."""
    first = next(c.source for c in notebook.cells if c.cell_type == "markdown" and "# " in c.source)
    return next(line[2:] for line in first.splitlines() if line.startswith("# "))


def with_links(notebook, name: str, repository: str | None):
    """Add, under the title, links to the source notebook: the one without outputs that a reader runs."""
    links = [f"{{download}}`Download the source notebook <../../analysis/{name}>`"]
    if repository:
        links += [
            f"[source on GitHub](https://github.com/{repository}/blob/main/analysis/{name})",
            f"[run it on Binder](https://mybinder.org/v2/gh/{repository}/HEAD?labpath=analysis/{name})",
        ]
    cell = nbformat.v4.new_markdown_cell(" · ".join(links))
    notebook.cells.insert(1, cell)
    return notebook


def findings(made: list) -> str:
    """A table of each chapter's question and the finding that its run computed."""
    rows = ["| chapter | finding |", "|---|---|"]
    for name, heading, content in made:
        rows.append(f"| [{heading}](analysis/{name}.ipynb) | {finding_of(content).replace('|', '/')} |")
    return "\n".join(rows) + "\n"


def finding_of(content: dict) -> str:
    """The finding among a chapter's sentences."""
    return next((text for key, text in content["texts"].items() if key.endswith("finding")), "")


def hero(made: list) -> str:
    """The front page's figure, with the caption that its chapter computed; nothing if that chapter was not run."""
    captions = [content["texts"]["hero_caption"] for _, _, content in made if "hero_caption" in content["texts"]]
    if not captions:
        return ""
    alt = "An image, and beside it, on scenes, the same under a heat map of the model's attention for tokens of its answer."
    return f"```{{figure}} _assets/hero.png\n:name: fig-hero\n:alt: {alt}\n:width: 100%\n\n{captions[0]}\n```\n"


def not_run(stems: set[str]) -> str:
    """A section for each chapter that this profile did not run, so that what refers to it leads somewhere."""
    lines = []
    for source in [notebook for notebook in NOTEBOOKS if notebook.stem not in stems]:
        notebook = nbformat.read(source, 4)
        label = notebook.cells[0].source.splitlines()[0]
        lines += [label, f"## {title(notebook)}", "", f"Not run with this profile: `--only {source.name[:2]}` runs it.", ""]
    return "\n".join(lines)


def how_made(made: list) -> str:
    """The page that says where every number comes from."""
    lines = [
        "(how-made)=", "# How this was made", "",
        "Each chapter is a notebook that papermill executed with the parameters below; the book executes nothing. Headline "
        "numbers are in `data/results/`, with 95 % bootstrap intervals, and `make check-results` measures them again.", "",
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


if __name__ == "__main__":
    sys.exit(main())
