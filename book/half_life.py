from dataclasses import dataclass

import dyrate


@dataclass(kw_only=True)
class HalfLife(dyrate.Strategy):
    """Halve the retention ratio every `half_life` generated tokens."""

    half_life: int = 32

    def keep(self, seen):  # share of image tokens kept from now on
        return 0.5 ** (seen.step / self.half_life)
