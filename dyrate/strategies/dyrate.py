"""DyRate (arXiv:2501.14204): the rate of each step is predicted from how attention divides. See `dyrate.predictor`."""

from dyrate.predictor import DyRate

__all__ = ["DyRate"]
