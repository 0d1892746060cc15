"""All that decides what a model computes, part by part: a walk through its modules and what they hold.

Each part has a place, ``(module, attribute, path inside it)``, and what is there: a plain value, a tensor, a module, a
callable, or something that only its identity tells apart. Containers, configs and other objects are walked into.
"""

import types
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, Literal
from weakref import ReferenceType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvcache.models._forwards import EVERYWHERE, HOOKS, foreign, wrapper

Place = tuple[str, str, str]
"""A module's name, its attribute, and the path inside that."""

Kind = Literal["plain", "size", "tensor", "module", "callable", "opaque"]

HELD = ("_parameters", "_buffers")
OWN = frozenset((*HELD, "_modules", *HOOKS))  # a module's dicts that are walked as what they are
# What has no part in what a forward computes: torch's and transformers' own bookkeeping.
ASIDE = frozenset(
    (
        "_non_persistent_buffers_set", "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook",
        "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
        "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
        "_compiled_call_impl", "_compiled_call", "_is_torch_compile", "_last_compile_config", "_is_hf_initialized", "_cache",
        "generation_config", "warnings_issued", "name_or_path", "_name_or_path", "model_tags", "loss_type",
        "_loss_function", "gradient_checkpointing", "_gradient_checkpointing_func", "_previous_max_cache_length",
        "_auto_class", "_require_grads_hook", "_require_grads_hooks", "_hf_peft_config_loaded",
    )
)  # fmt: skip
PLAIN = (
    type(None), bool, int, float, complex, str, bytes, Enum, range, slice, type(Ellipsis),
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
# What configs choose by name, by their attributes.
CHOSEN: dict[str, tuple[Mapping[str, Any], ...]] = {
    "_attn_implementation_internal": (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS),
    "_experts_implementation_internal": (ALL_EXPERTS_FUNCTIONS,),
}
_NOTHING = (ReferenceType, RemovableHandle)  # what only leads to something
_CALLABLE = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_OF_TENSORS = ASIDE | {"persistent", "_is_buffer", "_is_param"}  # how torch marks parameters and buffers
_COMPILERS = "_dynamo_"  # what torch.compile notes on the tensors that it has met
_MANY = 2048  # entries of a container that are looked at; a larger one is told by its identity and size
_DEEP = 8


@dataclass(frozen=True)
class Part:
    """What is at a place.

    Attributes:
        value: of a ``"size"`` what it is the size of: a container, or an object that is walked into.
    """

    place: Place
    kind: Kind
    value: Any


def functions_chosen(key: str, name: str) -> list[Any]:
    """The functions that transformers has now under the name that this attribute of a config gives; None where it has none.

    Anybody may register another one under the same name.
    """
    return [interface.get(name) for interface in CHOSEN[key]]


class Walk:
    """One walk through a model.

    Args:
        model: its root.
        state: attributes to leave out, by the names of their modules.

    Attributes:
        modules: all of them, by name; those that are no registered children as well.
        parts: what they hold.
        containers: dicts, lists and sets that were walked into, attributes of objects among them.
        chosen: what its configs choose by name, see `functions_chosen`: their attributes, and the names.
    """

    def __init__(self, model: nn.Module, state: Mapping[str, frozenset[str]] | None = None) -> None:
        self._state = state or {}
        self._seen: dict[int, str] = {}
        self.modules: dict[str, nn.Module] = {}
        self.containers: list[Any] = []
        self.parts: list[Part] = []
        self._found: list[tuple[str, nn.Module]] = []
        waiting = [("", model)]
        while waiting:  # depth first, so that wrappers around modules do not change the order
            name, module = waiting.pop()
            if id(module) not in self._seen:
                self._seen[id(module)] = name
                self.modules[name] = module
                self.parts += self._module(name, module)
                waiting += reversed(self._found)
                self._found = []
        configs = (part for part in self.parts if part.kind == "plain")
        chosen = {(key, part.value) for part in configs if (key := part.place[2].rpartition(".")[2]) in CHOSEN}
        self.chosen = sorted((key, name) for key, name in chosen if isinstance(name, str))
        for key, name in self.chosen:
            for i, function in enumerate(functions_chosen(key, name)):
                self.parts += self._leaves(("", "functions by name", f"{name}.{i}"), function, 0)
        for kind, hooks in EVERYWHERE.items():  # torch's global ones, which run around every module
            for i, hook in enumerate([hook for hook in list(hooks.values()) if foreign(hook)]):
                self.parts += self._leaves(("", "every module", f"{kind}.{i}"), hook, 0)

    def classes(self) -> set[type]:
        """Of the modules, and of the objects that were walked into."""
        return {
            type(one) for one in (*self.modules.values(), *(part.value for part in self.parts if part.kind == "size"))
        }

    def name_of(self, value: Any) -> str | None:
        """Under which name a module, or an object that is walked into, was met first."""
        return self._seen.get(id(value))

    def _module(self, name: str, module: nn.Module) -> Iterator[Part]:
        held = vars(module)
        for key, child in list(module._modules.items()):
            if child is not None:
                self._found.append((f"{name}.{key}" if name else key, child))
                yield Part((name, key, ""), "module", child)
        for kind in HELD:
            for key, tensor in list(held[kind].items()):
                yield from self._leaves((name, key, ""), tensor, 0)
        for kind in HOOKS:
            hooks = [hook for hook in list(held[kind].values()) if foreign(hook)]
            for i, hook in enumerate(hooks):
                yield from self._leaves((name, kind, str(i)), hook, 0)
        if not wrapper(module):
            aside = ASIDE | OWN | self._state.get(name, frozenset()) | getattr(type(module), "ASIDE", frozenset())
            for key, value in list(held.items()):
                if key not in aside:
                    yield from self._leaves((name, key, ""), value, 0)

    def _leaves(self, place: Place, value: Any, depth: int) -> Iterator[Part]:
        if isinstance(value, _NOTHING):
            return
        if isinstance(value, PLAIN):
            yield Part(place, "plain", value)
        elif isinstance(value, Tensor):
            yield Part(place, "tensor", value)
            yield from self._inside_tensor(place, value, depth)
        elif isinstance(value, nn.Module):
            self._found.append((_named(place), value))
            yield Part(place, "module", value)
        elif isinstance(value, _CALLABLE):
            yield Part(place, "callable", value)
        elif depth > _DEEP or (inner := _inside(value)) is None or len(inner) > _MANY:
            yield Part(place, "opaque", value)
        elif id(value) in self._seen:
            yield Part(place, "size", value)
        else:
            self._seen[id(value)] = _named(place)
            if isinstance(inner, _Attributes):
                self.containers.append(vars(value))
            elif isinstance(value, dict | list | set | deque):
                self.containers.append(value)
            yield Part(place, "size", value)
            for key, one in inner.items():
                yield from self._leaves((*place[:2], f"{place[2]}.{key}"), one, depth + 1)

    def _inside_tensor(self, place: Place, tensor: Tensor, depth: int) -> Iterator[Part]:
        """What a tensor holds beside its numbers: the state of a quantized one, the parts of a subclass."""
        held = vars(tensor)
        inner = {key: held[key] for key in list(held) if key not in _OF_TENSORS and not key.startswith(_COMPILERS)}
        if inner:
            self.containers.append(held)
        if hasattr(tensor, "__tensor_flatten__"):
            names, context = tensor.__tensor_flatten__()
            inner |= {"context": context, **{name: getattr(tensor, name) for name in names}}
        if inner and depth <= _DEEP and id(tensor) not in self._seen:
            self._seen[id(tensor)] = _named(place)
            for key, value in inner.items():
                if value is not tensor:
                    yield from self._leaves((*place[:2], f"{place[2]}.{key}"), value, depth + 1)


def _named(place: Place) -> str:
    return ".".join(filter(None, place))


class _Attributes(dict[str, Any]):
    """An object's."""


def _inside(value: Any) -> dict[Any, Any] | None:
    """What a container or an object holds, by name; None if it cannot be looked into."""
    if isinstance(value, dict | types.MappingProxyType):
        return dict(value)
    if isinstance(value, list | tuple | deque):
        return dict(enumerate(value))
    if isinstance(value, set | frozenset):
        return dict(enumerate(sorted(value, key=repr)))
    if isinstance(value, partial):
        return {"function": value.func, **dict(enumerate(value.args)), **value.keywords}
    if hasattr(value, "__dict__") and not isinstance(value, types.ModuleType | torch.ScriptObject):
        return _Attributes({key: one for key, one in list(vars(value).items()) if key not in ASIDE})
    return None
