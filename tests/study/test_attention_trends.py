"""The measures of fading on hand-made attention, where the truth is known."""

import numpy as np
import pandas as pd
import pytest

from dyrate.recording import Recording
from study import figures
from study.chapters import attention
from study.pocket.scenes import Group, Scene


def recording(image, response, n=30, layers=4, heads=2, image_tokens=144):
    """An answer of n tokens in which `image` and `response` (functions of the step) are the shares of every head."""
    shares = np.zeros((n, layers, heads, 4))
    for t in range(n):
        rest = 1 - image(t) - response(t)
        shares[t] = [rest / 2, image(t), rest / 2, response(t)]
    counts = np.tile([10, image_tokens, 10, 0], (n, 1))
    counts[:, 3] = np.arange(n)
    return Recording("sample", "description", ["a"] * n, "", shares, counts)


def test_measures_by_hand():
    measured = attention.measures(recording(lambda t: 0.4, lambda t: 0.2))
    assert np.allclose(measured["raw"], 0.4)
    assert np.allclose(measured["undiluted"], 0.5)
    assert np.allclose(measured["per_token"][6], 0.4 * 170 / 144)


def dilution(t):
    return 0.02 * t


CASES = {
    "diluted": (lambda t: 0.5 * (1 - dilution(t)), dilution, "diluted by the growing response"),
    "fades": (lambda t: 0.5 - 0.01 * t, lambda t: 0.1, "dilution alone does not explain it"),
    "constant": (lambda t: 0.5, lambda t: 0.1, "does not fall"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_finding_distinguishes_fading_from_dilution(case):
    image, response, finding = CASES[case]
    rng = np.random.default_rng(0)
    recordings = [recording(lambda t, k=k: image(t) + k, response) for k in rng.normal(0, 0.003, 12)]
    text = attention.finding(attention.trends(recordings), "`m`")
    assert text.startswith("**With `m`, ") and finding in text and text.endswith("95 % intervals over 12 answers.")


def test_trends_by_hand():
    trends = attention.trends([recording(lambda t: 0.6 if t <= 10 else 0.3, lambda t: 0.0, n=31)])
    assert np.allclose(trends[trends.measure == "raw"].value, -0.5)
    assert set(trends.depth) == {"shallow", "deep"}
    layers = attention.layer_trends([recording(lambda t: 0.6 if t <= 10 else 0.3, lambda t: 0.0, n=31)])
    assert len(layers) == 4 * len(attention.MEASURES)


def test_short_answers_are_reported_as_short():
    assert "too short" in attention.finding(attention.trends([recording(lambda t: 0.5, lambda t: 0.1, n=4)]), "`m`")


def test_one_depth_that_fades_is_part_of_the_fall():
    rows = [
        {"depth": depth, "measure": measure, "value": value, "low": value - 0.01, "high": value + 0.01, "n": 5}
        for depth, undiluted in (("shallow", -0.1), ("deep", 0.1))
        for measure, value in (("raw", -0.2), ("undiluted", undiluted), ("per_token", 0.0))
    ]
    text = attention.finding(pd.DataFrame(rows), "`m`")
    assert "part of the fall of the image's share is dilution" in text
    assert (
        "in deep layers its share of all attention falls by 20.0 % (-21.0 to -19.0 %), of the attention that" in text
    )
    assert "to the response it rises by 10.0 % (+9.0 to +11.0 %)" in text
    assert text.count("beside an average token it shows no significant change (-1.0 to +1.0 %)") == 2


def test_variance_explained_by_the_step():
    straight = attention.explained_by_step([recording(lambda t: 0.6 - 0.01 * t, lambda t: 0.1) for _ in range(4)])
    assert straight.set_index("measure").value["raw"] > 0.999
    rng = np.random.default_rng(1)
    noise = [recording(lambda t, x=x: x[t], lambda t: 0.1) for x in rng.uniform(0.2, 0.6, (20, 40))]
    assert attention.explained_by_step(noise).set_index("measure").value["raw"] < 0.05


def test_focus_by_hand():
    """All attention on the named object's patches: density is one over its share of the image, elsewhere zero."""
    scene = Scene(0, (Group("cat", "red", 1, "large", 0), Group("sun", "blue", 1, "large", 8)), "plain", None, None)
    cover = np.zeros((2, 12, 12), bool)
    cover[0, :2, :2] = True
    cover[1, 10:, 10:] = True
    one = recording(lambda t: 0.5, lambda t: 0.1, n=4)
    one.tokens = ["A", "red", "cat", "</s>"]
    one.image = np.zeros((4, 4, 144))
    one.image[:, :, cover[0].ravel()] = 0.125
    density = attention.focus([one], [scene], [cover]).set_index(["layer", "patches"]).value
    assert np.allclose(density.xs("named object", level="patches"), 144 / 4)
    assert np.allclose(density.xs("other objects", level="patches"), 0)
    assert np.allclose(density.xs("no object", level="patches"), 0)


def test_token_kinds():
    kinds = [attention.token_kind(w, True) for w in "Two red snowmen are at the top left .".split()]
    assert kinds == ["count", "colour", "object", "other", "other", "other", "place", "place", "other"]
    assert [attention.token_kind(w, False) for w in ("the", "dog", ".")] == ["function", "content", "function"]


def test_curves_stop_where_few_answers_go_on():
    recordings = [recording(lambda t: 0.5, lambda t: 0.1, n=n) for n in (5, 5, 5, 5, 5, 5, 5, 20)]
    curves = attention.curves(recordings)
    assert isinstance(curves, pd.DataFrame)
    assert curves.step.max() == 4
    assert np.allclose(curves[curves.what == "raw"].value, 0.5)


def test_answers_that_are_too_short_leave_a_figure_without_a_warning(recwarn):
    """Captions of noise may all be: a legend of nothing would warn on the page."""
    figure = figures.course_by_task(pd.DataFrame(columns=["task", "position", "value", "low", "high"]))
    assert "no answer is long enough" in figure.axes[0].texts[0].get_text() and not len(recwarn)
