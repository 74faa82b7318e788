"""The study as a user runs it: notebooks on profile smoke, pages from the reference run, the book, and the book in a browser."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from PIL import Image

from browser import BROWSER
from running import run
from study.profiles import NOTEBOOKS, ROOT, defaults, parameters_of, read_profile

RESULTS = ROOT / "data" / "results"
MEASURING = [notebook for notebook in NOTEBOOKS if "draw" in defaults(notebook)]  # the others read committed rows


@pytest.fixture(scope="session")
def smoke():
    """The chapters that measure, on profile smoke; committed results must not change."""
    before = {p: p.read_bytes() for p in (RESULTS / "pocket").glob("*") if p.is_file()}
    done = run("--profile", "smoke", "--force")
    assert done.returncode == 0, done.stderr
    assert {p: p.read_bytes() for p in (RESULTS / "pocket").glob("*") if p.is_file()} == before
    return RESULTS / "smoke"


@pytest.fixture(scope="session")
def drawn():
    """Every chapter, drawn from committed rows; and its numbers as they were committed."""
    committed = {n.stem: json.loads((RESULTS / "pocket-full" / f"{n.stem}.json").read_text())["numbers"] for n in NOTEBOOKS}
    done = run("--profile", "pocket-full", "--draw")
    assert done.returncode == 0, done.stderr
    return committed


@pytest.fixture(scope="session")
def book(smoke, drawn, tmp_path_factory):
    """The book of the reference run beside what smoke measured, built with warnings as errors, away from the user's own."""
    out = tmp_path_factory.mktemp("book") / "_build"
    shown = ["--profile", "pocket-full", "--remeasured", "smoke", "--repository", "owner/name", "--site", "https://owner.example/name"]
    done = subprocess.run([sys.executable, "book/build.py", "--out", str(out), *shown], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert BROWSER or "no PDF of the whole book" in done.stdout
    return out / "html"


def test_smoke_writes_results_with_provenance(smoke):
    assert not (ROOT / "build" / "predictors-smoke" / "unfinished").exists()  # what an interrupted chapter 2 would go on from
    for notebook in MEASURING:
        content = json.loads((smoke / f"{notebook.stem}.json").read_text())
        assert content["numbers"]
        about = content["provenance"]
        assert about["profile"] == "smoke"
        assert about["seconds"] > 0
        assert about["packages"]["torch"]
        assert about["jobs"] >= 1
        for number in content["numbers"].values():
            assert number.get("low", number["value"]) <= number["value"] <= number.get("high", number["value"])
        assert list(smoke.glob(f"{notebook.stem}*.csv"))


def test_pages_drawn_from_rows_have_the_numbers_that_were_committed(drawn):
    for notebook in NOTEBOOKS:
        content = json.loads((RESULTS / "pocket-full" / f"{notebook.stem}.json").read_text())
        committed = {key: pytest.approx(number, rel=1e-6, nan_ok=True) for key, number in drawn[notebook.stem].items()}
        assert content["numbers"] == committed, notebook.stem
        assert content["provenance"]["profile"] == "pocket-full" and ("drawn" in content) == (notebook in MEASURING)


def test_each_page_says_how_what_was_measured_here_compares(book):
    for notebook in NOTEBOOKS:
        page = (book / "analysis" / f"{notebook.stem}.html").read_text(encoding="utf-8")
        (badge,) = re.findall(r'<div class="remeasured docutils">(.*?)</div>', page, re.S)
        assert ("reference run" in badge) == (notebook in MEASURING), notebook.stem
        assert notebook.stem != "01_attention" or "headline numbers with an interval agree with the reference" in badge
    assert "Measured again" in (book / "made.html").read_text(encoding="utf-8")


def test_every_chapter_states_its_protocol(drawn):
    for notebook in NOTEBOOKS:
        rows = json.loads((RESULTS / "pocket-full" / f"{notebook.stem}.json").read_text())["protocol"]
        assert rows
        for row in rows:
            for key in ("task", "source", "split", "n", "prompt", "ocr", "metric", "decoding", "harness", "basis"):
                assert row[key], f"{notebook.stem}: {key}"


def test_what_is_up_to_date_is_skipped(smoke):
    written = (smoke / "01_attention.json").stat().st_mtime_ns
    done = run("--profile", "smoke", "--only", "01")
    assert done.returncode == 0
    assert "up to date" in done.stdout
    assert (smoke / "01_attention.json").stat().st_mtime_ns == written


def test_source_notebooks_are_clean_and_well_formed():
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, 4)
        nbformat.validate(notebook)
        assert "parameters" in notebook.cells[1].metadata.tags
        for cell in notebook.cells:
            if cell.cell_type == "code":
                assert not cell.outputs
                assert cell.execution_count is None
                figure = cell.metadata.get("mystnb", {})
                assert ("figure" in figure) == ("image" in figure)
                assert "figure" not in figure or (figure["figure"]["caption"] and figure["image"]["alt"])


def test_every_profile_fits_its_notebooks():
    for path in (ROOT / "analysis" / "params").glob("*.yaml"):
        _, profile = read_profile(path.stem)
        for notebook in NOTEBOOKS:
            parameters_of(notebook, profile)


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.targets, self.loaded, self.ids, self.images = [], [], set(), []

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"):
            self.targets.append(a["href"])
        if tag in ("script", "img", "iframe", "source") and a.get("src"):
            self.loaded.append(a["src"])
        if tag == "source" and a.get("srcset"):
            self.loaded.append(a["srcset"])
        if tag == "link" and a.get("href") and a.get("rel") not in ("canonical", "index", "search", "next", "prev"):
            self.loaded.append(a["href"])
        if tag == "img":
            self.images.append(a)


def test_internal_links_lead_somewhere_and_nothing_is_loaded_from_outside(book):
    pages = {p: Links() for p in book.rglob("*.html") if "macros" not in p.name}  # templates of the theme
    for path, links in pages.items():
        links.feed(path.read_text(encoding="utf-8"))
    for path, links in pages.items():
        assert not [t for t in links.loaded if re.match(r"(https?:)?//", t)], path
        for target in [*links.targets, *links.loaded]:
            if re.match(r"[a-z]+:|//|#$", target):
                continue
            file, _, anchor = unquote(target).partition("#")
            there = (path.parent / file.partition("?")[0]).resolve() if file else path
            assert there.exists(), f"{path.name}: {target}"
            if anchor and there in pages and not anchor.startswith("."):
                assert anchor in pages[there].ids, f"{path.name}: {target}"
        for image in links.images:
            assert image.get("alt"), f"{path.name}: {image.get('src')}"


def test_no_number_is_missing_in_the_pages(book):
    for page in ("index.html", "analysis/01_attention.html", "analysis/08_errata.html", "made.html"):
        text = (book / page).read_text(encoding="utf-8")
        assert "glue:" not in text
        assert "{numref}" not in text
        assert not re.search(r">\s*nan\s*<", text)


def test_the_whole_book_is_one_pdf(book):
    """With a bookmark for each chapter, and no link to the machine that printed it; where no browser is, no dead link."""
    offered = 'href="dyrate-study.pdf"' in (book / "intro.html").read_text(encoding="utf-8")
    assert offered == (book / "dyrate-study.pdf").exists() == bool(BROWSER)
    if BROWSER:
        content = (book / "dyrate-study.pdf").read_bytes()
        bookmarks = set(re.findall(rb"/Title \(([^()]*)\)", content))
        assert {b"Where does the attention go?", b"Limits", b"Glossary", b"How to cite"} <= bookmarks
        assert b"file:" not in content


def test_figures_offer_their_rows_and_the_notebook(book):
    for notebook in NOTEBOOKS:
        page = (book / "analysis" / f"{notebook.stem}.html").read_text(encoding="utf-8")
        figures = [c for c in nbformat.read(notebook, 4).cells if "figure" in c.metadata.get("mystnb", {})]
        lines = re.findall(r'<div class="rows[^"]*">(.*?)</div>', page, re.S)
        assert len(lines) == len(figures) and all(f"{notebook.name}" in line for line in lines), notebook.name
        assert sum(".csv" in line for line in lines) > len(lines) / 2, notebook.name  # but for pictures
        assert f"colab.research.google.com/github/owner/name/blob/colab/{notebook.name}" in page
        assert (book.parent / "colab" / notebook.name).exists()


def test_a_published_book_names_its_pages(book):
    site = "https://owner.example/name/"
    listed = re.findall(r"<loc>(.*?)</loc>", (book / "sitemap.xml").read_text())
    assert f"{site}intro.html" in listed and all((book / page.removeprefix(site)).exists() for page in listed)
    page = (book / "analysis" / "01_attention.html").read_text(encoding="utf-8")
    assert f'rel="canonical" href="{site}analysis/01_attention.html"' in page
    picture = re.search(rf'property="og:image" content="{site}([^"]+)"', page)
    assert picture and Image.open(book / picture[1]).size == (1200, 630)


def open_page(path: Path, profile: Path) -> tuple[str, list[str]]:
    """The page after its scripts ran, and the browser's complaints: console errors, and requests that leave the machine."""
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome found: install one to test the book in a browser")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={profile}", f"--log-net-log={profile}.json", "--enable-logging=stderr",
        "--virtual-time-budget=10000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    bad = re.compile(r"(ERROR|WARNING):CONSOLE|Failed to load|Uncaught|Refused")
    log = Path(f"{profile}.json").read_text(errors="replace")
    asked = [url for who, url in re.findall(r'"initiator":"([^"]*)".*?"url":"(https?://[^"]+)"', log) if who != "not an origin"]
    return done.stdout, [line for line in said if bad.search(line)] + sorted(set(asked))


def test_the_browser_test_can_fail(tmp_path):
    """The negative control: an error and an outside request are seen."""
    (tmp_path / "bad.html").write_text("<script>nothing.here()</script><img src='https://example.org/a.png'>")
    _, complaints = open_page(tmp_path / "bad.html", tmp_path / "profile")
    assert any("nothing is not defined" in c for c in complaints)
    assert "https://example.org/a.png" in complaints


@pytest.mark.parametrize("page", ["index.html", "analysis/01_attention.html", "explorer.html", "made.html"])
def test_pages_in_a_browser(book, page, tmp_path):
    content, complaints = open_page(book / page, tmp_path / "profile")
    assert not complaints, "\n".join(complaints)
    assert "<h1" in content
    if page == "index.html":
        assert content.count("<mjx-container") >= 2
        assert "hero" in content
    if page == "analysis/01_attention.html":
        assert content.count("<figure") >= 8
        assert len(re.findall(r"<img[^>]+_images/[0-9a-f]+\.png", content)) >= 8


def widths_on_a_phone(pages: list[Path], folder: Path) -> dict[str, int]:
    """The width that each page needs in a window of 390 pixels, a phone's."""
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome found: install one to test the book in a browser")
    measure = "setTimeout(() => this.dataset.needs = this.contentDocument.documentElement.scrollWidth, 3000)"
    frames = [f'<iframe width="390" height="844" src="{page.as_uri()}" onload="{measure}"></iframe>' for page in pages]
    (folder / "phones.html").write_text("\n".join(frames))
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--allow-file-access-from-files",
        f"--user-data-dir={folder / 'phones'}", "--virtual-time-budget=20000", "--dump-dom", (folder / "phones.html").as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=180).stdout
    return {name: int(width) for name, width in re.findall(r'src="[^"]*/([^/"]+)"[^>]*data-needs="(\d+)"', shown)}


def test_no_page_scrolls_sideways_on_a_phone(book, tmp_path):
    pages = [*(book / f"{name}.html" for name in ("intro", "made", "api", "models")), *sorted((book / "analysis").glob("*.html"))]
    (tmp_path / "wide.html").write_text("<table><tr><td style='min-width: 600px'>a wide table</td></tr></table>")
    widths = widths_on_a_phone([*pages, tmp_path / "wide.html"], tmp_path)
    assert widths.pop("wide.html") > 600  # the negative control
    assert len(widths) == len(pages) and max(widths.values()) <= 390, widths
