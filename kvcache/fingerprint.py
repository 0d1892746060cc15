"""Which model is this: a digest of all that decides what keys and values it computes.

A prefix computed by one model is poison to another, so two models that differ in one weight have different fingerprints.
Reading all weights takes a second or so per gigabyte of them and core; it is done once, and again only after something
changed.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
import transformers
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

_VOLATILE = {"_name_or_path", "architectures", "transformers_version", "use_cache", "return_dict", "torch_dtype"}
_ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters")  # how PEFT switches weights on and off

_known: "WeakKeyDictionary[nn.Module, tuple[_State, str]]" = WeakKeyDictionary()
_lock = Lock()


def model_fingerprint(model: nn.Module, settings: Mapping[str, Any] | None = None) -> str:
    """A SHA-256, in hex, of a model's architecture, weights, buffers, dtypes, positions and attention implementation.

    The digest is kept for as long as no tensor of the model has been replaced, moved or changed in place. What torch
    itself does not notice goes unnoticed here as well: writing through ``parameter.data``. Call `forget` after that.

    Args:
        model: any module; for a transformers model its config counts too.
        settings: further settings that decide its keys and values, as JSON.
    """
    state = _State(model)
    with _lock:
        known = _known.get(model)
    if known is not None and known[0] == state:
        digest = known[1]
    else:
        digest = _weights(model)
        with _lock:
            _known[model] = state, digest
    switches = json.dumps([_switches(model), _configs(model), settings], sort_keys=True, default=str)
    return hashlib.sha256(f"{digest} {transformers.__version__} {switches}".encode()).hexdigest()


def forget(model: nn.Module) -> None:
    """Read the model's weights again at the next question: after a change made through ``parameter.data``."""
    with _lock:
        _known.pop(model, None)


class _State:
    """Whether a model's tensors are still the ones that were read: the same objects, memory and version counters."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors: list[tuple[str, ReferenceType[Tensor], int, StorageWeakRef | None]] = [
            (name, ref(tensor), _version(tensor), _memory(tensor)) for name, tensor in _tensors(model)
        ]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _State) or len(self._tensors) != len(other._tensors):
            return False
        return all(
            a[0] == b[0] and a[1]() is not None and a[1]() is b[1]() and a[2] == b[2] and _same_memory(a[3], b[3])
            for a, b in zip(self._tensors, other._tensors, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _memory(tensor: Tensor) -> StorageWeakRef | None:
    """Its storage, held weakly: memory that was freed and taken again is another storage."""
    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):  # a tensor subclass without a storage of its own
        return None


def _same_memory(a: StorageWeakRef | None, b: StorageWeakRef | None) -> bool:
    if a is None or b is None:
        return a is b
    return bool(a.cdata == b.cdata) and not a.expired()  # type: ignore[no-untyped-call]


def _weights(model: nn.Module) -> str:
    """The digest of all tensors and of the modules' classes; hashing runs in threads, as hashlib lets go of the GIL."""
    named = [(name, part) for name, tensor in _tensors(model) for part in _plain(tensor)]
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda item: tensor_digest(item[1]), named))
    total = hashlib.sha256()
    for module in model.modules():
        total.update(f"{type(module).__module__}.{type(module).__qualname__}\n".encode())
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


def _switches(model: nn.Module) -> list[Any]:
    found = ((type(m).__qualname__, name, vars(m).get(name)) for m in model.modules() for name in _ADAPTERS)
    return [switch for switch in found if switch[2]]


def _configs(model: nn.Module) -> list[Any]:
    """The configs of a transformers model, or of those inside another module, with their attention implementation."""
    configs: list[Any] = []
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "to_dict") and not any(config is known for known in configs):
            configs.append(config)
    return [
        [
            {name: value for name, value in config.to_dict().items() if name not in _VOLATILE},
            getattr(config, "_attn_implementation", None),
        ]
        for config in configs
    ]
