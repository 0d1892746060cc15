"""Tokens that leave a cache when they are told to: the oldest, or those that a second reading finds worth least."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kvcache.cache import KVzip, LayerCache
from kvcache.cache import compress as compress_layers
from kvcache.errors import InputError, PolicyError
from kvcache.events import Event, emit
from kvcache.manager._caches import ModelCaches
from kvcache.models import kv_layers, rehearse, reset_eviction_count


def trim(caches: ModelCaches, cache: Any, max_tokens: int | None) -> int:
    """See `KVCacheManager.trim`."""
    layers = kv_layers(cache)
    if max_tokens is not None:
        caches.geometry.check_eviction()
        for layer in layers:
            layer.check_trim(max_tokens)
    left = [layer.trim(max_tokens) for layer in layers]
    for layer in layers:
        layer.shrink_to_fit()
    _tell(cache, left)
    return max(left)


def compress(caches: ModelCaches, cache: Any, inputs: Tensor, max_tokens: int, instruction: Tensor | None) -> int:
    """See `KVCacheManager.compress`."""
    layers = kv_layers(cache)
    _check_compressible(layers, inputs)
    for layer in layers:
        layer.check_trim(max_tokens)
    before, evicted = [layer.stored for layer in layers], [layer.evicted for layer in layers]
    rehearse(caches.observed_model, cache, inputs.to(caches.model.device), instruction)
    compress_layers(layers, max_tokens)
    _tell(cache, [layer.evicted - then for layer, then in zip(layers, evicted, strict=True)])
    return max(0, before[0] - max_tokens)


def _check_compressible(layers: Sequence[LayerCache], inputs: Any) -> None:
    """Refuse what is not the text that these layers hold, all of it, under a policy that reads it again."""
    given = tuple(inputs.shape) if isinstance(inputs, Tensor) else inputs
    if not isinstance(inputs, Tensor) or inputs.dim() != 2 or inputs.shape[1] != layers[0].seen:
        raise InputError(
            f"inputs {given} must be the token ids [rows, {layers[0].seen}] that the cache has seen: they are read again"
        )
    if not all(isinstance(layer.policy.ranking, KVzip) for layer in layers):
        raise PolicyError(
            f"compress() needs a cache under KVzip, or AdaKV(KVzip(…)), got {layers[0].policy!r}; "
            "under other policies tokens leave by themselves, or by trim()"
        )
    if layers[0].padding is not None or inputs.shape[0] != layers[0].rows:
        raise InputError(
            f"the cache holds {layers[0].rows} rows, {given[0]} were given; rows that were padded must be run apart"
        )
    if any(min(layer.heads or (layer.stored,)) < layer.seen for layer in layers):
        raise InputError("tokens have left this cache already; give KVzip a limit that holds the whole text")


def _tell(cache: Any, left: Sequence[int]) -> None:
    reset_eviction_count(cache)
    layers, total = kv_layers(cache), sum(left)
    if total:
        rows = layers[0].rows or 1
        numbers = {"tokens": total * rows, "layers": sum(n > 0 for n in left), "rows": rows, "seen": layers[0].seen}
        emit(Event("trimmed", repr(layers[0].policy), numbers))
