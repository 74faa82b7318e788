"""PyramidDrop (arXiv:2410.17247): the image shrinks by the same factor at a few depths."""

from dataclasses import dataclass

from dyrate.strategy import Strategy, rate_field


@dataclass(kw_only=True)
class PyramidDrop(Strategy):
    """PyramidDrop (arXiv:2410.17247): the image shrinks by one factor at a quarter, half and three quarters of the depth.

    ratio: what each stage keeps of what is left, in [0, 1] (the paper's lambda). Tokens are ranked by the last instruction
    token's attention, mean over heads, in the stage's own layer before anything is dropped there. Rounds up; its code down.
    """

    ratio: float = 0.5
    positions: str = "compact"
    each_step = False
    needs = frozenset({"own_attention"})

    def __post_init__(self):
        rate_field("ratio", self.ratio)
        super().__post_init__()

    def stages(self, n_layers):
        return sorted({max(1, n_layers * i // 4) for i in (1, 2, 3)})

    def observes(self, n_layers):
        return ()

    def keep(self, seen):
        return self.ratio ** (1 + list(self.stages(seen.n_layers)).index(seen.layer))

    def score(self, seen):
        return seen.own_attention.mean(1)

    def selector_macs(self, shape, tokens):
        """Queries, keys and values of every token that enters a stage's layer, once more, and the newest query's row."""
        heads = shape.heads * shape.head_dim
        projected = heads + 2 * shape.kv_heads * shape.head_dim
        return sum((tokens.text + n) * (shape.width * projected + heads) for n in tokens.image[:-1])

    @classmethod
    def at_retention(cls, retention, n_layers, **fields):
        """The ratio whose mean over the three stages is the retention: ratio + ratio^2 + ratio^3 = 3 retention."""
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if middle + middle**2 + middle**3 < 3 * retention else (low, middle)
        return cls(ratio=high, **fields)
