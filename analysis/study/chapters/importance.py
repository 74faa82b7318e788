"""Chapter 11, is attention importance? Drawn from rows that `python -m study.importance` measured on each laboratory.

Importance is what reading an image token at some step is worth to the reference answer, from one layer on: see
`study.attribution`. Rankings are compared with it by rank, and a ranking's worth is what its score loses when it is made worse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from dyrate.strategies import STRATEGIES
from study.agreement import PARTS, RETENTION, spearman
from study.book import Chapter
from study.chapters.laboratories import LABORATORIES, records
from study.importance import EARLY, RANKINGS
from study.intervals import bootstrap, in_words

ATTENTION = {
    "prefill": "attention as the prompt ends", "each step": "attention summed over the steps",
    "one step": "attention of one step, with what it reads",
}  # fmt: skip
MAPS = {
    "importance": "importance", "FastV": "attention,\nprompt's end", "each step": "attention,\nwhole answer",
    "another wording": "importance,\nother wording",
}  # fmt: skip
PUBLISHED = [name for name in RANKINGS if not STRATEGIES[name].control]
OTHER_WORDING = "another wording"  # importance for another reference answer: what agreement can be hoped for


@dataclass(eq=False)
class Measured:
    """The rows of one laboratory. about: how they were measured, with the layer where FastV is worth most, `late`."""

    name: str
    about: dict
    folder: Path

    def rows(self, part: str) -> pd.DataFrame:
        """One of `answers`, `groups`, `ranks`, `noise`, `maps`."""
        return pd.read_csv(self.folder / f"importance_{part}.csv.gz", dtype={"order": str})

    @property
    def noisy(self) -> bool:
        """Whether answers under worse rankings were generated; the attribution alone takes a tenth of the time."""
        return (self.folder / "importance_noise.csv.gz").exists()

    @property
    def layers(self) -> list[int]:
        """The layers from which FastV prunes: its own, and the one where it is worth most."""
        return sorted({EARLY, self.about["late"]})


def read(folder: str, names: Sequence[str] = LABORATORIES) -> tuple[Measured, ...]:
    """The laboratories with rows below a folder, relative to the repository. Raises FileNotFoundError where they are missing."""
    return tuple(Measured(*of) for of in records(folder, names, "importance"))


# -- is it importance? -----------------------------------------------------------------------------------------------------


def checks(measured: Sequence[Measured]) -> pd.DataFrame:
    """Whether the attribution is importance, a row a laboratory.

    incomplete: by which share of it the attributions miss what the answer loses without the image. own, other, nothing: nats
    that an answer loses in the sentences about a group, and in all others, without its patches, and without as many that show
    nothing. alike: rank correlation of both measures over the groups of an answer.
    """
    rows = []
    for lab in measured:
        answers, groups = lab.rows("answers"), lab.rows("groups")
        early = answers[answers.layer == EARLY]
        miss = (early.attributed - (early.blind - early.loss)).abs() / (early.blind - early.loss)
        shown = groups[groups.group >= 0].groupby("sample")[["own", "other"]].mean()
        nothing = groups[groups.group < 0].set_index("sample").other
        alike = [
            spearman(of[["attributed"]].to_numpy().T, (of.own + of.other).to_numpy()[None])[0]
            for _, of in groups.groupby("sample")
        ]
        found = {"incomplete": miss, "own": shown.own, "other": shown.other, "nothing": nothing, "alike": alike}
        rows += [{"laboratory": lab.name, "measure": name, **bootstrap(values)} for name, values in found.items()]
    return pd.DataFrame(rows)


def checks_shown(table: pd.DataFrame) -> pd.DataFrame:
    """`checks` as a table for the page."""
    names = {
        "own": "own sentences, without a group's patches (nats)", "other": "other sentences, without them (nats)",
        "nothing": "whole answer, without as many patches that show nothing (nats)",
        "alike": "rank correlation of this loss with the attribution", "incomplete": "attribution misses, of all (share)",
    }  # fmt: skip
    shown = table.assign(text=[in_words(row) for _, row in table.iterrows()])
    shown = shown.pivot(index="measure", columns="laboratory", values="text").loc[
        list(names), list(dict.fromkeys(table.laboratory))
    ]
    return shown.rename(index=names).reset_index()


# -- does attention agree with it? -----------------------------------------------------------------------------------------


def agreement(measured: Sequence[Measured]) -> pd.DataFrame:
    """Rank correlation with importance: a row a laboratory, first pruned layer, ranking and part of the answer.

    depth: the layer as a share of the model's. captured: mean share of the importance in the quarter ranked first.
    """
    rows, keys = [], ["layer", "ranking", "part"]
    for lab in measured:
        for key, of in lab.rows("ranks").groupby(keys, sort=False):
            row = {"laboratory": lab.name, **dict(zip(keys, key, strict=True))}
            row |= {"depth": row["layer"] / lab.about["layers"], "captured": of.captured.mean()}
            rows.append(row | bootstrap(of.rho))
            if row["ranking"] == "each step":
                rows.append(row | {"ranking": "one step", "captured": np.nan} | bootstrap(of.rho_step))
    return pd.DataFrame(rows)


def thirds_shown(table: pd.DataFrame, measured: Sequence[Measured]) -> pd.DataFrame:
    """Of `agreement` the attention before the layers from which FastV prunes, by thirds of the answer, as a table."""
    rows = []
    for lab in measured:
        for layer in lab.layers:
            for ranking, name in ATTENTION.items():
                of = _of(table, lab.name, layer=layer, ranking=ranking).set_index("part")
                row = {"laboratory": lab.name, "first pruned layer": layer, "ranking": name}
                rows.append(row | {part: in_words(of.loc[part]) for part in PARTS[1:]})
    return pd.DataFrame(rows)


def rankings(table: pd.DataFrame) -> pd.DataFrame:
    """Of `agreement` all rankings against importance from layer EARLY on, for the whole answer, FastV's by its name."""
    rows = table[(table.layer == EARLY) & (table.part == "all") & ~table.ranking.isin(("one step", "sum of effects"))]
    return rows.assign(ranking=rows.ranking.replace({"prefill": "FastV", "each step": "attention, all steps"}))


def maps(lab: Measured) -> pd.DataFrame:
    """Importance and scores of each image token of some answers, to look at."""
    return lab.rows("maps")


# -- what is a ranking worth? ----------------------------------------------------------------------------------------------


def noise(measured: Sequence[Measured]) -> pd.DataFrame:
    """Mean score by laboratory, ranking, layer, retention ratio and order (share of exchanged tokens, or "reversed")."""
    rows = []
    for lab in _noisy(measured):
        keys = ["method", "layer", "budget", "order"]
        for key, of in lab.rows("noise").groupby(keys, sort=False, dropna=False):
            rows.append({"laboratory": lab.name, **dict(zip(keys, key, strict=True)), **bootstrap(of.score)})
    return pd.DataFrame(rows)


def worth(measured: Sequence[Measured]) -> pd.DataFrame:
    """What each ranking is worth: its score minus that with all tokens exchanged, paired, and as a share of its score."""
    rows = []
    for lab in _noisy(measured):
        for (method, layer, budget), scores in _bases(lab):
            pair = scores[["0.0", "1.0"]].to_numpy()
            row = {
                "laboratory": lab.name,
                "ranking": method,
                "layer": int(layer),
                "retention": budget,
                "score": pair[:, 0].mean(),
            }
            row |= {"random": pair[:, 1].mean(), "reversed": scores["reversed"].mean(), **bootstrap(pair[:, 0] - pair[:, 1])}
            rows.append(row | {"share": row["value"] / row["score"] if row["score"] else np.nan})
    return pd.DataFrame(rows)


def _noisy(measured: Sequence[Measured]) -> list[Measured]:
    return [lab for lab in measured if lab.noisy]


def _bases(lab: Measured) -> Iterator[tuple[tuple, pd.DataFrame]]:
    """Scores of each ranking that was made worse, (sample, order)."""
    rows = lab.rows("noise").dropna(subset=["order"])
    for key, of in rows.groupby(["method", "layer", "budget"], sort=False):
        yield key, of.pivot(index="sample", columns="order", values="score")


def by_agreement(measured: Sequence[Measured], agreed: pd.DataFrame) -> pd.DataFrame:
    """Scores by rank correlation with importance, at RETENTION: FastV's ranking and importance itself, made worse step by step.

    rho: exchanging a share of the tokens takes it down by that share, and reversing turns its sign. agreed: of `agreement`.
    """
    rows = noise(measured)
    rows = rows[(rows.budget == RETENTION) & rows.method.isin(("FastV", "importance"))].rename(columns={"method": "ranking"})
    own = [1.0 if r.ranking == "importance" else _fastv(agreed, r.laboratory, r.layer).value for r in rows.itertuples()]
    left = [-1.0 if order == "reversed" else 1 - float(order) for order in rows.order]
    return rows.assign(rho=np.multiply(own, left))


def beyond_agreement(measured: Sequence[Measured], agreed: pd.DataFrame) -> pd.DataFrame:
    """FastV's score minus that of importance made as bad as FastV's ranking is, paired: what the rank correlation leaves open."""
    rows = []
    for lab in _noisy(measured):
        scores = {key: of for key, of in _bases(lab) if key[2] == RETENTION}
        for layer in lab.layers:
            row = _fastv(agreed, lab.name, layer)
            known = scores["importance", layer, RETENTION].drop(columns="reversed").rename(columns=float).sort_index(axis=1)
            alike = [np.interp(1 - row.value, known.columns, of) for of in known.to_numpy()]
            difference = scores["FastV", layer, RETENTION]["0.0"] - alike
            rows.append({"laboratory": lab.name, "layer": layer, "rho": row.value, **bootstrap(difference)})
    return pd.DataFrame(rows)


def _fastv(agreed: pd.DataFrame, laboratory: str, layer: int) -> pd.Series:
    """The row of FastV's ranking before this layer in `agreement`."""
    return _of(agreed, laboratory, layer=layer, ranking="prefill", part="all").iloc[0]


def worth_shown(table: pd.DataFrame) -> pd.DataFrame:
    """`worth` as a table for the page."""
    return pd.DataFrame({
        "laboratory": table.laboratory, "ranking": [f"{r.ranking}, layer {r.layer}" for r in table.itertuples()],
        "retention ratio": table.retention, "score": table.score, "all exchanged": table.random, "reversed": table.reversed,
        "worth": [in_words(row) for _, row in table.iterrows()],
        "share of the score": [f"{100 * share:.0f} %" if share > 0 else "" for share in table.share],
    })  # fmt: skip


# -- in words --------------------------------------------------------------------------------------------------------------


def finding(measured: Sequence[Measured], agreed: pd.DataFrame, worths: pd.DataFrame) -> str:
    """Is attention importance, and how much of FastV's score is its ranking?"""
    hoped = [_of(agreed, lab.name, ranking=OTHER_WORDING, part="all").value.iloc[0] for lab in measured]
    fastv = [_fastv(agreed, lab.name, EARLY).value for lab in measured]
    worth_of = []
    for lab in _noisy(measured):
        score = _of(worths, lab.name, ranking="FastV", layer=EARLY, retention=RETENTION).iloc[0]
        worth_of.append(f"{in_words(score, '+.2f')} of {score.score:.2f} on {lab.name}")
    return (
        f"**Is attention importance? {_verdict(measured, agreed)}: before layer {EARLY}, where FastV prunes, its attention and "
        f"what image tokens are worth to the answer have a rank correlation of {_range(fastv)}, where two wordings of one answer "
        f"agree to {_range(hoped)}.** What FastV's ranking adds to its score, against all ranks exchanged at random: "
        f"{', '.join(worth_of) or 'not measured'} (right slots, retention ratio {100 * RETENTION:.0f} %, "
        f"{measured[0].about['n']} descriptions a model, 95 % intervals)."
    )


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _verdict(measured: Sequence[Measured], agreed: pd.DataFrame) -> str:
    """Whether FastV's attention agrees with importance everywhere, and as well as importance agrees with itself."""
    less = []
    for lab in measured:
        hoped = _of(agreed, lab.name, ranking=OTHER_WORDING, part="all").iloc[0]
        rows = [_fastv(agreed, lab.name, layer) for layer in lab.layers]
        if any(row.low <= 0 for row in rows):
            return "Not everywhere"
        less += [row.high < hoped.low for row in rows]
    return "In part" if any(less) else "As far as importance agrees with itself"


def rankings_said(measured: Sequence[Measured], agreed: pd.DataFrame) -> str:
    """Which published ranking agrees best with importance on each model."""
    parts, compared = [], rankings(agreed)
    for lab in measured:
        rows = _of(compared, lab.name).set_index("ranking").loc[list(PUBLISHED)]
        best = rows.value.idxmax()
        share = f"its first quarter has {100 * rows.loc[best].captured:.0f} % of the importance"
        parts.append(f"{best} {in_words(rows.loc[best])} on {lab.name} ({share})")
    return f"The published ranking that agrees best: {', '.join(parts)}."


def beyond_shown(beyond: pd.DataFrame) -> pd.DataFrame:
    """`beyond_agreement` as a table for the page."""
    return pd.DataFrame({
        "laboratory": beyond.laboratory, "first pruned layer": beyond.layer, "rank correlation": beyond.rho,
        "FastV minus importance made as bad": [in_words(row, "+.2f") for _, row in beyond.iterrows()],
    })  # fmt: skip


def beyond_said(beyond: pd.DataFrame) -> str:
    """In how many settings FastV scores as well as importance made as bad as its ranking."""
    lower, higher = int((beyond.high < 0).sum()), int((beyond.low > 0).sum())
    return (
        f"At equal agreement FastV scores lower than importance made as bad in {lower} and higher in {higher} of {len(beyond)} "
        f"settings{': a rank correlation does not say all of a ranking' if lower + higher else ''}."
    )


def _of(table: pd.DataFrame, laboratory: str, **where) -> pd.DataFrame:
    rows = table[table.laboratory == laboratory]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    return rows


def tables_of(measured: Sequence[Measured]) -> dict[str, pd.DataFrame]:
    """The chapter's tables by name."""
    agreed = agreement(measured)
    return {
        "checks": checks(measured), "agreement": agreed, "noise": noise(measured), "worth": worth(measured),
        "beyond": beyond_agreement(measured, agreed),
    }  # fmt: skip


def record(chapter: Chapter, measured: Sequence[Measured], tables: dict[str, pd.DataFrame]) -> None:
    """The chapter's headline numbers, sentences and tables, `tables_of`."""
    agreed, worths = tables["agreement"], tables["worth"]
    for name, table in tables.items():
        chapter.table(f"{chapter.name}_{name}.csv", table)
    for lab in measured:
        key = lab.name.replace("-", "_")
        for layer in lab.layers:
            chapter.number(f"importance_{key}_fastv_{layer}", _fastv(agreed, lab.name, layer))
            if lab.noisy:
                of = _of(worths, lab.name, ranking="FastV", layer=layer, retention=RETENTION).iloc[0]
                chapter.number(f"importance_{key}_worth_{layer}", of)
    chapter.text("importance_finding", finding(measured, agreed, worths))
    chapter.text("importance_rankings", rankings_said(measured, agreed))
    chapter.text("importance_beyond", beyond_said(tables["beyond"]))
    chapter.text("importance_measured_on", _measured_on(measured))


def _measured_on(measured: Sequence[Measured]) -> str:
    sizes = [f"{lab.name}: {lab.about['parameters'] / 1e6:.0f} M parameters, {lab.about['layers']} layers" for lab in measured]
    about = measured[0].about
    return (
        f"{'; '.join(sizes)}; {about['n']} descriptions of unseen scenes, greedy, float32, seed 0 of the noise, {about['device']}"
    )
