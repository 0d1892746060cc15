"""What upstream's modules hold beside its classes. A class of one's own that derives from one of them has it all as well."""

import importlib
import importlib.util
import sys
import types
from typing import Any

from kvcache import InputError, MissingDependencyError


def beside(value: Any, name: str, default: Any = None) -> Any:
    """What is called `name` in the module of the class that `value` is of, or of one that this derives from.

    The classes that are derived from come first: their methods read their own module, whatever stands in a user's.

    Args:
        value: a model, or one of its modules.
        name: of a function, a class or a constant.
        default: where no module has it.
    """
    for kind in reversed(type(value).__mro__):
        module = sys.modules.get(kind.__module__)
        if hasattr(module, name):
            return getattr(module, name)
    return default


def needed_beside(value: Any, name: str) -> Any:
    """As `beside`, of what every release has.

    Raises:
        InputError: if it is not there.
    """
    found = beside(value, name)
    if found is None:
        modules = sorted({kind.__module__ for kind in type(value).__mro__} - {"builtins"})
        raise InputError(
            f"{type(value).__name__} is no model of chatterbox: there is no {name} in {', '.join(modules)}; "
            "derive it from upstream's class"
        )
    return found


def upstream_t3() -> Any:
    """Upstream's module `chatterbox.models.t3.t3`.

    The package itself imports an audio stack that tokens do not need; where that is missing, T3's own modules are
    imported without it.

    Raises:
        InputError: if chatterbox-tts is not installed.
    """
    name = "chatterbox.models.t3.t3"
    if "chatterbox" in sys.modules:
        return importlib.import_module(name)
    spec = importlib.util.find_spec("chatterbox")
    if spec is None or spec.submodule_search_locations is None:
        raise MissingDependencyError(
            "chatterbox-tts is not installed; run: pip install --no-deps chatterbox-tts==0.1.7"
        )
    try:
        return importlib.import_module(name)
    except ImportError:
        bare = types.ModuleType("chatterbox")
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules["chatterbox"] = bare
        return importlib.import_module(name)
