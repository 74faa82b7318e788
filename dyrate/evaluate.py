"""Generate answers under strategies, store each as soon as it is finished, and score them.

`answers` is the plain loop over a model. `run` measures strategies on examples: an interrupted run goes on where it
stopped, several processes (`accelerate launch`) share the work, and both end with the table that one run would give.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import zlib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from dyrate import metrics
from dyrate.attention import encode
from dyrate.cost import ledger, shape_of
from dyrate.datasets import Example, Examples
from dyrate.files import append_lines, write_whole
from dyrate.models import describe
from dyrate.pocket.language import read_description
from dyrate.pocket.scenes import render
from dyrate.processes import this_process
from dyrate.strategy import Strategy
from dyrate.trace import Trace

PACKAGE = Path(__file__).parent
# What a stored answer depends on, of this package
DECIDES = ("engine/*", "strategies/*", "look", "segments", "strategy", "trace", "cost", "datasets/*", "attention", "predictor")


def answers(
    model, processor, examples: Examples, *, max_new_tokens: int = 64, batch_size: int = 32, progress: bool = True, **generate
) -> list[tuple[Example, str]]:
    """The model's answer to each example whose image can be read; greedy unless `generate` says otherwise."""
    found = []
    bar = tqdm(total=len(examples), desc="answers", disable=not progress)
    for batch, images in examples.batches(batch_size):
        inputs = encode(processor, images, [e.prompt for e in batch])
        said = generated(model, inputs, {"max_new_tokens": max_new_tokens} | generate)
        found += zip(batch, in_words(processor, said), strict=True)
        bar.update(len(batch))
    bar.close()
    return found


def generated(model, inputs, settings: dict) -> list[list[int]]:
    """The answer to each row that `encode` made, as token ids with the end; greedy unless `settings` say otherwise."""
    inputs = inputs.to(model.device, model.dtype)
    with torch.inference_mode():
        output = model.generate(**inputs, **({"do_sample": False} | settings))
    said = output[:, inputs["input_ids"].shape[1] :]
    ends = model.generation_config.eos_token_id
    ended = torch.isin(said, torch.tensor(ends, device=said.device)) if ends is not None else torch.zeros_like(said).bool()
    lengths = (ended.cumsum(1) - ended.long() == 0).sum(1).tolist()
    return [ids[:length] for ids, length in zip(said.tolist(), lengths, strict=True)]


def in_words(processor, said: list[list[int]]) -> list[str]:
    """Answers as text."""
    return [text.strip() for text in processor.tokenizer.batch_decode(said, skip_special_tokens=True)]


def kept_shares(trace: Trace, lengths: list[int]) -> list[float]:
    """Share of image tokens that stayed, for each answer: mean over its tokens, its beams and the stages."""
    beams = len(trace.n_image) // len(lengths)  # rows of one example stand side by side
    share = trace.kept_share().reshape(len(trace.steps), len(lengths), beams).mean(2)
    return [float(share[:length, i].mean()) for i, length in enumerate(lengths)]


def run(
    model, processor, strategies: dict[str, Strategy], examples: Examples, store: Path, *, max_new_tokens: int = 64,
    batch_size: int = 32, seed: int = 0, progress: bool = True, **generate,
) -> pd.DataFrame:  # fmt: skip
    """One row for each strategy and example: answer, tokens, mean kept share, multiply-accumulates and bytes.

    strategies: by the label that tables show. store: a folder of finished samples; what another model, strategy, example
    or setting made is never mixed in. A batch is the same in every run, so an interrupt changes no number. Under
    `accelerate launch` each process takes its part of what is left, and all return the whole table. seed: for sampling, if
    `generate` asks for it.
    """
    settings = {"max_new_tokens": max_new_tokens} | generate
    drawn = settings.get("do_sample", False)
    fixed = settings | {"batch_size": batch_size} | ({"seed": seed} if drawn else {})
    state = this_process()
    folder = _folder(store, model, strategies, examples, fixed, state)
    mine = folder / f"part-{state.process_index:03}-of-{state.num_processes:03}.jsonl"
    tasks = dict.fromkeys(e.task for e in examples)
    chunks = []
    for task in tasks:
        of_task = [e for e in examples if e.task == task]
        chunks += [of_task[i : i + batch_size] for i in range(0, len(of_task), batch_size)]
    done = {(row["strategy"], row["sample"]) for row in _read(folder)}
    if len(folders := set(gather_object([folder.name]))) > 1:  # and all have read before one writes: they divide the same rest
        raise RuntimeError(
            f"the processes disagree on what to measure ({', '.join(sorted(folders))}): give each the same model, strategies "
            "and examples, on GPUs of one kind"
        )
    left = [(s, c) for s in strategies for c in chunks if not all((s, e.name) in done for e in c)]
    work = left[state.process_index :: state.num_processes]
    bar = tqdm(total=sum(len(chunk) for _, chunk in work), desc="answers", disable=not progress or not state.is_main_process)
    for label, chunk in work:
        bar.set_postfix_str(f"{label}, {chunk[0].task}")
        for batch, images in Examples(chunk, examples.source, examples.problems).batches(len(chunk)):
            if drawn:  # a batch draws the same words in every run
                torch.manual_seed(zlib.crc32(f"{seed} {label} {chunk[0].name}".encode()))
            rows = _measure(model, processor, label, strategies[label], batch, images, settings)
            append_lines(mine, [json.dumps(row) for row in rows])
        bar.update(len(chunk))
    bar.close()
    state.wait_for_everyone()
    return _table(folder, list(strategies), [e.name for e in examples])


def _measure(model, processor, label: str, strategy: Strategy, batch, images, settings: dict) -> list[dict]:
    strategy.meet(batch)
    with strategy(model, processor) as trace:
        said = generated(model, encode(processor, images, [e.prompt for e in batch]), settings)
    lengths, texts = [len(ids) for ids in said], in_words(processor, said)
    shares = kept_shares(trace, lengths)
    beams = len(trace.n_image) // len(batch)
    per_row = [length for length in lengths for _ in range(beams)]
    costs = ledger(shape_of(model), trace, strategy, lengths=per_row, itemsize=model.dtype.itemsize)
    costs = costs.groupby(costs.row // beams).sum()
    rows = []
    for i, example in enumerate(batch):
        cost = {k: int(v) for k, v in costs.iloc[i].items() if k != "row"}
        row = {"strategy": label, "sample": example.name, "task": example.task, "answer": texts[i], "tokens": lengths[i]}
        rows.append(row | {"kept": shares[i]} | cost)
    return rows


def _folder(store: Path, model, strategies, examples, settings: dict, state) -> Path:
    """A folder of its own for this very measurement, with a note of what that is."""
    code = hashlib.sha256()
    for path in (path for name in DECIDES for path in sorted(PACKAGE.glob(f"{name}.py"))):
        code.update(path.read_bytes())
    about = {
        "model": {k: v for k, v in describe(model).items() if k != "device"}  # processes may sit on several
        | {"name": model.config._name_or_path, "weights": _sum_of_weights(model)},
        "strategies": {k: _described(v) for k, v in strategies.items()}, "settings": {k: str(v) for k, v in settings.items()},
        "examples": [[e.name, e.prompt, str(e.path)] for e in examples], "code": code.hexdigest(),
    }  # fmt: skip
    text = json.dumps(about, indent=1, sort_keys=True)
    folder = Path(store) / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    if state.is_main_process:
        write_whole(folder / "about.json", text + "\n")
    return folder


def _described(strategy: Strategy) -> str:
    """A strategy with all its fields, and its own source where it is not the package's."""
    own = "" if type(strategy).__module__.startswith("dyrate.") else inspect.getsource(type(strategy))
    return repr(strategy) + own


def _sum_of_weights(model) -> float:
    """Tells two checkpoints of one name apart."""
    return sum(float(p.detach().double().abs().sum()) for p in model.get_decoder().parameters())  # devices may differ


def _read(folder: Path) -> list[dict]:
    """Every whole line that any process stored; of one sample stored twice, the first."""
    rows: dict[tuple[str, str], dict] = {}
    for path in sorted(folder.glob("part-*.jsonl")):
        for line in path.read_bytes().split(b"\n")[:-1]:
            row = json.loads(line)
            rows.setdefault((row["strategy"], row["sample"]), row)
    return list(rows.values())


def _table(folder: Path, labels: list[str], names: list[str]) -> pd.DataFrame:
    order = {name: i for i, name in enumerate(names)}
    rows = [row for row in _read(folder) if row["strategy"] in labels and row["sample"] in order]
    rows.sort(key=lambda row: (labels.index(row["strategy"]), order[row["sample"]]))
    return pd.DataFrame(rows)


def kept_by_word(
    model, processor, strategy: Strategy, examples: Examples, *, batch_size: int = 24, max_new_tokens: int = 64
) -> list[dict]:
    """For each example: picture, words, and which image tokens were left when each word was chosen.

    kept: (step, image_token). on_things, elsewhere: the kept share of patches that show something (pocket; else of all) and
    of the others, at each step. row_bias: how far below the middle the tokens kept first lie, in heights of the image.
    """
    found = []
    for batch, images in examples.batches(batch_size):
        strategy.meet(batch)
        with strategy(model, processor) as trace:
            inputs = encode(processor, images, [e.prompt for e in batch])
            said = generated(model, inputs, {"max_new_tokens": max_new_tokens})
        kept = torch.stack([step.stages[-1].kept for step in trace.steps], 1).cpu().numpy()  # (batch, step, image_token)
        for i, example in enumerate(batch):
            ids = [t for t in said[i] if t not in processor.tokenizer.all_special_ids]
            mask = kept[i, : len(ids), : trace.n_image[i]]
            shown = np.ones(mask.shape[1], bool)
            if example.scene is not None:
                shown = render(example.scene).shown
            side = round(mask.shape[1] ** 0.5)
            rows = np.arange(mask.shape[1]) // side
            found.append({
                "name": example.name, "picture": images[i], "kept": mask,
                "words": [processor.tokenizer.decode([t]).strip() for t in ids],
                "on_things": mask[:, shown].mean(1), "elsewhere": mask[:, ~shown].mean(1) if (~shown).any() else mask.mean(1),
                "row_bias": float(rows[mask[0]].mean() / (side - 1) - 0.5) if mask[0].any() else 0.0,
            })  # fmt: skip
    return found


def metric_of(task: str) -> str:
    """What `scored` computes for a task, in words."""
    if task == "caption":
        return f"CIDEr (pycocoevalcap {version('pycocoevalcap')}, PTB tokens; 1 is what papers print as 100)"
    return "exact match (share)" if task.startswith("qa_") else "right slots (share)"


def scored(table: pd.DataFrame, examples: Examples) -> pd.DataFrame:
    """The table with `score` (1 is best, but CIDEr has no bound) and `invented`, the share of named things that are not there.

    Captions score CIDEr; pocket descriptions the share of slots (thing, colour, count, place) that are right; questions 1 or
    0. invented is NaN where nothing can be said.
    """
    from dyrate.pocket.quality import slot_scores  # which imports this file

    by_name = {e.name: e for e in examples}
    table = table.assign(score=np.nan, invented=np.nan)
    for (_, task), rows in table.groupby(["strategy", "task"], sort=False):  # CIDEr's weights count the captions scored together
        found = [by_name[name] for name in rows["sample"]]
        if task == "caption":
            scores = metrics.cider(list(rows.answer), [e.references for e in found])
        elif task.startswith("qa_"):
            scores = [metrics.exact_match(a, e.references) for a, e in zip(rows.answer, found, strict=True)]
        else:
            scores = [slot_scores(e.scene, a).mean() for a, e in zip(rows.answer, found, strict=True)]
            table.loc[rows.index, "invented"] = [_invented(e, a) for a, e in zip(rows.answer, found, strict=True)]
        table.loc[rows.index, "score"] = scores
    return table


def _invented(example: Example, text: str) -> float:
    """CHAIR's share (arXiv:1809.02156), exact here: of the things that a description names, those that the scene lacks."""
    named = [said["thing"] for said in read_description(text)]
    shown = {group.thing for group in example.scene.groups}
    return float(np.mean([thing not in shown for thing in named])) if named else float("nan")


def compare(table: pd.DataFrame, reference: str = "Full") -> pd.DataFrame:
    """One row for each strategy and task: score with its interval, difference from `reference` on the same samples, cost.

    macs_share: multiply-accumulates of the decoder (prefill and decode) relative to the reference.
    """
    rows = []
    for (label, task), found in table.groupby(["strategy", "task"], sort=False):
        base = table[(table.strategy == reference) & (table.task == task)].set_index("sample")
        mine = found.set_index("sample")
        score = metrics.bootstrap(mine.score)
        row = {"strategy": label, "task": task, "n": len(found), **{k: score[k] for k in ("value", "low", "high")}}
        if len(base):
            loss = metrics.bootstrap((mine.score - base.score).dropna())
            row |= {f"difference_{k}": loss[k] for k in ("value", "low", "high")}
            decoder = (mine.prefill + mine.decode).mean() / (base.prefill + base.decode).mean()
            row |= {"macs_share": decoder, "prefill_share": mine.prefill.mean() / base.prefill.mean()}
            row |= {"kv_share": mine.kv_bytes.mean() / base.kv_bytes.mean()}
        rows.append(row | {"kept": mine.kept.mean(), "tokens": mine.tokens.mean(), "invented": mine.invented.mean()})
    return pd.DataFrame(rows)


def caption_measures(table: pd.DataFrame, examples: Examples) -> pd.DataFrame:
    """Mean CIDEr, BLEU-4, ROUGE-L and METEOR of the captions of each strategy, all on the same images. table: `scored` rows."""
    references = {e.name: e.references for e in examples}
    # the others score each caption by itself, all at once; CIDEr does not
    names = ("BLEU-4", "ROUGE-L", "METEOR")
    scores = metrics.caption_scores(list(table.answer), [references[name] for name in table["sample"]], names)
    found = pd.DataFrame({"strategy": list(table.strategy), "CIDEr": list(table.score), **scores})
    return found.groupby("strategy", sort=False).mean().reset_index()


def method_scores(table: pd.DataFrame, method: str, task: str) -> pd.Series:
    """Score of each sample of a task under one method, mean over its kept shares (the label's second word)."""
    rows = table[(table.task == task) & (table.strategy.str.split().str[0] == method)]
    return rows.groupby("sample").score.mean()
