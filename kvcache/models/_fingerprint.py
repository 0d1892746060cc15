"""Which model is this: a digest of all that decides what keys and values it computes.

A prefix computed by one model is poison to another, so two models that differ in one weight have different fingerprints.
Reading all weights takes a second or so per gigabyte of them and core; it is done once, and again only after something
changed.
"""

import hashlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn

from kvcache.errors import InputError
from kvcache.models._code import class_code, function_code
from kvcache.models._forwards import unwrapped, wrapper
from kvcache.models._signature import Signature, signature_of, watch_of
from kvcache.models._walk import Part, Walk

# Which part of a model's attributes says where it came from or what it gives back, not what it computes.
_VOLATILE = {
    "_name_or_path", "architectures", "transformers_version", "use_cache", "return_dict", "torch_dtype",
    "training", "base_model_name_or_path", "prepare_inputs_for_generation", "base_model_prepare_inputs_for_generation",
    "_old_forward", "_hf_hook", "forward", "hf_device_map", "output_attentions", "output_hidden_states",
    "_output_attentions", "_weight_conversions",
}  # fmt: skip

Codes = Mapping[type, str]  # what classes do, see `class_code`

_known: "WeakKeyDictionary[nn.Module, tuple[Signature, bytes, str]]" = WeakKeyDictionary()
_lock = Lock()


def model_fingerprint(model: nn.Module) -> str:
    """A SHA-256, in hex, of a model's architecture, weights, buffers, attributes, dtypes and attention implementation.

    The digest is kept for as long as nothing of the model has changed, see `kvcache.models`, and a sample of each tensor's
    content is what it was. What neither shows goes unnoticed: a few elements written through ``parameter.data``, functions
    and values replaced in a Python module. Call `forget` after that.

    Classes and functions of torch and transformers go by their names and the release of transformers. Of others what they
    do counts: their code, defaults and class attributes, and the functions and values that they read from their module.

    Args:
        model: any module; the configs of transformers models in it count too.

    Raises:
        InputError: for a model that cannot be told from others by what it holds: with hooks, or a forward, of somebody's
            own, offloaded weights, or attributes that have no value that could be written down.
    """
    watch = watch_of(model)
    signature, sample = watch.signature(), watch.sample()
    with _lock:
        known = _known.get(model)
    if known is None or known[0] is not signature or known[1] != sample:
        check_named(model)
        known = signature, sample, _digest(watch.walk(), tensor_digest, True)
        with _lock:
            _known[model] = known
    device = next((tensor.device.type for tensor in model.parameters()), "cpu")
    autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
    return hashlib.sha256(f"{known[2]} {transformers.__version__} {autocast}".encode()).hexdigest()


def model_outline(model: nn.Module) -> str:
    """A SHA-256, in hex, of what decides how fast a model is.

    That is its modules, the shapes and dtypes of its tensors, and its settings; not the numbers in the tensors, nor the release
    of transformers.
    """
    return _digest(watch_of(unwrapped(model)).walk(), lambda tensor: f"{tensor.dtype} {list(tensor.shape)}", False)


def model_program(model: nn.Module) -> str:
    """A SHA-256, in hex, of what decides which operations a model runs.

    That is all that its fingerprint is of, but of its tensors only shapes and dtypes.

    Raises:
        InputError: as `model_fingerprint`.
    """
    check_named(model)
    return _digest(watch_of(model).walk(), lambda tensor: f"{tensor.dtype} {list(tensor.shape)}", True)


def check_named(model: nn.Module) -> None:
    """Refuse a model that cannot be told from others.

    Raises:
        InputError: with the reason, see `model_fingerprint`.
    """
    if (why := signature_of(model).why_no_name) is not None:
        raise InputError(f"what {type(unwrapped(model)).__name__} computes cannot be kept for other requests: {why}")


def forget(model: nn.Module) -> None:
    """Read the model's weights again at the next question: after a change that goes unnoticed, see `model_fingerprint`."""
    watch_of(model).forget()
    with _lock:
        _known.pop(model, None)


def _digest(walk: Walk, of: Callable[[Tensor], str], with_code: bool) -> str:
    """The digest of all that a model holds, its tensors as `of` says; that runs in threads, as hashlib lets go of the GIL.

    Args:
        with_code: whether what classes and functions do counts, beside their names.
    """
    names = {id(module): _bare(name) for name, module in walk.modules.items()}
    codes = {kind: class_code(kind) for kind in walk.classes()} if with_code else None
    parts = [part for part in walk.parts if _counts(part)]
    said = [(_bare(".".join(part.place)), *_said(part, walk, names, codes)) for part in parts]
    with ThreadPoolExecutor() as pool:
        digests = iter(list(pool.map(of, [tensor for _, _, tensors in said for tensor in tensors])))
    lines = [f"{place} {text} {' '.join(next(digests) for _ in tensors)}" for place, text, tensors in said]
    modules = ((_bare(name), type(one)) for name, one in walk.modules.items() if not wrapper(one))
    lines += [f"{name} {_name_of(kind)} {codes[kind] if codes else ''}" for name, kind in modules]
    # In the order of their places: that in which they were assigned does not matter.
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _bare(name: str) -> str:
    """A module's name as if none were wrapped by `torch.compile`: compiled, it computes the same."""
    return ".".join(part for part in name.split(".") if part not in ("", "_orig_mod"))


def _counts(part: Part) -> bool:
    return part.value is not None and not (
        {part.place[1], part.place[2].rpartition(".")[2]} & _VOLATILE or part.place[1] == "_orig_mod"
    )


def _said(part: Part, walk: Walk, names: dict[int, str], codes: Codes | None) -> tuple[str, list[Tensor]]:
    """What is at a place, as text and as the tensors it consists of.

    Raises:
        InputError: if it cannot be written down.
    """
    value = part.value
    if part.kind == "tensor":
        if value.is_meta:
            where = ".".join(filter(None, part.place))
            raise InputError(f"{where} has no content to read: its weights are offloaded, or were never loaded")
        return type(value).__name__ if hasattr(value, "__tensor_flatten__") else "", list(_plain(value))
    if isinstance(value, torch.ScriptObject):
        return str(value._type()), [tensor for one in _tensors(value.__getstate__()) for tensor in _plain(one)]  # type: ignore[attr-defined]
    if part.kind == "module":
        return f"module {names[id(unwrapped(value))]}", []
    if part.kind == "plain":
        return f"{type(value).__name__} {value!r}", []
    if part.kind == "size":
        code = "" if codes is None else codes[type(value)]
        return f"{_name_of(type(value))} {_bare(walk.name_of(value) or '')} {code}", []
    named = _callable(value, names) if part.kind == "callable" else None
    if named is None:
        where = ".".join(filter(None, part.place))
        raise InputError(
            f"what this model computes cannot be kept for other requests: {where} is a {type(value).__name__}, which "
            "nothing that could be written down tells from another"
        )
    return (f"{named} {_code(value)}" if codes is not None else named), []


def _code(value: Any) -> str:
    """What a callable does, where its name does not tell."""
    value = getattr(value, "__func__", value)
    if isinstance(value, type):
        return class_code(value)
    return function_code(value) if isinstance(value, types.FunctionType) else ""


def _callable(value: Any, names: dict[int, str]) -> str | None:
    """The name of a class, a function or a method by which it is found again; None if it is not."""
    if isinstance(value, types.MethodType):
        owner, function = names.get(id(value.__self__)), _callable(value.__func__, names)
        return None if owner is None or function is None else f"{function} of {owner or 'the model'}"
    if isinstance(value, type):
        return _name_of(value)
    name = f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, types.BuiltinFunctionType):
        return name
    found: Any = sys.modules.get(value.__module__)
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    return name if found is value else None


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor consists of. A subclass's are parts of their own."""
    if tensor.is_quantized:
        yield tensor.int_repr()
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            yield torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)
        else:
            yield from (tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points())
    elif not hasattr(tensor, "__tensor_flatten__"):
        yield tensor


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256, in hex, of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of any shape, in row order; without a copy where it lies so already."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]
