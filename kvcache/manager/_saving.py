"""A whole cache as bytes and back, to go on from later, elsewhere, or twice."""

from typing import Any

from torch import Tensor

from kvcache.cache import check_states, read_saved, restore_layers, save_layers
from kvcache.errors import GeometryError, InputError
from kvcache.manager._caches import ModelCaches
from kvcache.models import ManagedCache, cache_layers, kv_layers, model_fingerprint


def save(caches: ModelCaches, cache: Any, secret: bytes | None) -> bytes:
    """See `KVCacheManager.save`."""
    if isinstance(cache, ManagedCache) and caches.changed_since(cache.made_for):
        raise InputError(
            "the model has changed since this cache was made, and what it holds is of the model as it was; save a cache "
            "before its model changes, or fill a new one"
        )
    return _saved(caches, cache, model_fingerprint(caches.model), secret)


def load(caches: ModelCaches, data: bytes, secret: bytes | None) -> Any:
    """See `KVCacheManager.load`."""
    tensors, header = read_saved(data, model_fingerprint(caches.model), secret)
    check_states(tensors, caches.geometry)  # whoever wrote it
    return _restored(caches, tensors, header)


def fork(caches: ModelCaches, cache: Any) -> Any:
    """See `KVCacheManager.fork`."""
    copied = _restored(caches, *read_saved(_saved(caches, cache, "", None), ""))
    copied.made_for = cache.made_for
    return copied


def _saved(caches: ModelCaches, cache: Any, model: str, secret: bytes | None) -> bytes:
    layers = kv_layers(cache)
    if len(layers) != len(cache_layers(cache)) or caches.model.config.is_encoder_decoder:
        raise GeometryError(
            f"{type(caches.model).__name__} keeps a part of its cache in its own way, which cannot be saved"
        )
    return save_layers(layers, model, layers[0].rows or 1, secret)


def _restored(caches: ModelCaches, tensors: dict[str, Tensor], header: dict[str, Any]) -> Any:
    cache = caches.empty(header["rows"])
    restore_layers(kv_layers(cache), tensors, header, caches.geometry.device)
    return cache
