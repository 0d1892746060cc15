"""What is asked of a whole cache, and done to it: its layers, its account, roll backs, what it has read."""

from array import array
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache

from kvcache.cache import CacheReport, LayerCache, account
from kvcache.errors import GeometryError, InputError
from kvcache.models._managed import ManagedCache, check_rollback
from kvcache.models._managed_layer import ManagedLayer


def cache_layers(cache: Any) -> list[Any]:
    """The self-attention layers of a cache, ours and the model's own."""
    return list(cache.self_attention_cache.layers if isinstance(cache, EncoderDecoderCache) else cache.layers)


def cross_layers(cache: Any) -> list[Any]:
    """The layers of a cache that hold what attends to an encoder."""
    return list(cache.cross_attention_cache.layers) if isinstance(cache, EncoderDecoderCache) else []


def report_of(cache: Any) -> CacheReport:
    """The account of all that a cache holds."""
    return account(cache_layers(cache), cross_layers(cache))


def kv_layers(cache: Any, some: bool = True) -> list[LayerCache]:
    """The layers of a cache that kvcache manages.

    Raises:
        GeometryError: if there are none, because the cache is not ours, and `some` must be.
    """
    managed = [layer.kv for layer in cache_layers(cache) if isinstance(layer, ManagedLayer)]
    if not managed and some:
        raise GeometryError(
            f"{type(cache).__name__} has no layer that kvcache manages; make the cache with new_cache()"
        )
    return managed


def check_ours(cache: Any) -> None:
    """Raise `GeometryError` for something else than one of our caches, or None."""
    own = getattr(cache, "self_attention_cache", cache)
    if own is not None and not isinstance(own, ManagedCache):
        raise GeometryError(f"{type(cache).__name__} is no cache of ours: make one with new_cache(), or give none")


def truncate(cache: Any, length: int) -> None:
    """Roll a whole cache back to its first `length` tokens; all of its layers or none.

    Raises:
        RollbackError: if one of them cannot.
    """
    layers, kept = cache_layers(cache), kv_layers(cache)
    for kv in kept:
        kv.check_truncate(length)
    check_rollback(layers, length, kept[0].seen)
    own = getattr(cache, "self_attention_cache", cache)
    if length == 0:
        own.reset()
        return
    if (removed := kept[0].seen - length) > 0:
        for layer in layers:
            if not isinstance(layer, ManagedLayer):
                layer.crop(-removed)
    for kv in kept:
        kv.truncate(length)
    if isinstance(cache, ManagedCache):
        cache.forget_read(length)
    reset_eviction_count(cache)


def check_continues(cache: Any, ids: Tensor | None, given: int) -> None:
    """Refuse what a cache already holds, or does not continue.

    Args:
        ids: the whole text so far, ``[rows, tokens]``; None where it is not known.
        given: its tokens.

    Raises:
        InputError: with the length to `truncate` to.
    """
    held = kv_layers(cache, some=False)
    seen = held[0].seen if held else 0
    if given <= seen:
        raise InputError(
            f"the cache has seen {seen} tokens, and {given} were given: give the whole text so far and what follows it, or go "
            f"back with truncate(cache, {max(0, given - 1)}) first, or use a new cache"
        )
    read = cache.read if isinstance(cache, ManagedCache) else None
    if read is None or ids is None or ids.dim() != 2 or ids.shape[0] != len(read):
        return
    known = min(len(read[0]), seen)
    before = torch.tensor([row[:known].tolist() for row in read])
    same = (ids[:, :known].cpu() == before).all(0)
    if not bool(same.all()):
        common = int(same.long().cumprod(0).sum())
        raise InputError(
            f"the cache has seen another text: only the first {common} of its {seen} tokens are those given; go back with "
            f"truncate(cache, {common}) first, or use a new cache"
        )


def note_read(cache: Any, ids: Tensor | None) -> None:
    """Remember which token ids ``[rows, tokens]`` a cache of ours has seen; None forgets them."""
    if isinstance(cache, ManagedCache):
        held = kv_layers(cache, some=False)
        known = ids is not None and held and held[0].rows == ids.shape[0]
        cache.read = (
            tuple(array("q", row[: held[0].seen].tolist()) for row in ids) if known and ids is not None else None
        )


def emit_evictions(cache: Any) -> None:
    """Tell what has left a cache and was not told yet: nothing follows its last forward."""
    managed = next((layer for layer in cache_layers(cache) if isinstance(layer, ManagedLayer)), None)
    if managed is not None and managed.evictions is not None:
        managed.evictions.after()


def reset_eviction_count(cache: Any) -> None:
    """Take the tokens that have left a cache so far for told, see `kvcache.events`."""
    for layer in cache_layers(cache):
        if isinstance(layer, ManagedLayer):
            layer.reset_eviction_count()


def left_padding(attention_mask: Tensor | None) -> Tensor | None:
    """Pads on the left of each row of a 2-D attention mask, ``[batch]``; None without a mask."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    return (attention_mask.cumsum(1) == 0).sum(1)
