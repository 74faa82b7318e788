"""The control, its twin and smol: harder questions, training and assembly, and the reference rows that pages draw from."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import dyrate
from study import reference
from study.answers import answer_all
from study.chapters import laboratories
from study.examples import examples
from study.pocket import language
from study.pocket.batches import IGNORE
from study.pocket.scenes import LONG_WORDS, WORDS, compose, render, seeds
from study.smol import parts as smol_parts
from study.smol import train as smol_train
from study.smol.assemble import assemble
from study.smol.batches import Batches, Config


@pytest.fixture(scope="module")
def drawn():
    return [compose(seed, long_words=True) for seed in seeds("test", 300)]


def groups_named(scene, text: str) -> list:
    """The groups whose things a text names, in the text's order."""
    at = {g: re.search(rf"\b({g.thing}|{language.PLURAL[g.thing]})\b", text) for g in scene.groups}
    return sorted((g for g in at if at[g]), key=lambda g: at[g].start())


def test_two_step_questions_have_one_answer(drawn):
    column, row = (lambda g: g.place % 3), (lambda g: g.place // 3)
    sides = {
        "to the left of": lambda a, b: column(a) < column(b), "to the right of": lambda a, b: column(a) > column(b),
        "above": lambda a, b: row(a) < row(b), "below": lambda a, b: row(a) > row(b),
    }  # fmt: skip
    turns = [(scene, turn) for scene in drawn if (turn := language.question(scene, "two_step"))]
    assert len(turns) > 200
    for scene, turn in turns:
        side = next(s for s in sides if f" {s} " in turn.prompt)
        (other,) = groups_named(scene, turn.prompt.split(side)[1])
        (meant,) = [g for g in scene.groups if sides[side](g, other)]
        assert turn.response == meant.colour != other.colour


def test_sums_and_comparisons_count_what_is_shown(drawn):
    answers = []
    for scene in drawn:
        turn = language.question(scene, "total")
        assert turn.response == "one two three four five six".split()[sum(g.count for g in groups_named(scene, turn.prompt)) - 1]
        if turn := language.question(scene, "more"):
            a, b = groups_named(scene, turn.prompt)
            assert a.count != b.count and turn.response == ("yes" if a.count > b.count else "no")
            answers.append(turn.response)
    assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_long_words_fill_two_places_that_nothing_else_uses(drawn):
    long = [scene for scene in drawn if scene.word in LONG_WORDS]
    assert 0.15 < len(long) / len(drawn) < 0.35
    for scene in long[:20]:
        picture = render(scene)
        rows, columns = np.nonzero(picture.word_cover)
        assert {3 * (r // 4) + c // 4 for r, c in zip(rows, columns, strict=True)} <= {scene.word_place, scene.word_place + 1}
        assert not (picture.cover.any(0) & picture.word_cover).any() and np.ptp(columns) >= 4
        assert language.question(scene, "reading") is None and language.question(scene, "long_word").response == scene.word


def test_a_scene_is_the_same_but_for_its_long_word(drawn):
    for scene in drawn:
        short = compose(scene.seed)
        assert (short.groups, short.texture) == (scene.groups, scene.texture) and short.word in (None, *WORDS)
        assert scene.word in LONG_WORDS or scene == short


def test_backwards_names_all_groups_from_the_last_place(drawn):
    for scene in drawn:
        places = [g["place"] for g in language.read_description(language.backwards(scene))]
        assert places == sorted((g.place for g in scene.groups), reverse=True)


def test_hard_tasks_are_for_models_that_were_trained_on_them():
    with pytest.raises(ValueError, match="unknown pocket task"):
        examples("pocket", 2, tasks=["qa_total"])
    assert len(examples("laboratories", 3, tasks=["qa_long_word", "backwards"])) == 6


# -- smol ------------------------------------------------------------------------------------------------------------------


def tiny_language() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random decoder of the real class with grouped-query attention, and a byte-level tokenizer with SmolLM2's marks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=marks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([language.description(compose(seed)) for seed in seeds("train", 50)], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=marks[1], eos_token=marks[2], pad_token=marks[2], unk_token=marks[0]
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(wrapped), hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16().float())  # so that a training in bfloat16 has the same
    return smol_parts.with_image_token(model, wrapped)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that makes a tiny training in a folder of this name."""
    monkeypatch.setattr(smol_train, "language_model", lambda path: tiny_language())
    config = Config(steps=4, batch=2, questions=2, rank=2)
    return lambda name, kind=smol_train.Run: kind(tmp_path / name, config, dyrate.models.POCKET, "cpu")


def test_packed_turns_read_as_the_chat_template_does(run):
    processor = run("a").processor
    batches, scene = Batches(Config(questions=3), 0, processor), compose(5, long_words=True)
    row, turns = batches.packed(scene), language.turns(scene, 3)
    for number, turn in enumerate(turns, 1):
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": turn.prompt}]}]
        chat = processor.apply_chat_template(asked, add_generation_prompt=True)
        want = processor(images=render(scene).image, text=f"{chat}{turn.response}<|im_end|>")["input_ids"][0]
        mine = [i for i, of in enumerate(row["turn"]) if of in (0, number)]
        assert [row["ids"][i] for i in mine] == want
        assert [row["positions"][i] for i in mine] == list(range(len(want)))
        answer = processor.tokenizer(f"{turn.response}<|im_end|>")["input_ids"]
        assert [row["labels"][i] for i in mine if row["labels"][i] >= 0] == answer == want[-len(answer) :]


def test_patches_of_a_painted_word_are_told_its_tokens(run, drawn):
    """The tokens of an answer, so that reading is naming what patches resemble; of a long word each half its own."""
    processor = run("words").processor
    batches = Batches(Config(), 0, processor)
    for scene in [s for s in drawn if s.word][:20]:
        picture = render(scene)
        ids = batches._patch_words(scene, picture).reshape(12, 12, 6)
        shown = {tuple(i for i in row if i != IGNORE) for row in ids[picture.word_cover]}
        whole = processor.tokenizer(scene.word)["input_ids"]
        assert all(set(tokens) <= set(whole) and tokens for tokens in shown), scene.word
        assert {i for tokens in shown for i in tokens} == set(whole), scene.word
        assert len(shown) == 1 if scene.word in WORDS else 1 < len(shown) <= 2, scene.word


def test_killed_training_of_smol_resumes_to_the_same_weights(run):
    whole = run("whole")
    whole.train()

    class Broken(smol_train.Run):
        save_seconds = 0.0

        def _save(self, optimizer):
            super()._save(optimizer)
            if self.done == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("broken", Broken).train()
    again = run("broken")
    again.train()
    assert again.done == 4
    for name, p in whole.trained().items():
        assert torch.equal(p, again.trained()[name]), name


def test_only_adapter_and_projector_are_trained(run):
    one = run("one")
    before = {n: p.clone() for n, p in one.model.named_parameters()}
    one.train()
    changed = {n for n, p in one.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "lora_" in n or "projector" in n}


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16 where frozen"])
def test_assembled_model_answers_as_the_trained_one(run, tmp_path, monkeypatch, half):
    from study.smol import assemble as module

    monkeypatch.setattr(smol_train, "fast_bfloat16", lambda device: half)  # whatever this machine's processor is
    monkeypatch.setattr("study.pocket.objectives.fast_bfloat16", lambda device: half)
    one = run("one")
    one.train()
    one.export(tmp_path / "out")
    monkeypatch.setattr(module, "language_model", lambda path: tiny_language())
    assemble(tmp_path / "out", tmp_path / "smol")
    model, processor = dyrate.load(tmp_path / "smol")
    asked = examples("laboratories", 2, tasks=["caption"])
    inputs = dyrate.encode(processor, [e.image() for e in asked], [e.prompt for e in asked])
    one.model.model.language_model.config._attn_implementation = "sdpa"
    one.model.float()
    with torch.no_grad():
        for p in [*one.trained().values(), *one.model.model.vision_tower.parameters()]:
            p.copy_(p.bfloat16().float())  # as what is ours is stored
        trained, loaded = one.model.eval()(**inputs).logits, model(**inputs).logits
    assert (trained - loaded).abs().max() < 1e-4 * trained.abs().max()
    tokens = model.generate(**inputs, max_new_tokens=3)
    assert tokens.shape[0] == 2


def test_a_language_model_that_is_missing_or_altered_is_named(tmp_path, monkeypatch):
    altered = tmp_path / smol_parts.GGUF
    altered.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="is not the published"):
        smol_parts.language_model(altered)
    monkeypatch.setattr(smol_parts, "PACKAGE", "no-such-package")
    with pytest.raises(FileNotFoundError, match="make smol"):
        smol_parts.language_model()
    monkeypatch.setitem(dyrate.models.BUILT_IN, "smol", (tmp_path / "nowhere", "put it together with `make smol`"))
    with pytest.raises(FileNotFoundError, match="make smol"):
        dyrate.load("smol")
    with pytest.raises(FileNotFoundError, match=r"study\.smol\.train"):
        assemble(tmp_path, tmp_path / "out")


# -- the reference rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pocket-dropped", "pocket-plain"])
def test_reference_rows_are_this_models(name, tmp_path):
    """The committed rows came from a GPU; these weights, measured here, give the same answers."""
    model, processor = dyrate.load(name)
    part = {part.name: part for part in reference.parts(8)}["layers"]
    chosen = [c for c in part.conditions if c.label in ("Full", "FastV 0.25 from layer 4", "RandomPrune 0.1 from layer 2")]
    asked = examples("laboratories", 4, tasks=["description", "qa_two_step"])
    here = answer_all(model, processor, chosen, asked, tmp_path, max_new_tokens=100, batch_size=4, progress=False)
    there = pd.read_csv(laboratories.ROOT / "data" / "results" / name / "reference_layers.csv.gz")
    both = here.merge(there, on=["label", "sample"], suffixes=("", "_there"))
    assert len(both) == 24
    assert (both.tokens == both.tokens_there).all() and np.allclose(both.retention, both.retention_there, atol=1e-5)
    assert (both.macs == both.macs_there).all()


def test_another_picture_is_asked_the_same():
    part = {part.name: part for part in reference.parts(8)}["other_picture"]
    asked = reference._asked(part, 2)
    same = examples("laboratories", 2, tasks=part.tasks)
    assert [(e.name, e.prompt, e.references) for e in asked] == [(e.name, e.prompt, e.references) for e in same]
    assert all(np.any(np.asarray(a.image()) != np.asarray(b.image())) for a, b in zip(asked, same, strict=True))


def test_the_chapter_reads_what_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"study\.reference"):
        laboratories.read(str(tmp_path))
    measured = laboratories.read("data/results")
    assert [lab.name for lab in measured] == list(laboratories.LABORATORIES)
    methods = laboratories.against_random(measured)
    for lab in measured:
        assert sum(laboratories.counted(methods, lab.name)) == len(laboratories.PUBLISHED)
    for row in methods[methods.published].itertuples():  # a headline compares at equal measured retention
        assert abs(row.retention - laboratories.RETENTION) < 0.01, row
    with pytest.raises(ValueError, match="no reference rows"):
        measured[0].scores("layers", "description", method="nothing")


def test_tasks_are_told_apart_by_what_they_need():
    rows = [("moves", 1.0, 0.5, 0.2), ("easy", 1.0, 0.97, 0.2), ("unable", 0.1, 0.1, 0.05)]
    columns = ["task", "unpruned", "a tenth at random", "another picture"]
    table = pd.DataFrame(rows, columns=columns).assign(laboratory="x")
    assert laboratories.telling(table, "x") == (["moves"], ["easy"], ["unable"])
