"""The pocket laboratory: scenes follow from seeds, texts are true and grammatical, splits are disjoint, training resumes."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dyrate.models import POCKET
from study.pocket import language, scenes
from study.pocket.batches import Config
from study.pocket.scenes import COLOURS, GRID, PATCH, PLACES, SIZES, THINGS, compose, render, seeds
from study.pocket.train import Run
from study.pocket.vlm import build_tokenizer
from study.scores import slot_scores

SAMPLE = [compose(seed) for seed in seeds("test", 200, 5000)]


def tokens(text: str) -> int:
    return len(re.findall(r"[A-Za-z]+|[^\sA-Za-z]", text))


def test_a_seed_determines_scene_picture_and_texts():
    for seed in (3, 77, 2_000_000_001):
        a, b = compose(seed), compose(seed)
        assert a == b
        assert render(a).image.tobytes() == render(b).image.tobytes()
        assert (render(a).cover == render(b).cover).all()
        assert language.every_turn(a) == language.every_turn(b)
    assert render(compose(3)).image.tobytes() != render(compose(4)).image.tobytes()


def test_painted_words_are_the_same_on_every_machine():
    """Where libfribidi is installed, Pillow would set letters otherwise: models that were trained without misread such words."""
    found = {word: hashlib.sha256(scenes._word(word).tobytes()).hexdigest()[:16] for word in ("BOATHOUSE", "SUNLIGHT")}
    assert found == {"BOATHOUSE": "985d79f2a1fc50fc", "SUNLIGHT": "1180c3809a3ac164"}
    assert {word: scenes._word(word).width for word in found} == {"BOATHOUSE": 104, "SUNLIGHT": 87}


def test_groups_share_no_patch_and_lie_in_their_place():
    for scene in SAMPLE:
        picture = render(scene)
        covers = [*picture.cover, picture.word_cover]
        assert np.sum(covers, axis=0).max() == 1
        for group, cover in zip(scene.groups, picture.cover, strict=True):
            rows, columns = np.nonzero(cover)
            assert len(rows) >= 1
            assert set(zip(rows // 4, columns // 4, strict=True)) == {divmod(group.place, 3)}
    assert {len(s.groups) for s in SAMPLE} == {2, 3, 4, 5, 6}
    assert picture.image.size == (GRID * PATCH,) * 2 == (168, 168)


def test_cover_is_where_the_pixels_change():
    """The ground truth against the picture itself: without a group, only the patches of its cover change much."""
    scene = next(s for s in SAMPLE if len(s.groups) == 3 and s.word is None)
    shown = render(scene)
    without = scenes.Scene(scene.seed, scene.groups[:2], scene.texture, None, None)
    difference = np.abs(np.asarray(shown.image, float) - np.asarray(render(without).image, float)).sum(2)
    changed = (difference.reshape(GRID, PATCH, GRID, PATCH) > 60).mean((1, 3)) >= 0.03
    assert changed.any()
    assert not (changed & ~shown.cover[2]).any()


def test_things_are_distinct_at_the_smallest_size():
    masks = {}
    for thing, (glyph, _) in THINGS.items():
        canvas = np.zeros((SIZES["small"],) * 2)
        glyph = np.asarray(scenes._glyph(glyph, SIZES["small"]), float)
        canvas[: glyph.shape[0], : glyph.shape[1]] = glyph
        masks[thing] = (canvas - canvas.mean()).ravel() / canvas.std() / np.sqrt(canvas.size)
    names = list(masks)
    assert len(names) >= 24
    similar = np.array([[masks[a] @ masks[b] for a in names] for b in names]) - np.eye(len(names))
    assert similar.max() < 0.85, np.array(names)[list(np.unravel_index(similar.argmax(), similar.shape))]


def test_colours_are_apart_and_off_the_ground():
    colours = np.array(list(COLOURS.values()), float)
    apart = np.linalg.norm(colours[:, None] - colours, axis=-1) + 1e3 * np.eye(len(colours))
    assert apart.min() > 60


def test_descriptions_read_back_as_the_scene():
    for scene in SAMPLE:
        truth = {(g.thing, g.colour, g.count, g.place) for g in scene.groups}
        for write in (language.description, language.recap, language.look_late):
            read = {tuple(g.values()) for g in language.read_description(write(scene)) if g["place"] is not None}
            assert read == truth
        assert slot_scores(scene, language.description(scene)).all()


def test_slot_scores_by_hand():
    group = scenes.Group("cat", "red", 2, "small", 4), scenes.Group("sun", "blue", 1, "large", 0)
    scene = scenes.Scene(0, group, "plain", None, None)
    text = "There are two green cats in the centre."
    assert slot_scores(scene, text).tolist() == [[1, 0, 1, 1], [0, 0, 0, 0]]
    assert slot_scores(scene, "Nothing.").sum() == 0


def test_lengths_and_grammar():
    for scene in SAMPLE:
        assert 30 <= tokens(language.description(scene)) <= 70
        assert len(set(language.captions(scene))) == 5
        for turn in language.every_turn(scene):
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", turn.response), turn
            assert not re.search(r"\b(mouses|snowmans|scissorses)\b", turn.response)
            assert not re.search(r"\bis (two|three)\b|\bare an? ", turn.response), turn
            assert turn.response[0] == turn.response[0].upper() or turn.task.startswith("qa_")


def test_a_recap_repeats_and_look_late_names_something_new():
    for scene in SAMPLE:
        summary = language.read_description(re.split(r"(?=To sum up|In short)", language.recap(scene))[1])
        assert {group["thing"] for group in summary} == {g.thing for g in scene.groups}
        head, tail = re.split(r"(?=One thing is left|Last,)", language.look_late(scene))
        late = language.read_description(tail)
        assert len(late) == 1
        assert late[0]["thing"] not in {group["thing"] for group in language.read_description(head)}


def test_answers_are_true_and_existence_is_balanced():
    yes = []
    for scene in SAMPLE:
        by_name = {n: g for g in scene.groups for n in (g.thing, language.PLURAL[g.thing])}
        for variant in range(4):
            for kind in ("count", "colour", "place"):
                turn = language.question(scene, kind, variant)
                named = max((n for n in by_name if re.search(rf"\b{n}\b", turn.prompt)), key=len)
                group = by_name[named]
                truth = {"count": ("one", "two", "three")[group.count - 1], "colour": group.colour, "place": PLACES[group.place]}
                assert turn.response == truth[kind]
            turn = language.question(scene, "existence", variant)
            colour, thing = re.fullmatch(r"Is there an? (\w+) (.+)\?", turn.prompt).groups()
            assert (turn.response == "yes") == any((g.colour, g.thing) == (colour, thing) for g in scene.groups)
            yes.append(turn.response == "yes")
            a, choice, b = re.fullmatch(
                r"(?:Is|Are) the (.+?) (left or right of|above or below) the (.+)\?",
                language.question(scene, "relation", variant).prompt,
            ).groups()
            a, b = by_name[a].place, by_name[b].place
            truth = ("left" if a % 3 < b % 3 else "right") if "left" in choice else ("above" if a // 3 < b // 3 else "below")
            assert language.question(scene, "relation", variant).response == truth
    assert 0.42 < np.mean(yes) < 0.58


def test_every_word_is_one_token():
    tokenizer = build_tokenizer()
    for scene in SAMPLE:
        for turn in language.every_turn(scene):
            text = f"{turn.prompt} {turn.response}"
            ids = tokenizer(text)["input_ids"][1:]
            assert len(ids) == tokens(text)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(tokenizer(turn.response)["input_ids"][1:]) == turn.response
    assert tokenizer.decode(tokenizer("xylophone")["input_ids"], skip_special_tokens=True) == "xylophone"


def test_no_test_scene_occurs_in_training():
    """Splits are disjoint ranges of seeds; here also no test scene's layout, and so none of its texts, was trained on."""
    record = json.loads((POCKET / "training.json").read_text())
    assert record["scenes_seen"] < scenes.SPLITS["validation"] < scenes.SPLITS["test"]
    test = {compose(seed).layout for seed in seeds("test", 1000)}
    trained = (compose(seed).layout for seed in seeds("train", record["scenes_seen"]))
    assert not any(layout in test for layout in trained)


TINY = Config(tower_steps=3, tower_batch=2, language_steps=2, language_batch=2, questions=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The state of a training that nothing stopped."""
    run = Run(tmp_path_factory.mktemp("whole"), TINY, "cpu")
    run.train()
    return load_file(run.work / "state.safetensors")


@pytest.mark.parametrize("stop", [("tower", 2), ("language", 1)])
def test_killed_training_resumes_to_the_same_weights(tmp_path, whole, stop):

    class Killed(BaseException):
        pass

    class Broken(Run):
        save_seconds = 0.0

        def save(self, optimizer):
            super().save(optimizer)
            if self.done[stop[0]] == stop[1]:
                raise Killed

    with pytest.raises(Killed):
        Broken(tmp_path / "broken", TINY, "cpu").train()
    again = Run(tmp_path / "broken", TINY, "cpu")
    again.train()
    broken = load_file(tmp_path / "broken" / "state.safetensors")
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[k], broken[k]) for k in whole)
    assert again.done == {"tower": 3, "language": 2}


def test_checkpoint_is_small_and_no_pickle():
    files = [p for p in POCKET.iterdir() if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 20e6
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
