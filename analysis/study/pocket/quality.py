"""How well the pocket LLaVA sees and speaks: the bars that it must reach before the study stands on it.

python -m study.pocket.quality            # 1,000 unseen scenes, both cores, minutes
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

import dyrate
from study.examples import examples
from study.answers import answers
from dyrate.atomic import write_whole
from study.intervals import bootstrap, cider
from study.pocket.language import QUESTION_KINDS, read_description
from study.pocket.scenes import Scene

BARS = {
    "cider_short": 4.5, "slot_object": 0.95, "slot_colour": 0.97, "slot_count": 0.95, "slot_place": 0.97,
    "qa_count": 0.90, "qa_colour": 0.95, "qa_place": 0.95, "qa_relation": 0.85, "qa_existence": 0.90, "qa_reading": 0.80,
}  # fmt: skip
SLOTS = ("object", "colour", "count", "place")


def slot_scores(scene: Scene, text: str) -> np.ndarray:
    """Which slots a description got right: (group, 4) of 0 or 1 for object, colour, count, place.

    Each group of the scene is matched to the not yet matched group of the text that shares most slots with it, best
    matches first; a group that the text leaves out has every slot wrong.
    """
    said = read_description(text)
    truth = [(g.thing, g.colour, g.count, g.place) for g in scene.groups]
    told = [(s["thing"], s["colour"], s["count"], s["place"]) for s in said]
    right = np.zeros((len(truth), 4))
    agree = [[np.array([a == b for a, b in zip(t, s, strict=True)], float) for s in told] for t in truth]
    pairs = sorted(((agree[i][j].sum(), -i, -j) for i in range(len(truth)) for j in range(len(told))), reverse=True)
    done_i, done_j = set(), set()
    for _, i, j in pairs:
        if -i not in done_i and -j not in done_j:
            right[-i] = agree[-i][-j]
            done_i.add(-i)
            done_j.add(-j)
    return right


def measure(model, processor, n: int, *, split: str = "test", batch_size: int = 50) -> dict[str, dict]:
    """Every bar on `n` scenes of a split, each {"value", "low", "high", "n"}; intervals resample scenes."""
    settings = {"batch_size": batch_size, "max_new_tokens": 100}
    found = {}
    captions = answers(model, processor, examples("pocket", n, split=split), **settings)
    found["cider_short"] = bootstrap(cider([text for _, text in captions], [e.references for e, _ in captions]))
    told = answers(model, processor, examples("pocket", n, tasks=["description"], split=split), **settings)
    right = [slot_scores(e.scene, text) for e, text in told]
    sums = np.array([[*r.sum(0), len(r)] for r in right])
    shares = bootstrap(sums, lambda x, axis: x.sum(axis)[:4] / x.sum(axis)[4])
    for i, slot in enumerate(SLOTS):
        found[f"slot_{slot}"] = {k: float(shares[k][i]) for k in ("value", "low", "high")} | {"n": shares["n"]}
    for kind in QUESTION_KINDS:
        asked = answers(model, processor, examples("pocket", n, tasks=[f"qa_{kind}"], split=split), **settings)
        found[f"qa_{kind}"] = bootstrap([text == e.references[0] for e, text in asked])
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--n", type=int, default=1000, help="scenes")
    parser.add_argument("--split", default="test", help="validation while choosing, test once")
    parser.add_argument("--out", type=Path, default=Path("data/results/pocket/pocket_quality.json"))
    given = parser.parse_args(argv)
    found = measure(*dyrate.load(given.model), given.n, split=given.split)
    print(f"{'':14}{'bar':>6}{'value':>8}   95 % interval")
    for name, bar in BARS.items():
        f = found[name]
        verdict = "" if f["value"] >= bar else "  MISSED"
        print(f"{name:14}{bar:6.2f}{f['value']:8.3f}   {f['low']:.3f} to {f['high']:.3f}{verdict}")
    write_whole(given.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
