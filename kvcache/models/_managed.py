"""Our caches where transformers expects its own: what can be done with a `DynamicCache` can be done with these.

What differs between releases is asked of transformers' own layers, not looked up by version.
"""

import copy
from array import array
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from kvcache.cache import CacheShape, LayerCache
from kvcache.errors import GeometryError, RollbackError
from kvcache.models._managed_layer import PLAIN, ManagedLayer, RowIndex, chosen, let_go, rows_of

_NOTHING: tuple[type, ...] = tuple(filter(None, [getattr(cache_utils, "DummyLayer", None)]))  # from 5.17 on


class MadeFor:
    """The model that a cache was made for, as it was then. A copy of the cache has it too; one in another process has not.

    Args:
        then: the model, see `Watch.now`; None if it is not known.
    """

    def __init__(self, then: Any = None) -> None:
        self.then = then

    def __deepcopy__(self, memo: object) -> "MadeFor":
        return self

    def __reduce__(self) -> tuple[type["MadeFor"], tuple[()]]:
        return MadeFor, ()


class ManagedCache(DynamicCache):
    """The layers of a model, ours and its own, as a `DynamicCache`, for which code of transformers and of others asks.

    Keys, values and choices of rows are as in `ManagedLayer`: ``[batch, KV heads, tokens, head_dim]`` and ``[rows]``.

    Args:
        layers: one for each of the model's, empty.

    Attributes:
        read: the token ids that each row begins with, where they are known; on the host, and no tensors, which are the layers'.
        made_for: the model.
    """

    layers: list[Any]
    made_for = MadeFor()
    read: "tuple[array[int], ...] | None" = None

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self.layers = list(layers)
        self.layer_class_to_replicate = None
        self._blank = [copy.deepcopy(layer) if _keeps_state(layer) else None for layer in layers]

    @property
    def is_compileable(self) -> bool:
        """Never: layers decide on the host what leaves, and `generate` would compile the user's model unasked."""
        return False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx >= len(self.layers):
            raise GeometryError(
                f"layer {layer_idx} was asked for, and the cache has {len(self.layers)} layers: it was made for another "
                "model, or another part of this one; make it with the new_cache() of the model that runs on it, or let "
                "generate() make its own"
            )
        attended: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if type(layer := self.layers[layer_idx]) is DynamicSlidingWindowLayer:
            let_go(layer, *attended)
        return attended

    def reset(self) -> None:
        """Empty all layers; another batch size, dtype or device may come next."""
        self.read = None
        for layer in self.layers:
            if isinstance(layer, ManagedLayer):
                layer.reset()
        self.reset_own()

    def reset_own(self) -> None:
        """Empty the layers that the model manages its own way."""
        for i, layer in enumerate(self.layers):
            if (blank := self._blank[i]) is not None:  # up to the newest release their reset keeps the batch size
                self.layers[i] = copy.deepcopy(blank)
            elif not isinstance(layer, ManagedLayer):
                empty(layer)

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the newest tokens from all layers or, if one cannot, from none; see `ManagedLayer.crop`."""
        for layer in self.layers:
            if isinstance(layer, ManagedLayer):
                layer.kv.check_truncate(layer.length_after_crop(tokens_to_remove))
        # The model's own first: they may still refuse, ours have said that they will not.
        for layer in sorted(self.layers, key=lambda layer: isinstance(layer, ManagedLayer)):
            layer.crop(tokens_to_remove)
        self.forget_read(self.get_seq_length())

    def forget_read(self, length: int) -> None:
        """Know no more of what was read than its first tokens."""
        self.read = None if self.read is None else tuple(ids[:length] for ids in self.read)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.read = None
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.read = None
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: RowIndex) -> None:
        """Keep these rows, by whatever a tensor can be indexed with."""
        self.read = None
        rows = next((rows_of(layer.kv) for layer in self.layers if isinstance(layer, ManagedLayer)), None)
        index = indices if rows is None else chosen(indices, rows)
        for layer in self.layers:
            choose = layer.reorder_cache if _keeps_state(layer) else layer.batch_select_indices
            choose(index)


class Crossed(DynamicCache):
    """What attends to an encoder. As soon as it is known how much that is, budgets in bytes pay for it.

    Args:
        ours: the layers of self-attention.
        shape: of the cache, where a budget is among them.
    """

    def __init__(
        self,
        ours: Sequence[LayerCache] = (),
        shape: CacheShape | None = None,
        *,
        config: Any = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
    ) -> None:
        # T5Gemma makes this part of a cache anew, by its class, as it would make a `DynamicCache`.
        super().__init__(config=config, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        self._ours, self._shape = ours, shape

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._shape is not None:
            whole = self._shape.whole(key_states.shape[2])
            for kv in self._ours:
                kv.share(whole)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class ManagedEncoderDecoderCache(EncoderDecoderCache):
    """A decoder's cache of ours beside that of its cross-attention."""

    def reset(self) -> None:
        super().reset()  # type: ignore[no-untyped-call]
        for layer in self.cross_attention_cache.layers:
            empty(layer)


def empty(layer: Any) -> None:
    """Forget all tokens of one of transformers' layers: up to some release, theirs keep their length and become zeros."""
    layer.reset()
    if isinstance(layer, DynamicLayer):
        layer.keys = layer.values = None
        layer.is_initialized = False


def _keeps_state(layer: Any) -> bool:
    """Whether a layer holds more than the keys and values of tokens, as state-space and convolution layers do."""
    return not isinstance(layer, (ManagedLayer, *_NOTHING)) and type(layer) not in PLAIN


def check_rollback(layers: Sequence[Any], length: int, seen: int) -> None:
    """Raise `RollbackError` if one of a model's own layers cannot be rolled back from `seen` to `length` tokens."""
    for layer in layers:
        if length in (0, seen) or isinstance(layer, (ManagedLayer, *_NOTHING)):
            continue
        if _keeps_state(layer):
            raise RollbackError(
                f"cannot roll back to {length} of {seen} tokens: the model's own {type(layer).__name__} holds a state of "
                "all of them, which none can be taken out of; give 0, or reset the cache and prefill again"
            )
        window = getattr(layer, "sliding_window", None)
        if window is not None and layer.get_seq_length() >= window:
            raise RollbackError(
                f"cannot roll back to {length} tokens: the model's own sliding layers have passed their window of "
                f"{window}; reset the cache and prefill again"
            )
