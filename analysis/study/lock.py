"""Work that must not run twice at once in a checkout."""

from __future__ import annotations

import fcntl
import os
from typing import TextIO

from study.profiles import ROOT


def locked(name: str, what: str, *, wait: bool = False) -> TextIO:
    """Take the lock of a name, held while the file is open: the system frees it when a process ends, however it ends.

    what: which work it is, in words. Raises ValueError that names the process which has it; wait: says so, and waits for its end.
    """
    path = ROOT / "build" / f"{name}.lock"
    path.parent.mkdir(exist_ok=True)
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        held = f"process {file.read()} {what} in this checkout"
        if not wait:
            raise ValueError(f"{held}: wait for it or end it") from error
        print(f"{held}: waiting for its end", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
