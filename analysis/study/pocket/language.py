"""Texts about a scene: captions, descriptions, questions and answers, in plain grammatical English.

All texts follow from the scene and a seed of their own (`variant`), so that one scene has many. `read_description`
goes the other way: it reads a description back into groups, which is how generated text is scored.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from study.pocket.scenes import COLOURS, LONG_WORDS, PLACES, THINGS, WORDS, Group, Scene, compose, seeds

NUMERALS = ("a", "two", "three")
PLURAL = {thing: plural for thing, (_, plural) in THINGS.items()}
COUNTS = ("one", "two", "three", "four", "five", "six")

CAPTION_PROMPTS = (
    "Provide a one-sentence caption for the provided image.",  # the paper's (lmms-eval's)
    "Write a short caption.",
    "What does the picture show?",
)
PROMPTS = {
    "description": ("Describe the image in detail.", "Tell me everything you see.", "What is in this picture, and where?"),
    "recap": ("Describe the image, then sum it up.", "Tell me what you see and repeat it at the end."),
    "look_late": ("Describe the image, sum it up, then tell what is left.", "Keep one thing for the end."),
    "backwards": ("Describe the image from the bottom right to the top left.", "List what you see, from the end."),
}  # fmt: skip
EASY_KINDS = ("count", "colour", "place", "relation", "existence", "reading")
HARD_KINDS = ("two_step", "more", "total", "long_word")  # a quarter of the image tokens does not answer them as well as all
QUESTION_KINDS = (*EASY_KINDS, *HARD_KINDS)


@dataclass(frozen=True)
class Turn:
    """One instruction and the response to it. task: caption, one of PROMPTS, or qa_<kind>."""

    task: str
    prompt: str
    response: str


def noun_phrase(group: Group, size: bool = False) -> str:
    """ "two red snowmen", "an orange cup", with `size` "a large red sun"."""
    words = [*([group.size] if size else []), group.colour, group.thing if group.count == 1 else PLURAL[group.thing]]
    numeral = NUMERALS[group.count - 1]
    if numeral == "a" and words[0][0] in "aeiou":
        numeral = "an"
    return " ".join([numeral, *words])


def place_phrase(place: int, rng: random.Random) -> str:
    """ "in the top left corner", "at the top", "on the left", "in the centre"."""
    name = PLACES[place]
    if " " in name:
        return rng.choice((f"in the {name} corner", f"at the {name}"))
    if name == "centre":
        return rng.choice(("in the centre", "in the middle"))
    return f"at the {name}" if name in ("top", "bottom") else f"on the {name}"


def captions(scene: Scene, n: int = 5) -> list[str]:
    """`n` different one-sentence captions; they name the large groups only, in reading order."""
    rng = random.Random(f"captions {scene.seed}")
    subjects = scene.subjects
    named = " and ".join(noun_phrase(g) for g in subjects)
    be = _be(subjects[0])
    forms = [
        f"{named}.", f"There {be} {named}.", f"A picture of {named}.", f"An image of {named}.",
        f"The picture shows {named}.", f"{named} in a picture.", f"{named} on a {scene.texture} ground.",
        f"There {be} {named} on a {scene.texture} ground.",
    ]  # fmt: skip
    return [_sentence(form) for form in rng.sample(forms, n)]


def description(scene: Scene, variant: int = 0) -> str:
    """Every group with colour, count and place, in random order and varied words: 30 to 70 tokens."""
    rng = random.Random(f"description {scene.seed} {variant}")
    groups = rng.sample(scene.groups, len(scene.groups))
    few = len(groups) <= 3
    sentences = _sentences(groups, rng, size=few)
    if few or (len(groups) < 6 and rng.random() < 0.3):
        sentences.insert(0, _opening(len(groups), rng))
    if few or rng.random() < 0.3:
        sentences.append(f"The ground is {scene.texture}.")
    if len(groups) == 2:
        sentences.append("Nothing else stands out." if scene.word is None else "A word is painted there too.")
    return " ".join(sentences)


def recap(scene: Scene, variant: int = 0) -> str:
    """A description whose last sentence only repeats what stands before it: late tokens do not need the image."""
    rng = random.Random(f"recap {scene.seed} {variant}")
    groups = rng.sample(scene.groups, len(scene.groups))
    return " ".join([*_sentences(groups, rng), _summary(groups, rng)])


def look_late(scene: Scene, variant: int = 0) -> str:
    """A description, its summary, then one group not named before: the last tokens need the image."""
    rng = random.Random(f"look_late {scene.seed} {variant}")
    *groups, last = rng.sample(scene.groups, len(scene.groups))
    where = place_phrase(last.place, rng)
    ending = rng.choice(
        (f"One thing is left: {where} {_be(last)} {noun_phrase(last)}.", f"Last, {where} {_be(last)} {noun_phrase(last)}.")
    )
    return " ".join([*_sentences(groups, rng), _summary(groups, rng), ending])


def backwards(scene: Scene, variant: int = 0) -> str:
    """Every group in a fixed order, from the bottom right to the top left: no order of the speaker's own to fall back on."""
    rng = random.Random(f"backwards {scene.seed} {variant}")
    return " ".join(_sentences(sorted(scene.groups, key=lambda g: -g.place), rng))


def long_turn(scene: Scene, task: str, variant: int = 0, prompt: int | None = None) -> Turn:
    """A turn of one of PROMPTS. prompt: which wording of the instruction (default: drawn)."""
    write = {"description": description, "recap": recap, "look_late": look_late, "backwards": backwards}[task]
    wordings = PROMPTS[task]
    chosen = random.Random(f"prompt {scene.seed} {variant}").randrange(len(wordings)) if prompt is None else prompt
    return Turn(task, wordings[chosen], write(scene, variant))


def question(scene: Scene, kind: str, variant: int = 0) -> Turn | None:
    """A question of one kind with its short answer, or None where the scene has nothing to ask (no word, no contrast).

    Hard kinds need more of the image: two_step finds one group by another, more compares two counts, total adds two, and
    long_word reads a word that is painted over two places. reading asks for short words only.
    """
    rng = random.Random(f"{kind} {scene.seed} {variant}")
    group = rng.choice(scene.groups)
    the = f"the {_name(group)}"
    if kind == "count":
        text, answer = f"How many {PLURAL[group.thing]} are there?", COUNTS[group.count - 1]
    elif kind == "colour":
        text, answer = f"What colour {_be(group)} {the}?", group.colour
    elif kind == "place":
        text, answer = f"Where {_be(group)} {the}?", PLACES[group.place]
    elif kind == "relation":
        return _relation(scene, rng)
    elif kind == "existence":
        return _existence(scene, rng)
    elif kind == "two_step":
        return _two_step(scene, rng)
    elif kind == "more":
        return _more(scene, rng)
    elif kind == "total":
        a, b = rng.sample(scene.groups, 2)
        text, answer = f"How many {PLURAL[a.thing]} and {PLURAL[b.thing]} are there together?", COUNTS[a.count + b.count - 1]
    else:
        if scene.word is None or (scene.word in LONG_WORDS) != (kind == "long_word"):
            return None
        text, answer = rng.choice(("What word is written?", "Which word can you read?")), scene.word
    return Turn(f"qa_{kind}", text, answer)


def _relation(scene: Scene, rng: random.Random) -> Turn | None:
    pairs = []
    for a in scene.groups:
        for b in scene.groups:
            across, down = a.place % 3 - b.place % 3, a.place // 3 - b.place // 3
            if across:
                pairs.append((a, b, "left or right of", "left" if across < 0 else "right"))
            if down:
                pairs.append((a, b, "above or below", "above" if down < 0 else "below"))
    a, b, choice, answer = rng.choice(pairs)
    return Turn("qa_relation", f"{_Be(a)} the {_name(a)} {choice} the {_name(b)}?", answer)


def turns(scene: Scene, questions: int) -> list[Turn]:
    """What a scene is trained on: a caption, a long turn, and so many questions of all kinds in turn."""
    rng = random.Random(f"turns {scene.seed}")
    chosen = [Turn("caption", rng.choice(CAPTION_PROMPTS), captions(scene, 1)[0])]
    chosen.append(long_turn(scene, rng.choices(list(PROMPTS), (4, 2, 2, 1))[0]))
    while len(chosen) < 2 + questions:
        number = len(chosen)
        turn = question(scene, QUESTION_KINDS[number % len(QUESTION_KINDS)], variant=number)
        if turn is None or (turn.response == scene.word and any(t.response == scene.word for t in chosen)):
            turn = question(scene, rng.choice(("count", "relation", "existence")), variant=number)
        chosen.append(turn)
    return chosen


SIDES = {
    "to the left of": lambda a, b: a % 3 < b % 3, "to the right of": lambda a, b: a % 3 > b % 3,
    "above": lambda a, b: a // 3 < b // 3, "below": lambda a, b: a // 3 > b // 3,
}  # fmt: skip


def _two_step(scene: Scene, rng: random.Random) -> Turn | None:
    """The colour of the only group on one side of another."""
    asked = []
    for b in scene.groups:
        for side, holds in SIDES.items():
            there = [a for a in scene.groups if holds(a.place, b.place)]
            if len(there) == 1 and there[0].colour != b.colour:
                asked.append((there[0], side, b))
    if not asked:
        return None
    a, side, b = rng.choice(asked)
    thing = "thing" if a.count == 1 else "things"
    return Turn("qa_two_step", f"What colour {_be(a)} the {thing} {side} the {b.colour} {_name(b)}?", a.colour)


def _more(scene: Scene, rng: random.Random) -> Turn | None:
    """Whether there are more of one thing than of another; yes as often as no."""
    pairs = [(a, b) for a in scene.groups for b in scene.groups if a.count > b.count]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    answer = rng.choice(("yes", "no"))
    if answer == "no":
        a, b = b, a
    return Turn("qa_more", f"Are there more {PLURAL[a.thing]} than {PLURAL[b.thing]}?", answer)


def _existence(scene: Scene, rng: random.Random) -> Turn:
    """Half yes. A hard no has a thing of the scene in the wrong colour, or an absent thing in a colour of the scene."""
    group = rng.choice(scene.groups)
    shown = {g.thing for g in scene.groups}
    colour, thing, answer = group.colour, group.thing, "yes"
    if rng.random() < 0.5:
        answer = "no"
        if rng.random() < 0.5:
            colour = rng.choice([c for c in COLOURS if c != group.colour])
        else:
            thing = rng.choice([t for t in THINGS if t not in shown])
    article = "an" if colour[0] in "aeiou" else "a"
    return Turn("qa_existence", f"Is there {article} {colour} {thing}?", answer)


def _sentences(groups: list[Group], rng: random.Random, size: bool = False) -> list[str]:
    """Sentences that name the groups with colour, count and place; two a sentence where there are many."""
    sentences, rest = [], list(groups)
    while rest:
        group, where = rest[0], place_phrase(rest[0].place, rng)
        phrase, be = noun_phrase(group, size), _be(group)
        if not size and len(rest) > 1 and len(groups) > 3:
            other = rest[1]
            also, there = noun_phrase(other), place_phrase(other.place, rng)
            forms = (
                f"There {be} {phrase} {where} and {also} {there}.",
                f"{where} {be} {phrase}, and {there} {_be(other)} {also}.",
                f"{phrase} {be} {where}, {also} {there}.",
            )
            rest = rest[2:]
        else:
            forms = (
                f"There {be} {phrase} {where}.", f"{where} {be} {phrase}.", f"{phrase} {be} {where}.",
                f"{where} you can see {phrase}.",
            )  # fmt: skip
            rest = rest[1:]
        sentences.append(_sentence(rng.choice(forms)))
    return sentences


def _summary(groups: list[Group], rng: random.Random) -> str:
    *firsts, last = [noun_phrase(g) for g in rng.sample(groups, len(groups))]
    listed = f"{', '.join(firsts)} and {last}" if firsts else last
    return rng.choice((f"To sum up: {listed}.", f"In short, you see {listed}."))


def _opening(n: int, rng: random.Random) -> str:
    number = ("two", "three", "four", "five", "six")[n - 2]
    return rng.choice((f"The picture shows {number} kinds of things.", f"You can see {number} kinds of things in the image."))


def _name(group: Group) -> str:
    return group.thing if group.count == 1 else PLURAL[group.thing]


def _be(group: Group) -> str:
    return "is" if group.count == 1 else "are"


def _Be(group: Group) -> str:
    return _be(group).capitalize()


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


_THING = {form: thing for thing, plural in PLURAL.items() for form in (thing, plural)}
_GROUP = re.compile(
    rf"\b(an?|two|three) (?:(?:small|large) )?({'|'.join(COLOURS)}) ({'|'.join(sorted(_THING, key=len, reverse=True))})\b", re.I
)
_PLACE = re.compile(rf"\b(?:in|at|on) the ({'|'.join(sorted(PLACES, key=len, reverse=True))}|middle)\b", re.I)


def read_description(text: str) -> list[dict]:
    """Read the groups that a description names: dicts of thing, colour, count and place (None if it has none).

    Each place belongs to the group beside it in the same clause: "on the left is a cup", "a cup is on the left".
    """
    return [group for group, _ in find_groups(text)]


def find_groups(text: str) -> list[tuple[dict, dict]]:
    """`read_description`'s groups, each with where the words of its slots stand: slot -> (first, behind the last) character."""
    found = []
    for sentence in re.finditer(r"[^.:]+", text):
        groups = list(_GROUP.finditer(text, *sentence.span()))
        places = list(_PLACE.finditer(text, *sentence.span()))
        for i, match in enumerate(groups):
            spans = {"count": match.span(1), "colour": match.span(2), "thing": match.span(3)}
            place = None
            if i < len(places):
                place, spans["place"] = places[i].group(1).lower(), places[i].span(1)
            count = {"two": 2, "three": 3}.get(match.group(1).lower(), 1)
            group = {
                "thing": _THING[match.group(3).lower()], "colour": match.group(2).lower(), "count": count,
                "place": None if place is None else PLACES.index({"middle": "centre"}.get(place, place)),
            }  # fmt: skip
            found.append((group, spans))
    return found


def vocabulary() -> list[str]:
    """Every word and punctuation mark that the laboratory's language can produce, sorted."""
    words = {*COUNTS, "yes", "no", *WORDS, *LONG_WORDS, *" ".join(PLACES).split()}
    words |= {w for t in COLOURS for w in (t, t.capitalize())}
    for seed in seeds("train", 3000):
        scene = compose(seed, long_words=True)
        texts = [t.prompt + " " + t.response for t in every_turn(scene)] + list(CAPTION_PROMPTS) + captions(scene)
        words |= set(re.findall(r"[A-Za-z]+|[^\sA-Za-z]", " ".join(texts)))
    return sorted(words)


def every_turn(scene: Scene) -> list[Turn]:
    """One turn of each task that the scene allows."""
    turns = [Turn("caption", CAPTION_PROMPTS[0], captions(scene)[0])]
    turns += [long_turn(scene, task) for task in PROMPTS]
    turns += [turn for kind in QUESTION_KINDS if (turn := question(scene, kind))]
    return turns
