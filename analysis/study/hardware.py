"""Write the README's table of what a profile needs: memory, and hours on a few GPUs.

python -m study.hardware            # anew, with Python's time as it was measured
python -m study.hardware --probe    # measure Python's time here first

Speeds are those of the makers' data sheets (`analysis/gpus.csv`); no GPU was asked.
"""

from __future__ import annotations

import json
import sys

import pandas as pd
import torch

from dyrate.atomic import write_whole
from dyrate.cost import LLAVA_7B, LLAVA_13B
from study import planning
from study.bench.machine import Machine, name_of_device, probe
from study.profiles import ROOT, defaults, planned, read_plan
from study.runner import spoken

PROBE, README = ROOT / "data" / "results" / "probe.json", ROOT / "README.md"
PROFILES = {"llava-7b": LLAVA_7B, "llava-13b": LLAVA_13B}
BEGIN, END = "<!-- written by analysis/study/hardware.py -->", "<!-- end -->"


def cards() -> list[Machine]:
    """The GPUs of the data sheets, with Python's time as measured."""
    python = json.loads(PROBE.read_text())["seconds_per_layer"]
    rows = pd.read_csv(ROOT / "analysis" / "gpus.csv").itertuples()
    return [Machine(r.gpu, r.bf16_tflops * 1e12 / 2, r.gb_per_second * 1e9, python, r.memory_gb * 1e9) for r in rows]


def table() -> pd.DataFrame:
    """One row a chapter: for each profile GiB needed, and hours on each card; nan where the memory does not suffice."""
    columns: dict[str, dict[str, float]] = {}
    for profile, shape in PROFILES.items():
        size = profile.removeprefix("llava-").upper()
        plan = [(n, v) for n, v in read_plan(profile)[1] if "model" in v]
        (predictors,) = planned(plan).values()
        for notebook, values in plan:
            work = planning.work(notebook.stem, {**defaults(notebook), **values}, predictors)
            need = planning.memory(work, shape)
            columns.setdefault(f"{size}: GiB", {})[notebook.stem] = need / 2**30
            for card in cards():
                hours = planning.seconds(work, shape, card) / 3600 if need <= card.memory else float("nan")
                columns.setdefault(f"{size}: {card.name}", {})[notebook.stem] = hours
    frame = pd.DataFrame(columns).rename_axis("chapter")
    frame.loc["all"] = {c: frame[c].max() if "GiB" in c else frame[c].sum(skipna=False) for c in frame}
    return frame.reset_index()


def markdown(frame: pd.DataFrame) -> str:
    """GiB in whole numbers, hours and minutes; a dash where the memory does not suffice."""

    def cell(column: str, value) -> str:
        if column == "chapter":
            return value
        return "–" if pd.isna(value) else f"{value:.0f}" if "GiB" in column else spoken(3600 * value)

    lines = ["| " + " | ".join(frame.columns) + " |", "|---|" + "--:|" * (len(frame.columns) - 1)]
    rows = frame.itertuples(index=False)
    return "\n".join([*lines, *("| " + " | ".join(map(cell, frame.columns, row)) + " |" for row in rows)])


def readme(text: str) -> str:
    """The README with its table written anew."""
    return f"{text.split(BEGIN)[0]}{BEGIN}\n{markdown(table())}\n{END}{text.split(END)[1]}"


if __name__ == "__main__":
    if "--probe" in sys.argv:
        about = {"device": name_of_device(), "torch": torch.__version__}
        python = min(probe().seconds_per_layer for _ in range(5))
        write_whole(PROBE, json.dumps(about | {"seconds_per_layer": python}, indent=1) + "\n")
    write_whole(README, readme(README.read_text(encoding="utf-8")))
