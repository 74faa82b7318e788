"""Chapter 8, errata: what the DyRate paper (arXiv:2501.14204) prints against what follows from its text, its tables and others.

One function an inconsistency. Each recomputes its evidence from the tables that it is given, so that it does not hold for
tables without the slip, and returns an `Erratum`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from dyrate.cost import LLAVA_7B, LLAVA_13B, Shape, decode_macs, layer_macs, prefill_macs, read_bytes
from dyrate.predictor import kept_counts, query_bias, rate_grid, rate_masks
from study.book import Chapter
from study.protocol import protocol_of, reported

TABLES = {  # of data/reported
    "table1": "table1_short_generation", "table2": "table2_caption_cider", "table3": "table3_efficiency",
    "table4a": "table4a_decoding", "table4b": "table4b_pruning_strategy", "others": "other_reports", "claims": "claims",
}  # fmt: skip
N_IMAGE = 576
TEXTS = range(201)  # lengths of the text, in tokens
ROUNDING = 0.05  # of a percentage with one digit
PRUNED = {"FastV K=2": (2, 0.5), "FastV K=3": (3, 0.5), "VTW K=16": (16, 0.0)}  # first pruned layer, retention; as printed
RTX_4090_BANDWIDTH = 1008e9  # bytes a second, by its data sheet
KINDS = EQUATION, PROTOCOL, PLACE, COST, TEXT = (
    "equation", "mixed protocols", "figure in a wrong place", "cost", "text against table",
)  # fmt: skip
CAPTIONS = ["nocaps_cider", "flickr30k_cider"]


@dataclass(frozen=True)
class Erratum:
    """One inconsistency.

    kind: one of KINDS; where: in the paper; evidence: what was computed; here: what this study does; holds: if confirmed.
    """

    kind: str
    where: str
    printed: str
    evidence: str
    here: str
    holds: bool


def read_tables() -> dict[str, pd.DataFrame]:
    """The reported tables that the errata are about, by the names in TABLES."""
    return {name: reported(file) for name, file in TABLES.items()}


def check(
    tables: dict[str, pd.DataFrame], *, score: Sequence[float], n_rates: int, text_tokens: Sequence[int], answer_tokens: int
) -> list[Erratum]:
    """Every inconsistency, in the order of the paper's pages. tables: `read_tables`; the rest: the notebook's parameters."""
    table1, table2, table3, table4a, table4b, others, claims = (tables[name] for name in TABLES)
    return [
        eq3(score, n_rates),
        eq6(),
        unpruned_of_another_harness(table1, others),
        mme_totals(table1, others),
        mislabelled_row(table1, others),
        mixed_visionzip(table1, others),
        swapped(table2, table4b, others),
        mixed_13b(table2, others),
        remaining(table3, claims, text_tokens),
        irreproducible_flops(table3),
        decode_saves_little(table3, text_tokens[1], answer_tokens),
        savings_ratio(table3, claims),
        latency(table3, claims),
        decoding_spread(table2, table4a, table4b, claims),
        ablation_elsewhere(table2, table3, table4b),
    ]


def listed(errata: Sequence[Erratum]) -> pd.DataFrame:
    """The errata as a table for the page."""
    return pd.DataFrame([
        {"where": e.where, "kind": e.kind, "printed": e.printed, "recomputed": e.evidence, "this study": e.here,
         "confirmed": "yes" if e.holds else "no"} for e in errata
    ])  # fmt: skip


def printed_masks(n_image: int, n_rates: int) -> np.ndarray:
    """Eq. 3 to the letter, (rate, rank): m_i^k = 1 if i <= (k - 1) N / n_rates, i counting from the best token."""
    rank, k = np.arange(1, n_image + 1), np.arange(1, n_rates + 1)
    return rank <= n_image / n_rates * (k[:, None] - 1)


def kept_by_rate(score: Sequence[float], n_rates: int, masks: np.ndarray | None = None) -> pd.DataFrame:
    """Image tokens that each rate keeps by Eq. 3 and as Eq. 1 describes. masks: (rate, image token); None: as printed."""
    n, rates = len(score), rate_grid(n_rates)
    everything = torch.ones(1, n, dtype=torch.bool)
    described = rate_masks(torch.tensor([list(score)]), everything, kept_counts(torch.tensor([n]), rates))[0]
    masks = printed_masks(n, n_rates) if masks is None else masks
    return pd.DataFrame({
        "k": range(1, n_rates + 1), "rate": rates.tolist(),
        "kept by Eq. 3": masks.sum(-1), "kept as described": described.sum(-1),
    })  # fmt: skip


def eq3(score: Sequence[float], n_rates: int, masks: np.ndarray | None = None) -> Erratum:
    """Eq. 3 keeps what it should drop: r = 0 would keep nothing."""
    table = kept_by_rate(score, n_rates, masks)
    kept, right = (table[column].tolist() for column in ("kept by Eq. 3", "kept as described"))
    return Erratum(
        EQUATION,
        "Eq. 3",
        "the mask of rate k keeps the first (k - 1) N / K tokens",
        f"of {len(score)} tokens and for {n_rates} rates it keeps {_listed(kept)}, where Eq. 1 promises {_listed(right)}",
        "keeps the N - floor(N r) best",
        kept != right,
    )


def dropped_attention(index: str) -> float:
    """What a dropped image token still receives from the last text token (equal scores), M_ij being m_i or m_j (Eq. 6)."""
    kept = torch.tensor([[[1.0, 1.0, 0.0]]])  # the third image token is dropped
    positions = torch.tensor([[1, 2, 3]])  # between two text tokens
    image, real = (torch.ones(1, n, dtype=torch.bool) for n in (3, 5))
    bias = query_bias(kept, positions, image, real, n_prompt=5)[0, 0]
    if index == "i":  # the row of the query's own token decides, whatever the key is; text rows are kept
        m = torch.ones(5).index_copy(0, positions[0], kept[0, 0])
        bias = torch.where(torch.eye(5, dtype=torch.bool), 0, (m[:, None] + 1e-24).log().expand(5, 5))
    return float(bias[-1].softmax(-1)[3])


def eq6(index: str = "i") -> Erratum:
    """Eq. 6 with the index of the query, as printed, lets other tokens attend to a dropped one."""
    left, right = dropped_attention(index), dropped_attention("j")
    return Erratum(
        EQUATION,
        "Eq. 6",
        "M with rows i and columns j takes m with index i",
        f"with equal scores the last of five tokens gives a dropped one {left:.2f} of its attention, with index j {right:.2f}",
        "takes m with index j, the key's",
        left > right,
    )


def other_figures(others: pd.DataFrame, report: str, method: str, benchmarks: Sequence[str]) -> np.ndarray:
    """Another report's figures for one method."""
    rows = others[(others.report == report) & (others.method == method)].set_index("benchmark").value
    return rows[list(benchmarks)].to_numpy(float)


def caption_rows(table2: pd.DataFrame, model: str) -> pd.DataFrame:
    """Table II's Nocaps and Flickr30k for one model, by method and K ("FastV K=3")."""
    rows = table2[table2.model == model]
    return rows[CAPTIONS].set_axis(rows.method.where(rows.K.isna(), rows.method + " K=" + rows.K.map("{:.0f}".format)))


def distance(table2: pd.DataFrame, others: pd.DataFrame, model: str, report: str, *, swap: bool) -> float:
    """Mean absolute difference, in CIDEr x 100, between Table II and a report on Nocaps and Flickr30k, where both have a row."""
    mine = caption_rows(table2, model)[CAPTIONS[::-1] if swap else CAPTIONS]
    theirs = others[(others.report == report) & (others.model == model)].method.unique()
    return float(np.mean([abs(mine.loc[m].to_numpy() - other_figures(others, report, m, CAPTIONS)) for m in theirs]))


def swapped(table2: pd.DataFrame, table4b: pd.DataFrame, others: pd.DataFrame) -> Erratum:
    """7B: Nocaps and Flickr30k have changed places, by FastV's lmms-eval figures and by the paper's own Table IV."""
    printed, changed = (distance(table2, others, "LLaVA-1.5-7B", "FastV repository", swap=s) for s in (False, True))
    control = distance(table2, others, "LLaVA-1.5-13B", "FastV Table 1", swap=True)
    flickr = set(table2[table2.model == "LLaVA-1.5-7B"].flickr30k_cider)
    mine = table2[(table2.model == "LLaVA-1.5-7B") & (table2.method == "DyRate")].iloc[0]
    again = [v for v in table4b.nocaps_cider[table4b.strategy.isin(["LLaVA", "FastV"])] if v in flickr]
    return Erratum(
        PLACE,
        "Tables II and III, 7B",
        f"DyRate: {mine.nocaps_cider:.2f} under Nocaps, {mine.flickr30k_cider:.2f} under Flickr30k",
        f"FastV's own figures lie {printed:.1f} CIDEr away, with the two columns swapped {changed:.1f} (13B, swapped: "
        f"{control:.1f}); {len(again)} of the 2 baselines that Table IV b prints for Nocaps stand under Flickr30k in Table II",
        f"reads {mine.flickr30k_cider:.2f} as Nocaps and {mine.nocaps_cider:.2f} as Flickr30k",
        changed < 1 < printed and len(again) == 2,
    )


def swap_rows(table2: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """7B's captions as printed and as FastV reports them, read as printed and with the two columns swapped."""
    rows, names = caption_rows(table2, "LLaVA-1.5-7B"), ("Nocaps", "Flickr30k")
    return pd.DataFrame([
        {"reading": reading, "case": f"{name}, {method.replace('Original', 'no pruning')}", "paper": paper, "report": report}
        for reading, order in (("as printed", CAPTIONS), ("swapped", CAPTIONS[::-1]))
        for method in ("Original", "FastV K=3")
        for name, paper, report in zip(
            names, rows.loc[method, order], other_figures(others, "FastV repository", method, CAPTIONS), strict=True
        )
    ])  # fmt: skip


def mixed_13b(table2: pd.DataFrame, others: pd.DataFrame) -> Erratum:
    """13B: FastV's rows are from FastV's paper, whose unpruned row is another than the one printed above them."""
    rows = caption_rows(table2, "LLaVA-1.5-13B")
    ours, pruned, dyrate = (rows.loc[m].to_numpy() for m in ("Original", "FastV K=3", "DyRate"))
    theirs = other_figures(others, "FastV Table 1", "Original", CAPTIONS)
    same = [np.array_equal(rows.loc[m], other_figures(others, "FastV Table 1", m, CAPTIONS)) for m in ("FastV K=2", "FastV K=3")]
    return Erratum(
        PROTOCOL,
        "Tables II and III, 13B",
        f"Nocaps: FastV (K=3) {pruned[0] - ours[0]:+.1f} and DyRate {dyrate[0] - ours[0]:+.1f} against no pruning",
        f"{sum(same)} of 2 FastV rows equal FastV's Table 1, whose unpruned row is {ours[0] - theirs[0]:.1f} (Nocaps) and "
        f"{ours[1] - theirs[1]:.1f} (Flickr30k) lower than the one printed: against its own, FastV changes Nocaps by "
        f"{pruned[0] - theirs[0]:+.1f}",
        "compares strategies on the same prompts in one harness only",
        all(same) and bool((abs(ours - theirs) > 1).all()),
    )


def mme_totals(table1: pd.DataFrame, others: pd.DataFrame) -> Erratum:
    """MME: two rows are perception and cognition together, the rest perception alone."""
    perception, cognition = (
        float(other_figures(others, "FastV repository", "Original", [f"mme_{k}"])[0]) for k in ("perception", "cognition")
    )
    mme = table1.set_index("model").mme
    rows = mme[["SparseVLM", "VisionZip"]]
    over = 100 * (rows / perception - 1)
    return Erratum(
        PROTOCOL,
        "Table I, MME",
        f"SparseVLM {rows.iloc[0]:.0f} and VisionZip {rows.iloc[1]:.0f} beside LLaVA's {mme['LLaVA-1.5']:.1f}",
        f"pruned models {over.min():.0f} to {over.max():.0f} % above the unpruned perception score ({perception:.1f}), but below "
        f"its perception and cognition together ({perception + cognition:.1f})",
        "names the variant of every reported figure",
        bool((rows > 1.05 * perception).all() and (rows < perception + cognition).all()),
    )


def unpruned_of_another_harness(table1: pd.DataFrame, others: pd.DataFrame) -> Erratum:
    """LLaVA's row is its own report's; the pruned rows below it were run in lmms-eval, without OCR tokens."""
    rows = table1.set_index("model")
    ran = rows.loc[["FastV", "VTW", "DyRate"]] - rows.loc["LLaVA-1.5"][["textvqa_em", "vizwiz_em", "sqa_i_em"]].astype(float)
    other = float(other_figures(others, "VisionZip Table 1", "Original", ["sqa_i_em"])[0])
    dyrate = rows.sqa_i_em["DyRate"]
    return Erratum(
        PROTOCOL,
        "Table I, LLaVA-1.5's row",
        "the pruned models beat the unpruned one on VizWiz and ScienceQA and fail on TextVQA",
        f"all three gain on VizWiz (up to {ran.vizwiz_em.max():+.1f}) and ScienceQA ({ran.sqa_i_em.min():+.1f} or more), all "
        f"lose on TextVQA ({ran.textvqa_em.max():+.1f} or worse: LLaVA's prompt holds OCR tokens, lmms-eval's does not); "
        f"VisionZip's Table 1 has ScienceQA {other:.1f} for the same unpruned model, above DyRate's {dyrate:.1f}",
        "has no such table; lists each row's protocol",
        bool((ran.vizwiz_em > 0).all() and (ran.sqa_i_em > 0).all() and (ran.textvqa_em < -10).all() and other > dyrate),
    )


def by_protocol(table1: pd.DataFrame, column: str, field: str, prefix: str = "") -> pd.DataFrame:
    """One column of Table I for the models with 336 pixels: model, value, protocol (the ledger's `field`)."""
    rows = table1[(table1.resolution == 336) & table1[column].notna()]
    protocol = protocol_of("table1_short_generation", column, field)[rows.index].str.removesuffix(", sum of scores")
    return pd.DataFrame({"model": rows.model, "value": rows[column], "protocol": prefix + protocol})


def mixed_columns(table1: pd.DataFrame, others: pd.DataFrame) -> tuple[dict[str, pd.DataFrame], dict[str, dict[str, float]]]:
    """Two columns of Table I `by_protocol`, and the unpruned LLaVA-1.5's figure under each protocol, both by column title."""
    mme, textvqa, ocr = "MME (sum of scores)", "TextVQA (VQA score)", "OCR in the prompt: "
    perception, cognition = other_figures(others, "FastV repository", "Original", ["mme_perception", "mme_cognition"])
    columns = {mme: by_protocol(table1, "mme", "metric"), textvqa: by_protocol(table1, "textvqa_em", "ocr", ocr)}
    unpruned = {
        mme: {"perception": perception, "perception and cognition": perception + cognition},
        textvqa: {f"{ocr}yes": float(table1.set_index("model").textvqa_em["LLaVA-1.5"])},
    }
    return columns, unpruned


def mislabelled_row(table1: pd.DataFrame, others: pd.DataFrame) -> Erratum:
    """The row named MiniGPT-4 holds BLIP-2's figures."""
    theirs = others[(others.report == "LLaVA-Mini Table 1") & (others.model == "BLIP-2")].set_index("benchmark").value
    ours = table1.set_index("model").loc["MiniGPT-4"][theirs.index].astype(float)
    same = int((ours == theirs).sum())
    return Erratum(
        PLACE,
        "Table I, MiniGPT-4",
        "a row of that name",
        f"{same} of {len(theirs)} figures are those that LLaVA-Mini's Table 1 lists for BLIP-2 with the same Vicuna-13B",
        "does not use the row",
        same == len(theirs),
    )


def mixed_visionzip(table1: pd.DataFrame, others: pd.DataFrame) -> Erratum:
    """VisionZip's row takes some figures from the training-free and some from the fine-tuned variant."""
    ours = table1.set_index("model").loc["VisionZip"]
    nearest = {}
    for benchmark in ("gqa_em", "sqa_i_em", "pope_acc", "mmb_acc", "mme"):
        off = {m: abs(other_figures(others, "VisionZip Table 1", m, [benchmark])[0] - float(ours[benchmark]))
               for m in ("VisionZip", "VisionZip tuned")}  # fmt: skip
        nearest[benchmark] = min(off, key=off.get)
    tuned = sum(m == "VisionZip tuned" for m in nearest.values())
    return Erratum(
        PROTOCOL,
        "Table I, VisionZip",
        "one row",
        f"{tuned} of {len(nearest)} figures are its fine-tuned variant's, {len(nearest) - tuned} its training-free one's "
        "(192 image tokens); TextVQA is cut off",
        "measures the training-free one",
        0 < tuned < len(nearest),
    )


def macs_left(shape: Shape, text: float, k: int, retention: float, mlp_matrices: int = 2, causal: bool = False) -> float:
    """Prefill multiply-accumulates left, in %, at a retention ratio of image tokens from layer k on."""

    def layer(n: float) -> float:
        return layer_macs(shape, n, n / 2 if causal else n, mlp_matrices)

    whole, rest = layer(text + N_IMAGE), layer(text + retention * N_IMAGE)
    return 100 * (k * whole + (shape.layers - k) * rest) / (shape.layers * whole)


def text_needed(shape: Shape, k: int, retention: float, percent: float, **count) -> float:
    """The length of the text at which `macs_left` is `percent`; NaN beyond 200 tokens."""
    left = [macs_left(shape, text, k, retention, **count) for text in TEXTS]
    return float(np.interp(percent, left, TEXTS, left=np.nan, right=np.nan))


def best_single_text(printed: dict[str, float], shape: Shape) -> float:
    """The least largest miss, in points, of any one text length, over the ways of counting that papers use.

    Two or three MLP matrices, all keys or the causal half, and K off by one either way.
    """
    return min(
        max(abs(macs_left(shape, text, k + off, r, mlp, causal) - printed[case]) for case, (k, r) in PRUNED.items())
        for mlp in (2, 3) for causal in (False, True) for off in (-1, 0, 1) for text in TEXTS
    )  # fmt: skip


def printed_percentages(table3: pd.DataFrame, model: str) -> dict[str, float]:
    """Table III's FLOPs in % of one model's pruned rows that have a K, by method and K ("FastV K=3")."""
    rows = table3[(table3.model == model) & table3.K.notna()]
    return {f"{row.method} K={row.K:.0f}": row.tflops_percent for row in rows.itertuples()}


def irreproducible_flops(table3: pd.DataFrame) -> Erratum:
    """No single text length gives the FLOPs column, and 13B repeats 7B's although it has more layers."""
    small, large = (printed_percentages(table3, f"LLaVA-1.5-{size}") for size in ("7B", "13B"))
    texts = [text_needed(LLAVA_7B, *PRUNED[case], small[case]) for case in PRUNED]
    miss = best_single_text(small, LLAVA_7B)
    vtw = [macs_left(LLAVA_13B, text, *PRUNED["VTW K=16"]) for text in texts if not np.isnan(text)]
    return Erratum(
        COST,
        "Table III, FLOPs",
        f"{', '.join(f'{small[c]:.1f} ({c})' for c in PRUNED)} %; 13B the same",
        f"they need {_listed([f'{t:.0f}' for t in texts])} text tokens; the best single length misses by {miss:.2f} points under "
        f"any way of counting that we tried (rounding: {ROUNDING}); 13B has {LLAVA_13B.layers} layers, so that its VTW would be "
        + (f"{min(vtw):.0f} to {max(vtw):.0f} %" if vtw else "another"),
        "counts each run's own tokens, and says how",
        miss > ROUNDING and small == large,
    )


def retention_needed(percent: float, k: int, text: float) -> float:
    """The retention ratio from layer k on at which the prefill costs `percent` of the whole (7B)."""
    ratios = np.linspace(0, 1, 1001)
    return float(np.interp(percent, [macs_left(LLAVA_7B, text, k, r) for r in ratios], ratios))


def macs_by_retention(texts: Sequence[int]) -> pd.DataFrame:
    """Prefill multiply-accumulates left by retention ratio (7B): case, retention, and the span over text lengths."""
    rows = []
    for k in (2, 3):
        for retention in np.linspace(0, 1, 51):
            left = [macs_left(LLAVA_7B, text, k, retention) for text in texts]
            rows.append({"case": f"from layer K = {k} on", "retention": retention, "low": min(left), "high": max(left)})
    return pd.DataFrame(rows)


def printed_costs(table3: pd.DataFrame) -> tuple[dict[str, float], pd.DataFrame]:
    """Levels and dots to compare `macs_by_retention` with: DyRate's FLOPs in both readings, and FastV's as printed (7B)."""
    left, printed = dyrate_left(table3), printed_percentages(table3, "LLaVA-1.5-7B")
    dots = pd.DataFrame([
        {"retention": PRUNED[name][1], "percent": printed[name], "name": name, "offset": offset}
        for name, offset in (("FastV K=3", (-62, 4)), ("FastV K=2", (8, -10)))
    ])  # fmt: skip
    return {f"Table III: {left:.2f} % left": left, f"if {left:.2f} % were saved": 100 - left}, dots


def dyrate_left(table3: pd.DataFrame) -> float:
    """DyRate's FLOPs in Table III, in %; the same for both models."""
    return float(table3[table3.method == "DyRate"].tflops_percent.iloc[0])


def remaining(table3: pd.DataFrame, claims: pd.DataFrame, texts: Sequence[int]) -> Erratum:
    """33.33 % is what is left; the text says that half of the tokens are dropped, which leaves more."""
    rows = table3[table3.model == "LLaVA-1.5-7B"].set_index("method").tflops_percent
    left = float(rows["DyRate"])
    half = claim(claims, "Sec. IV-B2", "image tokens")
    halved = [macs_left(LLAVA_7B, text, 3, 1 - half) for text in texts]
    needed = [retention_needed(left, k, text) for k in (2, 3) for text in texts]
    return Erratum(
        COST,
        "Table III, DyRate's FLOPs",
        f"{left:.2f} %, beside 100 for no pruning; the text: half of the tokens are dropped",
        f"{left:.2f} % is what is left, so that {100 - left:.2f} % is saved; half of the tokens from K = 3 on leave "
        f"{min(halved):.0f} to {max(halved):.0f} %; {left:.2f} % in the prefill needs {100 - 100 * max(needed):.0f} to "
        f"{100 - 100 * min(needed):.0f} % dropped",
        "says “left” or “saved”, prefill and decode apart",
        float(rows["Original"]) == 100 and min(halved) > left + 1,
    )


def decode_left(text: int, answer: int, k: int = 2) -> float:
    """Multiply-accumulates left, in %, if every image token is dropped from layer k on while decoding only, with a cache."""
    prefill = prefill_macs(LLAVA_7B, [text + N_IMAGE] * LLAVA_7B.layers)
    plain, pruned = (
        sum(decode_macs(LLAVA_7B, [text + t + N_IMAGE] * n + [text + t] * (LLAVA_7B.layers - n)) for t in range(1, answer))
        for n in (LLAVA_7B.layers, k)
    )
    return 100 * (prefill + pruned) / (prefill + plain)


def decode_saves_little(table3: pd.DataFrame, text: int, answer: int) -> Erratum:
    """A rate that rises while decoding cannot bring FLOPs to a third: linear layers cost the same whatever the cache holds."""
    left = decode_left(text, answer)
    printed = dyrate_left(table3)
    return Erratum(
        COST,
        "Table III and Sec. IV-B2",
        "FLOPs fall because rates rise during generation",
        f"with a cache, dropping every image token in every decode step leaves {left:.1f} % ({text} text, {answer} new tokens)",
        "reports memory and time of decoding beside FLOPs",
        left > printed + 50,
    )


def savings_ratio(table3: pd.DataFrame, claims: pd.DataFrame) -> Erratum:
    """The text announces baselines at 30 % and 50 % saved; the table has neither."""
    claimed = claims[(claims["where"] == "Sec. IV-C") & claims.claim.str.contains("saved")].value.to_numpy(float)
    saved = 100 - table3[table3.K.notna()].tflops_percent.to_numpy(float)
    off = float(min(abs(saved[:, None] - claimed).min(0)))
    return Erratum(
        TEXT,
        "Sec. IV-C",
        f"baselines at {_listed([f'{c:.0f}' for c in claimed])} % of the FLOPs saved",
        f"Table III's baselines save {saved.min():.1f} to {saved.max():.1f} %: at least {off:.1f} points from either",
        "compares at equal measured cost",
        off > 1,
    )


def latency(table3: pd.DataFrame, claims: pd.DataFrame) -> Erratum:
    """Table III's latency is shorter than reading the weights for the shortest answer, and does not follow its FLOPs."""
    shortest = claim(claims, "Sec. IV-C", "shortest")
    bound = 1000 * shortest * read_bytes(LLAVA_7B, [0] * LLAVA_7B.layers) / RTX_4090_BANDWIDTH
    rows = table3[table3.model == "LLaVA-1.5-7B"].set_index(["method", "K"])
    full = float(rows.xs("Original").latency_ms.iloc[0])
    costs = rows[["tflops_percent", "latency_ms"]]
    fewer = 100 * (1 - costs.xs("DyRate").iloc[0] / costs.loc[("FastV", 2)])
    return Erratum(
        COST,
        "Table III, latency",
        f"{full:.2f} ms unpruned, one RTX 4090",
        f"an answer of {shortest:.0f} tokens, the shortest of the text, reads the 16-bit weights as many times, which takes "
        f"{bound:.0f} ms at the card's bandwidth: this is no whole answer; DyRate has {fewer.tflops_percent:.0f} % fewer FLOPs "
        f"than FastV (K=2), and {fewer.latency_ms:.0f} % less latency",
        "times prefill and a decode step apart",
        full < bound,
    )


def ablation_elsewhere(table2: pd.DataFrame, table3: pd.DataFrame, table4b: pd.DataFrame) -> Erratum:
    """Neither variant of Table IV b is the paper's main result, and DP is FastV's score at FastV's cost."""
    rows = table4b.set_index("strategy")
    main = table2[(table2.model == "LLaVA-1.5-7B") & (table2.method == "DyRate")][CAPTIONS].to_numpy(float)[0]
    cost = float(table3[(table3.model == "LLaVA-1.5-7B") & (table3.method == "DyRate")].tflops_percent.iloc[0])
    variants = rows.loc[[name for name in rows.index if name.startswith("DyRate")]]
    hits = int((variants.nocaps_cider.isin(main) | (variants.flops_percent == cost)).sum())
    dp, fastv = rows.loc["DyRate (DP)"], rows.loc["FastV"]
    return Erratum(
        TEXT,
        "Table IV b",
        "FixedPrune and DepthPrune, the two ways to prune",
        f"{hits} of {len(variants)} have the cost ({cost}) or a score ({main[0]:.2f}, {main[1]:.2f}) of the main result, so its "
        f"variant is unknown; DP's CIDEr is FastV's {dp.nocaps_cider - fastv.nocaps_cider:+.2f}, at "
        f"{dp.flops_percent - fastv.flops_percent:+.1f} points of FLOPs",
        "measures both at equal cost",
        hits == 0,
    )


def decoding_spread(table2: pd.DataFrame, table4a: pd.DataFrame, table4b: pd.DataFrame, claims: pd.DataFrame) -> Erratum:
    """Table IV a: the best is top-k in the text and top_p in the table; greedy differs from the same greedy of Table IV b."""
    rows = table4a.set_index("strategy").nocaps_cider
    claimed = claim(claims, "Sec. IV-D2", "top_k")
    named = str(rows.idxmax())
    plain = float(table4b.set_index("strategy").nocaps_cider["LLaVA"])
    both = table2[table2.model == "LLaVA-1.5-7B"].set_index("method").flickr30k_cider  # Nocaps, see `swapped`
    return Erratum(
        TEXT,
        "Table IV a",
        f"the text: top_k = 6 is best with {claimed:.2f}; greedy {rows['Greedy']:.2f}",
        f"{claimed:.2f} stands beside {named}; greedy LLaVA has {plain:.2f} in Table IV b; the decodings differ by "
        f"{rows.max() - rows.min():.2f}, as much as DyRate from no pruning ({both['DyRate'] - both['Original']:.2f})",
        "gives every score its interval",
        rows.max() == claimed and "top_k" not in named and float(rows["Greedy"]) != plain,
    )


def claim(claims: pd.DataFrame, where: str, part: str) -> float:
    """The figure of the one claim of the text that stands at `where` and contains `part`."""
    (figure,) = claims[(claims["where"] == where) & claims.claim.str.contains(part)].value
    return float(figure)


def wins(table2: pd.DataFrame) -> tuple[int, int]:
    """In how many of Table II's columns DyRate is strictly best of its model's rows, and of how many."""
    best = 0
    for _, rows in table2.groupby("model"):
        values = rows.set_index("method")[[*CAPTIONS, "coco2017_cider"]]
        best += int((values.loc["DyRate"] > values.drop("DyRate").max()).sum())
    return best, 3 * table2.model.nunique()


def record(
    chapter: Chapter, tables: dict[str, pd.DataFrame], errata: Sequence[Erratum], text_tokens: Sequence[int], answer_tokens: int
) -> None:
    """The chapter's headline numbers and sentences. errata: of `check`."""
    table2, others = tables["table2"], tables["others"]
    row = table2[(table2.model == "LLaVA-1.5-7B") & (table2.method == "Original")].iloc[0]
    best, columns = wins(table2)
    left = dyrate_left(tables["table3"])
    numbers = {
        "printed_nocaps": row.nocaps_cider,
        "printed_flickr30k": row.flickr30k_cider,
        "distance_printed": distance(table2, others, "LLaVA-1.5-7B", "FastV repository", swap=False),
        "distance_swapped": distance(table2, others, "LLaVA-1.5-7B", "FastV repository", swap=True),
        "printed_left": left,
        "wins": best,
        "wins_of": columns,
        "decode_left": decode_left(text_tokens[1], answer_tokens),
        "answer_tokens": answer_tokens,
        "text_least": min(text_tokens),
        "text_most": max(text_tokens),
        "confirmed": sum(e.holds for e in errata),
        "checked": len(errata),
    }
    for key, value in numbers.items():
        chapter.number(key, value)
    chapter.text("errata_finding", finding(errata, left))


def finding(errata: Sequence[Erratum], left: float) -> str:
    """What the list is: how many slips were found, of which kinds, and how many their computation confirms.

    left: `dyrate_left`.
    """
    confirmed = [e.kind for e in errata if e.holds]
    kinds = ", ".join(f"{kind} {confirmed.count(kind)}" for kind in KINDS if kind in confirmed)
    counted = f"{len(confirmed)} of {len(errata)} are confirmed{f' ({kinds})' if kinds else ''}"
    return (
        f"**This is a list of slips in the DyRate paper (arXiv:2501.14204), found by computing its equations and tables again: "
        f"{counted}.** They are those that were looked for, not a sample of the paper's figures, and no model was run for them. "
        f"What matters most to a reader: for LLaVA-1.5-7B the columns Nocaps and Flickr30k are swapped, {left:.2f} % of the "
        "FLOPs is what is left and not what is saved, and several rows that stand together were made under different protocols."
    )


def _listed(values: Sequence) -> str:
    return ", ".join(str(v) for v in values[:-1]) + f" and {values[-1]}"
