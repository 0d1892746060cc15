"""A machine with an "mps" device that is not there: its tensors are the CPU's, and say that they are elsewhere.

It is as strict as the real one: tensors of two devices do not meet (numbers do), there is no float64, no NumPy, no pinned
memory and no CUDA. What asks something of a device by a wrong name therefore fails here as it fails there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

DEVICE = torch.device("mps", 0)

_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn",
    "tensor", "zeros",
)  # fmt: skip
_CROSSING = {"to", "copy_", "__getitem__", "__setitem__", "index_put_", "type_as"}  # may see both devices
_NAMES = ("cpu", "mps", "mps:0")
_HOME = {"cpu"}  # give a tensor of the CPU
_TELLING: dict[Any, Any] = {
    Tensor.device.__get__: DEVICE,
    Tensor.is_cpu.__get__: False,  # type: ignore[attr-defined]
    Tensor.is_mps.__get__: True,  # type: ignore[attr-defined]
}


class Away(Tensor):
    """A tensor that says it is on the device."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _TELLING:
            return _TELLING[func]
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        _check(name, [*args, *kwargs.values()])
        args, kwargs, device = _without_device(args, kwargs)
        home = name in _HOME or (device is not None and device.type == "cpu")
        result = super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        return tree_map(_home if home else _away, result)


def _check(name: str, given: list[Any]) -> None:
    if name == "numpy":
        raise TypeError("can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() first.")
    if name == "pin_memory":
        raise RuntimeError("cannot pin memory of an mps tensor")
    tensors = [one for one in _flat(given) if isinstance(one, Tensor)]
    here = [one for one in tensors if not isinstance(one, Away) and one.dim() > 0]
    if here and len(here) < len(tensors) and name not in _CROSSING:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} got some on mps:0 and some on cpu"
        )


def _flat(given: Any) -> Iterator[Any]:
    for one in given:
        if isinstance(one, list | tuple):
            yield from _flat(one)
        else:
            yield one


def _without_device(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any], torch.device | None]:
    """The arguments with the CPU in place of the device, and which one was asked for."""
    asked = kwargs.get("device")
    places = [
        i for i, one in enumerate(args) if isinstance(one, torch.device) or (isinstance(one, str) and one in _NAMES)
    ]
    if asked is None and places:
        asked = args[places[0]]
    if asked is None:
        return args, kwargs, None
    args = tuple("cpu" if i in places else one for i, one in enumerate(args))
    return args, {**kwargs, **({"device": "cpu"} if "device" in kwargs else {})}, torch.device(asked)


def _away(one: Any) -> Any:
    if not isinstance(one, Tensor):
        return one
    if one.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
    return one if isinstance(one, Away) else one.as_subclass(Away)


def _home(one: Any) -> Any:
    return one.as_subclass(Tensor) if isinstance(one, Away) else one


def _placing(make: Callable[..., Any]) -> Callable[..., Any]:
    """A factory, or `Tensor.to`, that knows the device."""

    def placed(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(one, Away) for one in args):
            return make(*args, **kwargs)
        args, kwargs, device = _without_device(args, kwargs)
        result = make(*args, **kwargs)
        return _away(result) if device is not None and device.type == DEVICE.type else result

    return placed


class Event:
    """Nothing is done later there."""

    def __init__(self, device: Any = None, **how: Any) -> None:
        """As torch's."""

    def record(self, *stream: Any) -> None:
        """Done."""

    def synchronize(self) -> None:
        """Done."""


@contextmanager
def an_mps_device() -> Iterator[torch.device]:
    """Within this block, in all threads, there is one. Its draws come from torch's generator for the CPU."""
    patches = [patch.object(torch, name, _placing(getattr(torch, name))) for name in _FACTORIES]
    patches.append(patch.object(Tensor, "to", _placing(Tensor.to)))
    patches.append(patch.object(torch.mps, "_get_default_mps_generator", lambda: torch.default_generator))
    patches.append(patch.object(torch, "Event", Event))
    for one in patches:
        one.start()
    try:
        yield DEVICE
    finally:
        for one in reversed(patches):
            one.stop()


def moved(model: nn.Module) -> nn.Module:
    """A model whose tensors are on the device."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = _away(tensor.detach())
    return model
