"""What a model calls its cache: ``past_key_values`` up to transformers 5.23 and in models of their own code, else ``cache``."""

import inspect
from collections.abc import Callable, Mapping, MutableMapping
from functools import lru_cache
from typing import Any

import transformers

MADE_AS = "cache" if tuple(int(n) for n in transformers.__version__.split(".")[:2]) >= (5, 24) else "past_key_values"
"""What this release's `generate` calls the cache that it makes."""

_NAMES = ("cache", "past_key_values", "layer_past")  # the last is that of GPT-2's attention up to some release


def cache_kwarg(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument that hands a cache to ``model(…)`` or ``model.generate(…)``."""
    while (inside := getattr(model, "_orig_mod", None)) is not None:  # of `torch.compile`
        model = inside
    return {_name(type(model).forward): cache}


def takes(model: Any) -> bool:
    """Whether a model's forward names a cache among its arguments."""
    arguments = inspect.signature(type(model).forward).parameters
    return any(name in arguments for name in _NAMES)


def get_cache(given: Mapping[str, Any]) -> Any:
    """The cache among a model's keyword arguments, under whichever name; None if there is none."""
    return next((given[name] for name in _NAMES if given.get(name) is not None), None)


def pop_cache(given: MutableMapping[str, Any]) -> Any:
    """The same, taken out of them."""
    found = get_cache(given)
    for name in _NAMES:
        given.pop(name, None)
    return found


def output_cache(output: Any) -> Any:
    """The cache that a model's output, or that of `generate`, brings back."""
    return get_cache(output)


@lru_cache(maxsize=256)
def _name(forward: Callable[..., Any]) -> str:
    return _NAMES[0] if _NAMES[0] in inspect.signature(forward).parameters else _NAMES[1]
