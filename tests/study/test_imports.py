"""Imports go one way, notebooks -> study -> dyrate, and the method runs where nothing of the study is installed."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def lint(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"]
    environment = {"PATH": "", "PYTHONPATH": f"{folder}:{folder / 'analysis'}", "HOME": str(folder)}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def test_imports_go_one_way():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout


def test_a_wrong_import_is_found(tmp_path):
    """The negative control: the method importing the study, and a lower module a higher one."""
    for folder in ("dyrate", "analysis/study"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for module, line in (("seen", "import study.scores"), ("trace", "import dyrate.cost")):
        with (tmp_path / "dyrate" / f"{module}.py").open("a") as file:
            file.write(f"\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1
    assert "dyrate.seen -> study.scores" in done.stdout and "dyrate.trace -> dyrate.cost" in done.stdout


def test_notebooks_define_nothing():
    """Cells call: what they call has a name and a docstring in study/chapters."""
    import nbformat

    for path in sorted((ROOT / "analysis").glob("*.ipynb")):
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "code":
                assert not re.search(r"^\s*(def|class|for|while) ", cell.source, re.M), f"{path.name}: {cell.source[:80]}"
