"""How many bytes something holds, found by walking all that it refers to."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from kvcache.models import ModelFacts


def bytes_held(held: Any, counts: Callable[[Tensor], bool]) -> int:
    """Bytes of the storages of all tensors that `held` refers to and that count; a model's own are not walked into."""
    storages: dict[int, int] = {}
    visited: set[int] = set()

    def visit(thing: Any) -> None:
        if id(thing) in visited or isinstance(thing, type | nn.Module | ModelFacts):  # facts are the model's
            return
        visited.add(id(thing))
        if isinstance(thing, Tensor):
            if counts(thing):
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, dict):
            for value in thing.values():
                visit(value)
        elif isinstance(thing, list | tuple | set):
            for value in thing:
                visit(value)
        elif hasattr(thing, "__dict__"):
            visit(vars(thing))

    visit(held)
    return sum(storages.values())
