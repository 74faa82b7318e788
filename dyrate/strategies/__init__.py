"""Published methods, one a file, and controls. A file laid in this folder is found: what it defines is registered."""

from importlib import import_module
from pkgutil import iter_modules

from dyrate.strategy import STRATEGIES

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

globals().update(STRATEGIES)
__all__ = sorted(STRATEGIES)
