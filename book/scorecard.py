"""The front page's table of the paper's claims: each with the number that tests it, and a verdict computed from its interval."""

from __future__ import annotations

import yaml

from study.profiles import ROOT

CLAIMS = ROOT / "data" / "reported" / "scorecard.yaml"
VERDICTS = ("reproduced", "contradicted", "no significant difference", "not testable here", "not measured in this profile")


def page(made: list) -> str:
    """The table in MyST. made: (stem, heading, content) of each chapter."""
    headings = {stem: heading for stem, heading, _ in made}
    contents = {stem: content["numbers"] for stem, _, content in made}
    rows = ["| in the paper | claim | verdict | measured here |", "|---|---|---|---|"]
    counts = dict.fromkeys(VERDICTS, 0)
    for claim in yaml.safe_load(CLAIMS.read_text()):
        number = None if "untestable" in claim else contents.get(claim["chapter"], {}).get(claim["number"])
        verdict = verdict_of(claim, number)
        counts[verdict] += 1
        styled = f"[{verdict}]{{.verdict-{verdict.split()[0]}}}"
        rows.append(f"| {claim['where']} | {claim['claim']} | {styled} | {_shown(claim, number, headings)} |")
    said = ", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n)
    start = f"Of {sum(counts.values())} claims: {said}. Intervals are 95 %; the model is the chapter's unless one is named.\n\n"
    return start + "\n".join(rows) + "\n"


def verdict_of(claim: dict, number: dict | None) -> str:
    """One of VERDICTS. A number without an interval is as certain as the computation that it comes from."""
    if "untestable" in claim:
        return "not testable here"
    if number is None:
        return "not measured in this profile"
    low, high = number.get("low", number["value"]), number.get("high", number["value"])
    if claim["holds"] == "above":
        low, high, than = -high, -low, -claim.get("than", 0)
    else:
        than = claim.get("than", 0)
    return "reproduced" if high < than else "contradicted" if low >= than else "no significant difference"


def _shown(claim: dict, number: dict | None, headings: dict) -> str:
    if "untestable" in claim:
        return claim["untestable"]
    chapter = headings.get(claim["chapter"])
    link = f"[{chapter}](analysis/{claim['chapter']}.ipynb)" if chapter else f"chapter {int(claim['chapter'][:2])}"
    if number is None:
        return link
    unit = f" {claim['unit']}" if "unit" in claim else ""
    interval = f" ({number['low']:.3g} to {number['high']:.3g})" if "low" in number else ""
    n = f", n = {number['n']:.0f}" if "n" in number else ""
    return f"{claim['measured']}: {number['value']:.3g}{unit}{interval}{n}. {link}"
