"""Is everything still what it was? Asked of thousands of values at once, in C."""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from kvcache.models._code import functions_of, written
from kvcache.models._forwards import EVERYWHERE
from kvcache.models._sample import Sample
from kvcache.models._walk import ASIDE, HELD, OWN, PLAIN, Walk, functions_chosen

_version = attrgetter("_version")
_code = attrgetter("__code__", "__defaults__")
_expired = torch.UntypedStorage._expired
_UNREAD = ASIDE & vars(nn.Module()).keys()  # what every module has, and none lets go of


class Glance:
    """What a walk found, as flat lists that are compared with what there is now.

    Modules' attributes are one list. Values that are not plain must be the same objects; the dicts of parameters, children
    and hooks may be others, and are looked into as they are. Parameters are told by their address, version and memory and not
    held, so that what a model lets go of is free at once.

    What a question costs is mostly memory that a step has driven out of the processor's caches. So no more is read than
    tells; and lists are copied before they are gone through, as a copy touches all objects side by side.

    Args:
        walk: of the model.
        state: attributes that do not count, by the names of their modules.
    """

    def __init__(self, walk: Walk, state: dict[str, frozenset[str]]) -> None:
        self._modules = list(walk.modules.values())
        self._kinds = list(map(type, self._modules))
        self._written = list(map(vars, written(walk.classes())))
        self._attributes = self._of_classes()
        self._functions = [one for value in self._attributes for one in functions_of(value)]
        self._codes = list(map(_code, self._functions))
        self._chosen = walk.chosen
        self._by_name = self._of_names()
        named = [(vars(module), state.get(name, frozenset())) for name, module in walk.modules.items()]
        self._whole = [held for held, left in named if not left]
        self._parted = [(held, left) for held, left in named if left]
        self._outlined = self._outline()
        of_keys: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
        for held, left in named:
            of_keys[tuple(key for key in held if key not in _UNREAD and key not in left)].append(held)
        self._groups = [(_getter(keys), dicts) for keys, dicts in of_keys.items()]
        self._dicts: list[dict[Any, Any]] = [one for one in walk.containers if isinstance(one, dict)]
        self._dicts += EVERYWHERE.values()
        self._lists = [one for one in walk.containers if isinstance(one, list | deque)]
        self._sets = [one for one in walk.containers if isinstance(one, set)]
        self._members = list(map(frozenset, self._sets))
        keys = [key for keys, dicts in of_keys.items() for _ in dicts for key in keys]
        self._values = self._flat()
        inner = [i for i, key in enumerate(keys) if key in OWN]
        filled = [i for i in inner if self._values[i]]
        self._empty = _getter([i for i in inner if not self._values[i]])
        self._tensors_in = _getter([i for i in filled if keys[i] in HELD])
        self._others_in = _getter([i for i in filled if keys[i] not in HELD])
        apart = {*inner, *(i for i, key in enumerate(keys) if key in ASIDE)}
        told = [i for i in range(len(self._values)) if i not in apart]
        self._plain = _getter([i for i in told if isinstance(self._values[i], PLAIN)])
        self._equal = self._plain(self._values)
        self._objects = _getter([i for i in told if not isinstance(self._values[i], PLAIN)])
        self._same = self._objects(self._values)
        self._others = _inside(self._others_in(self._values))
        tensors = self._current()
        self._addresses = list(map(id, tensors))
        extra = [part.value for part in walk.parts if part.kind == "tensor"]
        held_ids = set(self._addresses)
        self._extra = list({id(one): one for one in extra if id(one) not in held_ids}.values())
        self._watch_tensors([*tensors, *self._extra], len(tensors))

    def _watch_tensors(self, tensors: Sequence[Any], held: int) -> None:
        counted = [i for i, one in enumerate(tensors) if isinstance(one, Tensor) and not one.is_inference()]
        placed = [i for i, one in enumerate(tensors) if isinstance(one, Tensor) and _has_memory(one)]
        self._counted, self._placed = _getter(counted), _getter(placed)
        self._versions = list(map(_version, self._counted(tensors)))
        self._places = list(map(Tensor.data_ptr, self._placed(tensors)))
        # Held weakly: memory that was freed and taken again is other memory, though its address may be the same.
        self._memory = [StorageWeakRef(one.untyped_storage()) for one in self._placed(tensors)]  # type: ignore[no-untyped-call]
        self._memories = [memory.cdata for memory in self._memory]
        self._sampled = _getter([i for i in placed if i < held])
        self._sample: Sample | None = None

    def _flat(self) -> list[Any]:
        own = (map(values, dicts) for values, dicts in self._groups)
        return list(chain(*chain.from_iterable(own), *map(dict.values, self._dicts), *self._lists))

    def _outline(self) -> list[Any]:
        """How many attributes each module has; of one with state, which others."""
        parted = (tuple(key for key in held if key not in left) for held, left in self._parted)
        return [*map(len, self._whole), *parted]

    def _current(self) -> list[Any]:
        """The modules' parameters and buffers, None among them."""
        return _inside(self._tensors_in(self._values))

    def same(self) -> bool:
        """Whether nothing has changed."""
        try:
            return self._is_same()
        except (RuntimeError, KeyError):  # tensors that are compared by value, dicts that change meanwhile
            return False

    def _is_same(self) -> bool:
        for many in (self._whole, self._values, self._modules):
            many.copy()
        if self._outline() != self._outlined:
            return False
        values = self._flat()
        if len(values) != len(self._values) or not all(map(is_, self._objects(values), self._same)):
            return False
        if any(self._empty(values)) or list(map(type, self._modules)) != self._kinds:
            return False
        others = _inside(self._others_in(values))
        if len(others) != len(self._others) or not all(map(is_, others, self._others)):
            return False
        tensors = _inside(self._tensors_in(values))
        if list(map(id, tensors)) != self._addresses:
            return False
        tensors += self._extra
        return (
            self._plain(values) == self._equal
            and list(map(_version, self._counted(tensors))) == self._versions
            and list(map(Tensor.data_ptr, self._placed(tensors))) == self._places
            and not any(map(_expired, self._memories))
            and list(map(frozenset, self._sets)) == self._members
            and self._is_same_code()
        )

    def _is_same_code(self) -> bool:
        """By class, not by module: there are few."""
        attributes = self._of_classes()
        return (
            len(attributes) == len(self._attributes)
            and all(map(is_, attributes, self._attributes))
            and list(map(_code, self._functions)) == self._codes
            and all(map(is_, self._of_names(), self._by_name))
        )

    def _of_classes(self) -> list[Any]:
        """What the modules' classes have, theirs and their bases'."""
        return [value for held in self._written for value in held.values()]

    def _of_names(self) -> list[Any]:
        return [function for key, name in self._chosen for function in functions_chosen(key, name)]

    def sample(self) -> bytes | None:
        """Some bytes of each parameter and buffer; None if they are others than were looked at."""
        tensors = self._current()
        if list(map(id, tensors)) != self._addresses:
            return None
        sampled = self._sampled(tensors)
        if self._sample is None:
            self._sample = Sample(sampled)
        return self._sample(sampled)


def _getter(indices: Sequence[Any]) -> Callable[[Any], tuple[Any, ...]]:
    """What gives the values at these places of a sequence, or under these names of a dict."""
    if len(indices) > 1:
        return itemgetter(*indices)
    return lambda values: tuple(values[i] for i in indices)


def _inside(dicts: Sequence[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, dicts)))


def _has_memory(tensor: Tensor) -> bool:
    if tensor.is_meta or tensor.layout != torch.strided or type(tensor).__name__ == "FakeTensor":
        return False
    try:
        storage = tensor.untyped_storage()  # a fake tensor's has no memory, and is not to be asked for it
        return storage.device.type != "meta" and (storage.data_ptr() != 0 or tensor.numel() == 0)
    except (NotImplementedError, RuntimeError):  # a tensor subclass without memory of its own
        return False
