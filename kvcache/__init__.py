"""KV-cache management for autoregressive models that you run yourself, straight from PyTorch and transformers."""

from importlib import import_module
from typing import TYPE_CHECKING

from kvcache.installed import watch_transformers

if TYPE_CHECKING:
    from kvcache._public import *  # noqa: F403
    from kvcache._public import __all__ as __all__

__version__ = "0.1.0"

watch_transformers()

if not TYPE_CHECKING:  # or every name would be one that the package has

    def __getattr__(name):
        """The first name that is asked for brings all of them, and torch and transformers with them.

        A command that only says what is wrong, or is interrupted, waits for neither.
        """
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return import_module(f"{__name__}.{name}")  # modules ask for each other before all of them are there
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
        public = import_module(f"{__name__}._public")
        if name == "__all__":
            return public.__all__
        if name not in public.__all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals().update({one: getattr(public, one) for one in public.__all__})
        return globals()[name]

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})
