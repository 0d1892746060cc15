"""What classes and functions do, as text: their code, and the values that it reads beside a model's own.

The code of torch and transformers goes by its name: the release is told elsewhere. All other code can be another one under
the same name: in a script that was edited, or a method that was replaced.
"""

import dis
import hashlib
import sys
import types
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from kvcache.models._walk import PLAIN

_RELEASED = frozenset(("torch", "transformers", *sys.stdlib_module_names))
# What all modules, models and configs have: it is no part of what one computes, and there is much of it.
_BASES = frozenset((*PreTrainedModel.__mro__, *PreTrainedConfig.__mro__))
_MANY = 2048  # entries of a container that are written down
_CONSTANT = (tuple, frozenset, types.CodeType)
_METHOD = (types.FunctionType, staticmethod, classmethod, property)
# What says where a class was written, and what Python keeps there.
_ASIDE = frozenset(
    ("__doc__", "__module__", "__qualname__", "__firstlineno__", "__static_attributes__", "__dict__", "__weakref__",
     "__annotations__", "__annotations_cache__", "__annotate__", "__annotate_func__", "__slotnames__", "__parameters__",
     "__orig_bases__", "_abc_impl", "__init__")
)  # fmt: skip


def home(thing: Any) -> str:
    """The module that a function's code, or a class, was written in."""
    if isinstance(thing, types.FunctionType):
        return str(thing.__globals__.get("__name__"))
    return str(thing.__module__)


def released(thing: Any) -> bool:
    """Whether its name and a release tell what it does: neither it nor what it is wrapped around is of somebody else."""
    return all(home(one).partition(".")[0] in _RELEASED for one in _layers(thing))


def _layers(thing: Any) -> Iterator[Any]:
    """A function and those that it is wrapped around, as by ``torch.no_grad()``; a class as it is."""
    yield thing
    while isinstance(thing, types.FunctionType) and (thing := vars(thing).get("__wrapped__")) is not None:
        yield thing


def written(kinds: Iterable[type]) -> list[type]:
    """The classes that these consist of, without what all models have and Python's own, each once."""
    bases = dict.fromkeys(one for kind in kinds for one in kind.__mro__)
    return [one for one in bases if one not in _BASES and one.__module__ != "builtins"]


def class_code(kind: type) -> str:
    """A digest of what a class and its bases do, beside what the releases of torch and transformers tell; "" if nothing."""
    said = _Text()
    lines = []
    for one in written([kind]):
        for name, value in sorted(vars(one).items()):
            if name not in _ASIDE and (not released(one) or _foreign(value)):
                lines.append(f"{one.__qualname__}.{name} {said.of(value)}")
    return _digest("\n".join(lines)) if lines else ""


def function_code(function: types.FunctionType) -> str:
    """A digest of what a function does, and of what it reads beside what it is given; "" for one of a release."""
    return "" if released(function) else _digest(_Text().of(function))


def _foreign(value: Any) -> bool:
    """Whether a method of a released class is of somebody else."""
    return any(not released(function) for function in functions_of(value))


def functions_of(value: Any) -> Iterator[types.FunctionType]:
    """The functions behind what a class has under a name, and those that they are wrapped around."""
    if isinstance(value, _METHOD):
        behind = (value.fget, value.fset) if isinstance(value, property) else (getattr(value, "__func__", value),)
        yield from (one for top in behind for one in _layers(top) if isinstance(one, types.FunctionType))


class _Text:
    """Values as text that is the same in every process. What is met again, or cannot be written down, goes by its type."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}

    def of(self, value: Any) -> str:
        if isinstance(value, PLAIN):
            return f"{type(value).__name__} {value!r}"
        if isinstance(value, type | types.BuiltinFunctionType):
            return f"{value.__module__}.{value.__qualname__}"
        if isinstance(value, types.FunctionType) and released(value):
            return f"{home(value)}.{value.__qualname__}"
        if not isinstance(value, _CONSTANT):  # of which equal ones are one object or many
            if id(value) in self._seen:
                return f"again {type(value).__name__}"
            self._seen[id(value)] = value
        return f"{type(value).__name__}({', '.join(self._inside(value))})"

    def _inside(self, value: Any) -> Iterator[str]:
        if isinstance(value, types.FunctionType):
            yield from self._function(value)
        elif isinstance(value, _METHOD):
            yield from map(self.of, functions_of(value))
        elif isinstance(value, types.MethodType):
            yield self.of(value.__func__)
        elif isinstance(value, partial):
            yield from map(self.of, (value.func, value.args, value.keywords))
        elif isinstance(value, types.CodeType):
            yield from (value.co_code.hex(), str(value.co_names), str((value.co_flags, value.co_argcount)))
            yield from map(self.of, value.co_consts)
        elif isinstance(value, types.ModuleType):
            yield value.__name__
        elif isinstance(value, Tensor):
            yield _tensor(value)
        elif isinstance(value, dict | types.MappingProxyType) and len(value) <= _MANY:
            yield from (f"{self.of(key)}: {self.of(one)}" for key, one in list(value.items()))
        elif isinstance(value, list | tuple) and len(value) <= _MANY:
            yield from map(self.of, list(value))
        elif isinstance(value, set | frozenset) and len(value) <= _MANY:
            yield from sorted(map(self.of, list(value)))

    def _function(self, function: types.FunctionType) -> Iterator[str]:
        yield self.of(function.__code__)
        yield self.of(function.__defaults__)
        yield self.of(function.__kwdefaults__)
        for cell in function.__closure__ or ():
            try:
                yield self.of(cell.cell_contents)
            except ValueError:  # a name that has no value yet
                yield "empty"
        for name in _globals_in(function.__code__):
            if name in function.__globals__:
                yield f"{name}: {self.of(function.__globals__[name])}"


def _globals_in(code: types.CodeType) -> list[str]:
    """The names of a module that code reads."""
    codes, names = [code], set()
    for one in codes:  # grows: functions inside functions
        codes += [const for const in one.co_consts if isinstance(const, types.CodeType)]
        names |= {step.argval for step in dis.get_instructions(one) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return sorted(names)


def _tensor(tensor: Tensor) -> str:
    said = f"{tensor.dtype} {list(tensor.shape)}"
    if tensor.is_meta or tensor.is_quantized or tensor.is_sparse or hasattr(tensor, "__tensor_flatten__"):
        return said
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{said} {hashlib.sha256(flat.numpy().tobytes()).hexdigest()}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
