"""Our layers where transformers expects its own: what can be done with a `DynamicCache` can be done with these.

What differs between releases is asked of transformers' own layers, not looked up by version.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from kvcache.cache import LayerCache
from kvcache.errors import CapacityError, GeometryError, InputError, PolicyError
from kvcache.events import Evictions
from kvcache.models import _attention as attention
from kvcache.models._windows import Windows

_NOTHING: tuple[type, ...] = tuple(filter(None, [getattr(cache_utils, "DummyLayer", None)]))  # from 5.17 on

RowIndex = int | slice | Sequence[int] | Sequence[bool] | Tensor


def _after_crop(n: int) -> int | None:
    """How many of two tokens transformers' own layer keeps after ``crop(n)``; None if it refuses."""
    layer: Any = DynamicLayer()  # type: ignore[no-untyped-call]
    layer.update(torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 2, 1))
    try:
        layer.crop(n)
    except ValueError:
        return None
    return int(layer.keys.shape[2])


_CROP_ZERO_EMPTIES = _after_crop(0) == 0  # up to 5.13
_CROP_TO_LENGTH = _after_crop(1) == 1  # up to 5.22


def let_go(layer: DynamicSlidingWindowLayer, keys: Tensor, values: Tensor) -> None:
    """Let a model's own layer with a window hold as much as after a single token, whatever came.

    So what is held depends on how many came, and not on how. Transformers' holds a whole prompt until the next token comes.

    Args:
        keys, values: what its `update` has returned.
    """
    window = layer.sliding_window
    if 1 < window < keys.shape[2] and not getattr(layer, "record_past", False):
        layer.keys, layer.values = (states[:, :, -window:].clone()[:, :, 1:] for states in (keys, values))


PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)  # hold keys and values, and nothing else


class ManagedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """A `LayerCache` as transformers sees it.

    Keys are ``[batch, KV heads, tokens, head_dim]``, values the same with their own ``head_dim``; a choice of rows is ``[rows]``,
    and a number of tokens a tensor ``[]`` or an int.

    Args:
        kv: the layer.
        max_positions: of the model's table of learned positions; None where it has none.
        beside: all layers of the cache, which are asked before the first of them changes.
        evictions: of all of them; None where nothing is ever evicted.
        windows: of all of them; None where nothing is evicted by age.
    """

    is_sliding = False
    is_compileable = False

    def __init__(
        self,
        kv: LayerCache,
        max_positions: int | None = None,
        beside: Sequence[LayerCache] = (),
        evictions: Evictions | None = None,
        windows: Windows | None = None,
    ) -> None:
        # Not super().__init__(): it would assign keys and values, which are read from the layer here.
        self.kv = kv
        self.max_positions = max_positions
        self.beside = beside
        self.evictions = evictions
        self.windows = windows
        self._begun = False  # whether it was initialized since it was last empty
        self._assigned: dict[str, Tensor | None] = {}  # keys that wait for their values, or the other way round
        self._views: dict[str, Tensor] = {}  # as they were read last: what is read twice is the same object

    # ------------------------------------------------------------------ what it holds

    @property
    def keys(self) -> Tensor | None:
        return self._held("keys")

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        self._assign("keys", states)

    @property
    def values(self) -> Tensor | None:
        return self._held("values")

    @values.setter
    def values(self, states: Tensor | None) -> None:
        self._assign("values", states)

    def _held(self, name: str) -> Tensor | None:
        if name in self._assigned:
            return self._assigned[name]
        held: Tensor | None = getattr(self.kv, name) if self.is_initialized else None
        if held is None:
            return None
        before = self._views.get(name)
        if before is not None and before._base is held._base is not None and before.shape == held.shape:
            return before
        self._views[name] = held
        return held

    def _assign(self, name: str, states: Tensor | None) -> None:
        """Take over what is assigned, by copy, once keys and values fit each other."""
        if states is not None and (not isinstance(states, Tensor) or states.dim() != 4):
            given = list(states.shape) if isinstance(states, Tensor) else repr(states)
            raise GeometryError(f"{name} must be a tensor [batch, KV heads, tokens, head_dim], got {given}")
        both = {"keys": self.keys, "values": self.values, name: states}
        keys, values = both["keys"], both["values"]
        if keys is None and values is None:
            self._assigned.clear()
            self.reset()
            return
        if keys is None or values is None or not _alike(keys, values):
            self._assigned[name] = states
            return
        self.kv.replace(keys, values)
        self._assigned.clear()
        self._begun = True
        self.reset_eviction_count()

    def stand_in(self, keys: Any, values: Any) -> None:
        """Show these as keys and values, whatever they are; the layer cannot run before others are assigned."""
        self._assigned |= {"keys": keys, "values": values}

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return self._begun or self.kv.seen > 0

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return self.kv.rolls_back

    @property
    def dtype(self) -> torch.dtype | None:
        return None if (keys := self.keys) is None else keys.dtype

    @property
    def device(self) -> torch.device | None:
        return None if (keys := self.keys) is None else keys.device

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.kv.policy!r}, seen={self.kv.seen}, stored={self.kv.stored})"

    def get_seq_length(self, cache_position: Tensor | None = None) -> int:  # noqa: ARG002  # as transformers calls it
        return self.kv.seen

    def get_max_length(self) -> int:
        limit = self.kv.max_length
        return -1 if limit is None or self.kv.policy.evicts else limit  # -1 is transformers' word for "no maximum"

    get_max_cache_shape = get_max_length  # its name up to 5.12

    # ------------------------------------------------------------------ append

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        self.kv.append(key_states[:, :, :0], (key_states if value_states is None else value_states)[:, :, :0])
        self._begun = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._refuse_half()
        self._views.clear()  # a buffer that is outgrown must not live on in them
        if self.kv.seen:  # a prefix goes into an empty layer without any attention
            _check_observed(self.kv)
        if self.windows is not None:
            self.windows.check(self, key_states.shape[2])
        attended = self.kv.append(key_states, value_states)
        self._begun = True
        if attended.spans:
            attention.stored(self.kv, attended)
        elif self.evictions is not None and self.kv is self.beside[-1]:
            self.evictions.after()
        return attended.keys, attended.values

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        # Asked once before a forward writes anything: the place to refuse, with every layer still as it was.
        fresh = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        self._refuse_half()
        for kv in self.beside or (self.kv,):
            kv.check(fresh)
            _check_observed(kv)
        check_positions(self.max_positions, self.kv.seen, fresh)
        if self.windows is not None:
            self.windows.begin(fresh)
        if self.evictions is not None:
            self.evictions.before()
        retained = self.kv.retained
        return retained + fresh, self.kv.seen - retained

    def _refuse_half(self) -> None:
        if self._assigned:
            shapes = [list(t.shape) if isinstance(t, Tensor) else t for t in (self.keys, self.values)]
            raise GeometryError(
                f"keys {shapes[0]} and values {shapes[1]} were assigned to this layer, which do not fit each other; "
                "assign both in one shape, dtype and device"
            )

    # ------------------------------------------------------------------ going back, rows

    def reset(self) -> None:
        self.kv.reset()
        self._begun = False
        self._assigned.clear()
        self.reset_eviction_count()

    def reset_eviction_count(self) -> None:
        """Take what has left so far for told: it came or went without a forward."""
        self._views.clear()
        if self.evictions is not None:
            self.evictions.forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._views.clear()
        self.kv.select(beam_idx)

    def batch_select_indices(self, indices: RowIndex) -> None:
        rows = rows_of(self.kv)
        if rows is not None:
            self._views.clear()
            self.kv.select(chosen(indices, rows))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._views.clear()
        self.kv.repeat(repeats)

    def length_after_crop(self, tokens_to_remove: int | Tensor) -> int:
        """How many tokens `crop` leaves.

        Raises:
            InputError: if this release of transformers does not take this number.
        """
        n, seen = int(tokens_to_remove), self.kv.seen
        if n < 0:
            return max(0, seen + n)
        if n == 0:
            return 0 if _CROP_ZERO_EMPTIES else seen
        if _CROP_TO_LENGTH:
            return min(n, seen)
        raise InputError(
            f"crop({n}): this release of transformers wants how many tokens to remove, as a negative number; give "
            f"{min(n, seen) - seen}, or use truncate(cache, {n})"
        )

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Negative: remove that many tokens. Positive (up to 5.22): cut to that length. Zero: as the release has it."""
        length = self.length_after_crop(tokens_to_remove)
        if length < self.kv.seen:
            self.kv.truncate(length)
        self.reset_eviction_count()


def _alike(keys: Tensor, values: Tensor) -> bool:
    return keys.shape[:3] == values.shape[:3] and (keys.dtype, keys.device) == (values.dtype, values.device)


def rows_of(kv: LayerCache) -> int | None:
    """The batch size of a layer, or of the pads it was told; None if neither is known."""
    return kv.rows if kv.rows is not None or kv.padding is None else kv.padding.shape[0]


def chosen(indices: RowIndex, rows: int) -> Tensor:
    """The rows that an index of any kind chooses of `rows`, ``[chosen]``, from 0 on.

    Raises:
        GeometryError: if it chooses none, or one that is not there.
    """
    try:
        if isinstance(indices, slice):
            found = torch.arange(rows)[indices]
        else:
            index = torch.as_tensor(indices if isinstance(indices, Tensor) else _listed(indices)).cpu()
            found = torch.arange(rows)[index.reshape(1) if index.dim() == 0 else index]
        if found.dim() == 1 and found.numel():
            return found
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        raise GeometryError(
            f"cannot choose {indices!r} of {rows} rows: {error}; give rows from 0 to {rows - 1}"
        ) from error
    raise GeometryError(f"cannot choose {indices!r} of {rows} rows: give at least one row, in one dimension")


def _listed(indices: Any) -> Any:
    return list(indices) if isinstance(indices, Sequence) else indices


def _check_observed(kv: LayerCache) -> None:
    if kv.by_head and not attention.observing():
        raise PolicyError(
            f"under {kv.policy!r} each head sees its own tokens, and the cache what is attended to; run the model as "
            "manager.observed_model, or by manager.generate() and stream()"
        )


def check_positions(table: int | None, seen: int, fresh: int) -> None:
    """Raise `CapacityError` if `fresh` tokens after `seen` would run past a model's table of learned positions."""
    if table is not None and seen + fresh > table:
        raise CapacityError(
            f"cannot run {fresh} tokens at position {seen}: this model learned {table} positions, "
            "and evicting tokens does not give them back; start a new cache"
        )
