"""A cache that takes notes: what a model stores in each layer, and when."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from kvcache.cache import CacheGeometry
from kvcache.errors import GeometryError


class SpyLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """A cache layer that keeps all it is given, and tells when it was."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, index: int) -> None:
        # Not super().__init__(): what it assigns differs between releases.
        self.index = index
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.is_initialized = False
        self.seen = 0
        self.told: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] = lambda index, keys, values: (keys, values)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Nothing is allocated."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        first = self.keys is None or self.values is None
        self.keys = key_states if first else torch.cat([self.keys, key_states], 2)  # type: ignore[list-item]
        self.values = value_states if first else torch.cat([self.values, value_states], 2)  # type: ignore[list-item]
        self.is_initialized = True
        self.seen += key_states.shape[2]
        return self.told(self.index, self.keys, self.values)

    @property
    def kept(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def keep(self, columns: Sequence[int]) -> None:
        """Forget all tokens but these; how many were seen stays."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:, :, list(columns)], self.values[:, :, list(columns)]

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        fresh = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.kept + fresh, self.seen - self.kept

    def get_seq_length(self, cache_position: Tensor | None = None) -> int:  # noqa: ARG002  # as transformers calls it
        return self.seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name up to 5.12

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Negative: remove that many tokens; on a GPU `generate` takes back one that it ran too many. Positive: cut to that length."""
        n = int(tokens_to_remove)
        length = min(n, self.seen) if n > 0 else max(0, self.seen + n)
        self.keep(range(self.kept - (self.seen - length)))
        self.seen = length


def spying_cache(model: Any, layers: int | None = None, seen: int = 0, sliding: bool = False) -> Any:
    """A cache with a `SpyLayer` wherever `DynamicCache` would have a plain layer.

    Args:
        layers: at least so many; by default as many as the config tells.
        seen: tokens that it says have been seen, and does not hold.
        sliding: spy on the layers with a window of their own, too.
    """
    layers = _layers_told(model) if layers is None else layers
    spied = (DynamicLayer, DynamicSlidingWindowLayer) if sliding else (DynamicLayer,)
    own = list(DynamicCache(config=model.config).layers)[: layers or None]
    found: list[Any] = [SpyLayer(i) if type(layer) in spied else layer for i, layer in enumerate(own)]
    found += [SpyLayer(i) for i in range(len(own), layers)]
    for layer in found:
        if isinstance(layer, SpyLayer):
            layer.seen = seen
    cache = Cache(layers=found)
    return EncoderDecoderCache(cache, DynamicCache()) if model.config.is_encoder_decoder else cache


def layers_of(cache: Any) -> list[Any]:
    """The self-attention layers of a cache."""
    return list(cache.self_attention_cache.layers if isinstance(cache, EncoderDecoderCache) else cache.layers)


def copied(cache: Any) -> Any:
    """A copy of a cache and of the tensors in its layers."""
    held = (one for layer in layers_of(cache) for one in tree_leaves(vars(layer)))
    # Subclasses of tensors know how they are cloned, but not all of them how they are copied.
    return copy.deepcopy(cache, {id(one): one.clone() for one in held if isinstance(one, Tensor)})


def cache_among(given: Mapping[str, Any]) -> Any:
    """The cache among a module's arguments, under whichever name; None if there is none."""
    return next((value for value in given.values() if isinstance(value, Cache | EncoderDecoderCache)), None)


def _layers_told(model: Any) -> int:
    try:
        return CacheGeometry.from_config(model.config).layers
    except GeometryError:
        return 0
