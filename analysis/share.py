"""Share the long measurements of a profile among processes; `run.py` then finds the answers stored and makes the chapters.

accelerate launch analysis/share.py --profile llava-7b --only 03      # a process on each GPU; again, if one was lost
python analysis/run.py --profile llava-7b

Every process runs the measuring cell of each chapter that stores its answers (3, 4 and 7), which is its first after the
parameters; `dyrate.evaluate.run` in it divides what is not stored yet.
"""

from __future__ import annotations

import argparse
import sys

import nbformat
import run as runner

from dyrate.processes import this_process


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
        measure(notebook, {**values, "results": f"build/shared/{profile}-{this_process().process_index}"})
    return 0


def measure(notebook, values: dict) -> None:
    """Run a chapter's parameters, with these values in their place, and the first code cell after them."""
    code = [cell for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]
    first = next(i for i, cell in enumerate(code) if "parameters" in cell.metadata.get("tags", []))
    names: dict = {}
    exec(code[first].source, names)
    names |= values
    exec("\n".join(line for line in code[first + 1].source.splitlines() if not line.startswith("%")), names)


if __name__ == "__main__":
    sys.exit(main())
