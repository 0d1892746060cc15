"""Which model is this: a digest of all that decides what keys and values it computes.

A prefix computed by one model is poison to another, so two models that differ in one weight have different fingerprints.
Reading all weights takes a second or so per gigabyte of them and core; it is done once, and again only after something
changed.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
import transformers
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

_VOLATILE = {"_name_or_path", "architectures", "transformers_version", "use_cache", "return_dict", "torch_dtype"}
_ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")  # how PEFT switches weights

_known: "WeakKeyDictionary[nn.Module, _Read]" = WeakKeyDictionary()
_lock = Lock()


def model_fingerprint(model: nn.Module) -> str:
    """A SHA-256, in hex, of a model's architecture, weights, buffers, dtypes, positions and attention implementation.

    The digest is kept for as long as no tensor of the model has been replaced, moved or changed in place. What torch
    itself does not notice goes unnoticed here as well: writing through ``parameter.data``. Call `forget` after that.

    Args:
        model: any module; the configs of transformers models in it count too.
    """
    modules, tensors = _parts(model)
    with _lock:
        known = _known.get(model)
    if known is None or not known.is_of(modules, tensors):
        known = _Read(modules, tensors)
        with _lock:
            _known[model] = known
    said = f"{known.digest} {transformers.__version__} {_settings(modules, tensors)}"
    return hashlib.sha256(said.encode()).hexdigest()


def model_outline(model: nn.Module) -> str:
    """A SHA-256, in hex, of what decides how fast a model is: its modules, the shapes and dtypes of its tensors, its
    settings; not the numbers in them, nor the release of transformers."""
    modules, tensors = _parts(model)
    kinds = [f"{type(module).__module__}.{type(module).__qualname__} {list(module._modules)}" for module in modules]
    said = [kinds, [f"{tensor.dtype} {list(tensor.shape)}" for tensor in tensors], _settings(modules, tensors)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def forget(model: nn.Module) -> None:
    """Read the model's weights again at the next question: after a change made through ``parameter.data``."""
    with _lock:
        _known.pop(model, None)


class _Read:
    """A digest, and how to tell whether it still holds: the same tensors, in the same memory, at the same version.

    And modules of the same classes: an activation that has no tensor may be exchanged.
    """

    def __init__(self, modules: list[nn.Module], tensors: list[Tensor]) -> None:
        self._classes = [type(module) for module in modules]
        self._tensors: list[ReferenceType[Tensor]] = [ref(tensor) for tensor in tensors]
        self._states = [_state(tensor) for tensor in tensors]
        # Held weakly: memory that was freed and taken again is other memory, though its address may be the same.
        self._memory = [_memory(tensor) for tensor in tensors]
        self.digest = _weights(modules)

    def is_of(self, modules: list[nn.Module], tensors: list[Tensor]) -> bool:
        if [type(module) for module in modules] != self._classes or len(tensors) != len(self._tensors):
            return False
        return all(
            known() is tensor and _state(tensor) == state and (memory is None or not memory.expired())  # type: ignore[no-untyped-call]
            for tensor, known, state, memory in zip(tensors, self._tensors, self._states, self._memory, strict=True)
        )


def _parts(model: nn.Module) -> tuple[list[nn.Module], list[Tensor]]:
    """All modules and tensors in a fixed order: what `named_parameters` and the like give, in a tenth of the time."""
    modules = [model]
    tensors: list[Tensor] = []
    for module in modules:  # grows while it is walked
        tensors += [tensor for tensor in module._parameters.values() if tensor is not None]
        tensors += [tensor for tensor in module._buffers.values() if tensor is not None]
        modules += [child for child in module._modules.values() if child is not None]
    return modules, tensors


def _state(tensor: Tensor) -> tuple[object, ...]:
    """Its version counter, where it lies, and how."""
    try:
        place = tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.stride()
    except (NotImplementedError, RuntimeError):  # a tensor subclass without a storage of its own
        place = None
    return 0 if tensor.is_inference() else tensor._version, place, tensor.shape, tensor.dtype


def _memory(tensor: Tensor) -> StorageWeakRef | None:
    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):
        return None


def _weights(modules: list[nn.Module]) -> str:
    """The digest of all tensors and of the modules' classes; hashing runs in threads, as hashlib lets go of the GIL."""
    named = [
        (f"{i}.{name}", part)
        for i, module in enumerate(modules)
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if tensor is not None
        for part in _plain(tensor)
    ]
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda item: tensor_digest(item[1]), named))
    total = hashlib.sha256()
    for module in modules:
        total.update(f"{type(module).__module__}.{type(module).__qualname__} {list(module._modules)}\n".encode())
    for (name, _), digest in zip(named, digests, strict=True):
        total.update(f"{name} {digest}\n".encode())
    return total.hexdigest()


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor subclass, such as a quantized weight, is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256, in hex, of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in row order, without a copy where it lies so already."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def _settings(modules: list[nn.Module], tensors: list[Tensor]) -> str:
    """What is not in the weights: configs with their attention implementation, adapters switched on or off, autocast."""
    configs: dict[int, Any] = {}
    switches = []
    for i, module in enumerate(modules):
        own = vars(module)
        config = own.get("config")
        if config is not None and hasattr(config, "to_dict"):
            configs[id(config)] = config
        switches += [(i, name, own[name]) for name in _ADAPTERS if own.get(name)]
    said = [
        [
            {name: value for name, value in vars(config).items() if name not in _VOLATILE},
            getattr(config, "_attn_implementation", None),
        ]
        for config in configs.values()
    ]
    device = tensors[0].device.type if tensors else "cpu"
    autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
    return json.dumps([said, switches, autocast], sort_keys=True, default=str)
