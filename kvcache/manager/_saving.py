"""A whole cache as bytes and back, to go on from later, elsewhere, or twice."""

from typing import Any

from kvcache.cache import LayerCache, check_states, read_saved, restore_layers, save_layers
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
    layers = _layers(caches, cache)
    return save_layers(layers, model_fingerprint(caches.model), layers[0].rows or 1, secret)


def load(caches: ModelCaches, data: bytes, secret: bytes | None) -> Any:
    """See `KVCacheManager.load`."""
    tensors, header = read_saved(data, model_fingerprint(caches.model), secret)
    check_states(tensors, caches.geometry)  # whoever wrote it
    cache = caches.empty(header["rows"])
    restore_layers(kv_layers(cache), tensors, header, caches.geometry.device)
    return cache


def fork(caches: ModelCaches, cache: Any) -> Any:
    """See `KVCacheManager.fork`."""
    layers = _layers(caches, cache)
    copied = caches.like(layers)
    for layer, own in zip(layers, kv_layers(copied), strict=True):
        own.restore(*layer.state())
    copied.made_for = cache.made_for
    return copied


def _layers(caches: ModelCaches, cache: Any) -> list[LayerCache]:
    """Those of a cache, where there are no others."""
    layers = kv_layers(cache)
    if len(layers) != len(cache_layers(cache)) or caches.model.config.is_encoder_decoder:
        raise GeometryError(
            f"{type(caches.model).__name__} keeps a part of its cache in its own way, which cannot be saved"
        )
    return layers
