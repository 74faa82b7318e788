"""Chapter 6: what is kept of scenes and photographs, and the figure to play with, tried in a browser."""

import json
import re
import subprocess

import numpy as np
import pytest
from PIL import Image

import dyrate
from browser import BROWSER
from study.book import Chapter
from study.chapters import masks
from study.examples import examples
from study.figures.masks import kept_patches
from study.figures.slider import kept_slider
from study.pocket.scenes import Group, Scene
from study.profiles import NOTEBOOKS, defaults


def answer(shown):
    kept = np.zeros((3, 16), bool)
    kept[0], kept[1, :8], kept[2, 12:] = True, True, True
    return masks.Answer("a", Image.new("RGB", (32, 32), "red"), ["a", "red", "cat"], kept, shown)


def test_retention_by_answer_by_hand():
    shown = np.arange(16) >= 14
    (row,) = masks.by_answer([answer(shown)]).to_dict("records")
    assert (row.pop("last_change"), row.pop("steps")) == (2, 3)
    assert row == {"sample": "a", "row_bias": 0.0, "kept_first": 1, "shown_first": 1, "other_first": 1, "kept_last": 4 / 16,
                   "shown_last": 1, "other_last": 2 / 14}  # fmt: skip
    late = answer(shown)
    late.kept = late.kept[2:]
    assert late.row_bias == 0.5  # all in the last row


def measured(answers, residency="mask", images=()):
    """The chapter's measurements with these answers."""
    table = masks.by_answer(answers)
    return masks.Masks("`a`", "`a` (images)", "p", 4, 2, residency, dyrate.Examples(list(images), "x"), table, [])


def test_of_photographs_nothing_is_claimed_about_what_they_show(tmp_path):
    table = masks.by_answer([answer(None)])
    assert list(table) == ["sample", "row_bias", "last_change", "steps", "kept_first", "kept_last"]
    answers, chapter = [answer(None)] * 2, Chapter("06_masks", str(tmp_path))
    photograph = dyrate.Example("a", "caption", "", ("a red cat",))
    masks.record(chapter, measured(answers, images=[photograph]))
    assert set(chapter.numbers) == {"row_bias", "kept_first", "kept_last", "first_pruned_layer"}
    assert chapter.texts["masks_finding"] == (
        "**With `a` (images) and the predictor `p`, 2 of 2 answers end at the same retention, 0.250 (distinct last retentions: "
        "1); at the first token it is 1.00 (1.00 to 1.00).** 95 % intervals."
    )
    assert "scenes only" in chapter.texts["masks_on_content"]
    shown = masks.beside_unpruned([masks.Answer("a", None, [], np.ones((1, 4), bool), None, "a cat", "a dog")])
    assert shown.to_dict("list") == {
        "image": ["1", "1"], "answer": ["unpruned", "pruned"], "mean retention": [1.0, 1.0], "text": ["a dog", "a cat"]
    }  # fmt: skip


def test_late_rates_are_inert_under_eviction_alone():
    other = answer(None)
    other.kept = np.concatenate([other.kept[:2], other.kept[1:2]])
    answers = [answer(None), other, other]
    for residency, explained in (("evict", True), ("mask", False)):
        text = masks.finding(measured(answers, residency))
        assert "2 of 3 answers end at the same retention, 0.500 (distinct last retentions: 2)" in text
        assert ("The 4 rates lie 0.250 apart" in text) == explained
        assert ("Retention changes last at token 2 of 3 (medians)" in text) == explained


def test_wrong_words_of_both_answers_are_in_bold():
    scene = Scene(0, (Group("cat", "red", 1, "large", 0),), "plain", None, None)
    right, wrong = "There is a red cat at the top left.", "There is a blue cat at the top left."
    one = masks.Answer("a", None, [], np.ones((1, 4), bool), None, wrong, right, scene)
    shown = masks.beside_unpruned([one])
    assert shown.text.tolist() == [right, "There is a **blue** cat at the top left."]
    assert shown["right slots"].tolist() == [1, 0.75]
    table = masks.by_answer([one, one])
    assert table.right.tolist() == [0.75, 0.75] and table.right_unpruned.tolist() == [1, 1]
    text = masks.finding(measured([one, one]))
    assert "get 0.75 of the slots right, unpruned 1.00: a difference of -0.25 (-0.25 to -0.25)" in text


def test_a_family_without_a_square_of_patches_is_refused_before_it_is_loaded(tmp_path):
    values = defaults(next(n for n in NOTEBOOKS if n.stem == "06_masks"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    with pytest.raises(ValueError, match="a square grid of patches, which 'qwen2_vl' has not"):
        masks.measure(**values | {"model": str(tmp_path)})


def test_kept_by_token_follows_the_trace():
    model, processor = dyrate.load("pocket")
    scenes = examples("pocket", 2, tasks=["qa_colour"])
    answers = list(masks.kept_by_token(model, processor, dyrate.FastV(rate=0.75), scenes, max_new_tokens=6))
    for one, scene in zip(answers, scenes, strict=True):
        assert one.name == scene.name and one.kept.shape == (len(one.tokens), 144) and one.shown.shape == (144,)
        assert (one.kept.mean(1) == 0.25).all()
        assert one.text and one.scene is None  # a question is not scored by slots
    assert len(masks.unpruned(model, processor, scenes, max_new_tokens=6)) == 2
    assert len(kept_patches(answers).axes) == 12
    again = masks.from_json(json.loads(json.dumps(masks.as_json(answers[1]))), scenes)
    assert (again.kept == answers[1].kept).all() and (again.shown == answers[1].shown).all() and again.text == answers[1].text
    assert again.picture == answers[1].picture and again.tokens == answers[1].tokens


@pytest.mark.skipif(BROWSER is None, reason="no browser")
def test_the_slider_shows_what_is_kept(tmp_path):
    kept = np.zeros((3, 16), bool)
    kept[0], kept[1, :8], kept[2, :3] = True, True, True
    figure = kept_slider("kept", Image.new("RGB", (32, 32), "red"), kept, ["a", "</script>", "cat"]).data
    move = "<script>const r = document.querySelector('input'); r.value = 2; r.dispatchEvent(new Event('input'));</script>"
    (tmp_path / "page.html").write_text(f"<!doctype html><body>{figure}{move}</body>")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/browser",
               "--virtual-time-budget=3000", "--dump-dom", f"file://{tmp_path}/page.html"]  # fmt: skip
    page = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert 'data-kept="3"' in page
    assert "step 2: 3 of 16 image tokens kept" in page
    assert re.search(r'<span style="font-weight: bold; opacity: 1;">cat ', page)
    assert "http" not in figure.replace("http-equiv", "")
