"""This process among those of `accelerate launch` or `torchrun`."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import PartialState


def this_process() -> PartialState:
    """Number, device and company of this process; alone, it is the only one.

    A process may wait a day for the others, whose batches can be slower: a lost one ends all through the launcher, not by
    waiting.
    """
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
