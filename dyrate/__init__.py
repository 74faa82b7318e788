"""DyRate (arXiv:2501.14204) and its kin: how many image tokens does a vision-language model need, and when?

    model, processor = dyrate.load("llava-hf/llava-1.5-7b-hf")
    inputs = dyrate.encode(processor, [image], ["Describe the image in detail."])
    with dyrate.FastV(rate=0.75)(model, processor) as trace:
        tokens = model.generate(**inputs, max_new_tokens=64)
    trace.frame()

To understand the whole, read `strategy.py`, then `strategies/fastv.py`, then `seen.py`.
"""

from dyrate import strategies
from dyrate.data import Example, Examples, read_examples
from dyrate.engine import observe, prune
from dyrate.generation import Answers, answer_batch, answer_examples, encode
from dyrate.models import load
from dyrate.predictor import RatePredictor
from dyrate.recording import Recording, record, record_examples
from dyrate.seen import Seen
from dyrate.segments import SEGMENTS, Segments, find_segments
from dyrate.strategies import *  # noqa: F403  (every strategy by its name)
from dyrate.strategy import STRATEGIES, Strategy
from dyrate.trace import Trace

__all__ = [
    "SEGMENTS", "STRATEGIES", "Answers", "Example", "Examples", "RatePredictor", "Recording", "Seen", "Segments", "Strategy",
    "Trace", "answer_batch", "answer_examples", "encode", "find_segments", "load", "observe", "prune", "read_examples", "record",
    "record_examples", *strategies.__all__,
]  # fmt: skip
