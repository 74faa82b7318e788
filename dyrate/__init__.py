"""DyRate (arXiv:2501.14204), studied: how many image tokens does a vision-language model need, and when?"""

from dyrate import strategies
from dyrate.attention import Recording, encode, record, record_examples
from dyrate.datasets import Example, Examples, examples
from dyrate.engine import observe, prune
from dyrate.models import load
from dyrate.predictor import RatePredictor
from dyrate.segments import SEGMENTS, Segments, find_segments
from dyrate.strategies import *  # noqa: F403  (every strategy by its name)
from dyrate.strategy import STRATEGIES, Seen, Strategy, lineup
from dyrate.trace import Trace

__all__ = [
    "SEGMENTS", "STRATEGIES", "Example", "Examples", "RatePredictor", "Recording", "Seen", "Segments", "Strategy", "Trace",
    "encode", "examples", "find_segments", "lineup", "load", "observe", "prune", "record", "record_examples", *strategies.__all__,
]  # fmt: skip
