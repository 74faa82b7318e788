"""The picture that a shared link shows: the front page's figure under the book's title, in the shape that sites expect."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIZE = (1200, 630)  # pixels, of Open Graph cards
MARGIN = 60


def write_card(hero: Path, title: str, question: str, out: Path) -> None:
    """Write a card with the title, the question below it, and the figure `hero` below that."""
    card = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(card)
    draw.text((MARGIN, 60), title, fill="#323232", font=ImageFont.load_default(64))
    draw.multiline_text((MARGIN, 160), folded(question), fill="#555555", font=ImageFont.load_default(36), spacing=12)
    figure = Image.open(hero).convert("RGB")
    width = SIZE[0] - 2 * MARGIN
    figure = figure.resize((width, round(figure.height * width / figure.width)))
    card.paste(figure, (MARGIN, SIZE[1] - MARGIN - figure.height))
    card.save(out)


def folded(text: str) -> str:
    """Two lines of about the same length."""
    words = text.split()
    cuts = [(" ".join(words[:i]), " ".join(words[i:])) for i in range(1, len(words))]
    return "\n".join(min(cuts, key=lambda halves: abs(len(halves[0]) - len(halves[1]))))
