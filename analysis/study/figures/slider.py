"""A figure to play with: which image tokens are left at each generated word. One block of HTML; no library, no network."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path

import numpy as np
from IPython.display import HTML


def kept_slider(name: str, picture, masks: np.ndarray, words: list[str]) -> HTML:
    """A slider over the generated words, with the picture's kept patches. masks: (step, patch) of bool; name: an HTML id."""
    buffer = io.BytesIO()
    picture.convert("RGB").resize((336, 336)).save(buffer, "PNG")
    data = {
        "image": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(),
        "side": round(masks.shape[1] ** 0.5), "words": words,
        "kept": ["".join("1" if x else "0" for x in mask) for mask in masks],
    }  # fmt: skip
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    filled = {"id": html.escape(name), "last": str(len(words) - 1), "data": json.dumps(data).replace("</", r"<\/")}
    for key, value in filled.items():
        page = page.replace(f"{{{key}}}", value)
    return HTML(page)
