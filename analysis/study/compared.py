"""What is compared: methods, retention ratios, layers; those of the laboratories' reference rows by name."""

from __future__ import annotations

from collections.abc import Sequence

from dyrate.strategies import STRATEGIES
from study import controls  # noqa: F401  (registers its strategies)
from study.answers import Condition

RETENTIONS = (0.5, 0.25, 0.1)
METHODS = (
    "FastV", "RandomPrune", "Oracle", "UniformPool", "FastVRerank", "LinearAnneal", "PyramidDrop", "SparseVLM", "VisionZip",
    "PruMerge", "DivPrune", "DART", "VisPruner", "CDPruner",
)  # fmt: skip
LATE_METHODS = ("FastV", "RandomPrune", "FastVRerank", "LinearAnneal", "PyramidDrop", "VisionZip", "UniformPool", "Oracle")
QUESTIONS = ("qa_reading", "qa_long_word", "qa_count", "qa_total", "qa_two_step")  # short answers that need details
LATE = ("look_late", "backwards")  # long answers whose details are needed at the end, or in a prescribed order


def scanned_layers(n_layers: int) -> list[int]:
    """First pruned layers that are compared in a decoder of so many layers."""
    return sorted({k for k in (1, 2, 3, 4, 6, 8, 11, 14, 18, 22) if k < 0.8 * n_layers})


def lineup(retentions: Sequence[float], n_layers: int, names: Sequence[str] = (), *, scenes: bool = True) -> list[Condition]:
    """Strategies to compare: Full, and each of `names` (default: all that are `compared`) at each retention ratio.

    scenes: False for photographs, of which nobody knows what they show: without the strategies that need to. Raises
    ValueError for a name that no strategy has.
    """
    conditions = [Condition("Full", STRATEGIES["Full"](), "Full")]
    for name in methods(names, scenes=scenes):
        conditions += [Condition(f"{name} {x:g}", STRATEGIES[name].at(x, n_layers), name, x) for x in retentions]
    return conditions


def methods(names: Sequence[str] = (), *, scenes: bool = True) -> list[str]:
    """The strategies beside Full in `lineup`, by name."""
    if unknown := set(names) - set(STRATEGIES):
        raise ValueError(f"no strategy is called {sorted(unknown)}; there are {sorted(STRATEGIES)}")
    every = [name for name, cls in STRATEGIES.items() if cls.compared and (scenes or "scene" not in cls.needs)]
    return list(names) or [name for name in every if name != "Full"]
