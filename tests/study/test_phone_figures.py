"""Figures in a phone's shape: the same panels in a narrow picture, stored beside the wide one and shown in its place."""

import base64
import io
import sys
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from study.figures import phone
from study.figures.style import axes_of
from study.profiles import ROOT

sys.path.insert(0, str(ROOT / "book"))
import phones


def panels_of(figure: Figure) -> list[tuple[float, float]]:
    """Left and upper edge of each panel, drawn, as shares of the figure."""
    figure.draw_without_rendering()
    return [(axes.get_position().x0, axes.get_position().y1) for axes in figure.axes]


@pytest.mark.parametrize(("columns", "kept"), [(1, 1), (2, 1), (3, 1), (4, 2), (6, 3)])
def test_panels_side_by_side_come_one_under_another(columns, kept):
    wide, axes = axes_of(9, 3, columns, sharey=True)
    for axis in [axes] if columns == 1 else axes:
        axis.plot([0, 1], [1, 2], label="a line")
    (axes if columns == 1 else axes[0]).set_ylabel("share")
    wide.legend(["a line"], loc="outside right upper")
    before = panels_of(wide)
    narrow = phone.narrow(wide)
    assert narrow.get_size_inches()[0] == phone.WIDTH
    edges = panels_of(narrow)
    assert len({round(left, 1) for left, _ in edges}) == kept and len({round(top, 1) for _, top in edges}) == columns // kept
    assert all(axis.get_ylabel() == "share" for axis in narrow.axes) and len(narrow.legends) == 1
    assert np.allclose(panels_of(wide), before, atol=0.01) and wide.get_size_inches()[0] == 9  # the wide one is left as it was


def test_a_notebook_stores_the_picture_and_a_page_offers_it(tmp_path):
    figure, axis = axes_of(8, 3)
    axis.plot([0, 1])
    stored = phone.bundle(figure)
    assert Image.open(io.BytesIO(base64.b64decode(stored[phone.TYPE]))).width < 900
    output = nbformat.v4.new_output("display_data", data={"image/png": "", **stored})
    name = {"mystnb": {"figure": {"name": "fig-a"}}}
    cells = [
        nbformat.v4.new_code_cell("a()", outputs=[output], metadata=name),
        nbformat.v4.new_code_cell("b()", outputs=[output]),
    ]
    (tmp_path / "_assets").mkdir()
    phones.save_pictures(nbformat.v4.new_notebook(cells=cells), tmp_path / "_assets")
    assert [path.name for path in (tmp_path / "_assets" / phones.FOLDER).iterdir()] == ["fig-a.png"]

    body = '<figure class="x" id="fig-{}">\n<a href="wide.png"><img alt="An alt." src="wide.png" /></a></figure>'
    context = {"body": body.format("a") + body.format("b"), "pathto": lambda address, _: f"../{address}"}
    app = SimpleNamespace(builder=SimpleNamespace(name="html"), srcdir=tmp_path)
    phones.offer_pictures(app, "page", "page.html", context, None)
    first, second = context["body"].split("</figure>")[:2]
    assert 'srcset="../_static/phone/fig-a.png" /><img alt="An alt." src="wide.png" /></picture></a>' in first
    assert second + "</figure>" == body.format("b")  # without a picture nothing changes
