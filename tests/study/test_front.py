"""The front page's figure: points from committed rows, tasks weighted alike."""

import pandas as pd
import pytest

from study.chapters import front
from study.chapters.laboratories import Laboratory
from study.figures import front as figures


def rows(method: str, budget: float | None, task: str, scores: list[float], macs: float, retention: float) -> list[dict]:
    of = {"method": method, "label": method, "budget": budget, "task": task, "retention": retention}
    of |= {"prefill": macs, "decode": macs, "tokens": 2 * macs}
    return [of | {"sample": f"{task}-{i}", "score": score} for i, score in enumerate(scores)]


@pytest.fixture
def lab(tmp_path):
    """Two of the tasks, one with twice the answers of the other, and one that the figure leaves out."""
    methods, questions = [], []
    for method, budget, right, macs in (("Full", None, 1.0, 10), ("FastV", 0.5, 0.5, 5)):
        methods += rows(method, budget, "description", [right] * 4, macs, budget or 1)
        methods += rows(method, budget, "caption", [9.0], 99, budget or 1)
        questions += rows(method, budget, "qa_reading", [1.0, 1.0], macs, budget or 1)
    return Laboratory("made-up", {}, tmp_path, {"methods": pd.DataFrame(methods), "questions": pd.DataFrame(questions)})


def test_tasks_weigh_alike_and_cost_is_a_share_of_the_unpruned(lab):
    table = front.points(lab).set_index("name")
    assert table.value.to_dict() == {"unpruned": 1.0, "FastV": pytest.approx(0.75)}
    assert table.macs_share["FastV"] == pytest.approx(0.5) and table.retention["FastV"] == 0.5 and table.n["FastV"] == 6


def test_predictors_stand_beside_the_methods_by_their_recipe(lab):
    answers = [r for name in ("Full", "DyRate evict-0.33", "DyRate curves-0.25")
               for r in rows(name, None, "description", [0.8, 0.9], 7, 0.3)]  # fmt: skip
    pd.DataFrame(answers).to_csv(lab.folder / "headroom_layer2_generated_evict.csv.gz", index=False)
    table = front.points(lab)
    assert list(table.name[-2:]) == ["DyRate, curves once an answer", "DyRate, the paper's recipe"]
    assert table.value.iloc[-1] == pytest.approx(0.85)
    axis = figures.headline({"made-up": table}).axes[0]
    said = [text.get_text() for text in [*axis.texts, *axis.get_legend().texts]]
    assert {"FastV", "unpruned", "DyRate, curves once an answer"} <= set(said)
    assert "n = 2 and 6 answers" in front.said({"made-up": table})


def test_a_line_that_turns_back_is_explained(lab):
    table = front.points(lab)
    assert "turns back" not in front.said({"made-up": table})
    cheaper = {"name": "FastV", "retention": 0.1, "macs_share": 0.8, "tokens": 50.0}
    table = pd.concat([table, pd.DataFrame([cheaper])], ignore_index=True)
    said = " FastV turns back on made-up: at its lowest retention its answers are 2.5 times as long as unpruned."
    assert front.turning_back(table, "made-up") == said


@pytest.mark.parametrize("layout", [figures.WIDE, figures.TALL], ids=["wide", "tall"])
def test_the_methods_picture_fits_its_frame(layout):
    figure = figures.method(layout)
    figure.draw_without_rendering()
    frame, inside = figure.bbox, [text.get_window_extent() for text in figure.axes[0].texts]
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in inside)
    steps = [text.get_text() for text in figure.axes[0].texts if text.get_text().startswith("drop")]
    assert steps == ["drop 25 %", "drop 50 %", "drop 75 %"]
