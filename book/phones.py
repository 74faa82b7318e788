"""Figures in a phone's shape: taken from the executed notebooks, and shown in place of the wide ones on a narrow screen.

A Sphinx extension, and what build.py calls before it. A notebook stores the picture beside the wide one (`study.figures.phone`).
"""

from __future__ import annotations

import base64
import re
from pathlib import Path

from study.figures.phone import TYPE

FOLDER = "phone"  # in _assets, which Sphinx copies to _static
IMAGE = re.compile(r'(<figure[^>]*\bid="([\w-]+)"[^>]*>\s*(?:<a [^>]*>)?)(<img [^>]*>)')


def save_pictures(notebook, assets: Path) -> None:
    """Move the pictures for phones out of a notebook's outputs into `assets`, each under its figure's name."""
    (assets / FOLDER).mkdir(exist_ok=True)
    for cell in notebook.cells:
        name = cell.metadata.get("mystnb", {}).get("figure", {}).get("name")
        for output in cell.get("outputs", []):
            picture = output.get("data", {}).pop(TYPE, None)  # of a type that pages do not know
            if picture and name:
                (assets / FOLDER / f"{name}.png").write_bytes(base64.b64decode(picture))


def setup(app) -> dict:
    app.connect("html-page-context", offer_pictures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def offer_pictures(app, page: str, template: str, context: dict, doctree) -> None:
    """Wrap each figure's image so that a screen as narrow as a phone's loads the other picture."""
    if app.builder.name != "html" or "body" not in context:
        return

    def both(found: re.Match) -> str:
        start, name, image = found.groups()
        if not (Path(app.srcdir) / "_assets" / FOLDER / f"{name}.png").exists():
            return found[0]
        address = context["pathto"](f"_static/{FOLDER}/{name}.png", 1)
        return f'{start}<picture><source media="(max-width: 600px)" srcset="{address}" />{image}</picture>'

    context["body"] = IMAGE.sub(both, context["body"])
