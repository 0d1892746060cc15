"""Inside of layers: what those that rank have observed, and the attention by which they observe it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from kvcache.cache import RankedLayer
from kvcache.models._attention import _attend as attend_stored  # by itself, told more than models here tell
from kvcache.models._attention import _stored, observing  # whether a run has ended in which attention is observed

__all__ = ["attend_stored", "observing"]

ATTEND_ONE = "kvcache.cache._attended._one"  # for an attention that fails
QUERIES_AT_ONCE = "kvcache.cache._ranking._QUERIES_AT_ONCE"


def cumulative_attention(layer: RankedLayer) -> Tensor:
    """What each token has received in all, ``[batch, heads, stored]``."""
    assert layer._mass is not None
    return layer._mass


def latest_queries(layer: RankedLayer) -> Tensor:
    """Those that it keeps, ``[batch, heads, queries, head_dim]``."""
    assert layer._latest is not None
    return layer._latest


def beside_the_states(layer: Any) -> list[Tensor]:
    """The tensors of a layer that are about its tokens, as positions and queries are."""
    held = (getattr(layer, "_at", None), getattr(layer, "_queries", None))
    return [one for one in held if one is not None]


@contextmanager
def stored(*held: Any) -> Iterator[None]:
    """Within the block, this is what a cache has just stored."""
    token = _stored.set(held)
    try:
        yield
    finally:
        _stored.reset(token)
