"""KV-cache management for autoregressive models that you run yourself, straight from PyTorch and transformers."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcache._public import *
    from kvcache._public import __all__ as __all__

__version__ = "0.1.0"

if not TYPE_CHECKING:  # or every name would be one that the package has

    def __getattr__(name):
        """Whatever is asked for first brings all of it, and torch and transformers with it: a command that only says what is
        wrong, or is interrupted, waits for neither."""
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        public = import_module(f"{__name__}._public")
        known = globals()
        known.update({one: getattr(public, one) for one in public.__all__}, __all__=public.__all__)
        if name not in known:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return known[name]

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})
