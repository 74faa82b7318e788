"""Scenes of the pocket laboratory: what is in a picture, and the picture itself.

A scene is 2 to 6 groups of alike things on a textured, cluttered ground, sometimes with a painted word. One integer, its
seed, determines all of it. The picture is divided into a 3 x 3 grid of places; a group lies inside one of them, so no
patch is shared by two groups and the renderer can say which patches show which group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 168  # pixels
PATCH = 14  # pixels: 12 x 12 = 144 image tokens
GRID = SIDE // PATCH
CELL = SIDE // 3  # pixels of one place: 4 x 4 patches

# name -> (glyph of DejaVu Sans, plural)
THINGS = {
    "sun": ("\u2600", "suns"), "cloud": ("\u2601", "clouds"), "umbrella": ("\u2602", "umbrellas"),
    "snowman": ("\u2603", "snowmen"), "star": ("\u2605", "stars"), "telephone": ("\u260e", "telephones"),
    "cup": ("\u2615", "cups"), "clover": ("\u2618", "clovers"), "skull": ("\u2620", "skulls"),
    "moon": ("\u263e", "moons"), "king": ("\u265a", "kings"), "castle": ("\u265c", "castles"),
    "bishop": ("\u265d", "bishops"), "knight": ("\u265e", "knights"), "heart": ("\u2665", "hearts"),
    "diamond": ("\u2666", "diamonds"), "spade": ("\u2660", "spades"), "anchor": ("\u2693", "anchors"),
    "flag": ("\u2691", "flags"), "gear": ("\u2699", "gears"), "plane": ("\u2708", "planes"),
    "envelope": ("\u2709", "envelopes"), "pair of scissors": ("\u2702", "pairs of scissors"),
    "pencil": ("\u270e", "pencils"), "snowflake": ("\u2744", "snowflakes"), "flower": ("\u273f", "flowers"),
    "hand": ("\u261b", "hands"), "house": ("\u2302", "houses"), "mouse": ("\U0001f42d", "mice"),
    "cow": ("\U0001f42e", "cows"), "cat": ("\U0001f431", "cats"), "monkey": ("\U0001f435", "monkeys"),
    "wheel": ("\u2638", "wheels"), "note": ("\u266b", "notes"), "keyboard": ("\u2328", "keyboards"),
    "arrow": ("\u27a1", "arrows"),
}  # fmt: skip
COLOURS = {
    "red": (214, 32, 38), "orange": (245, 130, 22), "yellow": (250, 226, 40), "green": (28, 140, 52),
    "blue": (34, 74, 210), "purple": (138, 40, 168), "black": (18, 18, 20), "white": (250, 250, 250),
}  # fmt: skip
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
TEXTURES = ("plain", "striped", "dotted", "checked")
SIZES = {"small": 18, "large": 25}  # pixels of the longer side
WORDS = (
    "OPEN", "STOP", "EXIT", "SALE", "PARK", "CAFE", "TAXI", "FIRE", "LOVE", "HOME", "FREE", "SHOP",
    "BANK", "ROAD", "FISH", "MILK", "TEA", "ICE", "BUS", "ZOO", "GYM", "ART", "SKY", "INK",
)  # fmt: skip
# Two halves each, so that neither half tells the word: it takes the patches of both to read one.
HALVES = ("FIRE", "SUN", "RAIN", "FARM", "BOAT"), ("HOUSE", "LIGHT", "WOOD", "FISH", "BIRD")
LONG_WORDS = tuple(a + b for a in HALVES[0] for b in HALVES[1])

# Splits are disjoint ranges of seeds; a scene's seed tells its split.
SPLITS = {"train": 0, "validation": 1_000_000_000, "test": 2_000_000_000}


@dataclass(frozen=True)
class Group:
    """Some alike things in one place. count: 1 to 3; size: small or large; place: index into PLACES."""

    thing: str
    colour: str
    count: int
    size: str
    place: int


@dataclass(frozen=True)
class Scene:
    """What a picture shows. word: the painted word and its place, or None; a long word also fills the place on the right."""

    seed: int
    groups: tuple[Group, ...]
    texture: str
    word: str | None
    word_place: int | None

    @property
    def subjects(self) -> list[Group]:
        """The large groups (one or two), which a short caption names, in reading order."""
        return sorted((g for g in self.groups if g.size == "large"), key=lambda g: g.place)

    @property
    def layout(self) -> tuple:
        """All of the scene but its seed: two scenes of one layout differ only in clutter and jitter."""
        return frozenset(self.groups), self.texture, self.word, self.word_place


@dataclass(frozen=True)
class Picture:
    """A rendered scene. cover[i] is a (12, 12) boolean grid: the patches that show group i; word_cover: the word's."""

    image: Image.Image
    cover: np.ndarray
    word_cover: np.ndarray

    @property
    def shown(self) -> np.ndarray:
        """The patches, in raster order (144,), that show a group or the word."""
        return (self.cover.any(0) | self.word_cover).flatten()


def seeds(split: str, n: int, start: int = 0) -> range:
    """The seeds of `n` scenes of a split ("train", "validation" or "test")."""
    first = SPLITS[split] + start
    return range(first, first + n)


def compose(seed: int, long_words: bool = False) -> Scene:
    """Decide what the scene of this seed shows, without drawing it. long_words: some painted words are long ones."""
    rng = np.random.default_rng(seed)
    n_groups = int(rng.integers(2, 7))
    n_large = int(rng.integers(1, 3))
    places = rng.permutation(9)
    things = rng.choice(list(THINGS), n_groups, replace=False)
    colours = rng.choice(list(COLOURS), n_groups)
    groups = tuple(
        Group(str(things[i]), str(colours[i]), int(rng.integers(1, 4)), "large" if i < n_large else "small", int(places[i]))
        for i in range(n_groups)
    )
    has_word = rng.random() < 0.5
    word = str(rng.choice(WORDS)) if has_word else None
    place = int(places[n_groups]) if has_word else None
    texture = str(rng.choice(TEXTURES))
    if long_words and has_word and rng.random() < 0.6:
        free = {int(p) for p in places[n_groups:]}
        wide = sorted(p for p in free if p % 3 < 2 and p + 1 in free)
        if wide:
            word, place = str(rng.choice(LONG_WORDS)), int(rng.choice(wide))
    return Scene(seed, groups, texture, word, place)


def render(scene: Scene) -> Picture:
    """Draw a scene: an RGB picture of 168 x 168 pixels and the patches that each group covers."""
    rng = np.random.default_rng([scene.seed, 1])
    image = Image.fromarray(_ground(scene.texture, rng))
    _clutter(ImageDraw.Draw(image), rng)
    cover = np.zeros((len(scene.groups), GRID, GRID), dtype=bool)
    for i, group in enumerate(scene.groups):
        glyph = _glyph(THINGS[group.thing][0], SIZES[group.size])
        colour = tuple(int(c) for c in np.clip(np.array(COLOURS[group.colour]) + rng.integers(-14, 15, 3), 0, 255))
        shown = Image.new("L", image.size)
        for spot in _spots(group, glyph.size, rng):
            image.paste(colour, spot, glyph)
            shown.paste(glyph, spot)
        cover[i] = _patches(shown)
    word_cover = np.zeros((GRID, GRID), dtype=bool)
    if scene.word:
        text = _word(scene.word)
        row, column = divmod(scene.word_place, 3)
        room = 2 * CELL if scene.word in LONG_WORDS else CELL
        x = column * CELL + int(rng.integers(0, room - text.width + 1))
        y = row * CELL + int(rng.integers(0, CELL - text.height + 1))
        image.paste((15, 15, 15) if rng.random() < 0.5 else (250, 250, 250), (x, y), text)
        shown = Image.new("L", image.size)
        shown.paste(text, (x, y))
        word_cover = _patches(shown)
    return Picture(image, cover, word_cover)


def _spots(group: Group, size: tuple[int, int], rng: np.random.Generator) -> list[tuple[int, int]]:
    """Upper left corners of a group's things: a lone one anywhere in its place, several in different quarters."""
    row, column = divmod(group.place, 3)
    if group.count == 1:
        quarters, room = [(0, 0)], CELL
    else:
        quarters, room = [divmod(int(q), 2) for q in rng.permutation(4)[: group.count]], CELL // 2
    return [
        (
            column * CELL + c * room + int(rng.integers(0, room - size[0] + 1)),
            row * CELL + r * room + int(rng.integers(0, room - size[1] + 1)),
        )
        for r, c in quarters
    ]


def _patches(mask: Image.Image) -> np.ndarray:
    """Patches of which the mask paints at least 3 % (6 of 196 pixels)."""
    return np.asarray(mask.reduce(PATCH)) >= 0.03 * 255


@cache
def _glyph(character: str, side: int) -> Image.Image:
    """A glyph as an alpha mask whose longer side is `side` pixels."""
    large = _text_mask(character, "DejaVuSans.ttf", 96)
    scale = side / max(large.size)
    return large.resize((max(1, round(large.width * scale)), max(1, round(large.height * scale))), Image.Resampling.BOX)


@cache
def _word(text: str) -> Image.Image:
    return _text_mask(text, "DejaVuSans-Bold.ttf", 15 if text in LONG_WORDS else 17)


def _text_mask(text: str, font: str, size: int) -> Image.Image:
    path = Path(matplotlib.get_data_path()) / "fonts/ttf" / font
    face = ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)  # the other needs what a system may lack
    left, top, right, bottom = face.getbbox(text)
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), text, fill=255, font=face)
    return mask.crop(mask.getbbox())


def _ground(texture: str, rng: np.random.Generator) -> np.ndarray:
    """A textured ground in a muted middle tone, so that black and white things both stand out."""
    tone = rng.integers(118, 176) + rng.integers(-22, 23, 3)
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    period = int(rng.integers(9, 18))
    if texture == "striped":
        a, b = rng.normal(size=2)
        pattern = np.sin((a * x + b * y) / np.hypot(a, b) * 2 * np.pi / period) > 0
    elif texture == "dotted":
        pattern = (x % period - period / 2) ** 2 + (y % period - period / 2) ** 2 < (period / 3.5) ** 2
    elif texture == "checked":
        pattern = (x // period + y // period) % 2 == 0
    else:
        pattern = np.zeros((SIDE, SIDE))
    grain = rng.integers(-8, 9, (SIDE, SIDE), dtype=np.int16) + int(rng.integers(14, 24)) * pattern.astype(np.int16)
    return (tone.astype(np.int16) + grain[..., None]).astype(np.uint8)  # 118-22-8 to 175+22+8+23: no overflow


def _clutter(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """Small grey marks that no text mentions: they make patches redundant, but not blank."""
    for _ in range(int(rng.integers(20, 50))):
        x, y = (int(v) for v in rng.integers(0, SIDE, 2))
        dx, dy = (int(v) for v in rng.integers(-6, 7, 2))
        grey = tuple(int(v) for v in rng.integers(80, 210) + rng.integers(-18, 19, 3))
        if rng.random() < 0.5:
            draw.line((x, y, x + dx, y + dy), fill=grey, width=1)
        else:
            draw.ellipse((x, y, x + abs(dx) // 2 + 1, y + abs(dx) // 2 + 1), fill=grey)
