"""Profiles: which notebooks run with which parameters, and which trained predictors they read."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[2]  # of the checkout
NOTEBOOKS = sorted((ROOT / "analysis").glob("[0-9][0-9]_*.ipynb"))

PROVENANCE = "provenance.json"  # beside the rows of a chapter: of the run that measured them

Plan = list[tuple[Path, dict]]  # notebooks with the parameters that a profile gives them


def read_plan(name: str, only: Sequence[str] = ()) -> tuple[str, Plan]:
    """A profile's name, and the notebooks that it runs with their parameters."""
    profile, parameters = read_profile(name)
    chosen = choose(only)
    if not only and profile_is_partial(parameters):
        chosen = [notebook for notebook in chosen if notebook.stem in parameters]
    return profile, [(notebook, parameters_of(notebook, parameters)) for notebook in chosen]


def read_profile(name: str) -> tuple[str, dict[str, dict]]:
    """A profile's name and its parameters: a mapping from "all" or a notebook's name to values."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else ROOT / "analysis" / "params" / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in (ROOT / "analysis" / "params").glob("*.yaml")))
        raise FileNotFoundError(f"no profile {name!r}: name a YAML file or one of {known}")
    content = yaml.safe_load(path.read_text()) or {}
    stems = {notebook.stem for notebook in NOTEBOOKS}
    if not isinstance(content, dict) or any(not isinstance(v, dict) for v in content.values()):
        raise ValueError(f"{path}: expected sections ('all' or a notebook's name) of parameters")
    if unknown := set(content) - stems - {"all"}:
        raise ValueError(f"{path}: no notebook is called {sorted(unknown)}; there are {sorted(stems)}")
    return path.stem, content


def profile_is_partial(parameters: dict[str, dict]) -> bool:
    """A profile that names some notebooks, and has no section "all", means those."""
    return bool(parameters) and "all" not in parameters


def choose(only: Sequence[str]) -> list[Path]:
    """The notebooks whose names begin with one of `only`; all of them without any."""
    chosen = [n for n in NOTEBOOKS if not only or any(n.name.startswith(o) for o in only)]
    missing = [o for o in only if not any(n.name.startswith(o) for n in NOTEBOOKS)]
    if missing:
        raise ValueError(f"no notebook begins with {missing}; there are {[n.stem for n in NOTEBOOKS]}")
    return chosen


def parameters_of(notebook: Path, profile: dict[str, dict]) -> dict:
    """The profile's values for one notebook; an unknown parameter is an error (papermill would only warn)."""
    values = {**profile.get("all", {}), **profile.get(notebook.stem, {})}
    known = defaults(notebook)
    if unknown := set(values) - set(known):
        raise ValueError(f"{notebook.name} has no parameter {sorted(unknown)}; it has {sorted(known)}")
    for name, value in values.items():
        check_value(f"{notebook.stem}: {name}", value, known[name])
    return values


def check_value(name: str, value, default) -> None:
    """Raises ValueError for what no chapter can run with, by the notebook's own value: another type, no items, no count."""
    if isinstance(default, int) and not isinstance(default, bool):
        least = 0 if name.endswith(("seed", "first_pruned_layer")) else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is a whole number of at least {least}, not {value!r}")
    elif isinstance(default, bool | str | list | dict) and not isinstance(value, type(default)):
        raise ValueError(f"{name} is a {type(default).__name__} such as {default!r}, not {value!r}")
    elif isinstance(default, list) and default and not value:
        raise ValueError(f"{name} is empty; the notebook's own is {default!r}")
    if name.endswith(("retentions", "budgets")):
        tokens = name.endswith(" retentions")  # chapter 3 also takes numbers of tokens
        if not all(isinstance(x, int | float) and (0 < x <= 1 or (tokens and x > 1 and isinstance(x, int))) for x in value):
            also = ", or whole numbers of tokens" if tokens else ""
            raise ValueError(f"{name} are shares of image tokens in (0, 1]{also}, not {value!r}")


def defaults(notebook: Path) -> dict:
    """A notebook's parameters as it stands."""
    cell = next(c for c in nbformat.read(notebook, 4).cells if "parameters" in c.metadata.get("tags", []))
    return {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(cell.source).body}


def drawn(profile: str, plan: Plan) -> Plan:
    """The plan in which chapters that measure draw instead what the profile's last run measured; the others stay as they are.

    Raises FileNotFoundError where there is nothing to draw from.
    """
    found: Plan = []
    for notebook, values in plan:
        if "draw" in defaults(notebook):
            values = {"results": f"data/results/{profile}"} | values | {"draw": True}
            if not (rows_of(values["results"], notebook.stem) / PROVENANCE).exists():
                how = f"measure them with `python analysis/run.py --profile {profile} --only {notebook.name[:2]}`"
                raise FileNotFoundError(f"{notebook.stem} has no rows in {values['results']} to draw from: {how}")
        found.append((notebook, values))
    return found


def rows_of(results: str | Path, chapter: str) -> Path:
    """The folder of what a chapter measured, from which its page is drawn (`study.book.Chapter.measured`)."""
    return ROOT / results / "rows" / chapter


def planned(plan: Plan) -> dict[str, list[str]]:
    """The predictors that chapter 2 will have trained when later chapters want them: folder -> names."""
    found = {}
    for notebook, values in plan:
        if notebook.stem.startswith("02") and not values.get("draw"):
            v = {**defaults(notebook), **values}
            trainings = itertools.product(v["budgets"], range(v["seeds"]))
            found[v["predictors"]] = [predictor_name(v["residency"], *training) for training in trainings]
    return found


def predictor_name(residency: str, budget: float, training: int) -> str:
    """The folder of one that chapter 2 trains. training: 0, and above where it trains several for each budget."""
    return f"{residency}-{budget:g}" + (f"-seed{training}" if training else "")


def wanted_predictors(notebook: Path, values: dict) -> list[Path]:
    """Folders of trained predictors that a chapter reads: paths whose last part may be a pattern."""
    v = {**defaults(notebook), **values}
    if v.get("draw"):
        return []
    paths = [line["predictor"] for line in v.get("ablations", []) if "predictor" in line]
    paths += [v["predictor"]] if "predictor" in v else []
    patterns = [f"{start}*" for start in (v["prefix"], *v["others"].values())] if "prefix" in v else []
    patterns += v["patterns"] if v.get("patterns") and v["predictors"] else []
    return [Path(path) for path in paths] + [Path(v["predictors"]) / pattern for pattern in patterns]


def reads(notebook: Path, values: dict, coming: Iterable[str]) -> bool:
    """Whether a chapter reads predictors that are still to be trained into one of these folders."""
    return any(path.parent == Path(folder) for path in wanted_predictors(notebook, values) for folder in coming)


def predictors_of(notebook: Path, values: dict, coming: dict[str, list[str]] | None = None) -> list[Path]:
    """The predictors that a chapter reads. Raises FileNotFoundError if one is missing and not `coming` either."""
    found = []
    for path in wanted_predictors(notebook, values):
        trained = [path.parent / name for name in (coming or {}).get(str(path.parent), [])]
        there = [*(ROOT / path.parent).glob(path.name), *(ROOT / folder for folder in trained if folder.match(path.name))]
        if not there:
            raise FileNotFoundError(f"{notebook.stem}: no predictor {path}: run chapter 02 first, with the same profile")
        found += there
    return sorted(set(found))
