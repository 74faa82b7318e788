"""Chapter 5, where the saving lands: multiply-accumulates, bytes and memory from shapes, and times that the bench measured.

All that is computed is of LLaVA-1.5-7B, and of 13B where a table says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from dyrate.cost import LLAVA_7B, LLAVA_13B, decode_macs, kv_bytes, prefill_macs, read_bytes, tower_macs
from dyrate.seen import kept_count
from study.bench.results import TABLE3_BARS, verdict
from study.bench.table3 import SHAPES
from study.book import Chapter

IMAGE = LLAVA_7B.patches - 1  # image tokens
LAYERS = LLAVA_7B.layers
ANSWER = 64  # tokens of an answer, where one length has to be taken
EXAMPLES = 200  # prepared for training, in the table of memory
PRINTED = {"k2": ("FastV", 2), "k3": ("FastV", 3), "vtw": ("VTW", 16)}  # lines of Table III that a prompt length explains
DYRATE_BUDGET = 0.33  # the bench's that is nearest to what the paper prints
LABELS = {
    "keep1_over_plain": "keep all / plain generate (time)",
    "prefill_realised_r50": "prefill, R = .5",
    "prefill_realised_r90": "prefill, R = .9",
    "decode_b8_r90_realised": "decode, batch 8, R = .9",
    "decode_b64_r90_realised": "decode, batch 64, R = .9",
    "decode_b64_dyrate_realised": "decode, batch 64, DyRate at a forced rate",
    "decode_b8_r90_each_step_realised": "the same, a new rate each step",
    "decode_b8_dyrate_realised": "decode, batch 8, DyRate at a forced rate",
    "decode_b8_r90_mask_realised": "decode, batch 8, R = .9, masked",
    "deciding_share": "deciding / decode step (time)",
    "pocket_step_over_plain": "a step at batch 1 / plain, pocket LLaVA (time)",
}
REALISED = (  # the finding's: in the prefill, and while decoding at a rate, under DyRate, and that beside the engine's cache
    "prefill_realised_r90", "decode_b8_r90_realised", "decode_b8_dyrate_realised", "decode_b8_dyrate_realised_in_place",
)  # fmt: skip
COMMAND = "python -m study.bench prune --shape llava-1.5-7b --out data/results/<gpu>/bench.json"


def held(text: int, first_pruned_layer: int = LAYERS, retention: float = 0.0) -> list[int]:
    """Tokens in each layer where this share of the image tokens is kept from a layer on; without one, all are."""
    return [text + IMAGE] * first_pruned_layer + [text + kept_count(IMAGE, retention)] * (LAYERS - first_pruned_layer)


# -- computed from shapes --------------------------------------------------------------------------------------------------


def share_by_text(reported: pd.DataFrame, lengths: Sequence[int] = range(10, 121)) -> pd.DataFrame:
    """Multiply-accumulates of a prefill in percent of the unpruned one, by text tokens, two MLP matrices as FastV counts.

    reported: the paper's Table III, whose percentages (of 7B) stand beside.
    """
    lines, rows = reported[reported.model == "LLaVA-1.5-7B"], []
    for method, first in PRINTED.values():
        of_paper = lines[(lines.method == method) & (lines.K.astype(float) == first)].iloc[0]
        retention = 1 - float(of_paper.R)
        for text in lengths:
            pruned, whole = (prefill_macs(LLAVA_7B, tokens, 2) for tokens in (held(text, first, retention), held(text)))
            rows.append({"method": method, "first_pruned_layer": first, "retention": retention, "text": text,
                         "percent": 100 * pruned / whole, "reported": float(of_paper.tflops_percent)})  # fmt: skip
    return pd.DataFrame(rows)


def matching_text(ratios: pd.DataFrame) -> pd.DataFrame:
    """For each line of the paper's the row of `share_by_text` nearest to it."""
    nearest = (ratios.percent - ratios.reported).abs().groupby([ratios.method, ratios.first_pruned_layer], sort=False).idxmin()
    return ratios.loc[nearest].reset_index(drop=True)


def decode_share(text: int, lengths: Sequence[int]) -> pd.DataFrame:
    """Percent of all multiply-accumulates left where every image token is dropped from layer 2 on, in decode only."""
    prefill = prefill_macs(LLAVA_7B, held(text))
    rows = []
    for length in lengths:
        whole, pruned = ([held(text + t, first) for t in range(length)] for first in (LAYERS, 2))
        plain = prefill + sum(decode_macs(LLAVA_7B, tokens) for tokens in whole[1:])
        left = prefill + sum(decode_macs(LLAVA_7B, tokens) for tokens in pruned[1:])
        again = [sum(prefill_macs(LLAVA_7B, tokens) for tokens in steps) for steps in (pruned, whole)]
        rows.append({"new tokens": length, "with cache, % left": 100 * left / plain,
                     "without cache, % left": 100 * again[0] / again[1], "prefill, % of all": 100 * prefill / plain})  # fmt: skip
    return pd.DataFrame(rows)


def decode_reads(text: int, batches: Sequence[int], itemsize: int) -> pd.DataFrame:
    """What one decode step reads, in GiB, and by how much faster than unpruned it is at best, for each retention and batch."""
    rows = []
    for retention in (1.0, 0.5, 0.25, 0.1):
        for batch in batches:
            whole, size = (read_bytes(LLAVA_7B, held(text + ANSWER, 2, r), itemsize, batch) for r in (1.0, retention))
            rows.append({"first_pruned_layer": 2, "retention": retention, "batch": batch, "gib": size / 2**30,
                         "faster": whole / size})  # fmt: skip
    return pd.DataFrame(rows)


def even_batch(text: int, itemsize: int) -> float:
    """The batch whose cache weighs as much as the weights that a decode step reads."""
    return read_bytes(LLAVA_7B, [0] * LAYERS, itemsize) / kv_bytes(LLAVA_7B, held(text + ANSWER), itemsize)


def memory_sentence(needs: pd.DataFrame, card_gb: float) -> str:
    """Which models' predictors can be trained on a card of so many GB. needs: `study.memory.overview`."""
    sizes = needs[needs.what == "training, checkpointing"].set_index("model").GB
    lines = [f"{name} takes {gb:.1f} GB and {'fits' if gb < card_gb else 'does not fit'}" for name, gb in sizes.items()]
    return f"Training a predictor at batch 1 with checkpointing on a card of {card_gb} GB: {'; '.join(lines)}."


# -- measured on any machine -----------------------------------------------------------------------------------------------


def read_bench(path: Path) -> dict:
    """What `study.bench.small` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def savings(measured: dict) -> pd.DataFrame:
    """Realised shares of the small bench, with their bars."""
    results, bars = measured["results"], measured["bars"]
    return pd.DataFrame(
        {"case": label, "bar": bars.get(key, float("nan"))} | results[key]
        | {"same cache": results.get(f"{key}_in_place", {}).get("value", float("nan"))}
        for key, label in LABELS.items() if "realised" in key and key in results
    )  # fmt: skip


def verdicts(results: dict, bars: dict) -> pd.DataFrame:
    """Each bar that was set beforehand: met, missed or not measured."""
    return pd.DataFrame(
        {"what": LABELS[name], "measured": results.get(name, {}).get("value", float("nan")), "bar": bar,
         "verdict": verdict(results, name, bar)}
        for name, bar in bars.items()
    )  # fmt: skip


def medians(measured: dict) -> pd.DataFrame:
    """The times and sizes behind the ratios of the small bench."""
    names = {"prefill_ms": "prefill (ms)", "ms_per_token": "a decode step (ms)", "cache_mib": "cache (MiB)"}
    return pd.DataFrame(measured["table"])[["case", "way", *names]].rename(columns=names)


def grown(measured: dict) -> pd.DataFrame:
    """What `study.bench.growth` wrote, for the page: seconds of a plain answer, and the others relative to it."""
    names = {"image_tokens": "image tokens", "new_tokens": "new tokens", "plain_s": "plain (s)"}
    return pd.DataFrame(measured["table"]).rename(columns=names)


def profile_sentence(measured: dict) -> str:
    """Where the time of a decode step goes, plain and with DyRate, and what follows from it."""
    plain, pruned = (measured["profile"][way] for way in ("plain", "DyRate"))
    whole, left = sum(plain.values()), sum(pruned.values())
    in_place = measured["results"]["in_place_over_plain"]
    return (
        f"Where does a step of batch {measured['about']['batch']} go? Plain: {100 * plain['linear layers'] / whole:.0f} % into "
        f"linear layers, {100 * plain['attention'] / whole:.0f} % into attention, and {100 * plain['copies'] / whole:.0f} % into "
        "copies, nearly all of them of the cache, which transformers copies whole to add one token. The engine adds in place, by "
        f"which alone, with every token kept, a step takes {in_place['value']:.2f} of plain's time. With DyRate "
        f"{100 * pruned['linear layers'] / left:.0f} % are linear layers, {100 * pruned['attention'] / left:.0f} % attention, "
        f"{100 * pruned['copies'] / left:.0f} % copies (of what stays, when reading past what is evicted has cost as much), and "
        f"{100 * pruned['observation'] / left:.1f} % the observed row of attention; the rest is small operations and Python."
    )


def bench_sentence(measured: dict) -> str:
    """What the small bench was measured on."""
    return (
        "a random LLaVA with {layers} layers of width {width} and {image_tokens} image tokens ({device}, torch {torch})"
    ).format(**measured["about"])


def deciding_sentence(measured: dict) -> str:
    """What observing, predicting and dropping cost in the small bench."""
    about, share = measured["about"], measured["results"].get("deciding_share")
    if share is None:
        return "What a decision costs was not measured here: `python -m study.bench prune` does."
    return (
        f"With DyRate at a forced mean retention of {about['retention']:.2f}, observation, predictor and dropping take "
        f"{100 * share['value']:.1f} % of a decode step ({100 * share['low']:.1f} to {100 * share['high']:.1f} %, n = "
        f"{share['n']}; batch {about['batch']}, {about['layers']} layers of width {about['width']}, {about['device']})."
    )


# -- measured at the paper's scale -----------------------------------------------------------------------------------------


def gpu_files(folder: Path) -> list[dict]:
    """What `--shape` measured on GPUs, from all bench.json below a folder of results."""
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/bench.json"))]
    return [content for content in contents if "shapes" in content and not content["about"]["device"].startswith("CPU")]


def gpu_rows(files: list[dict]) -> pd.DataFrame:
    """Every row that was measured at a real shape, with its model and device."""
    return pd.DataFrame(
        {"model": name, "device": content["about"]["device"]} | row
        for content in files for name, shape in content["shapes"].items() for rows in shape["rows"].values() for row in rows
    )  # fmt: skip


def gpu_table(files: list[dict]) -> pd.DataFrame:
    """Those rows for the page: times beside the roofline, memory, or why there is none."""
    names = {
        "model": "model", "device": "device", "method": "method", "first_pruned_layer": "K", "budget": "retention",
        "batch": "batch", "images": "images", "new_tokens": "new tokens", "static": "static steps", "prefill_ms": "prefill ms",
        "roofline_prefill_ms": "at least", "ms_per_token": "ms a token", "roofline_ms_per_token": "at least ",
        "tokens_per_s": "tokens a second", "peak_gib": "GiB", "status": "status",
    }  # fmt: skip
    return gpu_rows(files).reindex(columns=list(names)).rename(columns=names)


def gpu_verdicts(files: list[dict]) -> pd.DataFrame:
    """The bars of the real shapes on each GPU; without any, each of them is not measured."""
    tables = []
    for name in SHAPES:
        for content in files or [{"about": {"device": ""}, "shapes": {}}]:
            results = content["shapes"].get(name, {}).get("results", {})
            tables.append(verdicts(results, TABLE3_BARS).assign(model=name, device=content["about"]["device"]))
    return pd.concat(tables)[["model", "device", "what", "measured", "bar", "verdict"]]


def beside_reported(reported: pd.DataFrame, files: list[dict]) -> pd.DataFrame:
    """The paper's Table III, and beside its latency (of what, it does not say) prefill and step at batch 1 on each GPU."""
    table = reported.drop(columns="auto_r").rename(columns={"latency_ms": "RTX 4090 ms, reported", "tflops_percent": "FLOPs %"})
    for content in files:
        rows = gpu_rows([content])
        for key, name in (("prefill_ms", "prefill ms"), ("ms_per_token", "ms a token")):
            column = f"{content['about']['device']} {name}, measured"
            table[column] = [_like(line, rows).get(key, float("nan")) for line in reported.itertuples()]
    return table


def _like(line, rows: pd.DataFrame) -> dict:
    """The measured row of one line of the paper's: static steps, one prompt with one image, the shortest answer."""
    method = "Full" if line.method == "Original" else line.method
    budget = {"Full": 1.0, "DyRate": DYRATE_BUDGET}.get(method, 1 - float(line.R))
    at = (rows.model == line.model.lower()) & (rows.method == method) & (rows.budget == budget)
    at &= rows.static & (rows.batch == 1) & (rows.images == 1)
    if pd.notna(line.K):
        at &= rows.first_pruned_layer == float(line.K)
    return rows[at].sort_values("new_tokens").iloc[0].to_dict() if at.any() else {}


def gpu_sentence(files: list[dict]) -> str:
    """On which GPUs the real shapes were measured, or that they were not, and how to do it."""
    if not files:
        return f"**Not measured: no GPU was available.** `{COMMAND}` fills the table (with `--quick`, its main part)."
    places = [f"{', '.join(c['shapes'])} on {c['about']['device']} (torch {c['about']['torch']})" for c in files]
    return f"Measured with random weights: {'; '.join(places)}."


# -- for the page ----------------------------------------------------------------------------------------------------------


def record(
    chapter: Chapter, *, text: int, itemsize: int, reported: pd.DataFrame, ratios: pd.DataFrame, left: pd.DataFrame,
    reads: pd.DataFrame, measured: dict,
) -> None:  # fmt: skip
    """The chapter's numbers and sentences, from the tables that the functions above made."""
    chapter.number("image_tokens", IMAGE)
    chapter.number("layers_13b", LLAVA_13B.layers)
    chapter.number("reported_dyrate", reported[reported.method == "DyRate"].tflops_percent.astype(float).iloc[0])
    for key, line in zip(PRINTED, matching_text(ratios).itertuples(), strict=True):
        chapter.number(f"text_{key}", line.text)
        chapter.number(f"reported_{key}", line.reported)
    for length, share in zip(left["new tokens"], left["with cache, % left"], strict=True):
        chapter.number(f"left_{length}", share)
    tenth = reads[(reads.retention == 0.1) & (reads.batch == 1)].iloc[0]
    chapter.number("faster_b1_percent", 100 * (tenth.faster - 1))
    chapter.number("even_batch", even_batch(text, itemsize))
    chapter.number("context_tokens", text + ANSWER)
    tower = tower_macs(LLAVA_7B)
    chapter.number("tower_percent", 100 * tower / (tower + prefill_macs(LLAVA_7B, held(text))))
    for key, result in measured["results"].items():
        chapter.number(key, result)
    chapter.number("deciding_bar_percent", 100 * TABLE3_BARS["deciding_share"])
    chapter.text("bench_on", bench_sentence(measured))
    chapter.text("deciding", deciding_sentence(measured))
    chapter.text("profile", profile_sentence(measured))
    chapter.text("efficiency_finding", finding(left, measured))


def finding(left: pd.DataFrame, measured: dict) -> str:
    """How much of an ideal saving is realised, by DyRate and at a hypothetical rate, and what decoding can save at all.

    left: `decode_share`, of whose answer lengths the second is quoted. measured: the small bench.
    """
    prefill, fixed, dyrate, same = (_share(measured["results"], key) for key in REALISED)
    batch, retention = (measured["about"][key] for key in ("batch", "retention"))
    line = left.iloc[min(1, len(left) - 1)]
    return (
        f"**On {bench_sentence(measured)}, DyRate, at a forced mean retention of {retention:.2f}, realises {same} of the time "
        f"that its dropping could save while decoding at batch {batch}, beside a model with the same cache.** Beside plain "
        f"`generate`, whose cache copies more, it is {dyrate}. A hypothetical R = .9 realises {fixed} there, and {prefill} in "
        "the prefill. "
        f"**With a cache, dropping every image token while decoding leaves {line['with cache, % left']:.1f} % of LLaVA-1.5-7B's "
        f"multiply-accumulates (computed, {line['new tokens']:.0f} new tokens): it saves memory, not computation.**"
    )


def _share(results: dict[str, dict], key: str) -> str:
    """A realised share in percent with its interval over repeats."""
    if key not in results:
        return "an unmeasured part"
    value, low, high = (100 * results[key][end] for end in ("value", "low", "high"))
    return f"{value:.0f} % ({low:.0f} to {high:.0f} %, n = {results[key]['n']} repeats)"
