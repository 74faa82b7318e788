"""How well the pocket LLaVA sees and describes: the bars that it must reach before the study uses it.

    python -m study.quality            # 1,000 unseen scenes, both cores, minutes
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

import dyrate
from dyrate.atomic import write_whole
from dyrate.generation import answer_examples
from study.caption_metrics import cider
from study.examples import SceneExample, examples
from study.intervals import bootstrap
from study.pocket.language import EASY_KINDS
from study.scores import slot_scores

BARS = {
    "cider_short": 4.5, "slot_object": 0.95, "slot_colour": 0.97, "slot_count": 0.95, "slot_place": 0.97,
    "qa_count": 0.90, "qa_colour": 0.95, "qa_place": 0.95, "qa_relation": 0.85, "qa_existence": 0.90, "qa_reading": 0.80,
}  # fmt: skip
SLOTS = ("object", "colour", "count", "place")


def measure(model, processor, n: int, *, split: str = "test", batch_size: int = 50) -> dict[str, dict]:
    """Every bar on `n` scenes of a split, each {"value", "low", "high", "n"}; intervals resample scenes."""

    def answered(task: str) -> list[tuple[SceneExample, str]]:
        prompts = examples("pocket", n, tasks=[task], split=split)
        batches = answer_examples(model, processor, prompts, batch_size=batch_size, max_new_tokens=100, progress=True)
        return [pair for batch, _, answers in batches for pair in zip(batch, answers.texts, strict=True)]

    captions = answered("caption")
    measured = {"cider_short": bootstrap(cider([text for _, text in captions], [e.references for e, _ in captions]))}
    right = [slot_scores(e.scene, text) for e, text in answered("description")]
    sums = np.array([[*r.sum(0), len(r)] for r in right])
    shares = bootstrap(sums, of_means=lambda x: x[..., :4] / x[..., 4:])
    for i, slot in enumerate(SLOTS):
        measured[f"slot_{slot}"] = {k: float(shares[k][i]) for k in ("value", "low", "high")} | {"n": shares["n"]}
    for kind in EASY_KINDS:
        measured[f"qa_{kind}"] = bootstrap([text == e.references[0] for e, text in answered(f"qa_{kind}")])
    return measured


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--n", type=int, default=1000, help="scenes")
    parser.add_argument("--split", default="test", help="validation while choosing, test once")
    parser.add_argument("--out", type=Path, default=Path("data/results/pocket/pocket_quality.json"))
    given = parser.parse_args(argv)
    measured = measure(*dyrate.load(given.model), given.n, split=given.split)
    print(f"{'':14}{'bar':>6}{'value':>8}   95 % interval")
    for name, bar in BARS.items():
        one = measured[name]
        verdict = "" if one["value"] >= bar else "  MISSED"
        print(f"{name:14}{bar:6.2f}{one['value']:8.3f}   {one['low']:.3f} to {one['high']:.3f}{verdict}")
    write_whole(given.out, json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
