"""Chapter 9, does it hold on another model? Drawn from the reference rows of three laboratories; nothing is measured here.

pocket-dropped and pocket-plain are twins that differ in one thing: whether image tokens were dropped at random in training.
smol has a language model of real words inside, and was never trained with dropping.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pandas as pd

from dyrate.strategies import STRATEGIES
from study.book import NUMBER, ROOT, Chapter
from study.chapters.attention import MEASURES
from study.compared import METHODS, RETENTIONS
from study.intervals import bootstrap, bootstrap_crossed, in_words
from study.quality import BARS

LABORATORIES = ("pocket-dropped", "pocket-plain", "smol")
TRAINED = {
    "pocket-dropped": "trained with random dropping", "pocket-plain": "the same, trained without", "smol": "SmolLM2-135M inside",
}  # fmt: skip
SMOL_BARS = {
    "cider_short": 4.5, "slot_object": 0.90, "slot_colour": 0.95, "slot_count": 0.90, "slot_place": 0.90,
    **{bar: 0.85 for bar in BARS if bar.startswith("qa_")},
}  # fmt: skip
TASK, RETENTION = "description", 0.25  # of the headline
PUBLISHED = [name for name in METHODS if not STRATEGIES[name].control and name != "FastVRerank"]
MOVES = 0.05  # a task whose score falls by less than this at a tenth of the tokens does not tell methods apart


@dataclass(eq=False)
class Laboratory:
    """The reference rows of one model. about: how they were measured; parts: `scored` rows by part of `study.reference`."""

    name: str
    about: dict
    folder: Path
    parts: dict[str, pd.DataFrame] = field(default_factory=dict)

    def has(self, part: str) -> bool:
        """Whether this part was measured."""
        return part in self.parts or (self.folder / f"reference_{part}.csv.gz").exists()

    def rows(self, part: str) -> pd.DataFrame:
        if part not in self.parts:
            self.parts[part] = pd.read_csv(self.folder / f"reference_{part}.csv.gz")
        return self.parts[part]

    def scores(self, part: str, task: str, **where) -> pd.Series:
        """Score by sample, under the condition that `where` (columns and their values) tells."""
        rows = self.rows(part)
        rows = rows[rows.task == task]
        for column, value in where.items():
            rows = rows[rows[column] == value]
        if rows.empty:
            raise ValueError(f"{self.name}: no reference rows of {task} with {where}")
        return rows.set_index("sample").score

    def difference(self, part: str, task: str, one: dict, other: dict) -> dict:
        """Paired difference in score between two conditions, with its interval."""
        return bootstrap((self.scores(part, task, **one) - self.scores(part, task, **other)).dropna())


def read(folder: str, names: Sequence[str] = LABORATORIES) -> tuple[Laboratory, ...]:
    """The laboratories with reference rows below a folder, relative to the repository. Raises FileNotFoundError without."""
    return tuple(Laboratory(*of) for of in records(folder, names, "reference"))


def records(folder: str, names: Sequence[str], program: str) -> list[tuple[str, dict, Path]]:
    """Name, record and folder of each laboratory that `python -m study.<program>` measured below a folder of the repository.

    Raises FileNotFoundError that says how to measure the first one without.
    """
    paths = {name: ROOT / folder / name / f"{program}.json" for name in names}
    for name, path in paths.items():
        if not path.exists():
            raise FileNotFoundError(f"no {path}: `python -m study.{program}` measures {name}, see its --help")
    return [(name, json.loads(path.read_text()), path.parent) for name, path in paths.items()]


def bars(laboratories: tuple[Laboratory, ...]) -> pd.DataFrame:
    """What each model reaches unpruned on unseen scenes, beside its bar: one row a measure and laboratory."""
    rows = []
    for lab in laboratories:
        unpruned = lab.rows("unpruned")
        described = unpruned[unpruned.task == TASK]
        for name, bar in (SMOL_BARS if lab.name == "smol" else BARS).items():
            if name.startswith("slot_"):
                slot = described[["groups", name.removeprefix("slot_")]].to_numpy(float)
                measured = bootstrap(slot, of_means=lambda x: x[..., 1] / x[..., 0])
            else:
                task = "caption" if name == "cider_short" else name
                measured = bootstrap(lab.scores("unpruned", task))
            rows.append({"laboratory": lab.name, "measure": name, **measured, "bar": bar, "met": measured["value"] >= bar})
    return pd.DataFrame(rows)


def bars_shown(table: pd.DataFrame) -> pd.DataFrame:
    """`bars` as a table for the page: a column for each laboratory."""
    told = {True: "", False: " missed"}
    text = [f"{r.value:.2f} ({r.low:.2f} to {r.high:.2f}); bar {r.bar:.2f}{told[r.met]}" for r in table.itertuples()]
    shown = table.assign(text=text).pivot(index="measure", columns="laboratory", values="text")
    return shown.loc[list(BARS), list(dict.fromkeys(table.laboratory))].reset_index()


@cache
def needs(laboratories: tuple[Laboratory, ...]) -> pd.DataFrame:
    """Score of each task as a share of the unpruned one: with a tenth of the tokens, with no image, with another picture."""
    rows = []
    for lab in laboratories:
        for task in lab.rows("needs_image").task.unique():
            full = lab.scores("needs_image", task, method="Full").mean()
            row = {"laboratory": lab.name, "task": task, "unpruned": full}
            row["a tenth at random"] = lab.scores("needs_image", task, method="RandomPrune").mean()
            row["no image"] = lab.scores("needs_image", task, method="no image").mean()
            row["another picture"] = lab.scores("other_picture", task).mean()
            rows.append(row)
    return pd.DataFrame(rows)


def telling(table: pd.DataFrame, laboratory: str) -> tuple[list[str], list[str], list[str]]:
    """Tasks that tell methods apart, those that a tenth of the tokens answers as well, and those that the model cannot do."""
    rows = table[table.laboratory == laboratory]
    unable = rows[rows.unpruned - rows["another picture"] < 0.1]
    able = rows.drop(unable.index)
    moves = able["a tenth at random"] < (1 - MOVES) * able.unpruned
    return list(able[moves].task), list(able[~moves].task), list(unable.task)


@cache
def scan(laboratories: tuple[Laboratory, ...], task: str = TASK) -> pd.DataFrame:
    """FastV minus random pruning by first pruned layer: paired differences, and both scores."""
    rows = []
    for lab in laboratories:
        measured = lab.rows("layers")
        pairs = measured[(measured.method == "FastV") & (measured.task == task)][["budget", "first_pruned_layer"]]
        for budget, layer in pairs.drop_duplicates().itertuples(index=False):
            one, other = ({"method": m, "budget": budget, "first_pruned_layer": layer} for m in ("FastV", "RandomPrune"))
            row = {"laboratory": lab.name, "retention": budget, "layer": layer, "depth": layer / lab.about["layers"]}
            row |= {name: lab.scores("layers", task, **which).mean() for name, which in (("FastV", one), ("random", other))}
            rows.append(row | lab.difference("layers", task, one, other))
    return pd.DataFrame(rows)


@cache
def against_random(laboratories: tuple[Laboratory, ...], task: str = TASK, retention: float = RETENTION) -> pd.DataFrame:
    """Each method minus random pruning at one retention ratio, with its score, measured retention and computation.

    macs_share: the decoder's multiply-accumulates, prefill and decode, relative to no pruning.
    """
    rows = []
    for lab in laboratories:
        base = {"method": "RandomPrune", "budget": retention}
        for method in METHODS:
            one = {"method": method, "budget": retention}
            measured = lab.rows("methods")
            mine = measured[(measured.task == task) & (measured.method == method) & (measured.budget == retention)]
            if mine.empty:  # a reference run may ask fewer tasks or budgets
                continue
            row = {"laboratory": lab.name, "method": method, "published": method in PUBLISHED, "score": mine.score.mean()}
            row |= {"retention": mine.retention.mean(), "macs_share": _decoder(mine) / _decoder(measured[_full(measured, task)])}
            rows.append(row | lab.difference("methods", task, one, base))
    return pd.DataFrame(rows)


def _full(rows: pd.DataFrame, task: str) -> pd.Series:
    return (rows.task == task) & (rows.method == "Full")


def _decoder(rows: pd.DataFrame) -> float:
    return (rows.prefill + rows.decode).mean()


def counted(table: pd.DataFrame, laboratory: str) -> tuple[int, int, int]:
    """Of the published methods in `against_random`: how many score above random pruning, below it, and neither."""
    rows = table[(table.laboratory == laboratory) & table.published]
    above, below = int((rows.low > 0).sum()), int((rows.high < 0).sum())
    return above, below, len(rows) - above - below


def verdicts(laboratories: tuple[Laboratory, ...]) -> pd.DataFrame:
    """Each finding on each model: what was compared, and the paired difference with its interval."""
    scanned, methods = scan(laboratories), against_random(laboratories)
    rows = []
    for lab in laboratories:
        of = methods[methods.laboratory == lab.name].set_index("method")
        mine = scanned[(scanned.laboratory == lab.name) & (scanned.retention == RETENTION)].set_index("layer")
        best = mine.value.idxmax()
        above, below, neither = counted(methods, lab.name)
        late = {"method": "FastVRerank", "budget": RETENTION}, {"method": "FastV", "budget": RETENTION}
        changes = attention(lab)
        rows += [
            {"finding": "FastV's ranking against random pruning, from layer 2", "laboratory": lab.name,
             "text": _said(mine.loc[2])},
            {"finding": "The same from the layer where it is worth most", "laboratory": lab.name,
             "text": f"layer {best} of {lab.about['layers']}: {_said(mine.loc[best])}"},
            {"finding": "Published methods against random pruning", "laboratory": lab.name,
             "text": f"{above} above, {below} below, {neither} neither, of {len(PUBLISHED)}"},
            {"finding": "Knowing the patches that show something (Oracle) against random pruning", "laboratory": lab.name,
             "text": _said(of.loc["Oracle"])},
            {"finding": "Dropped tokens re-selectable (FastVRerank) against evicted (FastV)", "laboratory": lab.name,
             "text": _said(lab.difference("methods", TASK, *late))},
            {"finding": "DyRate against the constant rate of its own mean retention", "laboratory": lab.name,
             "text": _said(compared.loc[TASK]) if len(compared := dynamic(lab).set_index("task")) else "not measured"},
            {"finding": "Attention to the image, last third of an answer against the first (deep layers)", "laboratory": lab.name,
             "text": "; ".join(f"{m.replace('_', ' ')} {_percent(changes.loc[m])}" for m in MEASURES)},
        ]  # fmt: skip
    return pd.DataFrame(rows)


@cache
def dynamic(lab: Laboratory) -> pd.DataFrame:
    """DyRate minus the constant rate of its own mean retention, by task, over samples and seeds; empty if none is trained."""
    if not (lab.folder / "reference_constants.csv.gz").exists():
        return pd.DataFrame(columns=["task", *NUMBER])
    rows = lab.rows("constants")
    result = []
    for task, of in rows[rows.method != "Full"].groupby("task", sort=False):
        scores = of.pivot(index="sample", columns=["method", "seed"], values="score")
        difference = (scores["DyRate"] - scores["Constant"]).dropna()
        means = of.groupby("method")[["retention", "score"]].mean()
        row = {"task": task, **bootstrap_crossed(difference.to_numpy())}
        row |= {"DyRate": means.score["DyRate"], "constant": means.score["Constant"]}
        result.append(row | {"retention": means.retention["DyRate"], "retention of constant": means.retention["Constant"]})
    return pd.DataFrame(result)


def attention(lab: Laboratory) -> pd.DataFrame:
    """How much each measure of attention (chapter 1) changes over an answer in the deep layers, by measure."""
    changes = pd.read_csv(lab.folder / "reference_attention.csv")
    return changes[changes.depth == "deep"].set_index("measure")


def _said(difference) -> str:
    mark = "higher" if difference["low"] > 0 else "lower" if difference["high"] < 0 else "no difference"
    return f"{mark} ({difference['value']:+.3f}, {difference['low']:+.3f} to {difference['high']:+.3f})"


def _percent(change) -> str:
    return f"{100 * change['value']:+.0f} % ({100 * change['low']:+.0f} to {100 * change['high']:+.0f})"


def verdicts_shown(table: pd.DataFrame) -> pd.DataFrame:
    """`verdicts` with a column for each laboratory."""
    shown = table.pivot(index="finding", columns="laboratory", values="text")
    return shown.loc[list(dict.fromkeys(table.finding)), list(dict.fromkeys(table.laboratory))].reset_index()


def confound(laboratories: tuple[Laboratory, ...]) -> str:
    """On which models random pruning beats the published methods: the sentence for every page that compares with it."""
    methods = against_random(laboratories)
    parts = []
    for lab in laboratories:
        above, below, _ = counted(methods, lab.name)
        of = methods[methods.laboratory == lab.name]
        random, n = of[of.method == "RandomPrune"].score.item(), of[of.published].n.min()
        about = f"{TRAINED[lab.name]}; random pruning {random:.2f}, n = {n:.0f}"
        parts.append(f"on {lab.name} ({about}) {below} score below it and {above} above")
    return (
        f"Of {len(PUBLISHED)} published methods at a retention ratio of {100 * RETENTION:.0f} % on {TASK}s (95 % intervals), "
        f"{', '.join(parts)}"
    )


def note(model: str, folder: str = "data/results") -> str:
    """What a page that compares with random pruning on this model must add; nothing but for those trained with dropping."""
    if model not in ("pocket", "pocket-dropped"):
        return ""
    return f" This model was trained with random dropping, which favours random pruning. {confound(read(folder))}."


def finding(laboratories: tuple[Laboratory, ...]) -> str:
    """Whether random pruning wins on every model, and what the choice of the first pruned layer is worth on the last."""
    last = laboratories[-1]
    scanned = scan((last,))
    at = scanned[scanned.retention == RETENTION].set_index("layer")
    best = at.value.idxmax()
    counts = {lab: counted(against_random(laboratories), lab.name) for lab in laboratories}
    wins = [lab.name for lab, (above, below, _) in counts.items() if below > above]
    loses = [lab.name for lab in counts if lab.name not in wins]
    start = f"Random pruning beats most published methods on {' and '.join(wins) or 'no model'}"
    start += f", and loses to most on {' and '.join(loses)}" if loses else ""
    each = ", ".join(
        f"{below} score below it and {above} above on {lab.name} ({TRAINED[lab.name]})"
        for lab, (above, below, _) in counts.items()
    )
    return (
        f"**{start}: of {len(PUBLISHED)} at a retention ratio of {100 * RETENTION:.0f} % on {TASK}s, {each}. What a ranking is "
        f"worth depends on the layer: on {last.name} FastV minus random pruning is {in_words(at.loc[2], '+.2f')} from layer 2 "
        f"on and {in_words(at.loc[best], '+.2f')} from layer {best} of {last.about['layers']} (right slots, 95 % intervals).**"
    )


def front_page(laboratories: tuple[Laboratory, ...]) -> str:
    """The front page's answer to which tokens stay: on which models the published rankings beat a random one."""
    changes = ", ".join(f"{_percent(attention(lab).loc['undiluted'])} on {lab.name}" for lab in laboratories)
    sides = [(lab, *counted(against_random(laboratories), lab.name)) for lab in laboratories]
    counts = "; ".join(f"{above} above and {below} below on {lab.name} ({TRAINED[lab.name]})" for lab, above, below, _ in sides)
    return (
        f"Which tokens stay? Of {len(PUBLISHED)} published methods at a retention ratio of {100 * RETENTION:.0f} %, {TASK}s, "
        f"against random pruning: {counts}. With the growing answer set aside, attention to the image changes over a {TASK} by "
        f"{changes}."
    )


def oracle(laboratories: tuple[Laboratory, ...]) -> str:
    """Where knowing the patches that show something helps, and what it says that it does not everywhere."""
    methods = against_random(laboratories)
    of = methods[methods.method == "Oracle"].set_index("laboratory")
    text = "Against random pruning: " + "; ".join(f"on {name} {_said(row)}" for name, row in of.iterrows())
    helps = of.low > 0
    if helps["pocket-plain"] and not helps["pocket-dropped"]:
        text += (
            ". The twins differ in the random dropping alone, so it is this training, not the pictures or the model's size, that "
            "makes a random choice as good as knowing the content: the model has learned to find what it needs in a random sample"
        )
    return text + "."


def record(chapter: Chapter, laboratories: tuple[Laboratory, ...]) -> None:
    """The chapter's headline numbers, sentences and tables."""
    tables = {"bars": bars(laboratories), "needs": needs(laboratories), "layers": scan(laboratories)}
    asked = [(task, x) for task in (TASK, "caption") for x in RETENTIONS]
    tables["methods"] = pd.concat([against_random(laboratories, task, x).assign(task=task, budget=x) for task, x in asked])
    for name, table in tables.items():
        chapter.table(f"09_laboratories_{name}.csv", table)
    methods = against_random(laboratories)
    for lab in laboratories:
        key = lab.name.replace("-", "_")
        for name in ("FastV", "Oracle"):
            row = methods[(methods.laboratory == lab.name) & (methods.method == name)].iloc[0]
            chapter.number(f"{key}_{name.lower()}_minus_random", row)
        above, below, _ = counted(methods, lab.name)
        chapter.number(f"{key}_above_random", above)
        chapter.number(f"{key}_below_random", below)
        moving, easy, unable = telling(tables["needs"], lab.name)
        chapter.text(f"{key}_tasks", _tasks_said(lab.name, moving, easy, unable))
    chapter.text("laboratories_finding", finding(laboratories))
    chapter.text("laboratories_oracle", oracle(laboratories))
    chapter.text("front_page", front_page(laboratories))
    early = methods[(methods.laboratory == laboratories[-1].name) & methods.published].sort_values("macs_share")
    shares = ", ".join(f"{row.method} {100 * row.macs_share:.0f} %" for row in early.itertuples())
    name = laboratories[-1].name
    chapter.text("laboratories_computation", f"At this retention ratio the decoder of {name} computes: {shares} of all.")
    chapter.text("laboratories_measured_on", measured_on(laboratories))
    missed = tables["bars"][~tables["bars"].met].groupby("laboratory", sort=False)
    said = [f"{name}: {', '.join(f'{r.measure} {r.value:.2f} of {r.bar:.2f}' for r in of.itertuples())}" for name, of in missed]
    chapter.text("laboratories_missed", "; ".join(said) or "none")
    off = methods[(methods.retention - RETENTION).abs() > 0.02]
    kept = [f"{row.method} kept {100 * row.retention:.0f} % on {row.laboratory}" for row in off.itertuples()]
    chapter.text("laboratories_off_budget", f"Off this retention ratio: {', '.join(kept) or 'none'}.")


def measured_on(laboratories: tuple[Laboratory, ...]) -> str:
    """Models, sample count and device of the reference rows, for captions."""
    abouts = {lab.name: lab.about for lab in laboratories}
    sizes = [f"{name}: {a['parameters'] / 1e6:.0f} M parameters, {a['layers']} layers" for name, a in abouts.items()]
    n, device = laboratories[0].about["n"], laboratories[0].about["device"]
    others = [f"; {part} of {name}: {of}" for name, a in abouts.items() for part, of in a.get("devices", {}).items()]
    where = f"float32 on an {device}{''.join(others)}"
    return f"{'; '.join(sizes)}; {n} unseen scenes a task ({4 * n} for the bars), greedy, {where}"


def _tasks_said(name: str, moving: list[str], easy: list[str], unable: list[str]) -> str:
    def listed(tasks: list[str]) -> str:
        return ", ".join(task.replace("_", " ") for task in tasks) or "none"

    text = f"On {name} a tenth of the tokens at random costs score on {listed(moving)}; it answers as well on {listed(easy)}"
    return text + (f"; the model itself cannot do {listed(unable)}." if unable else ".")
