"""What a perfect controller could gain, measured once for a laboratory; its chapter draws from what is written.

python -m study.headroom measure --model pocket-plain --n 200 --out data/results/pocket-plain    # a GPU: a minute or two
python -m study.headroom predictors --folder data/results/pocket-plain --predictors data/pocket-plain/dyrate   # later ones
python -m study.headroom report --folder data/results/pocket-plain                                # headroom.json
python -m study.headroom confirm --folder data/results/pocket-plain --out build/headroom-answers  # generates; a GPU: minutes
python -m study.headroom score --from build/headroom-answers --folder data/results/pocket-plain   # needs Java, no model
"""

from __future__ import annotations

import argparse
from pathlib import Path

from study.headroom.confirm import BUDGETS, confirm, score
from study.headroom.measure import TASKS, measure, measure_predictors
from study.headroom.rankings import RANKINGS
from study.headroom.report import report
from study.profiles import ROOT


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m study.headroom", description=__doc__.split("\n")[0])
    subparsers = parser.add_subparsers(dest="verb", required=True)
    measuring = subparsers.add_parser("measure", help="teacher-forced losses of the library on every answer")
    measuring.add_argument("--model", required=True, help="a laboratory: pocket-plain, pocket-dropped, smol, or a folder")
    measuring.add_argument("--n", type=int, default=100, help="answers a task")
    measuring.add_argument("--out", type=Path, required=True)
    measuring.add_argument("--layer", type=int, default=2, help="first pruned layer")
    measuring.add_argument("--source", default="laboratories", help="of scenes: laboratories, or pocket for its model")
    measuring.add_argument("--tasks", nargs="+", default=TASKS)
    measuring.add_argument("--rankings", nargs="+", default=RANKINGS, choices=RANKINGS)
    measuring.add_argument("--predictors", type=Path, help="trained ones (default: the model's own, if it has some)")
    measuring.add_argument("--store", type=Path, default=Path("build/headroom"), help="finished parts")
    measuring.add_argument("--batch-size", type=int, default=100)
    adding = subparsers.add_parser("predictors", help="losses of predictors that were trained later, on the same answers")
    adding.add_argument("--predictors", type=Path, required=True, help="a folder of trained ones")
    adding.add_argument("--rankings", nargs="+", default=(), choices=RANKINGS, help="default: the library's")
    adding.add_argument("--store", type=Path, default=Path("build/headroom"), help="finished parts")
    adding.add_argument("--batch-size", type=int, default=100)
    reporting = subparsers.add_parser("report", help="headroom.json, from measured losses")
    confirming = subparsers.add_parser("confirm", help="answers under the best schedules, from measured losses")
    confirming.add_argument("--n", type=int, default=100, help="answers a task")
    confirming.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="of the schedules")
    confirming.add_argument("--predictors", type=Path, help="a folder of trained ones, to answer too")
    confirming.add_argument("--out", type=Path, required=True)
    confirming.add_argument("--store", type=Path, default=Path("build/answers"), help="finished batches")
    confirming.add_argument("--batch-size", type=int, default=100)
    scoring = subparsers.add_parser("score", help="score answers of confirm")
    scoring.add_argument("--from", dest="source", type=Path, required=True)
    for verb in (adding, reporting, confirming, scoring):
        verb.add_argument("--folder", type=Path, required=True, help="of the measured losses")
    for verb in (adding, confirming, scoring):
        verb.add_argument("--layer", type=int, default=2, help="first pruned layer")
    for verb in (confirming, scoring):
        verb.add_argument("--add", action="store_true", help="to the answers that are scored in FOLDER: those that it lacks")
        verb.add_argument("--residency", default="evict", choices=("evict", "mask"))
    given = vars(parser.parse_args(argv))
    verbs = {"measure": _measure, "predictors": measure_predictors, "report": report, "confirm": confirm, "score": score}
    verbs[given.pop("verb")](**given)


def _measure(model: str, predictors: Path | None, **given) -> None:
    own = ROOT / "data" / model / "dyrate"
    measure(model, predictors=predictors or (own if own.is_dir() else None), **given)


if __name__ == "__main__":
    main()
