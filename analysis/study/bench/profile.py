"""Where the time of a decode step goes: the operations of a few steps, by what they are for."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile

from dyrate.strategy import Strategy
from study.bench.runs import Clock, timed

KINDS = {  # by the beginning of an operation's name; what is left is small operations and Python
    "linear layers": ("aten::addmm", "aten::mm"),
    "attention": ("aten::_scaled_dot_product",),
    "copies": ("aten::cat", "aten::copy_", "aten::index_select", "aten::index_copy_"),  # nearly all of them of the cache
    "observation": ("aten::bmm", "aten::_softmax"),  # fused attention needs neither
}


class Profiled(Clock):
    """Notes the operations from the first token on."""

    def __init__(self):
        super().__init__()
        self.profile = profile(activities=[ProfilerActivity.CPU])

    def __call__(self, input_ids, scores, **kwargs):
        if self.times:
            return super().__call__(input_ids, scores, **kwargs)
        going_on = super().__call__(input_ids, scores, **kwargs)
        self.profile.start()
        return going_on


def where_time_goes(model, batch: int, new_tokens: int, strategy: Strategy | None) -> dict[str, float]:
    """Milliseconds of a mean decode step on a processor, in operations of each of KINDS and in all else."""
    clock = Profiled()
    timing = timed(model, batch, new_tokens, strategy, clock=clock)
    clock.profile.stop()
    spent = dict.fromkeys(KINDS, 0.0)
    for operation in clock.profile.key_averages():
        for kind, names in KINDS.items():
            if operation.key.startswith(names):
                spent[kind] += operation.self_cpu_time_total / 1000 / len(timing.steps)
    return spent | {"all else": 1000 * timing.steps.mean() - sum(spent.values())}
