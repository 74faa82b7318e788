"""The page "How to cite": BibTeX of the study and of what it examines, from CITATION.cff."""

from __future__ import annotations

import re

import yaml

from study.book import ROOT


def page(repository: str | None) -> str:
    """The page as Markdown; repository: owner/name on GitHub."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    url = {"url": f"https://github.com/{repository}"} if repository else {}
    entries = [bibtex("dyrate-study", citation | url), *(bibtex(key_of(work), work) for work in citation["references"])]
    return "\n".join([
        "(cite)=", "# How to cite", "", citation["message"], "", "```bibtex", "\n\n".join(entries), "```", "",
        "A number of this book is cited with the chapter that computes it and, from {ref}`how-made`, with the profile and",
        "the commit. A method is cited by its authors' paper: see {ref}`references`.", "",
    ])  # fmt: skip


def bibtex(key: str, work: dict) -> str:
    """One work of a CITATION.cff as a BibTeX entry: `@software`, or `@article` for an article."""
    kind = "article" if work["type"] == "article" else "software"
    year = work.get("year") or str(work.get("date-released", ""))[:4]
    values = {"title": f"{{{work['title']}}}", "author": " and ".join(map(author, work["authors"])), "year": year}
    values |= {name: work.get(name) for name in ("version", "url")}
    for identifier in work.get("identifiers", []):
        if number := re.fullmatch(r"arXiv:([\d.]+)", identifier["value"]):
            values |= {"journal": f"arXiv preprint {identifier['value']}", "eprint": number[1], "archivePrefix": "arXiv"}
    lines = [f"  {name} = {{{value}}}," for name, value in values.items() if value]
    return "\n".join([f"@{kind}{{{key},", *lines, "}"])


def author(person: dict) -> str:
    """A person as "Family, Given"; a group in braces, so that BibTeX does not take its name apart."""
    return f"{person['family-names']}, {person['given-names']}" if "family-names" in person else f"{{{person['name']}}}"


def key_of(work: dict) -> str:
    """A key such as `liang2025dynamic`."""
    return f"{work['authors'][0]['family-names']}{work['year']}{work['title'].split()[0]}".lower()
