"""The front page's figures, drawn from the reference rows when the book is built: what is lost at which cost, and the method."""

from __future__ import annotations

from pathlib import Path

import phones

from study.chapters import front, laboratories
from study.figures import front as figures
from study.figures.phone import narrow

LABORATORIES = {"smol": "smol (SmolLM2-135M inside)", "pocket-plain": "pocket-plain (a toy, the same eyes)"}
RESULTS = "data/results"
METHOD = (
    "How DyRate works (drawn, not measured): at each step a linear layer reads how the newest token's attention divides over "
    "four kinds of tokens, and chooses the share of image tokens that is gone from then on. Which ones go is another matter: "
    "those that a ranking puts last."
)
ALT = {
    "headline": "For each of two models two panels of score, over the measured retention ratio and over computation, a line for "
    "each method below a line without pruning.",
    "method": "Three steps of an answer, one under another: bars of attention shares, a box for the predictor, a drop rate, and "
    "a grid of image tokens of which fewer and fewer are left.",
}


def write(book: Path) -> None:
    """Draw both figures into the book's assets, and write the pages' parts that show them."""
    tables = {LABORATORIES[lab.name]: front.points(lab) for lab in laboratories.read(RESULTS, list(LABORATORIES))}
    drawn = {"headline": figures.headline(tables), "method": figures.method()}
    captions = {"headline": f"What dropping image tokens costs. {front.said(tables)}", "method": METHOD}
    for name, figure in drawn.items():
        figure.savefig(book / "_assets" / f"{name}.png")
        text = f"```{{figure}} _assets/{name}.png\n:name: fig-{name}\n:alt: {ALT[name]}\n:width: 100%\n\n{captions[name]}\n```\n"
        (book / f"_{name}.md").write_text(text)
    narrower = {"headline": narrow(drawn["headline"]), "method": figures.method(figures.TALL)}
    for name, figure in narrower.items():
        figure.savefig(book / "_assets" / phones.FOLDER / f"fig-{name}.png")
