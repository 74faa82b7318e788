"""The only place that knows transformers' internals: it reads attention from a live model and drops image tokens in it.

`observe`, `prune` and `static_steps` are contexts around plain `generate` and leave the model as found; `run_below` and
`run_above` run a model in two parts for training; `encode_images` runs the vision tower ahead of `generate`; `own_layers` gives
a cache the layers that strategies use.
"""

from dyrate.engine.cache import own_layers
from dyrate.engine.observing import decoder_layers, observe
from dyrate.engine.pruning import prune
from dyrate.engine.split import run_above, run_below
from dyrate.engine.static import static_steps
from dyrate.engine.vision import encode_images

__all__ = ["decoder_layers", "encode_images", "observe", "own_layers", "prune", "run_above", "run_below", "static_steps"]
