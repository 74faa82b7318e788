"""The study's runner, as a user starts it."""

import subprocess
import sys

from study.profiles import ROOT


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "analysis/run.py", *arguments], cwd=ROOT, capture_output=True, text=True)
