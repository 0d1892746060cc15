"""Copies of a model's structure that share its tensors: how a model is changed without being patched."""

import copy
from collections.abc import Callable
from typing import Any

from torch import nn


def rebuilt(module: nn.Module, replace: Callable[[str, nn.Module], nn.Module | None]) -> Any:
    """A copy of a module's structure, sharing its tensors, with some of its modules replaced.

    Args:
        module: is not changed; hooks that it gets later are its own, those it has are the copy's as well.
        replace: is asked for each module, by name and as it is, for what takes its place; None keeps it. The children of
            one that is replaced are not asked for.
    """
    done: dict[int, nn.Module] = {}

    def visit(name: str, old: nn.Module) -> nn.Module:
        if id(old) not in done:
            new = replace(name, old)
            if new is None:
                new = copy.copy(old)
                for key, value in vars(old).items():
                    if isinstance(value, dict) and ("_hooks" in key or key in ("_parameters", "_buffers")):
                        new.__dict__[key] = copy.copy(value)
                new.__dict__["_modules"] = {
                    child: None if part is None else visit(f"{name}.{child}" if name else child, part)
                    for child, part in old._modules.items()
                }
            done[id(old)] = new
        return done[id(old)]

    return visit("", module)
