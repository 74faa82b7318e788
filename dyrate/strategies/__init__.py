"""Published methods, one a file, and controls. Importing a file registers what it defines."""

from dyrate.strategies.ablations import DepthPrune, FixedPrune
from dyrate.strategies.controls import (
    Constant,
    LinearAnneal,
    MeanTrajectory,
    NoRoPE,
    Oracle,
    RandomPrune,
    ShuffledRates,
    UniformPool,
    WorstFirst,
)
from dyrate.strategies.dycoke import DyCoke
from dyrate.strategies.fastv import FastV
from dyrate.strategies.full import Full
from dyrate.strategies.prumerge import PruMerge
from dyrate.strategies.pyramiddrop import PyramidDrop
from dyrate.strategies.sparsevlm import SparseVLM
from dyrate.strategies.visionzip import VisionZip
from dyrate.strategies.vtw import VTW

__all__ = [
    "VTW", "Constant", "DepthPrune", "DyCoke", "FastV", "FixedPrune", "Full", "LinearAnneal", "MeanTrajectory", "NoRoPE",
    "Oracle", "PruMerge", "PyramidDrop", "RandomPrune", "ShuffledRates", "SparseVLM", "UniformPool", "VisionZip", "WorstFirst",
]  # fmt: skip
