"""Share the long measurements of a profile among processes; `run.py` then finds the answers stored and makes the chapters.

accelerate launch analysis/share.py --profile llava-7b --only 03      # a process on each GPU; again, if one was lost
python analysis/run.py --profile llava-7b

Every process runs each chapter that stores its answers (3, 4 and 7), without a kernel and with results thrown away;
`study.answers.run` in it divides what is not stored yet.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import nbformat
import run as runner

from dyrate.distributed import this_process


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", required=True, help="a name in analysis/params, or a YAML file")
    parser.add_argument("--only", nargs="+", default=[], help="numbers of chapters, such as 03")
    given = parser.parse_args(argv)
    try:
        profile, plan = runner.read_plan(given.profile, given.only)
        plan = [(notebook, values) for notebook, values in plan if "store" in runner.papermill.inspect_notebook(str(notebook))]
        runner.before(plan)
    except runner.BAD_INPUT as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for notebook, values in plan:
        print(f"{notebook.stem}: process {this_process().process_index + 1} of {this_process().num_processes}", flush=True)
        run_cells(notebook, {**values, "results": f"build/shared/{profile}-{this_process().process_index}"})
    return 0


def run_cells(notebook: Path, values: dict) -> None:
    """Run a notebook's code in this process, with these values in place of its parameters."""
    names: dict = {}
    for cell in nbformat.read(notebook, 4).cells:
        if cell.cell_type == "code":
            lines = [line for line in cell.source.splitlines() if not line.startswith("%")]
            exec(compile("\n".join(lines), f"{notebook.stem}, {cell.id}", "exec"), names)
            if "parameters" in cell.metadata.get("tags", []):
                names |= values


if __name__ == "__main__":
    sys.exit(main())
