"""Importance, how rankings agree with it, and rankings made worse: laws on a pocket twin, and worked examples."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

import dyrate
from by_hand import HEADS, kept, seen
from dyrate.teacher_forcing import prepare, token_losses
from study import agreement, figures, importance, noise
from study.answers import answer_all
from study.attribution import every_token, integrated_gradients, left_out, path, pruned_from
from study.chapters import importance as chapter
from study.examples import examples
from study.groups import covered, sentences
from study.importance import reworded
from study.noise import Known, Noisy, Reversed
from study.pocket.language import PLURAL

ONE = [dyrate.Example("a", "caption", "", ())]


@pytest.fixture(scope="module")
def laboratory():
    model, processor = dyrate.load("pocket-plain", dtype=torch.float32)
    asked = examples("laboratories", 3, tasks=["description"])
    place = pruned_from(model, 2)
    prepared = prepare(model, processor, place, list(asked), [e.image() for e in asked])
    return model, processor, asked, place, prepared, integrated_gradients(model, place, prepared)


def test_effects_sum_to_what_the_image_is_worth(laboratory):
    model, _, _, place, prepared, effect = laboratory
    with torch.no_grad():
        whole = every_token(prepared)
        worth = token_losses(model, place, prepared, 0 * whole).sum(1) - token_losses(model, place, prepared, whole).sum(1)
    assert torch.allclose(effect.sum((1, 2)), worth, rtol=0.1)
    assert (effect[~prepared.valid] == 0).all()  # after its end nothing is worth anything to an answer
    assert worth.min() > 10  # nats: that it is nothing would be no test


def test_the_path_is_integrated_exactly_where_that_is_known():
    points = path(12)
    assert sum(w for _, w in points) == pytest.approx(1)
    assert sum(w * m for m, w in points) == pytest.approx(0.5)
    assert sum(w / (m + 0.001) for m, w in points) == pytest.approx(
        np.log(1.001 / 0.001), rel=0.01
    )  # steep near 0, as losses are


def test_an_answer_loses_what_it_says_of_a_group_without_its_patches(laboratory):
    """Leaving out is local, and agrees with the gradients: groups against as many patches that show nothing."""
    model, processor, asked, place, prepared, effect = laboratory
    covers, own = [covered(e) for e in asked], [sentences(processor, e) for e in asked]
    shown, nothing = [], []
    for group in range(max(map(len, covers))):
        tokens = np.stack([c[min(group, len(c) - 1)] for c in covers])
        lost = left_out(model, place, prepared, torch.from_numpy(tokens)).numpy()
        for i in (i for i, c in enumerate(covers) if group < len(c)):
            mine, n = own[i][group], own[i].shape[1]
            row = lost[i, :n][mine].sum(), lost[i, :n][~mine].sum(), float(effect[i][:, tokens[i]].sum())
            (shown if group else nothing).append(row)
    (own_loss, other_loss, attributed), (_, empty_loss, empty_attributed) = np.mean(shown, 0), np.mean(nothing, 0)
    assert own_loss > 3 > 1 > abs(other_loss) and abs(empty_loss) < 0.3
    assert attributed > 3 > 1 > abs(empty_attributed)


def test_sentences_of_each_group_are_found(laboratory):
    _, processor, asked, *_ = laboratory
    for example in asked:
        own = sentences(processor, example)
        ids = processor.tokenizer(example.references[0], add_special_tokens=False)["input_ids"]
        assert own.shape == (1 + len(example.scene.groups), len(ids) + 1) and not own[:, -1].any() and not own[0].any()
        for row, group in zip(own[1:], example.scene.groups, strict=True):
            said = processor.tokenizer.decode([t for t, mine in zip(ids, row, strict=False) if mine])
            assert group.thing in said or PLURAL[group.thing] in said
            assert said.count(".") == 1  # one whole sentence


def test_another_wording_is_of_the_same_scene(laboratory):
    asked = laboratory[2]
    for a, b in zip(asked, reworded(asked), strict=True):
        assert (a.name, a.prompt, a.scene) == (b.name, b.prompt, b.scene) and a.references != b.references


# -- agreement -------------------------------------------------------------------------------------------------------------


def test_rank_correlation_of_worked_examples():
    a = np.array([[1.0, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [5, 5, 5, 5]])
    b = np.array([[10.0, 20, 30, 99], [4, 3, 2, 1], [1, 1, 2, 2], [1, 2, 3, 4]])
    found = agreement.spearman(a, b)
    assert found[:3] == pytest.approx([1, -1, 2 / np.sqrt(5)]) and np.isnan(found[3])  # ties: ranks 1.5, 1.5, 3.5, 3.5


def test_captured_share_of_worked_example():
    worth = np.array([[1.0, 2, 3, 4]])
    assert agreement.captured(np.array([[9.0, 1, 1, 1]]), worth, 0.25) == pytest.approx([0.1])
    assert agreement.captured(worth, worth, 0.5) == pytest.approx([0.7])


def test_random_scores_agree_with_nothing_and_importance_with_itself():
    rng = np.random.default_rng(0)
    worth = rng.random((300, 9, 144))
    random = [next(agreement.once(rng.random(144), w))["rho"] for w in worth]
    assert abs(np.mean(random)) < 4 / np.sqrt(143 * 300)
    rows = list(agreement.each_step(worth[0], worth[0]))
    assert [row["part"] for row in rows] == list(agreement.PARTS)
    assert all(row["rho"] == pytest.approx(1) and row["rho_step"] == pytest.approx(1) for row in rows)


# -- rankings made worse ---------------------------------------------------------------------------------------------------


def scores(strategy, name: str, n: int = 144) -> torch.Tensor:
    """Scores for n tokens whose attention is 0, 1, 2, ... (in units of their sum)."""
    attention = torch.arange(n).float()
    return strategy.score(seen([(attention / attention.sum()).tolist()], examples=[dyrate.Example(name, "caption", "", ())]))[0]


def test_noise_keeps_the_ranking_at_0_and_the_values_at_any_share():
    base = scores(dyrate.FastV(), "a")
    assert torch.equal(scores(Noisy(share=0.0), "a"), base)
    for share in (0.1, 0.5, 1.0):
        made = scores(Noisy(share=share), "a")
        assert torch.equal(made.sort().values, base.sort().values)
        assert torch.equal(made, scores(Noisy(share=share), "a")) and not torch.equal(made, scores(Noisy(share=share), "b"))
        assert (made != base).sum() <= round(share * 144)


def test_noise_takes_the_rank_correlation_down_by_its_share():
    """And at 1 every token is as likely to stay as any other, as in random pruning."""
    base = scores(dyrate.FastV(), "a").numpy()
    for share in (0.1, 0.5, 1.0):
        made = np.stack([scores(Noisy(share=share), str(i)).numpy() for i in range(400)])
        correlation = agreement.spearman(made, np.broadcast_to(base, made.shape))
        assert correlation.mean() == pytest.approx(1 - share, abs=0.03)
    stays = (np.argsort(-made, 1)[:, :36, None] == np.arange(144)).any(1).mean(0)
    assert abs(stays - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 400)
    assert abs(stays[72:].mean() - stays[:72].mean()) < 0.02  # whatever the base ranks first


def test_noise_and_reversal_prune_where_and_as_much_as_their_base():
    base = dyrate.FastV(rate=0.5, first_pruned_layer=3)
    assert kept(base, seen(HEADS, layer=3)) == [1, 3] and kept(Reversed(base=base), seen(HEADS, layer=3)) == [0, 2]
    assert Noisy(base=base, share=1.0).stages(8) == (3,) and list(Reversed(base=base).observes(8)) == [2]
    before = dyrate.STRATEGIES["VisPruner"](rate=0.5)
    assert (Reversed(base=before).needs, Reversed(base=before).positions) == (before.needs, "compact")


def test_known_scores_rank_by_name():
    known = Known(rate=0.5, scores={"a": (0.0, 3.0, 1.0, 2.0)})
    assert kept(known, seen(HEADS, examples=ONE)) == [1, 3]
    with pytest.raises(ValueError, match=r"no score is known for \['b'\]"):
        known.score(seen(HEADS, examples=[dyrate.Example("b", "caption", "", ())]))


def test_what_cannot_be_made_worse_is_refused():
    for base in (dyrate.STRATEGIES["FastVRerank"](), dyrate.STRATEGIES["VisionZip"]()):
        with pytest.raises(ValueError, match="only a ranking made once"):
            Noisy(base=base)
    with pytest.raises(ValueError, match="lies in"):
        Noisy(share=1.5)


# -- the rows and the chapter ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The rows of two descriptions, measured at two layers and a few points, their answers cut short."""
    out = tmp_path_factory.mktemp("results") / "pocket-plain"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importance, "scanned_layers", lambda n_layers: [1, 2])
        patch.setattr(importance, "integrated_gradients", partial(integrated_gradients, nodes=2))
        patch.setattr(noise, "SHARES", {0.25: (0.0, 1.0)})
        patch.setattr(noise, "answer_all", lambda *given, **settings: answer_all(*given, **settings | {"max_new_tokens": 6}))
        importance.measure("pocket-plain", 2, out, store=out / "answers", batch_size=2)
    return out.parent


def test_the_program_writes_what_the_chapter_draws(folder):
    (lab,) = measured = chapter.read(str(folder), ["pocket-plain"])
    agreed = chapter.agreement(measured)
    assert lab.layers == sorted({2, importance.late_layer("pocket-plain")})
    assert set(chapter.rankings(agreed).ranking) >= {"FastV", "RandomPrune", *chapter.PUBLISHED, chapter.OTHER_WORDING}
    assert set(chapter.noise(measured).order.dropna()) == {"0.0", "1.0", "reversed"}
    checked = chapter.checks(measured).set_index("measure").value
    assert checked.own > 1 > abs(checked.nothing)
    assert agreed.set_index(["layer", "ranking", "part"]).value.between(-1, 1).all()
    for drawn in (
        figures.importance_maps(chapter.maps(lab), chapter.MAPS),
        figures.agreement_by_layer(agreed, chapter.ATTENTION, chapter.OTHER_WORDING),
        figures.agreement_of_rankings(chapter.rankings(agreed)),
        figures.score_under_noise(chapter.noise(measured), 0.25, 2),
        figures.score_by_agreement(chapter.by_agreement(measured, agreed), 2),
    ):
        drawn.canvas.draw()
        assert all(axis.get_xlabel() or not axis.axison for axis in drawn.axes)


def test_missing_rows_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"study\.importance"):
        chapter.read(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"study\.reference"):
        importance.late_layer("no-such-model")


@pytest.fixture
def by_hand(tmp_path):
    """FastV scores what importance does at half of its noise; its attention agrees with importance by a half."""
    orders = {"0.0": (0.9, 0.7), "0.5": (0.7, 0.6), "1.0": (0.5, 0.5), "reversed": (0.1, 0.2)}
    rows = [
        {"sample": str(i), "method": method, "budget": 0.25, "layer": 2, "order": order, "score": pair[which] + i / 100}
        for i in range(5) for which, method in enumerate(("importance", "FastV")) for order, pair in orders.items()
    ]  # fmt: skip
    ranks = [{"sample": str(i), "layer": 2, "ranking": name, "part": "all", "rho": rho, "captured": 0.5, "rho_step": 0.1}
             for i in range(5) for name, rho in (("prefill", 0.5), ("another wording", 0.8))]  # fmt: skip
    (tmp_path / "x").mkdir()
    pd.DataFrame(rows).to_csv(tmp_path / "x" / "importance_noise.csv.gz", index=False)
    pd.DataFrame(ranks).to_csv(tmp_path / "x" / "importance_ranks.csv.gz", index=False)
    (tmp_path / "x" / "importance.json").write_text(json.dumps({"n": 5, "layers": 8, "late": 2}))
    return chapter.read(str(tmp_path), ["x"])


def test_what_a_ranking_is_worth_on_rows_made_by_hand(by_hand):
    worth = chapter.worth(by_hand).set_index("ranking")
    assert worth.value.to_dict() == pytest.approx({"importance": 0.4, "FastV": 0.2})
    assert worth.loc["FastV"].share == pytest.approx(0.2 / 0.72) and worth.loc["FastV"].reversed == pytest.approx(0.22)
    agreed = chapter.agreement(by_hand)
    (beyond,) = chapter.beyond_agreement(by_hand, agreed).to_dict("records")
    assert beyond["rho"] == 0.5 and beyond["value"] == pytest.approx(0)  # half of the noise explains all of FastV's score
    curve = chapter.by_agreement(by_hand, agreed).set_index(["ranking", "order"]).rho
    assert curve["FastV"].to_dict() == {"0.0": 0.5, "0.5": 0.25, "1.0": 0, "reversed": -0.5}
    assert curve["importance"]["reversed"] == -1
    assert "In part" in chapter.finding(by_hand, agreed, chapter.worth(by_hand))
