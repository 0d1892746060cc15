"""What a cache holds of one row, layer by layer, and its bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from kvcache.cache._budget import Token, Whole, bytes_of
from kvcache.cache._geometry import CacheGeometry
from kvcache.errors import GeometryError


@dataclass(frozen=True)
class LayerShape:
    """What one layer of a cache holds of one row.

    Attributes:
        managed: whether it is kvcache's; else the model's own.
        token: of its keys and values; None for a layer without, or one that reads another's.
        window: the most tokens that the model's own layer holds; None for all.
        fixed: bytes of states, whatever was seen.
        more: bytes that each token takes besides its key and value.
        asked: gives the bytes after so many tokens, where a layer of a model's own kind follows no such rule.
    """

    managed: bool
    token: Token | None = None
    window: int | None = None
    fixed: int = 0
    more: int = 0
    asked: Callable[[int], int] | None = None

    @property
    def token_bytes(self) -> tuple[int, int]:
        """Of a key and a value."""
        return (0, 0) if self.token is None else bytes_of(self.token)

    def own_bytes(self, tokens: int | None) -> int:
        """Bytes of a row of the model's own layer after so many tokens; None: of the most that it may come to, where it
        has an end.

        Raises:
            GeometryError: if that cannot be said, see `asked`.
        """
        if self.asked is not None:
            if tokens is None:
                raise GeometryError(
                    "a layer of the model's own kind has no end that is known; give a limit in tokens instead"
                )
            return self.asked(tokens)
        most = (tokens or 0) if self.window is None else self.window
        kept = most if tokens is None else min(tokens, most)
        return self.fixed + (sum(self.token_bytes) + self.more) * kept


@dataclass(frozen=True)
class CacheShape:
    """What a whole cache holds of one row.

    Attributes:
        layers: of self-attention, or of what stands in its place.
        cross: bytes of one position of an encoder, over all layers; 0 without an encoder.
    """

    layers: tuple[LayerShape, ...]
    cross: int = 0

    @classmethod
    def of(cls, geometry: CacheGeometry) -> "CacheShape":
        """Of a cache whose layers are all managed, and all of one shape."""
        token = geometry.kv_heads, geometry.head_dim, geometry.value_dim, geometry.dtype
        return cls((LayerShape(True, token),) * geometry.layers)

    def whole(self, encoder_tokens: int = 0) -> Whole:
        """For a budget in bytes, beside so many positions of an encoder."""
        own = sum(layer.own_bytes(None) for layer in self.layers if not layer.managed)
        return Whole(
            tuple(layer.token for layer in self.layers if layer.managed and layer.token is not None),
            own + self.cross * encoder_tokens,
        )


def tensors_of(layer: Any) -> list[Tensor]:
    """All tensors that a layer of a transformers cache holds, and no counters.

    They are keys and values ``[rows, KV heads, tokens, head_dim]``, and states in the shapes of their model.
    """
    held = {name: value for name, value in vars(layer).items() if isinstance(value, Tensor | dict | list | tuple)}
    return [t for t in tree_leaves(held) if isinstance(t, Tensor) and t.dim() > 0]


def layer_bytes(layer: Any) -> int:
    """Bytes of what a layer holds, ours or the model's own."""
    if (kv := getattr(layer, "kv", None)) is not None:
        return int(kv.nbytes)
    # The model's own layers may hold a slice of a larger tensor: what counts is the storage behind it.
    held = [t.untyped_storage() for t in tensors_of(layer)]
    return sum({storage._cdata: storage.nbytes() for storage in held}.values())
