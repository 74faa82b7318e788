"""Figures for a phone: the same panels, but one under another, so that their text keeps its size on a narrow screen."""

from __future__ import annotations

import base64
import io
import pickle

from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 4.6  # inches, shown over the width of a phone: text of 10 points is then about as large as a caption's
TYPE = "application/vnd.dyrate.phone"  # under which a notebook stores the picture, beside the wide one


def bundle(figure: Figure, include=None, exclude=None) -> dict[str, str]:
    """What IPython stores of a figure beside the wide picture: the one for phones, a PNG in base64."""
    file = io.BytesIO()
    narrow(figure).savefig(file, format="png")
    return {TYPE: base64.b64encode(file.getvalue()).decode()}


def narrow(figure: Figure) -> Figure:
    """A copy of the figure in a phone's shape.

    Up to three panels side by side come one under another, four in twos, more (small pictures) in threes. Panels keep about
    their shape.
    """
    copy = pickle.loads(pickle.dumps(figure))
    panels = [axes for axes in copy.axes if axes.get_subplotspec() is not None]
    lines, columns = panels[0].get_gridspec().get_geometry()
    kept_columns = 1 if columns < 4 else 2 if columns == 4 else 3
    kept_lines = -(-len(panels) // kept_columns)
    width, height = copy.get_size_inches()
    shape = min(1.15, (WIDTH / kept_columns) / (width / columns))  # taller where it becomes wider, but not by much
    copy.set_size_inches(WIDTH, height / lines * kept_lines * max(shape, 0.75))
    if columns > 1:
        grid = copy.add_gridspec(kept_lines, kept_columns)
        for i, axes in enumerate(panels):
            axes.set_subplotspec(grid[i // kept_columns, i % kept_columns])
            label_alone(axes, panels[i - i % columns])
    for legend in list(copy.legends):
        below(copy, legend)
    return copy


def label_alone(axes: Axes, first: Axes) -> None:
    """Give a panel the labels that it shared with its row's first, or with the panel below."""
    shared = axes.get_shared_y_axes().joined(axes, first) and axes is not first
    if shared and not axes.get_ylabel():
        axes.set_ylabel(first.get_ylabel())
    if axes.axison and axes.get_yticks().size:
        axes.tick_params(labelleft=True)
    if axes.axison and axes.get_xticks().size:
        axes.tick_params(labelbottom=True)


def below(figure: Figure, legend) -> None:
    """Move a figure's legend under the panels, in at most two columns."""
    names, title = [text.get_text() for text in legend.get_texts()], legend.get_title().get_text()
    handles = legend.legend_handles
    legend.remove()
    columns = 2 if max(map(len, names)) > 8 else 4
    figure.legend(handles, names, title=title or None, loc="outside lower center", ncols=columns)
