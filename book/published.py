"""What a published book has beside its pages: an address for each page, a sitemap, and the card that a shared link shows.

A Sphinx extension. SITE_URL says where the book will stand; without it no page names an address and there is no sitemap. In the
one page that becomes the PDF, figures are no links to themselves.
"""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

from docutils import nodes

CARD = "_static/card.png"


def setup(app) -> dict:
    app.connect("builder-inited", set_address)
    app.connect("html-page-context", open_graph)
    app.connect("build-finished", write_sitemap)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def set_address(app) -> None:
    """The book's address, from which Sphinx makes each page's canonical link."""
    app.config.html_scaled_image_link = app.builder.name != "singlehtml"
    if site := os.environ.get("SITE_URL"):
        app.config.html_baseurl = site.rstrip("/") + "/"


def open_graph(app, name: str, template: str, context: dict, doctree) -> None:
    """The tags that a shared link's preview is made of: title, first sentences, address and picture."""
    if not app.config.html_baseurl or doctree is None:
        return
    about = {
        "og:type": "article", "og:site_name": app.config.html_title, "og:title": doctree_title(doctree) or context["title"],
        "og:description": first_sentences(doctree), "og:url": f"{app.config.html_baseurl}{name}.html",
    }  # fmt: skip
    if (Path(app.srcdir) / "_assets" / "card.png").exists():
        about["og:image"] = app.config.html_baseurl + CARD
    tags = [f'<meta property="{key}" content="{escape(value)}" />' for key, value in about.items()]
    tags += ['<meta name="twitter:card" content="summary_large_image" />'] if "og:image" in about else []
    context["metatags"] = "\n".join([context.get("metatags", ""), *tags])


def doctree_title(doctree) -> str:
    heading = next(doctree.findall(nodes.title), None)
    return heading.astext() if heading else ""


def first_sentences(doctree, most: int = 200) -> str:
    """The first paragraph, cut at a word where it is longer than `most` characters."""
    paragraph = next(doctree.findall(nodes.paragraph), None)
    text = " ".join(paragraph.astext().split()) if paragraph else ""
    return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " …"


def write_sitemap(app, failed) -> None:
    """sitemap.xml with the address of each page."""
    if failed or app.builder.name != "html" or not app.config.html_baseurl:
        return
    pages = sorted(app.env.found_docs)
    urls = [f"  <url><loc>{app.config.html_baseurl}{page}.html</loc></url>" for page in pages]
    head = ['<?xml version="1.0" encoding="utf-8"?>', '<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">']
    (Path(app.outdir) / "sitemap.xml").write_text("\n".join([*head, *urls, "</urlset>"]) + "\n")
