"""Docstrings as Sphinx reads them: a Sphinx extension beside autodoc.

Docstrings are plain text, for `help()`: an example is an indented block after a blank line, and a parameter is explained where
its name stands before a colon. Here examples become blocks of code, parameters' names bold, and a dataclass shows its fields.
"""

from __future__ import annotations

import dataclasses
import inspect
import re


def setup(app) -> dict:
    app.connect("autodoc-process-docstring", mark_parameters)
    app.connect("autodoc-process-docstring", mark_examples)
    app.connect("autodoc-process-signature", show_fields)
    return {"parallel_read_safe": True}


def mark_parameters(app, what: str, name: str, obj, options, lines: list[str]) -> None:
    """Make bold, in place, what stands before a colon and is a parameter or a field."""
    try:
        parameters = init_parameters(obj) if inspect.isclass(obj) else inspect.signature(obj).parameters.values()
    except (TypeError, ValueError):  # an attribute, or what is written in C
        return
    if known := [parameter.name for parameter in parameters]:
        named = re.compile(rf"(?<![\w`.*])({'|'.join(map(re.escape, known))})(?=: )")
        lines[:] = [line if line.startswith("    ") else named.sub(r"**\1**", line) for line in lines]


def mark_examples(app, what: str, name: str, obj, options, lines: list[str]) -> None:
    """Put, in place, a line `::` before each indented block, which marks it as code."""
    marked = []
    for i, line in enumerate(lines):
        after_text = i > 1 and not lines[i - 1].strip() and not marked[-2].startswith(" ")
        if line.startswith("    ") and after_text:
            marked += ["::", ""]
        marked.append(line)
    lines[:] = marked


def show_fields(app, what: str, name: str, obj, options, signature: str | None, returns: str | None):
    """The signature of a dataclass: its fields with their defaults, also where `__new__` hides them."""
    if what != "class" or not dataclasses.is_dataclass(obj):
        return None
    fields = [p.replace(annotation=AsWritten(as_text(p.annotation))) for p in init_parameters(obj)]
    return str(inspect.Signature(fields)).replace("<factory>", "..."), returns


def as_text(annotation) -> str:
    """An annotation that is a string already, under `from __future__ import annotations`, or a type."""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


class AsWritten(str):
    """An annotation, shown as the code has it."""

    __repr__ = str.__str__


def init_parameters(cls: type) -> list[inspect.Parameter]:
    """What making an object takes, `self` left out: of a dataclass its fields."""
    return list(inspect.signature(cls.__init__).parameters.values())[1:]
