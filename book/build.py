"""Build the book from executed notebooks: python book/build.py --profile pocket

Takes the notebooks that analysis/run.py executed for a profile, writes the pages that follow from their results, and renders
everything with warnings as errors into book/_build/html, with the whole book as one PDF beside the pages where there is a
Chromium to print it. Nothing is executed here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import card
import cite
import explorer_page
import front
import links
import model_matrix
import nbformat
import pdf
import phones
import remeasured
import scorecard
import yaml
from how_made import how_made, not_run, title

from study.book import ROOT
from study.lock import locked

BOOK = Path(__file__).resolve().parent
PDF = "dyrate-study.pdf"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--profile", default="pocket", help="whose executed notebooks to show")
    parser.add_argument("--remeasured", metavar="PROFILE", help="whose run on this machine to compare with what is shown")
    parser.add_argument("--repository", default=os.environ.get("GITHUB_REPOSITORY"), help="owner/name on GitHub, for links")
    parser.add_argument("--site", default=os.environ.get("SITE_URL"), help="address at which the book will be published")
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
    lock = locked("book", "builds the book", wait=True)  # noqa: F841  (held until this returns; it would overwrite these pages)
    toc = write_pages(pages, given.repository, remeasured.measured_here(given.remeasured))
    shutil.rmtree(given.out, ignore_errors=True)
    if done := render_all(given.out, toc, given.profile, given.site):
        return done
    if given.repository:
        links.write_for_colab(given.out / "colab", given.repository)
    print(f"the book: {given.out / 'html' / 'index.html'}")
    return 0


def render_all(out: Path, toc: Path, profile: str, site: str | None) -> int:
    """Render the book, first as one page that is printed, then as its pages, which offer what was printed; the exit status."""
    links_of_front_page = BOOK / "_take_away.md"
    links_of_front_page.write_text(f"*The DyRate study, measured with the profile `{profile}`.*\n")
    program, printed = pdf.browser(), out / PDF
    if not program:
        print(f"no PDF of the whole book: none of {', '.join(pdf.BROWSERS)} is installed")
    elif done := render("singlehtml", out, toc):
        return done
    elif pdf.print_page(program, out / "singlehtml" / "intro.html", printed):
        shutil.rmtree(out / "singlehtml")
    links_of_front_page.write_text(take_away(printed))
    done = render("html", out, toc, site)
    if done == 0 and printed.exists():
        shutil.move(printed, out / "html" / PDF)
    return done


def render(builder: str, out: Path, toc: Path, site: str | None = None) -> int:
    """Run one of Sphinx's builders on the book, into the folder of its name in `out`; its exit status."""
    program = "from jupyter_book.cli.main import main; main()"  # the command of this interpreter, wherever PATH leads
    options = ["--path-output", str(out.parent), "--toc", str(toc), "-W", "-n", "--keep-going", "-q", "--builder", builder]
    command = [sys.executable, "-c", program, "build", str(BOOK), *options]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"SITE_URL": site or ""}).returncode


def take_away(printed: Path) -> str:
    """The line of links on the front page. printed: the book's PDF, offered if it is there."""
    size = f"{printed.stat().st_size / 2**20:.0f} MB" if printed.exists() else ""
    whole = [f'<a href="{PDF}">The whole book as a PDF</a> ({size})'] if size else []
    return f":::{{div}} launch\n{' · '.join([*whole, '{ref}`How to cite <cite>`', '{ref}`Glossary <glossary>`'])}\n:::\n"


def write_pages(executed: list[Path], repository: str | None, here: dict[str, dict]) -> Path:
    """Write executed notebooks, and the pages that follow from their results, into the book; return its table of contents.

    here: what chapters found that were measured again on this machine, by stem.
    """
    for generated in (BOOK / "analysis", BOOK / "_assets" / phones.FOLDER):
        shutil.rmtree(generated, ignore_errors=True)
    (BOOK / "analysis").mkdir()
    for picture in ("hero.png", "card.png"):
        (BOOK / "_assets" / picture).unlink(missing_ok=True)
    made = []
    for page in executed:
        notebook = nbformat.read(page, 4)
        results = ROOT / parameter(notebook, "results")
        heading = title(notebook)
        phones.save_pictures(notebook, BOOK / "_assets")
        content = json.loads((results / f"{page.stem}.json").read_text())
        linked = links.with_links(notebook, page.name, repository, results)
        # below the title and its links
        linked.cells.insert(2, nbformat.v4.new_markdown_cell(remeasured.badge(page.stem, content, here.get(page.stem))))
        nbformat.write(linked, BOOK / "analysis" / page.name)
        made.append((page.stem, heading, content))
        for picture in results.glob("*_words.png"):
            shutil.copy(picture, BOOK / "_assets" / "hero.png")
            card.write_card(picture, *headings(), BOOK / "_assets" / "card.png")
    if (narrow := BOOK / "_assets" / phones.FOLDER / "fig-tokens-on-image.png").exists():
        shutil.copy(narrow, narrow.with_name("fig-hero.png"))  # the same figure
    (BOOK / "made.md").write_text(how_made(made, remeasured.section(made, here)) + not_run({page.stem for page in executed}))
    (BOOK / "_found.md").write_text(findings(made))
    (BOOK / "_scorecard.md").write_text(scorecard.page(made))
    (BOOK / "_finding.md").write_text(f":::{{div}} finding\n{answers(made)}\n:::\n")
    (BOOK / "_hero.md").write_text(hero(made))
    (BOOK / "models.md").write_text(model_matrix.page())
    (BOOK / "cite.md").write_text(cite.page(repository))
    front.write(BOOK)
    explorer_page.write_parts(BOOK)
    toc = BOOK / "_toc.generated.yml"
    toc.write_text(yaml.safe_dump(with_pages(yaml.safe_load((BOOK / "_toc.yml").read_text()), {p.stem for p in executed})))
    return toc


def headings() -> tuple[str, str]:
    """The book's title, and the question that heads its front page."""
    question = (BOOK / "intro.md").read_text().splitlines()[0].removeprefix("# ")
    return yaml.safe_load((BOOK / "_config.yml").read_text())["title"], question


def with_pages(toc: dict, stems: set[str]) -> dict:
    """The table of contents without the chapters that this profile did not run."""
    for part in toc["parts"]:
        part["chapters"] = [c for c in part["chapters"] if not c["file"].startswith("analysis/") or Path(c["file"]).name in stems]
    return toc


def parameter(notebook, name: str):
    """The value with which papermill ran a notebook."""
    return notebook.metadata["papermill"]["parameters"][name]


def answers(made: list) -> str:
    """The front page's answers, a paragraph each, of which the question is bold; where no chapter has one, the first finding."""
    texts = [plain(content["texts"]["front_page"]) for _, _, content in made if "front_page" in content["texts"]]
    answered = [f"**{question}?**{answer}" for question, _, answer in (text.partition("?") for text in texts)]
    return "\n\n".join(answered or [plain(finding_of(made[0][2]))])


def findings(made: list) -> str:
    """A table of each chapter's question and what its run found: the sentences of its finding that are bold."""
    rows = ["| chapter | finding |", "|---|---|"]
    for name, heading, content in made:
        text = finding_of(content).replace("|", "/")
        bold = " ".join(re.findall(r"[*]{2}(.+?)[*]{2}", text))
        rows.append(f"| [{heading}](analysis/{name}.ipynb) | {plain(bold or text)} |")
    return "\n".join(rows) + "\n"


def finding_of(content: dict) -> str:
    """The finding among a chapter's sentences."""
    return next((text for key, text in content["texts"].items() if key.endswith("finding")), "")


def plain(text: str) -> str:
    """A text without its emphasis."""
    return text.replace("**", "").replace("`", "")


def hero(made: list) -> str:
    """The front page's figure, with the caption that its chapter computed; nothing if that chapter was not run."""
    captions = [plain(content["texts"]["hero_caption"]) for _, _, content in made if "hero_caption" in content["texts"]]
    if not captions:
        return ""
    alt = "An image, and beside it, on scenes, the same under a heat map of the model's attention for tokens of its answer."
    return f"```{{figure}} _assets/hero.png\n:name: fig-hero\n:alt: {alt}\n:width: 100%\n\n{captions[0]}\n```\n"


if __name__ == "__main__":
    sys.exit(main())
