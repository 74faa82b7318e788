"""A figure to play with: which image tokens are kept at each generated token. One block of HTML; no library, no network."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path

import numpy as np
from IPython.display import HTML

PAGE = Path(__file__).with_suffix(".html")


def kept_slider(name: str, picture, kept: np.ndarray, tokens: list[str]) -> HTML:
    """A slider over the generated tokens, with the picture's kept patches. name: an HTML id; kept: (step, patch) of bool."""
    buffer = io.BytesIO()
    picture.convert("RGB").resize((336, 336)).save(buffer, "PNG")
    data = {
        "image": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(),
        "side": round(kept.shape[1] ** 0.5), "tokens": tokens,
        "kept": ["".join("1" if x else "0" for x in patches) for patches in kept],
    }  # fmt: skip
    page = PAGE.read_text(encoding="utf-8")
    filled = {"id": html.escape(name), "last": str(len(tokens) - 1), "data": json.dumps(data).replace("</", r"<\/")}
    for key, value in filled.items():
        page = page.replace(f"{{{key}}}", value)
    return HTML(page)
