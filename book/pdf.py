"""The whole book as one PDF: all pages as one page of HTML, printed by Chromium, with a bookmark for each heading."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def browser() -> str | None:
    """The path of a Chromium or Chrome; None where there is none."""
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


def print_page(program: str, page: Path, pdf: Path) -> bool:
    """Print a page of HTML with the browser `program`; whether it worked. The outline comes from the page's headings."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            program, "--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--no-sandbox",  # the page is ours, and in containers the user is often root
            "--generate-pdf-document-outline", "--no-pdf-header-footer",  # study.css numbers the pages
            "--virtual-time-budget=60000",  # lets the scripts set all formulas first
            f"--user-data-dir={profile}", f"--print-to-pdf={pdf}", page.resolve().as_uri(),
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            print(f"no PDF: {program} did not finish in 300 s")
            return False
    if done.returncode or not pdf.exists():
        print(f"no PDF: {program} failed:\n{done.stderr[-500:]}")
        pdf.unlink(missing_ok=True)  # whole or not at all
        return False
    return True
