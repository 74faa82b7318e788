"""Docstrings as Sphinx reads them: the indented examples of this project's docstrings become blocks of code.

A Sphinx extension beside autodoc. Docstrings are plain text for `help()`: an example is an indented block after a blank line,
with no mark that reStructuredText would ask for.
"""

from __future__ import annotations


def setup(app) -> dict:
    app.connect("autodoc-process-docstring", mark_examples)
    return {"parallel_read_safe": True}


def mark_examples(app, what: str, name: str, obj, options, lines: list[str]) -> None:
    """Put, in place, a line `::` before each indented block, which marks it as code."""
    marked = []
    for i, line in enumerate(lines):
        after_text = i > 1 and not lines[i - 1].strip() and not marked[-2].startswith(" ")
        if line.startswith("    ") and after_text:
            marked += ["::", ""]
        marked.append(line)
    lines[:] = marked
