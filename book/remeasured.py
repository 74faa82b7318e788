"""Numbers that this machine measured again beside those of the reference run that the pages show: badges, and a table of all."""

from __future__ import annotations

import json
import math
from statistics import NormalDist

import pandas as pd

from study.book import ROOT, shown_table
from study.profiles import defaults

LABEL = "tab-remeasured"
COLUMNS = ["number", "here", "reference", "in its interval", "agrees"]


def agreement(here: dict[str, dict], reference: dict[str, dict]) -> pd.DataFrame:
    """One row for each headline number that both runs have with an interval: `COLUMNS`, and both numbers.

    in its interval: whether the number measured here lies in the reference's 95 % interval. agrees: whether the two differ by no
    more than the intervals of both allow, the root of the summed squares of their halves that face each other, widened so that
    all numbers of a chapter agree at once in 95 % of honest runs (Bonferroni's correction); a small sample has a wide interval,
    and is not held to the narrow one.
    """
    both = {key: (here[key], there) for key, there in reference.items() if key in here}
    both = {key: pair for key, pair in both.items() if all(math.isfinite(number.get("low", math.inf)) for number in pair)}
    wider, rows = _quantile(0.05 / max(1, len(both))) / _quantile(0.05), []
    for key, (mine, there) in both.items():
        lower, higher = sorted((mine, there), key=lambda number: number["value"])
        allowed = wider * math.hypot(lower["high"] - lower["value"], higher["value"] - higher["low"])
        rows.append({
            "number": key, "here": mine, "reference": there, "in its interval": there["low"] <= mine["value"] <= there["high"],
            "agrees": higher["value"] - lower["value"] <= allowed + 1e-9,
        })  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)


def _quantile(missed: float) -> float:
    """How many standard deviations a two-sided interval reaches that misses with this probability."""
    return NormalDist().inv_cdf(1 - missed / 2)


def badge(stem: str, content: dict, here: dict | None) -> str:
    """What stands under a chapter's title: whose numbers it shows, and how those that were measured here compare with them.

    content: of the chapter shown. here: the same chapter measured on this machine; None where it was not.
    """
    about = content["provenance"]
    if "draw" not in defaults(ROOT / "analysis" / f"{stem}.ipynb"):
        return _div("remeasured", "Computed from committed results when this book was built: this page measures nothing itself.")
    if "drawn" not in content:
        return _div("remeasured", f"Measured with the profile `{about['profile']}` on {about['device']}.")
    shown = f"Drawn from the committed rows of the {{term}}`reference run` (`{about['profile']}`, {about['device']})"
    if here is None:
        return _div("remeasured", f"{shown}; not measured again on the machine that built this book.")
    found = agreement(here["numbers"], content["numbers"])
    if found.empty:
        return _div("remeasured", f"{shown}; no number that was measured again has an interval.")
    smaller = differing(stem, here["provenance"]["parameters"], about["parameters"])
    inside, agree = found["in its interval"].sum(), found.agrees.sum()
    text = (
        f"{shown}. Measured again on the machine that built this book{f' ({smaller})' if smaller else ''}: **{agree} of "
        f"{len(found)}** headline numbers with an interval agree with the reference, {inside} lie in its 95 % interval "
        f"({{numref}}`{LABEL}`)."
    )
    wrong = found[~found.agrees.astype(bool)].itertuples()
    differ = [f"[`{row.number}`: here {said(row.here)}, reference {said(row.reference)}]{{.differs}}" for row in wrong]
    return _div("remeasured", text + (f" These differ: {'; '.join(differ)}." if differ else ""))


def said(number: dict) -> str:
    """A number and its interval, three significant digits."""
    return f"{number['value']:.3g} ({number['low']:.3g} to {number['high']:.3g})"


def differing(stem: str, here: dict, reference: dict) -> str:
    """How the sizes of a run differ from the reference's: "n 12 in place of 100"."""
    own = defaults(ROOT / "analysis" / f"{stem}.ipynb")
    sizes = [name for name, value in own.items() if isinstance(value, int) and not isinstance(value, bool)]
    pairs = [(name, here.get(name, own[name]), reference.get(name, own[name])) for name in sizes]
    return ", ".join(f"`{name}` {mine} in place of {theirs}" for name, mine, theirs in pairs if mine != theirs)


def section(made: list, here: dict[str, dict]) -> str:
    """The table of all, for the page that says how the book was made. made: (stem, heading, content); here: contents by stem."""
    start = "(remeasured)=\n## Measured again\n\n"
    tables = [agreement(here[stem]["numbers"], of["numbers"]).assign(chapter=stem) for stem, _, of in made if stem in here]
    if not tables or (table := pd.concat(tables, ignore_index=True)).empty:
        return f"{start}No chapter of this book was measured again beside the run that it shows.\n\n"
    unjudged = sum(len(of["numbers"]) for stem, _, of in made if stem in here) - len(table)
    table["number"] = table.number.str.replace("_", " ")  # so that a long name breaks
    table["here"], table["reference"] = table.here.map(said), table.reference.map(said)
    table["in its interval"] = table["in its interval"].map({True: "yes", False: "no"})
    table["agrees"] = table.agrees.map({True: "yes", False: "[no]{.differs}"})
    text = (
        f"{{numref}}`{LABEL}` has every headline number with an interval that was measured again on the machine that built this "
        "book. It *agrees* with the reference where the two differ by no more than both 95 % intervals allow, widened for the "
        "number of comparisons in a chapter. Intervals are over samples: where a quick run also trains less, its "
        f"numbers can differ for that reason. {unjudged} more headline numbers have no interval, and are not judged.\n\n"
    )
    shown = shown_table(table[["chapter", *COLUMNS]], "Headline numbers measured again, with 95 % intervals.", LABEL)
    return f"{start}{text}{shown.data}\n\n"


def measured_here(profile: str | None) -> dict[str, dict]:
    """What the chapters of a profile found, by stem, of those that were executed in this checkout."""
    if not profile:
        return {}
    results, executed = ROOT / "data" / "results" / profile, ROOT / "build" / "analysis" / profile
    there = [path for path in results.glob("[0-9][0-9]_*.json") if (executed / f"{path.stem}.ipynb").exists()]
    return {path.stem: json.loads(path.read_text()) for path in there}


def _div(kind: str, text: str) -> str:
    return f":::{{div}} {kind}\n{text}\n:::"
