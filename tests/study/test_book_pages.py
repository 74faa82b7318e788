"""What build.py writes beside the chapters: rows under figures, Colab notebooks, BibTeX, the glossary, the API, the PDF."""

import inspect
import json
import math
import os
import re
import sys
import threading
from pathlib import Path

import nbformat
import pytest

import dyrate
from study import lock
from study.profiles import NOTEBOOKS, ROOT

sys.path.insert(0, str(ROOT / "book"))
import cite
import docstrings
import links
import pdf
import remeasured
import scorecard

RESULTS = ROOT / "data" / "results" / "pocket-full"


def figure_cell(source: str, **metadata):
    return nbformat.v4.new_code_cell(source, metadata={"mystnb": {"figure": {}}, **metadata})


def test_two_books_are_not_built_at_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(lock, "ROOT", tmp_path)
    first, done = lock.locked("book", "builds the book", wait=True), []
    second = threading.Thread(target=lambda: done.append(lock.locked("book", "builds the book", wait=True)))
    second.start()
    second.join(0.5)
    assert not done and f"process {os.getpid()} builds the book in this checkout: waiting for its end" in capfd.readouterr().out
    first.close()
    second.join(10)
    assert done
    done[0].close()


def test_a_figure_names_the_rows_it_is_drawn_from(tmp_path):
    for name in ("09_x_a.csv", "09_x_b.csv", "03_y.csv"):
        (tmp_path / name).touch()
    writes = figure_cell('chapter.table("09_x_a.csv", a)\nfigures.a(a)')
    assert links.rows_behind(writes, "09_x.ipynb", tmp_path) == ["09_x_a.csv"]
    assert links.rows_behind(figure_cell("figures.b(b)", rows=["09_x_b.csv"]), "09_x.ipynb", tmp_path) == ["09_x_b.csv"]
    assert links.rows_behind(figure_cell("figures.b(b)"), "09_x.ipynb", tmp_path) == ["09_x_a.csv", "09_x_b.csv"]
    assert links.rows_behind(figure_cell("figures.picture()", rows=[]), "09_x.ipynb", tmp_path) == []
    absent = figure_cell('chapter.table("09_x_c.csv", c)')  # a profile may lack what a cell writes if it can
    assert links.rows_behind(absent, "09_x.ipynb", tmp_path) == []


def test_links_stand_under_the_title_and_under_each_figure():
    cells = [nbformat.v4.new_markdown_cell("# Title"), figure_cell("figures.a(a)"), nbformat.v4.new_code_cell("other()")]
    linked = links.with_links(nbformat.v4.new_notebook(cells=cells), "03_comparison.ipynb", "owner/name", RESULTS).cells
    assert len(linked) == 5
    assert "colab.research.google.com/github/owner/name/blob/colab/03_comparison.ipynb" in linked[1].source
    assert "mybinder.org/v2/gh/owner/name/" in linked[1].source and "03_comparison_by_task.csv" in linked[3].source
    here = links.with_links(nbformat.v4.new_notebook(cells=cells), "03_comparison.ipynb", None, RESULTS).cells
    assert "http" not in here[1].source  # where nothing is published there is nothing to open


def test_rows_that_a_notebook_names_exist():
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, 4).cells:
            for file in cell.metadata.get("rows", []):
                assert (RESULTS / file).exists() or f'"{file}"' in path.read_text(), f"{path.name}: {file}"


def test_for_colab_the_first_cell_installs_and_the_rest_is_the_notebook(tmp_path):
    links.write_for_colab(tmp_path, "owner/name")
    for path in NOTEBOOKS:
        first, *rest = nbformat.read(tmp_path / path.name, 4).cells
        assert "https://github.com/owner/name" in first.source and "pip install" in first.source
        assert [c.source for c in rest] == [c.source for c in nbformat.read(path, 4).cells]


def test_citation_as_bibtex():
    work = {
        "type": "article", "title": "On Tokens", "year": 2025, "identifiers": [{"type": "other", "value": "arXiv:2501.00001"}],
        "authors": [{"family-names": "Liang", "given-names": "X."}, {"name": "A Group"}],
    }  # fmt: skip
    assert cite.key_of(work) == "liang2025on"
    assert cite.bibtex("key", work).splitlines() == [
        "@article{key,", "  title = {{On Tokens}},", "  author = {Liang, X. and {A Group}},", "  year = {2025},",
        "  journal = {arXiv preprint arXiv:2501.00001},", "  eprint = {2501.00001},", "  archivePrefix = {arXiv},", "}",
    ]  # fmt: skip
    assert cite.page("owner/name").count("@") == 2 and "url = {https://github.com/owner/name}" in cite.page("owner/name")


def test_every_chapter_states_its_limits_last():
    for path in NOTEBOOKS:
        prose = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown"]
        assert "## Limits" in prose[-1], path.name


def test_the_glossary_defines_what_pages_lead_to_it_for():
    """Sphinx warns of an undefined term; here, that what a newcomer cannot know leads there at all."""
    text = (ROOT / "book" / "glossary.md").read_text()
    blocks = "".join(re.findall(r"```\{glossary\}\n(.*?)```", text, re.S))
    defined = {line for line in blocks.splitlines() if line and not line.startswith(" ")}
    pages = "".join(c.source for path in NOTEBOOKS for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")
    led = {re.sub(r"\s+", " ", a or b) for a, b in re.findall(r"\{term\}`(?:[^`<]*<([^`>]+)>|([^`<]+))`", pages)}
    assert led <= defined
    asked = {"attribute accuracy", "retention ratio", "random pruning", "teacher-forced", "recap", "look-late", "calibration"}
    assert asked <= led and {"re-selectable", "shallow", "deep", "KV cache", "eviction"} <= defined


def test_the_interface_page_has_every_public_name():
    page = (ROOT / "book" / "api.md").read_text()
    shown = set(re.findall(r"(?:autofunction|autoclass):: (\w+)", page)) | set(re.findall(r"`dyrate\.(\w+)`", page))
    assert "automodule:: dyrate.strategies" in page
    assert set(dyrate.__all__) - set(dyrate.strategies.__all__) <= shown


def test_docstrings_become_code_and_bold_names():
    lines = (inspect.getdoc(dyrate.FastV) or "").splitlines()
    docstrings.mark_parameters(None, "class", "FastV", dyrate.FastV, None, lines)
    docstrings.mark_examples(None, "class", "FastV", dyrate.FastV, None, lines)
    assert "**rate**: the share" in "\n".join(lines)
    at = lines.index("::")
    assert lines[at + 2].startswith("    with dyrate.FastV") and lines.count("::") == 1
    shown, _ = docstrings.show_fields(None, "class", "FastV", dyrate.FastV, None, None, None)
    assert "rate: float = 0.5" in shown and "residency: Literal['evict', 'mask'] = 'evict'" in shown


def test_a_page_is_printed_with_a_bookmark_for_each_heading(tmp_path):
    if not (program := pdf.browser()):
        pytest.skip("no Chromium or Chrome found: install one to test the PDF")
    (tmp_path / "page.html").write_text("<h1>First heading</h1><p>text</p><h2>Second heading</h2>")
    assert pdf.print_page(program, tmp_path / "page.html", tmp_path / "page.pdf")
    assert {"First heading", "Second heading"} <= bookmarks(tmp_path / "page.pdf")


def test_where_printing_fails_it_says_so(tmp_path, capsys):
    """The negative control: a program that is no browser."""
    (tmp_path / "page.html").write_text("<h1>x</h1>")
    assert not pdf.print_page("/bin/false", tmp_path / "page.html", tmp_path / "page.pdf")
    assert "no PDF: /bin/false failed" in capsys.readouterr().out


def bookmarks(path: Path) -> set[str]:
    """The titles in a PDF's outline, of those that are plain ASCII."""
    return {title.decode() for title in re.findall(rb"/Title \(([^()]*)\)", path.read_bytes())}


@pytest.mark.parametrize(("holds", "number", "verdict"), [
    ("below", {"value": -2, "low": -3, "high": -1}, "reproduced"), ("below", {"value": 2, "low": 1, "high": 3}, "contradicted"),
    ("above", {"value": 2, "low": 1, "high": 3}, "reproduced"), ("above", {"value": -2, "low": -3, "high": -1}, "contradicted"),
    ("above", {"value": 2, "low": -1, "high": 5}, "no significant difference"), ("above", {"value": 2}, "reproduced"),
    ("below", {"value": 15}, "contradicted"), ("below", None, "not measured in this profile"),
])  # fmt: skip
def test_a_claims_verdict_follows_from_its_interval(holds, number, verdict):
    assert scorecard.verdict_of({"holds": holds}, number) == verdict
    assert scorecard.verdict_of({"untestable": "why"}, None) == "not testable here"


def test_every_claim_names_a_number_that_its_chapter_has():
    table = scorecard.page(made())
    assert "not measured" not in table
    content = {"numbers": {"DyRate_against_a_constant": {"value": -1.0, "low": -1.5, "high": -0.5, "n": 20}}}
    row = next(row for row in scorecard.page([("07_dynamics", "Dynamics", content)]).splitlines() if "constant rate. |" in row)
    assert "[contradicted]" in row and "-1 (-1.5 to -0.5), n = 20. [Dynamics](analysis/07_dynamics.ipynb)" in row


def made() -> list:
    """Every chapter of the reference run."""
    return [(path.stem, path.stem, json.loads(path.read_text())) for path in sorted(RESULTS.glob("[0-9][0-9]_*.json"))]


@pytest.mark.parametrize(("here", "inside", "agrees"), [
    ({"value": 1.1, "low": 0.9, "high": 1.3}, True, True), ({"value": 1.4, "low": 0.9, "high": 1.9}, False, True),
    ({"value": 1.6, "low": 1.5, "high": 1.7}, False, False), ({"value": 0.4, "low": 0.3, "high": 0.5}, False, False),
])  # fmt: skip
def test_a_small_sample_agrees_by_both_intervals(here, inside, agrees):
    (row,) = remeasured.agreement({"a": here}, {"a": {"value": 1.0, "low": 0.8, "high": 1.2}}).to_dict("records")
    assert (row["in its interval"], row["agrees"]) == (inside, agrees)


def test_of_many_numbers_few_differ_by_chance():
    there, here = {"value": 1.0, "low": 0.8, "high": 1.2}, {"value": 1.35, "low": 1.1, "high": 1.6}
    alone, many = (remeasured.agreement({str(i): here for i in range(n)}, {str(i): there for i in range(n)}) for n in (1, 20))
    assert not alone.agrees.any() and many.agrees.all()


def test_numbers_without_intervals_are_not_judged():
    plain, whole = {"value": 1.0}, {"value": 1.0, "low": 0.0, "high": 2.0}
    wide = {"value": 1.0, "low": -math.inf, "high": math.inf}
    assert remeasured.agreement({"a": plain, "b": wide}, {"a": whole, "b": whole, "c": whole}).empty
    assert "No chapter of this book was measured again" in remeasured.section(made(), {})


def test_the_badge_catches_a_number_that_was_altered():
    """Every chapter that measures, its reference beside itself; then one of its numbers moved out of both intervals."""
    measuring = [(stem, content) for stem, _, content in made() if "drawn" in content]
    assert len(measuring) == 6
    for stem, content in measuring:
        same = remeasured.badge(stem, content, content)
        n = len(remeasured.agreement(content["numbers"], content["numbers"]))
        assert n and f"**{n} of {n}**" in same and ".differs" not in same and "in place of" not in same
        key, number = next((key, of) for key, of in content["numbers"].items() if of.get("low", -math.inf) > -math.inf)
        moved = {end: number[end] + 3 * (number["high"] - number["low"]) + 1e-3 for end in ("value", "low", "high")}
        altered = content | {"numbers": content["numbers"] | {key: moved}}
        text = remeasured.badge(stem, altered, content)
        assert f"**{n - 1} of {n}**" in text and f"[`{key}`: here {remeasured.said(number)}, reference" in text
        lines = remeasured.section([(stem, stem, altered)], {stem: content}).splitlines()
        assert any(f"{len(content['numbers']) - n} more headline numbers have no interval" in line for line in lines)
        (wrong,) = (line for line in lines if "[no]{.differs}" in line)
        assert key.replace("_", " ") in wrong and wrong.startswith(f"| {stem} |")


def test_the_badge_says_whose_numbers_a_page_shows():
    content = next(content for stem, _, content in made() if stem == "03_comparison")
    small = content | {"provenance": content["provenance"] | {"parameters": content["provenance"]["parameters"] | {"n": 12}}}
    assert "(`n` 12 in place of 100)" in remeasured.badge("03_comparison", content, small)
    assert "not measured again" in remeasured.badge("03_comparison", content, None)
    own = {key: value for key, value in content.items() if key != "drawn"}
    assert "Measured with the profile `pocket-full`" in remeasured.badge("03_comparison", own, small)
    assert "measures nothing itself" in remeasured.badge("09_laboratories", content, None)
