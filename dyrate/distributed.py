"""This process among those of `accelerate launch` or `torchrun`."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import PartialState


def this_process() -> PartialState:
    """Index, device and number of processes; without a launcher there is one.

    A process waits up to a day for the others, whose batches can be slower: when one is lost, the launcher ends the others.
    """
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
