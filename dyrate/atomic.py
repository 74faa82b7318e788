"""Files are written whole or not at all: an interrupt never leaves half of one behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, content: str | Callable[[Path], object]) -> None:
    """Write text, or let `content` write to the path it is given, and only then put the file in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    if callable(content):
        content(part)
    else:
        part.write_text(content, encoding="utf-8")
    part.replace(path)


def append_lines(path: Path, lines: list[str]) -> None:
    """Append whole lines and have them on disk before returning; half a line that an interrupt left is removed first."""
    with path.open("a+b") as file:
        held = file.seek(0, os.SEEK_END)
        if held:
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            if whole < held:
                file.truncate(whole)
        file.write("".join(line + "\n" for line in lines).encode())
        file.flush()
        os.fsync(file.fileno())
