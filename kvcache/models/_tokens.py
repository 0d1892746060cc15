"""What a walk found, as values that are equal where nothing has changed."""

import types
from collections.abc import Hashable
from functools import cached_property
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedConfig

from kvcache.models._code import functions_of, written
from kvcache.models._forwards import HOOKS, reached
from kvcache.models._stores import stored_by
from kvcache.models._walk import HELD, PLAIN, Part, Place, Walk

Facts = dict[Place, Hashable]

_BESIDE = ("prepare_inputs_for_generation",)  # what a model runs before its forward
_MAKES = ("__init__", "__new__", "__setattr__", "__setstate__")


class Tokens:
    """Numbers for objects and memory: the same number for the same one, never that of one that is gone."""

    def __init__(self) -> None:
        self._objects: dict[int, tuple[ReferenceType[Any], int]] = {}
        self._memory: dict[int, tuple[StorageWeakRef, int]] = {}
        self._next = 0

    def facts(self, walk: Walk) -> Facts:
        """What is at each place, and each module's class and forward."""
        found: Facts = {part.place: self._fact(part, walk) for part in walk.parts}
        for name, module in walk.modules.items():
            kind = type(module)
            forward = vars(module).get("_compiled_call_impl") is not None, self._of(getattr(kind, "forward", None))
            found[name, "", ""] = self._of(kind), forward
        for kind in written(walk.classes()):
            found["", "", f"class {self._of(kind)}"] = self._of_class(kind)
        return found

    def _of_class(self, kind: type) -> Hashable:
        """Its methods and what they are made of, and its plain attributes."""
        held = list(vars(kind).items())
        functions = {name: list(functions_of(value)) for name, value in held}
        methods = [
            (name, self._of(one), self._of(one.__code__), repr(one.__defaults__))
            for name in functions
            for one in functions[name]
        ]
        return frozenset(methods), frozenset(
            (name, type(value), repr(value)) for name, value in held if isinstance(value, PLAIN)
        )

    def _fact(self, part: Part, walk: Walk) -> Hashable:
        value = part.value
        if part.kind == "plain":
            return "plain", type(value), repr(value)
        if part.kind == "size":  # of a container or an object that is walked into where it was met first
            return "size", type(value), len(value) if hasattr(value, "__len__") else 0, walk.name_of(value)
        if part.kind == "tensor":
            return "tensor", self._tensor(value)
        return part.kind, self._of(value)

    def _of(self, value: Any) -> Hashable:
        if isinstance(value, types.MethodType):
            return self._of(value.__func__), self._of(value.__self__)
        known = self._objects.get(id(value))
        if known is not None and known[0]() is value:
            return known[1]
        try:
            reference = ref(value)
        except TypeError:  # what cannot be told from another that takes its place when it is gone
            return type(value), id(value)
        self._next += 1
        self._objects[id(value)] = reference, self._next
        return self._next

    def _tensor(self, tensor: Tensor) -> Hashable:
        if tensor.is_meta:  # where weights are offloaded, there is a new one after each call
            return tensor.shape, tensor.dtype, "meta"
        version = 0 if tensor.is_inference() else tensor._version
        place = self._place(tensor)
        # No weak reference where memory tells it: `torch.utils.swap_tensors` refuses tensors that have one.
        told = place is not None or hasattr(tensor, "__tensor_flatten__")
        known = id(tensor) if told else self._of(tensor)
        return known, version, place, tensor.shape, tensor.dtype, str(tensor.device)

    def _place(self, tensor: Tensor) -> Hashable:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # a tensor subclass without memory of its own
            return None
        known = self._memory.get(storage._cdata)
        if known is None or known[0].expired():  # type: ignore[no-untyped-call]
            self._next += 1
            known = self._memory[storage._cdata] = StorageWeakRef(storage), self._next  # type: ignore[no-untyped-call]
        return known[1], tensor.storage_offset(), tensor.stride()


def is_state(before: Facts, after: Facts, walk: Walk) -> set[tuple[str, str]]:
    """Which attributes a forward wrote between two walks, as pairs of a module's name and theirs; `walk` is the later one."""
    changed = [place for place in before.keys() | after.keys() if before.get(place) != after.get(place)]
    stored = _Stored(walk)
    attributes = {place[:2] for place in changed}
    others = {place[:2] for place in changed if not _written(place, before.get(place), after.get(place), stored)}
    return attributes - others


def _written(place: Place, before: Any, after: Any, stored: "_Stored") -> bool:
    name, attribute, path = place
    module = stored.walk.modules.get(name)
    if module is None or attribute in ("", *HOOKS) or any(attribute in vars(module)[kind] for kind in HELD):
        return False
    if all(fact is None or fact[0] in ("tensor", "size") or fact[1] is type(None) for fact in (before, after)):
        return attribute in stored.anywhere or any(part in stored.anywhere for part in path.split("."))
    number = all(fact is not None and fact[0] == "plain" and fact[1] in (int, float) for fact in (before, after))
    return number and not path and attribute in stored.by_class(type(module))


class _Stored:
    """Which attributes code stores that the forward of a model's classes reaches."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self._known: dict[type, set[str]] = {}

    def by_class(self, kind: type) -> set[str]:
        if kind not in self._known:
            classes = [one for one in kind.__mro__ if issubclass(one, nn.Module)]
            self._known[kind] = stored_by(function for one in classes for function in reached(one, *_BESIDE))
        return self._known[kind]

    @cached_property
    def anywhere(self) -> set[str]:
        """By any of the classes, as one module may store what another one keeps, and by methods of what modules hold."""
        held = {type(part.value) for part in self.walk.parts if part.kind == "size"}
        bases = {one for kind in held if not issubclass(kind, PreTrainedConfig) for one in kind.__mro__}
        methods = (value for one in bases for name, value in vars(one).items() if name not in _MAKES)
        found = stored_by(value for value in methods if isinstance(value, types.FunctionType))
        return found.union(*(self.by_class(type(module)) for module in self.walk.modules.values()))
