"""The beginning of a request, computed for others: on a cache that keeps everything."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvcache.cache import CacheSpec
from kvcache.errors import GeometryError, InputError, PositionsError
from kvcache.models import ManagedCache, ManagedLayer, facts_of, kv_layers, rope_by_length
from kvcache.prefixes._snapshot import PrefixKey, PrefixSnapshot

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def cache_for_prefix(model: Any) -> Any:
    """A cache that keeps everything in every layer, also where the model has a window of its own: to compute a prefix on.

    What a layer's window hides, its mask hides; so any cache can begin with what this one holds.

    Raises:
        InputError: for an encoder-decoder, whose decoder depends on the encoder's input.
        GeometryError: for a model with layers that keep a state instead of keys and values.
        PositionsError: for a model whose rotation of the first keys depends on how many follow.
    """
    if model.config.is_encoder_decoder:
        raise InputError(
            f"{type(model).__name__} is an encoder-decoder: what its decoder computes depends on the encoder's input, "
            "so no prefix can be reused; keep the encoder's output instead"
        )
    layers = DynamicCache(config=model.config).layers
    other = next((layer for layer in layers if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)), None)
    if other is not None:
        raise GeometryError(
            f"{type(model).__name__} has a {type(other).__name__}, which keeps no keys and values to reuse; "
            "prefixes need attention in every layer"
        )
    kinds = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    # Up to 5.13 such layers do not show in a cache.
    if getattr(model, "_is_stateful", False) or not kinds <= _ATTENTION:
        raise GeometryError(
            f"{type(model).__name__} has a layer with a state, which keeps no keys and values to reuse; "
            "prefixes need attention in every layer"
        )
    if (rope_type := rope_by_length(model)) is not None:
        raise PositionsError(
            f"no prefix can be reused: {rope_type!r} RoPE turns the first keys by how many tokens follow; "
            "use a model with another rope_type"
        )
    if (why := facts_of(model).why_no_prefix) is not None:
        raise PositionsError(f"no prefix of {type(model).__name__} can be reused: {why}; give it with each request")
    return ManagedCache([ManagedLayer(CacheSpec().layer()) for _ in layers])


def extend_prefix(
    run: Callable[[Tensor], Any], key: PrefixKey, start: PrefixSnapshot | None, cache: Any, device: torch.device
) -> PrefixSnapshot:
    """The snapshot of `key`, computed on an empty cache.

    Args:
        run: runs ``[1, tokens]`` ids or ``[1, tokens, dim]`` embeddings on that cache.
        key: of what.
        start: a beginning of it that is known and need not be run; None if nothing is.
        cache: of ours, which keeps everything; see `cache_for_prefix`.
        device: where the model wants its input.
    """
    began, known, spent = time.perf_counter(), 0, 0.0
    if start is not None:
        start.to(device).write_to(cache)
        known, spent = len(start), start.build_seconds
    run(key.content[None, known:].to(device))
    return PrefixSnapshot.of(kv_layers(cache), key, build_seconds=spent + time.perf_counter() - began)
