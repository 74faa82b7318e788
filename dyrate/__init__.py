"""DyRate (arXiv:2501.14204), studied: how many image tokens does a vision-language model need, and when?"""

from dyrate.attention import Recording, encode, record, record_examples
from dyrate.datasets import Example, Examples, examples
from dyrate.engine import observe
from dyrate.models import load
from dyrate.segments import SEGMENTS, Segments, find_segments

__all__ = [
    "SEGMENTS", "Example", "Examples", "Recording", "Segments", "encode", "examples", "find_segments", "load", "observe",
    "record", "record_examples",
]  # fmt: skip
