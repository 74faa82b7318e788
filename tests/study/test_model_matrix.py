"""The page "Which model, which method" against what the laws know."""

import sys

import laws
from study.profiles import ROOT

sys.path.insert(0, str(ROOT / "book"))


def test_the_matrix_says_no_exactly_where_the_laws_make_no_sense_of_a_method():
    import model_matrix

    table = model_matrix.matrix().set_index("strategy")
    families = table.drop(columns=["source", "residency", "positions"])
    refused = {(strategy, family) for strategy, row in families.iterrows() for family, answer in row.items() if answer == "no"}
    assert refused == {(strategy, family) for strategy in laws.ENCODER_SIDE for family in families if family != "llava"}
    assert table.loc["FastV", "source"] == "arXiv:2403.06764"
    assert table.loc["Constant", "source"] == "control"
