"""What the explorer's traces say together: is a group of things described well whose patches are kept?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from study.explorer.stored import kept, mask, read_laboratories, read_scene
from study.intervals import bootstrap
from study.scores import SLOTS

LITTLE = 0.25  # the retention ratio up to which random pruning leaves many groups without a patch


def by_group(folder: Path) -> pd.DataFrame:
    """One row for each laboratory, scene, condition and group of the scene.

    patches: how many show the group; seen: those of them that are kept at the first token; right: share of its slots that the
    answer gets right, 0 where it leaves the group out.
    """
    rows = []
    for name, about in read_laboratories(folder).items():
        for scene in about["scenes"]:
            stored = read_scene(folder / name / f"{scene}.js")
            for condition in about["conditions"]:
                answer = stored["answers"][condition["label"]]
                first = kept(answer)[0]
                for i, group in enumerate(stored["groups"]):
                    patches = mask(group["patches"])
                    right = sum(ok for *_, meant, ok in answer["marks"] if meant == i) / len(SLOTS)
                    row = {"laboratory": name, "scene": scene, **condition, "group": i, "right": right}
                    rows.append(row | {"patches": patches.sum(), "seen": (patches & first).sum()})
    return pd.DataFrame(rows)


def seen_and_right(groups: pd.DataFrame) -> dict[str, dict]:
    """Share of right slots of groups with a kept patch ("some"), with none, and the difference; intervals resample scenes.

    groups: `by_group` of one laboratory. Under random pruning alone, where no answer and no attention decides what is kept.
    """
    rows = groups[(groups.method == "RandomPrune") & (groups.retention <= LITTLE)]
    sums = rows.assign(some=rows.seen > 0).groupby(["scene", "some"]).right.agg(["sum", "size"]).unstack(fill_value=0)
    columns = [(part, some) for some in (True, False) for part in ("sum", "size")]
    sums = sums.reindex(columns=columns, fill_value=0).to_numpy(float)

    def shares(x, axis):
        right_some, n_some, right_none, n_none = x.sum(axis)
        some, none = right_some / n_some, right_none / n_none
        return np.array([some, none, some - none])

    found = bootstrap(sums, shares)
    ends = {part: {k: float(found[k][i]) for k in ("value", "low", "high")} for i, part in enumerate(("some", "none", "apart"))}
    sizes = sums.sum(0)[[1, 3]]
    return {"some": ends["some"] | {"n": int(sizes[0])}, "none": ends["none"] | {"n": int(sizes[1])}, "apart": ends["apart"]}
