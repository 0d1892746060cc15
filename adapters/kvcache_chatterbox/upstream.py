"""What upstream's modules hold beside its classes. A class of one's own that derives from one of them has it all as well."""

import sys
from typing import Any

from kvcache import InputError


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
