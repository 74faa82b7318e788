"""The page "Which model, which method" against what the laws know."""

import sys

import laws
from study.profiles import ROOT

sys.path.insert(0, str(ROOT / "book"))


def test_a_family_is_missing_exactly_where_the_laws_make_no_sense_of_a_method():
    import model_matrix

    table = model_matrix.matrix().set_index("strategy")
    assert set(table.index[table.families == "llava"]) == set(laws.ENCODER_SIDE)
    assert set(table.families) == {"all", "llava"}
    assert laws.STUDY and {"Oracle", "ShuffledRates", "TaskConstant"} <= set(table.index)
    assert table.loc["FastV", "source"] == "arXiv:2403.06764"
    assert table.loc["Constant", "source"] == "control"
