"""The explorer: what its traces hold, and the page in a browser, with real keys and fingers."""

from __future__ import annotations

import base64
import json
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch

import dyrate
from browser import BROWSER, Browser
from dyrate.generation import answer_examples
from dyrate.recording import record
from study.answers import Condition
from study.chapters.masks import kept_by_token
from study.examples import examples
from study.explorer.__main__ import main
from study.explorer.findings import by_group, seen_and_right
from study.explorer.measure import METHODS, PRUNED_FROM, RETENTIONS, TASK, conditions, explored
from study.explorer.stored import bits, kept, mask, packed, read_laboratories, read_scene
from study.pocket.language import description
from study.pocket.scenes import Group, Scene, compose, seeds
from study.profiles import ROOT
from study.scores import marked, slot_scores

TRACES = ROOT / "data" / "explorer"


@pytest.fixture(scope="module")
def plain():
    return dyrate.load("pocket-plain", dtype=torch.float32)


def condition(method: str, retention: float) -> Condition:
    return Condition(f"{method} {retention:g}", dyrate.STRATEGIES[method].at(retention, 8), method, retention)


# -- words ----------------------------------------------------------------------------------------------------------------


def test_marked_words_by_hand():
    scene = Scene(0, (Group("sun", "red", 2, "large", 0), Group("cat", "blue", 1, "small", 4)), "plain", None, None)
    text = "Two green suns are at the top left. In the middle is a black cow, and a blue dog on the left."
    found = [(text[m.start : m.end], m.slot, m.group, m.right) for m in marked(scene, text)]
    assert found == [
        ("Two", "count", 0, True), ("green", "colour", 0, False), ("suns", "thing", 0, True), ("top left", "place", 0, True),
        ("middle", "place", 1, True), ("a", "count", 1, True), ("black", "colour", 1, False), ("cow", "thing", 1, False),
    ]  # fmt: skip
    third = marked(scene, text + " A blue cat is in the centre. A red sun is on the right.")
    assert [m.group for m in third if not m.right][-4:] == [None] * 4 and sum(m.right for m in third) == 3 + 4


def test_as_many_words_are_right_as_the_score_counts():
    for seed in seeds("test", 60):
        scene, other = compose(seed), compose(seed + 1)
        assert all(m.right for m in marked(scene, description(scene)))
        for text in (description(scene), description(other), description(scene)[:60] + description(other)):
            assert sum(m.right for m in marked(scene, text)) == slot_scores(scene, text).sum()


# -- traces ---------------------------------------------------------------------------------------------------------------


def test_a_trace_holds_what_the_model_does(plain):
    """Observed answers are plain answers, kept tokens are those of the strategy's own trace, and they survive the file."""
    asked = examples("laboratories", 3, tasks=[TASK])
    full, rerank = Condition("Full", dyrate.Full(), "Full"), condition("FastVRerank", 0.1)
    found = {c.label: answers for c, answers in explored(*plain, [full, rerank], asked, max_new_tokens=12)}
    ((_, _, unobserved),) = answer_examples(*plain, asked, max_new_tokens=12)
    assert [a.text for a in found["Full"]] == unobserved.texts and all(a.kept.all() for a in found["Full"])
    for answer, truth in zip(
        found["FastVRerank 0.1"], kept_by_token(*plain, rerank.strategy, asked, max_new_tokens=12), strict=True
    ):
        assert [piece.strip() for piece in answer.pieces] == truth.tokens
        assert (answer.kept == truth.kept).all() and (answer.kept.sum(1) == 15).all()
        stored = json.loads(json.dumps(packed(answer)))
        assert (kept(stored) == truth.kept).all() and len(stored["kept"]) > 1


def test_shares_are_those_that_recording_finds(plain):
    asked = examples("laboratories", 2, tasks=[TASK])
    ((_, answers),) = explored(*plain, [Condition("Full", dyrate.Full(), "Full")], asked, max_new_tokens=8)
    recordings = record(*plain, [e.image() for e in asked], [e.prompt for e in asked], max_new_tokens=8)
    for answer, recording in zip(answers, recordings, strict=True):
        np.testing.assert_allclose(answer.shares, recording.shares[:, PRUNED_FROM:].mean((1, 2)), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_shares_are_of_what_is_left(plain, method):
    """Under any method they sum to 1, and nothing is left to look at where no image token is kept."""
    asked = examples("laboratories", 2, tasks=[TASK])
    ((_, some),) = explored(*plain, [condition(method, 0.25)], asked, max_new_tokens=6)
    for answer in some:
        np.testing.assert_allclose(answer.shares.sum(1), 1, atol=1e-5)
        assert (answer.shares > 0)[1:].all()
    nothing = Condition("x", dyrate.STRATEGIES["RandomPrune"](rate=1.0), "x")
    ((_, none),) = explored(*plain, [nothing], asked, max_new_tokens=6)
    assert all((answer.shares[:, 1] == 0).all() for answer in none)


def test_prompts_of_different_lengths_are_refused(plain):
    mixed = examples("laboratories", 1, tasks=["caption", "recap"])
    with pytest.raises(ValueError, match="the prompts differ in length"):
        next(explored(*plain, [Condition("Full", dyrate.Full(), "Full")], mixed))


def test_bits_by_hand():
    some = np.zeros(144, bool)
    some[[0, 9, 143]] = True
    assert base64.b64decode(bits(some)) == bytes([0b10000000, 0b01000000, *[0] * 15, 1])
    assert (mask(bits(some)) == some).all()
    changing = {"pieces": list("abcd"), "kept": [[0, bits(~some)], [2, bits(some)]]}
    assert (kept(changing) == [~some, ~some, some, some]).all()


def test_methods_are_measured_one_by_one(tmp_path):
    asked = ["--model", "pocket-plain", "--out", str(tmp_path), "--n", "1", "--methods"]
    main([*asked, "Full"])
    before = read_scene(next(tmp_path.glob("pocket-plain/*.js")))
    main([*asked, "DyRate"])
    after = read_scene(next(tmp_path.glob("pocket-plain/*.js")))
    assert list(before["answers"]) == ["Full"] and before["answers"]["Full"] == after["answers"]["Full"]
    assert [c["label"] for c in read_laboratories(tmp_path)["pocket-plain"]["conditions"]] == list(after["answers"])
    assert list(after["answers"]) == ["Full", "DyRate evict-0.33-seed0"]
    about = tmp_path / "pocket-plain" / "about.json"
    about.write_text(about.read_text().replace('"cpu"', '"a GPU"'))
    for _ in range(2):
        main([*asked, "DyRate, curves at every step"])
    there = read_laboratories(tmp_path)["pocket-plain"]
    assert there["conditions"][-1]["method"] == "DyRate, curves at every step" and there["device"] == "a GPU, cpu"
    with pytest.raises(ValueError, match="traces of other scenes"):
        main([*asked[:-2], "2", "--methods", "Full"])


def test_groups_by_hand(tmp_path):
    first = np.arange(144) < 10
    answer = {"pieces": ["a", " sun"], "kept": [[0, bits(first)], [1, bits(~first)]]}
    answer["marks"] = [[0, 1, 2, 1, 1], [1, 2, 0, 1, 0], [1, 2, 0, -1, 0]]
    stored = {"groups": [{"patches": bits(np.arange(144) % 72 < 2)}, {"patches": bits(~first)}], "answers": {"x": answer}}
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "s.js").write_text(f"explorer.add({json.dumps(stored)});\n")
    condition = {"label": "x", "method": "FastV", "retention": 0.1}
    (tmp_path / "lab" / "about.json").write_text(json.dumps({"scenes": ["s"], "conditions": [condition]}))
    found = by_group(tmp_path)
    assert found[["group", "right", "patches", "seen"]].to_numpy().tolist() == [[0, 0, 4, 2], [1, 0.25, 134, 0]]


def test_what_a_kept_patch_is_worth_by_hand():
    groups = pd.DataFrame({"scene": list("aabbcc"), "method": "RandomPrune", "retention": 0.1, "seen": [2, 0] * 3,
                           "right": [1, 0.5, 1, 0, 0.25, 0.25]})  # fmt: skip
    other = groups.assign(method="FastV", right=0), groups.assign(retention=0.5, right=0)
    found = seen_and_right(pd.concat([groups, *other]))
    assert found["some"]["value"] == 0.75 and found["none"]["value"] == 0.25 and found["some"]["n"] == found["none"]["n"] == 3
    assert found["apart"]["value"] == 0.5 and found["apart"]["low"] == 0 and found["apart"]["high"] == 1


def test_the_committed_traces_are_whole_and_small():
    for name, about in read_laboratories(TRACES).items():
        assert len(about["scenes"]) >= 12
        wanted = {c.label for c in conditions(about["layers"], ROOT / "data" / name / "dyrate")}
        methods = {f"{m} {x:g}" for m in METHODS for x in RETENTIONS}
        assert methods < wanted
        files = [TRACES / name / f"{scene}.js" for scene in about["scenes"]]
        assert sum(file.stat().st_size for file in files) < 1_000_000
        for file in files:
            stored = set(read_scene(file)["answers"])
            assert methods < stored <= wanted  # a predictor may be younger than the traces
            assert (TRACES / "scenes" / f"{file.stem}.webp").stat().st_size < 20_000


def test_the_committed_traces_are_the_models(plain):
    about = read_laboratories(TRACES)["pocket-plain"]
    asked = examples("laboratories", len(about["scenes"]), tasks=[TASK])
    ((measured, answers),) = explored(*plain, [condition("FastV", 0.25)], asked)
    for example, answer in zip(asked, answers, strict=True):
        stored = read_scene(TRACES / "pocket-plain" / f"{example.name}.js")["answers"][measured.label]
        assert stored["pieces"] == answer.pieces and (kept(stored) == answer.kept).all()


# -- the page -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The explorer alone on a page, opened from a folder."""
    sys.path.insert(0, str(ROOT / "book"))
    import explorer_page

    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(TRACES, folder / "_static")
    for file in (ROOT / "book" / "_assets").glob("[eu]*"):
        shutil.copy(file, folder / "_static")
    body = explorer_page.explorer(read_laboratories(TRACES))
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
    (folder / "page.html").write_text(
        f"<!doctype html><html data-theme='light'>{head}<body>{body}</body></html>", encoding="utf-8"
    )
    return folder / "page.html"


@pytest.fixture(params=[1200, 390], ids=["desktop", "phone"])
def browser(request, page, tmp_path):
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome found: install one to test the explorer in a browser")
    with Browser(tmp_path / "profile", request.param) as browser:
        browser.open(page)
        browser.wait(f"{text('said')}.startsWith('Token 1 of')")
        yield browser
        assert not browser.complaints
        assert browser.value("document.documentElement.scrollWidth") <= request.param


def text(part: str) -> str:
    return f"document.querySelector('[data-part={part}]').textContent"


def trace(laboratory: str, number: int) -> dict:
    return read_scene(TRACES / laboratory / f"{read_laboratories(TRACES)[laboratory]['scenes'][number]}.js")


def expected(stored: dict, label: str, step: int) -> tuple[int, str]:
    answer = stored["answers"][label]
    return int(kept(answer)[step].sum()), "".join(answer["pieces"]).strip()


def shown(browser) -> tuple[int, str]:
    return browser.value(f"[+document.querySelector('canvas').dataset.kept, {text('pruned')}.trim()]")


def test_choosing_changes_what_is_shown(browser):
    first = trace("pocket-plain", 0)
    assert shown(browser) == list(expected(first, "FastV 0.25", 0))
    assert browser.value(f"{text('unpruned')}.trim()") == expected(first, "Full", 0)[1]
    assert browser.value("document.querySelectorAll('script[src*=description]').length") == 1  # loaded when asked for
    for change, stored, label in [
        ("[value=\"VisionZip 0.1\"]", first, "VisionZip 0.1"),
        ("[value$=\"-2000000003\"]", trace("pocket-plain", 3), "VisionZip 0.1"),
        ("[value^='DyRate curves']", trace("pocket-plain", 3), "DyRate curves-0.25-seed0"),
        ("[value^='DyRate evict']", trace("pocket-plain", 3), "DyRate evict-0.33-seed0"),
    ]:  # fmt: skip
        browser.touch(f"label:has({change})")
        browser.wait(f"{text('pruned')}.trim() === {json.dumps(expected(stored, label, 0)[1])}")
        assert shown(browser) == list(expected(stored, label, 0))
        right = sum(mark[-1] for mark in stored["answers"][label]["marks"])
        assert browser.value(text("pruned-right")) == f"{right} of {4 * len(stored['groups'])} slots right"
        assert browser.value("document.querySelectorAll('[data-part=pruned] .right').length") >= right
    browser.value("(s => { s.value = 'smol'; s.dispatchEvent(new Event('change', {bubbles: true})) })"
                  "(document.querySelector('select'))")  # fmt: skip
    answer = expected(trace("smol", 3), "DyRate evict-0.33-seed0", 0)  # its own, trained as the other's
    browser.wait(f"{text('pruned')}.trim() === {json.dumps(answer[1])}")
    assert shown(browser) == list(answer)


def test_keys_move_over_tokens_and_conditions(browser):
    browser.touch('label:has([value="LinearAnneal 0.5"])')
    browser.wait(f"{text('method')} === 'LinearAnneal 0.5'")
    for key, label in [
        ("ArrowRight", "LinearAnneal 0.25"), ("ArrowUp", "VisionZip 0.25"), ("ArrowUp", "FastVRerank 0.25"),
        ("ArrowLeft", "FastVRerank 0.5"), ("ArrowDown", "VisionZip 0.5"), ("ArrowDown", "LinearAnneal 0.5"),
    ]:  # fmt: skip
        browser.press(key)
        browser.wait(f"{text('method')} === '{label}'")
    browser.press("Tab")
    assert browser.value("document.activeElement.name") == "step"
    stored = trace("pocket-plain", 0)
    counts = []
    for step in range(1, 20):
        browser.press("ArrowRight")
        counts.append(shown(browser)[0])
        assert counts[-1] == expected(stored, "LinearAnneal 0.5", step)[0]
        assert browser.value(text("said")).startswith(f"Token {step + 1} of")
        assert browser.value("document.querySelector('.now').dataset.step") == str(step)
    assert counts[0] > counts[-1]


def test_a_touched_word_says_what_it_is(browser):
    stored = trace("pocket-plain", 0)
    answer = stored["answers"]["FastV 0.25"]
    token, _, _, group, _ = next(m for m in answer["marks"] if not m[-1] and m[3] >= 0 and m[2] == 0)
    browser.touch(f'[data-part=pruned] [data-step="{token}"]')
    said = browser.value(text("said"))
    assert said.startswith(f"Token {token + 1} of") and said.endswith(
        f"Object wrong: the picture shows {stored['groups'][group]['thing']}."
    )
    patches = mask(stored["groups"][group]["patches"])
    there = int((patches & kept(answer)[token]).sum())
    assert f"{there} of the {patches.sum()} that show {stored['groups'][group]['text']} (outlined)" in said


def test_charts_follow_the_theme_and_lead_to_a_token(browser):
    def told(label, step):
        """What the legend should say: the shares of the four segments at a step."""
        shares = base64.b64decode(trace("pocket-plain", 0)["answers"][label]["shares"])[4 * step : 4 * step + 4]
        return ",".join(f"{share / 255:.2f}" for share in shares)

    legend = "[...document.querySelectorAll('.u-legend .u-value')].slice(1, 5).map(e => e.textContent).join()"
    assert browser.value("document.querySelectorAll('.u-over').length") == 2
    assert browser.value(legend) == told("FastV 0.25", 0)
    browser.value("document.documentElement.dataset.theme = 'dark'")
    browser.wait("getComputedStyle(document.querySelector('.explorer')).getPropertyValue('--paper').trim() !== '#fff'")
    browser.touch(".u-over")
    steps = len(trace("pocket-plain", 0)["answers"]["FastV 0.25"]["pieces"])
    browser.wait(f"Math.abs(document.querySelector('[name=step]').value - {steps / 2}) < 3")
    browser.touch('label:has([value="RandomPrune 0.1"])')
    step = browser.value("+document.querySelector('[name=step]').value")
    browser.wait(f"{legend} === '{told('RandomPrune 0.1', step)}'")


def test_paper_has_pictures_in_its_place(browser):
    visible = "[...document.querySelectorAll('.explorer, .explorer-print')].map(e => e.offsetHeight > 0)"
    assert browser.value(visible) == [True, False]
    browser.send("Emulation.setEmulatedMedia", media="print")
    assert browser.value(visible) == [False, True]
    pictures = "[...document.querySelectorAll('.explorer-print img')].map(i => [i.naturalWidth, i.alt])"
    assert [width for width, alt in browser.value(pictures) if "patches kept" in alt] == [168] * 6


def test_the_browser_test_can_fail(tmp_path):
    """The negative control: an error, a missing file and an outside request are seen."""
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome found: install one to test the explorer in a browser")
    (tmp_path / "bad.html").write_text(
        "<script src='missing.js'></script><script>nothing.here()</script><img src='https://example.org/a.png'>"
    )
    with Browser(tmp_path / "profile") as browser:
        browser.open(tmp_path / "bad.html")
        browser.wait("document.images[0].complete")
        complaints = "\n".join(browser.complaints)
    for sign in ("ERR_FILE_NOT_FOUND", "nothing is not defined", "https://example.org/a.png"):
        assert sign in complaints
