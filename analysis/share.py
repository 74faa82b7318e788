"""Share the long measurements of a profile among processes; `run.py` then finds the answers stored and makes the chapters.

accelerate launch analysis/share.py --profile llava-7b --only 03      # a process on each GPU; again, if one was lost
python analysis/run.py --profile llava-7b

Every process calls `measure` of each chapter that stores its answers (3, 4 and 7), in which `study.answers.answer_all` divides
what is not stored yet.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from dyrate.data import one_line
from dyrate.distributed import this_process
from study.profiles import defaults, read_plan
from study.runner import BAD_INPUT, before


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", required=True, help="a name in analysis/params, or a YAML file")
    parser.add_argument("--only", nargs="+", default=[], help="numbers of chapters, such as 03")
    given = parser.parse_args(argv)
    warnings.formatwarning = one_line
    try:
        _, plan = read_plan(given.profile, given.only)
        plan = [(notebook, values) for notebook, values in plan if measure_of(notebook)]
        before(plan)
    except BAD_INPUT as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for notebook, values in plan:
        mine = f"{notebook.stem}: process {this_process().process_index + 1} of {this_process().num_processes}"
        sys.stdout.write(f"{mine}\n")  # in one piece: print may let another process in before the end of its line
        sys.stdout.flush()
        measure_of(notebook)(**{**defaults(notebook), **values})
    return 0


def measure_of(notebook: Path) -> Callable | None:
    """The function that measures for a notebook, in the module of its name; None if the chapter stores no answers."""
    stores = "store" in defaults(notebook)
    return importlib.import_module(f"study.chapters.{notebook.stem[3:]}").measure if stores else None


if __name__ == "__main__":
    sys.exit(main())
