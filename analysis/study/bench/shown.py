"""What the efficiency chapter shows of the files that the bench wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from study.bench import table3

LABELS = {
    "keep1_over_plain": "keep all / plain generate (time)",
    "prefill_realised_r50": "prefill, R = .5",
    "prefill_realised_r90": "prefill, R = .9",
    "decode_b8_r90_realised": "decode, batch 8, R = .9",
    "decode_b64_r90_realised": "decode, batch 64, R = .9",
    "decode_b8_r90_each_step_realised": "the same, a new rate each step",
    "decode_b8_dyrate_realised": "decode, batch 8, DyRate at a forced rate",
    "decode_b8_r90_hide_realised": "decode, batch 8, R = .9, hidden (masked)",
    "deciding_share": "deciding / decode step (time)",
}
COMMAND = "python -m study.bench prune --shape llava-1.5-7b --out data/results/<gpu>/bench.json"


def savings(measured: dict) -> pd.DataFrame:
    """Realised shares of the small bench, with their bars."""
    found, bars = measured["results"], measured["bars"]
    return pd.DataFrame(
        {"case": label, "bar": bars.get(key, float("nan"))} | found[key]
        for key, label in LABELS.items() if "realised" in key and key in found
    )  # fmt: skip


def verdicts(results: dict, bars: dict, met: Callable[[str, float], bool]) -> pd.DataFrame:
    """Each bar that was set beforehand: met, missed or not measured."""
    rows = []
    for name, bar in bars.items():
        value = results.get(name, {}).get("value", float("nan"))
        verdict = ("met" if met(name, value) else "missed") if name in results else "not measured"
        rows.append({"what": LABELS[name], "measured": value, "bar": bar, "verdict": verdict})
    return pd.DataFrame(rows)


def medians(measured: dict) -> pd.DataFrame:
    """The times and sizes behind the ratios of the small bench."""
    table = pd.DataFrame(measured["table"])
    names = {"prefill_ms": "prefill (ms)", "ms_per_token": "a decode step (ms)", "cache_mib": "cache (MiB)"}
    return table.assign(case=table.case.map(LABELS))[["case", "way", *names]].rename(columns=names)


def gpu_files(folder: Path) -> list[dict]:
    """What `--shape` measured on GPUs, from all bench.json below a folder of results."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*/bench.json"))]
    return [content for content in found if "shapes" in content and not content["about"]["device"].startswith("CPU")]


def gpu_verdicts(files: list[dict]) -> pd.DataFrame:
    """The bars of the real shapes on each GPU; without any, each of them is not measured."""
    rows = []
    for name in table3.SHAPES:
        for content in files or [{"about": {"device": ""}, "shapes": {}}]:
            results = content["shapes"].get(name, {}).get("results", {})
            found = verdicts(results, table3.BARS, table3.met)
            rows.append(found.assign(model=name, device=content["about"]["device"]))
    return pd.concat(rows)[["model", "device", "what", "measured", "bar", "verdict"]]


def beside_reported(reported: pd.DataFrame, files: list[dict]) -> pd.DataFrame:
    """The paper's Table III, and beside its latency (of what, it does not say) prefill and step at batch 1 on each GPU."""
    table = reported.drop(columns="auto_r").rename(columns={"latency_ms": "RTX 4090 ms, reported", "tflops_percent": "FLOPs %"})
    for content in files:
        for key, name in (("prefill_ms", "prefill ms"), ("ms_per_token", "ms a token")):
            column = f"{content['about']['device']} {name}, measured"
            table[column] = [_number(content["shapes"].get(line.model.lower(), {}), line, key) for line in reported.itertuples()]
    return table


def _number(shape: dict, line, key: str) -> float:
    layer = f"K={float(line.K):.0f}"
    method = {"Original": "Full", "FastV": f"FastV {layer} R=.5", "VTW": f"VTW {layer}", "DyRate": "DyRate 0.33"}[line.method]
    rows = shape.get("rows", {}).get(f"{method}, batch 1, images 1, static", [{}])
    return rows[0].get(key, float("nan"))


def gpu_rows(files: list[dict]) -> pd.DataFrame:
    """Every line that was measured at a real shape: times beside the roofline, memory, or why there is none."""
    rows = [
        {
            "model": name, "device": content["about"]["device"], "method": row["method"], "batch": row["batch"],
            "images": row["images"], "new tokens": row["new_tokens"], "steps": "static" if row["static"] else "eager",
            "prefill ms": row.get("prefill_ms"), "at least": row["roofline_prefill_ms"], "ms a token": row.get("ms_per_token"),
            "at least ": row["roofline_ms_per_token"], "tokens a second": row.get("tokens_per_s"), "GiB": row.get("peak_gib"),
            "status": row["status"],
        }
        for content in files for name, shape in content["shapes"].items() for lines in shape["rows"].values() for row in lines
    ]  # fmt: skip
    return pd.DataFrame(rows)


def gpu_sentence(files: list[dict]) -> str:
    """On which GPUs the real shapes were measured, or that they were not, and how to do it."""
    if not files:
        return f"**Not measured: no GPU was at hand.** `{COMMAND}` fills the table (with `--quick`, its most telling part)."
    places = [f"{', '.join(c['shapes'])} on {c['about']['device']} (torch {c['about']['torch']})" for c in files]
    return f"Measured with random weights: {'; '.join(places)}."


def deciding_sentence(measured: dict) -> str:
    """What observing, predicting and dropping cost in the small bench."""
    about, found = measured["about"], measured["results"].get("deciding_share")
    if found is None:
        return "What a decision costs was not measured here: `python -m study.bench prune` does."
    return (
        f"With DyRate at a forced mean kept share of {about['mean_kept']:.2f}, observation, predictor and dropping take "
        f"{100 * found['value']:.1f} % of a decode step ({100 * found['low']:.1f} to {100 * found['high']:.1f} %, n = "
        f"{found['n']}; batch 8, {about['layers']} layers of width {about['width']}, {about['device']})."
    )


def memory_sentence(needs: pd.DataFrame, card_gb: float) -> str:
    """Which models' predictors can be trained on a card of so many GB."""
    sizes = needs[needs.what == "training, checkpointing"].set_index("model").GB
    found = [f"{name} takes {gb:.1f} GB and {'fits' if gb < card_gb else 'does not fit'}" for name, gb in sizes.items()]
    return f"Training a predictor at batch 1 with checkpointing on a card of {card_gb} GB: {'; '.join(found)}."
