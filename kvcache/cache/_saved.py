"""A whole cache as bytes, whatever its policy, to go on later or elsewhere exactly where it stood."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvcache.cache._archive import check_finite, pack, unpack
from kvcache.cache._geometry import CacheGeometry
from kvcache.cache._layer import LayerCache
from kvcache.errors import CorruptError, InputError, KVCacheError, said

_FORMAT = "kvcache-cache"
_VERSION = 1


def save_layers(layers: Sequence[LayerCache], model: str, rows: int, secret: bytes | None = None) -> bytes:
    """The layers of a cache as a checked safetensors file; see `kvcache.cache.pack`.

    Args:
        model: the model's fingerprint.
        rows: batch size.
    """
    tensors: dict[str, Tensor] = {}
    counts = []
    for i, layer in enumerate(layers):
        own, numbers = layer.state()
        tensors |= {f"{i}.{name}": tensor for name, tensor in own.items()}
        counts.append(numbers)
    header: dict[str, Any] = {"format": _FORMAT, "version": _VERSION, "model": model, "rows": rows}
    return pack(tensors, header | {"policies": _policies(layers), "counts": counts}, secret)


def read_saved(data: bytes, model: str, secret: bytes | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_layers` wrote, checked as far as can be without the layers.

    Returns:
        The tensors by layer and part, such as ``0.keys``, ``[rows, KV heads, tokens, head_dim]`` where they are held as they
        came; and the header.

    Raises:
        CorruptError: if it is not that.
        InputError: if it is another model's.
    """
    tensors, header = unpack(data, secret)
    if (header.get("format"), header.get("version")) != (_FORMAT, _VERSION):
        raise CorruptError(
            f"a {header.get('format')!r} of version {header.get('version')!r}; this is version {_VERSION} of {_FORMAT!r}"
        )
    rows = header.get("rows")
    if type(rows) is not int or rows < 1 or not isinstance(header.get("counts"), list):
        raise CorruptError(f"a cache of {rows!r} rows; it will not be used, save it again")
    if header.get("model") != model:
        raise InputError("this cache was saved with another model or other weights; its keys mean nothing to this one")
    return tensors, header


def check_states(tensors: dict[str, Tensor], geometry: CacheGeometry) -> None:
    """Raise `CorruptError` for keys and values that are not finite, or not of this model's shape.

    Args:
        tensors: of `read_saved`; those that are checked are ``[rows, KV heads, tokens, head_dim]``.
        geometry: of the model that the cache is for.
    """
    for name, states in tensors.items():
        numbers, part = _parted(name)
        if not part.startswith(("keys", "values", "pinned_keys")):
            continue  # counts and positions, which their layer checks
        if states.is_floating_point():
            check_finite(states, name)
        whole = part in ("keys", "values") or part.endswith((".like", ".tail"))
        if not whole or states.dim() != 4 or not numbers or numbers[0] >= geometry.layers:
            continue
        layer = geometry.of(numbers[0])
        heads = layer.kv_heads if len(numbers) == 1 else states.shape[1]  # some heads, which their layer counts
        expected = heads, layer.head_dim if part.startswith("keys") else layer.value_dim
        if (states.shape[1], states.shape[3]) != expected:
            raise CorruptError(
                f"{name} has {states.shape[1]} heads of {states.shape[3]}, the model {expected[0]} of {expected[1]}; "
                "it will not be used, save it again"
            )


def _parted(name: str) -> tuple[list[int], str]:
    """The numbers of the layer and of its part, and what a tensor is called within."""
    words, numbers = name.split("."), list[int]()
    while words and words[0].isdigit():
        numbers.append(int(words.pop(0)))
    return numbers, ".".join(words)


def _policies(layers: Sequence[LayerCache]) -> list[str]:
    """What stays in each layer and how it is held."""
    return [
        repr(layer.given) if layer.storage.plain else f"{layer.given!r}, held as {layer.storage!r}" for layer in layers
    ]


def restore_layers(
    layers: Sequence[LayerCache], tensors: dict[str, Tensor], header: dict[str, Any], device: torch.device
) -> None:
    """Fill the empty layers of a new cache; on any error they are to be thrown away.

    Args:
        tensors, header: of `read_saved`: keys and values are ``[rows, KV heads, tokens, head_dim]``.
        device: where the layers shall hold them.

    Raises:
        InputError: if the policies are others.
        CorruptError: if tensors and counts do not belong together.
    """
    policies = _policies(layers)
    if header.get("policies") != policies:
        saved = header.get("policies")
        first = saved[0] if isinstance(saved, list) and saved else saved
        raise InputError(f"the cache was saved under {first}, this manager has {policies[0]}; use one with the same")
    if len(header["counts"]) != len(layers):
        raise CorruptError(f"{len(header['counts'])} layers were saved, the model has {len(layers)}")
    left = set(tensors)
    for i, (layer, counts) in enumerate(zip(layers, header["counts"], strict=True)):
        own = {name.partition(".")[2]: t for name, t in tensors.items() if name.partition(".")[0] == str(i)}
        left -= {f"{i}.{name}" for name in own}
        try:
            layer.restore({name: t.to(device) for name, t in own.items()}, counts)
        except CorruptError:
            raise
        except (KVCacheError, AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CorruptError(f"layer {i} was not saved by this: {said(error)}; save it again") from error
    if left or len({layer.seen for layer in layers}) != 1:
        raise CorruptError("the layers that were saved do not belong together; save the cache again")
