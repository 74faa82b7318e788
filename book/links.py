"""What a reader can take away: under each title the notebook and where to run it, under each figure its rows."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat

from study.book import ROOT

PAGES = ROOT / "book" / "analysis"  # where the chapters' pages lie
COLAB = "colab"  # the branch with the notebooks that Colab opens, pushed by the workflow

INSTALL = """\
# Fetch the study and install it beside what Colab has: a few minutes, once a session
![ -d /content/study ] || git clone --quiet --depth 1 https://github.com/{repository} /content/study
!pip install --quiet -e "/content/study[study]" -e /content/study/analysis
import sys

sys.path[:0] = ["/content/study", "/content/study/analysis"]  # this kernel started before the installation"""


def with_links(notebook, name: str, repository: str | None, results: Path):
    """An executed notebook with links under its title and under each figure. results: the folder with the chapter's rows."""
    cells = []
    for i, cell in enumerate(notebook.cells):
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.metadata.tags.append("remove-cell")  # they stand in the badge and in how the book was made
        cells.append(cell)
        if i == 0:
            cells.append(line("launch", launch(name, repository)))
        elif "figure" in cell.metadata.get("mystnb", {}):
            cells.append(line("rows", [download(results / file) for file in rows_behind(cell, name, results)] + [source(name)]))
    notebook.cells = cells
    return notebook


def launch(name: str, repository: str | None) -> list[str]:
    """Links to the source notebook, the one without outputs that a reader runs; `repository`: owner/name on GitHub."""
    links = [f"{{download}}`Download the notebook <{os.path.relpath(ROOT / 'analysis' / name, PAGES)}>`"]
    if repository:
        links += [
            f"[source on GitHub](https://github.com/{repository}/blob/main/analysis/{name})",
            f"[open in Colab](https://colab.research.google.com/github/{repository}/blob/{COLAB}/{name})",
            f"[open on Binder](https://mybinder.org/v2/gh/{repository}/HEAD?labpath=analysis/{name})",
        ]
    return links


def rows_behind(cell, name: str, results: Path) -> list[str]:
    """The CSV files that a figure is drawn from.

    They are those in the cell's metadata `rows`, else those that the cell itself writes; where neither says, all of the
    chapter's.
    """
    written = re.findall(r'chapter\.table\("([^"]+)"', cell.source)
    stated = cell.metadata.get("rows", written)
    chapters = sorted(path.name for path in results.glob(f"{Path(name).stem}*.csv"))
    if "rows" in cell.metadata or written:
        return [file for file in stated if file in chapters]  # a profile may not have what a cell writes if it can
    return chapters


def download(path: Path) -> str:
    return f"{{download}}`{path.name} <{os.path.relpath(path, PAGES)}>`"


def source(name: str) -> str:
    return f"{{download}}`notebook <{os.path.relpath(ROOT / 'analysis' / name, PAGES)}>`"


def line(kind: str, links: list[str]):
    """A cell with links in one line; `kind`: its class in study.css."""
    return nbformat.v4.new_markdown_cell(f":::{{div}} {kind}\n{' · '.join(links)}\n:::")


def write_for_colab(folder: Path, repository: str) -> None:
    """Write each source notebook with a first cell that installs the study from its repository, owner/name on GitHub."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((ROOT / "analysis").glob("[0-9][0-9]_*.ipynb")):
        notebook = nbformat.read(path, 4)
        notebook.cells.insert(0, nbformat.v4.new_code_cell(INSTALL.format(repository=repository)))
        nbformat.write(notebook, folder / path.name)
