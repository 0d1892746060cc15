"""Our caches as arguments and results of what `torch.export` makes: taken apart into tensors, and put together again."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree as pytree
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvcache.cache import CacheSpec, KeepAll, LayerCache
from kvcache.models._managed import ManagedCache
from kvcache.models._managed_layer import PLAIN, ManagedLayer


class NotExportable:
    """A cache that cannot be taken apart: what leaves it is decided on the host, as it runs. Export under `KeepAll`."""

    def __init__(self, cache: ManagedCache) -> None:
        self.cache = cache


def register() -> None:
    """Tell PyTorch how our caches are taken apart; for our class alone, and nothing of transformers'."""
    pytree.register_pytree_node(
        ManagedCache,
        _flatten,
        _unflatten,
        serialized_type_name="kvcache.ManagedCache",
        flatten_with_keys_fn=_flatten_with_keys,
    )
    fx_pytree.register_pytree_flatten_spec(ManagedCache, lambda cache, spec: _flatten(cache)[0])  # torch 2.6 looks here


def _flatten(cache: ManagedCache) -> tuple[list[Any], list[Any]]:
    """Keys and values of each layer, and in plain numbers what else it takes, so that a program can be saved."""
    made = [_made_of(layer) for layer in cache.layers]
    if None in made:
        return [NotExportable(cache)], []
    return [t for layer in cache.layers if layer.is_initialized for t in (layer.keys, layer.values)], made


def _flatten_with_keys(cache: ManagedCache) -> tuple[list[tuple[pytree.KeyEntry, Any]], list[Any]]:
    parts, made = _flatten(cache)
    return [(pytree.SequenceKey(i), part) for i, part in enumerate(parts)], made


def _made_of(layer: Any) -> dict[str, Any] | None:
    """What it takes to make an empty layer like this one; None if keys and values are not all that it holds."""
    if isinstance(layer, ManagedLayer):
        kv = layer.kv
        if not kv.storage.plain or not isinstance(kv.policy, KeepAll) or kv.padding is not None:
            return None
        limits = {"max_length": kv.max_length, "static": kv.static, "max_positions": layer.max_positions}
        return {"managed": True, "held": layer.is_initialized, **limits}
    if type(layer) not in PLAIN or getattr(layer, "record_past", False):
        return None
    window = getattr(layer, "sliding_window", None)
    left = layer.get_seq_length() - layer.keys.shape[2] if layer.is_initialized and window is not None else 0
    return {"managed": False, "held": layer.is_initialized, "window": window, "left": left}


def _unflatten(parts: Iterable[Any], made: list[Any]) -> ManagedCache:
    states = list(parts)
    if not made:
        cache: ManagedCache = states[0].cache
        return cache
    ours: list[LayerCache] = []
    layers: list[Any] = []
    for one in made:
        held = (states.pop(0), states.pop(0)) if one["held"] else None
        if one["managed"]:
            kv = CacheSpec(max_length=one["max_length"], static=one["static"]).layer()
            ours.append(kv)
            layers.append(ManagedLayer(kv, one["max_positions"], ours))
        else:
            layers.append(_own_layer(one["window"]))
        if held is not None:
            _fill(layers[-1], *held, one)
    return ManagedCache(layers)


def _own_layer(window: int | None) -> Any:
    return DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)  # type: ignore[no-untyped-call]


def _fill(layer: Any, keys: Any, values: Any, made: dict[str, Any]) -> None:
    if not isinstance(keys, Tensor):  # a tree of ours may hold anything instead of tensors, such as their shapes
        if isinstance(layer, ManagedLayer):
            layer.stand_in(keys, values)
        return
    if not made["managed"]:
        layer.lazy_initialization(keys, values)
        if made["window"] is not None:
            layer.cumulative_length = keys.shape[2] + made["left"]
    layer.keys, layer.values = keys, values
