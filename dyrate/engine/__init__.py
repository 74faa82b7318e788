"""The only place that knows transformers' internals: it reads attention from a live model and drops image tokens in it.

`observe`, `prune` and `static_steps` are contexts around plain `generate` and leave the model as found; `run_below` and
`run_above` run a model in two parts for training.
"""

from dyrate.engine.observing import decoder_layers, observe
from dyrate.engine.pruning import prune
from dyrate.engine.split import run_above, run_below
from dyrate.engine.static import static_steps

__all__ = ["decoder_layers", "observe", "prune", "run_above", "run_below", "static_steps"]
