"""The only place that knows transformers' internals: it reads attention from a live model and drops image tokens in it.

`observe`, `prune` and `static_steps` are contexts around plain `generate` and leave the model as found; `lower_half` and
`upper_half` run a model in two parts for training.
"""

from dyrate.engine.halves import lower_half, upper_half
from dyrate.engine.observing import decoder_layers, observe
from dyrate.engine.pruning import prune
from dyrate.engine.static import static_steps

__all__ = ["decoder_layers", "lower_half", "observe", "prune", "static_steps", "upper_half"]
