"""Callables that hold a model's modules, bound anew to the modules of a copy."""

import types
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn

from kvcache.models._forwards import behind_compile


def escape(value: Any, inside: Collection[int], seen: set[int] | None = None) -> str | None:
    """How a callable reaches a model's modules in a way that `Rebinding` cannot turn to a copy; None if there is none.

    Args:
        value: a forward, or a part of one.
        inside: ids of the model's modules.
        seen: ids of functions that were looked at.
    """
    seen = set() if seen is None else seen
    value = behind_compile(value)
    if isinstance(value, types.MethodType):
        if not isinstance(value.__self__, nn.Module):
            return f"is a method of a {type(value.__self__).__name__}"
        return escape(value.__func__, inside, seen)
    if isinstance(value, partial):
        parts = (value.func, *value.args, *value.keywords.values())
        return next((why for part in parts if callable(part) and (why := escape(part, inside, seen))), None)
    if isinstance(value, types.FunctionType):
        return _function_escape(value, inside, seen)
    if isinstance(value, nn.Module | types.BuiltinFunctionType | type):
        return None
    return f"is a {type(value).__name__}, which may hold the model"


def _function_escape(function: types.FunctionType, inside: Collection[int], seen: set[int]) -> str | None:
    if id(function) in seen:
        return None
    seen.add(id(function))
    for name, value in _globals_of(function):
        if _reaches(value, inside, set()):
            return f"reaches the model by the global name {name!r}"
        near = isinstance(value, types.FunctionType) and value.__globals__ is function.__globals__
        if near and (why := _function_escape(value, inside, seen)) is not None:
            return why
    given = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    if any(_reaches(value, inside, set()) for value in given):
        return "holds the model as a default"
    for held in map(_content, function.__closure__ or ()):
        if isinstance(held, types.FunctionType | types.MethodType | partial):
            why = escape(held, inside, seen)
        else:
            parts = held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple | set) else ()
            inner = any(_reaches(part, inside, set()) for part in list(parts))
            why = f"holds the model in a {type(held).__name__}" if inner else None
        if why is not None:
            return why
    return None


def _reaches(value: Any, inside: Collection[int], seen: set[int]) -> bool:
    value = behind_compile(value)
    if id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, types.MethodType):
        return id(value.__self__) in inside
    if isinstance(value, partial):
        return any(_reaches(part, inside, seen) for part in (value.func, *value.args, *value.keywords.values()))
    if isinstance(value, types.FunctionType):
        return any(_reaches(part, inside, seen) for part in map(_content, value.__closure__ or ()))
    return id(value) in inside


def _globals_of(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    codes = [function.__code__]
    for code in codes:  # grows: functions inside functions
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
        yield from ((name, function.__globals__[name]) for name in code.co_names if name in function.__globals__)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that has no value yet
        return None


class Rebinding:
    """Attributes and hooks as a copy of a model has them: what is bound to a module is bound to that module's copy.

    Args:
        copies: of each module, by its id.
    """

    def __init__(self, copies: Mapping[int, nn.Module]) -> None:
        self._copies = copies
        self._made: dict[int, tuple[Any, Any]] = {}  # functions, and what they became; the old one keeps its id its own

    def __call__(self, value: Any) -> Any:
        """What takes the place of a value; the value itself, where it reaches no module."""
        if isinstance(value, nn.Module):
            return self._copies.get(id(value), value)
        behind = behind_compile(value)
        if isinstance(behind, types.MethodType):
            owner, function = self(behind.__self__), self(behind.__func__)
            same = owner is behind.__self__ and function is behind.__func__
            return value if same else types.MethodType(function, owner)
        if isinstance(behind, partial):
            return self._partial(value, behind)
        if isinstance(behind, types.FunctionType):
            if id(value) not in self._made:
                self._made[id(value)] = value, value  # while its parts are looked at: a function may hold itself
                self._made[id(value)] = value, self._function(value, behind)
            return self._made[id(value)][1]
        if type(value) in (list, tuple, set, frozenset):
            parts = [self(part) for part in value]
            return value if _same(parts, value) else type(value)(parts)
        if type(value) is dict:
            named = {key: self(part) for key, part in value.items()}
            return value if _same(named.values(), value.values()) else named
        return value

    def _partial(self, value: Any, given: "partial[Any]") -> Any:
        function, args = self(given.func), [self(one) for one in given.args]
        named = {name: self(one) for name, one in given.keywords.items()}
        if _same((function, *args, *named.values()), (given.func, *given.args, *given.keywords.values())):
            return value
        made = partial(function, *args, **named)
        made.__dict__.update({name: self(one) for name, one in vars(given).items()})
        return made

    def _function(self, value: Any, function: types.FunctionType) -> Any:
        turns = (
            nn.Module,
            types.MethodType,
            types.FunctionType,
            partial,
        )  # lists are shared: a hook may collect in one
        cells = function.__closure__ or ()
        held = [_content(cell) for cell in cells]
        new = [self(one) if isinstance(one, turns) else one for one in held]
        if _same(new, held):
            return value
        turned = tuple(cell if a is b else types.CellType(b) for cell, a, b in zip(cells, held, new, strict=True))
        name, defaults = function.__name__, function.__defaults__
        made = types.FunctionType(function.__code__, function.__globals__, name, defaults, turned)
        made.__kwdefaults__ = function.__kwdefaults__
        made.__dict__.update({name: self(one) for name, one in vars(function).items()})
        return made


def _same(new: Any, old: Any) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))
