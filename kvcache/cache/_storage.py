"""How the keys and values of a layer are held: as they came, in fewer bits, on the host, or in a way of your own."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvcache.cache._budget import Token

Side = Literal["keys", "values"]
SIDES: tuple[Side, Side] = ("keys", "values")
AS_CAME = "states"
"""The name of a held tensor that is the states themselves."""


class Storage(ABC):
    """How keys and values are held, each token by itself; which tokens stay is the policy's.

    Any policy works with any storage. Write yours as a frozen dataclass: equal storages count as the same one.

    Attributes:
        exact: whether what is read is, bit by bit, what came.
        plain: whether tokens are held just as they came, so that nothing is lost where another buffer takes them over.
    """

    exact: ClassVar[bool] = False
    plain: ClassVar[bool] = False

    @abstractmethod
    def encode(self, states: Tensor, side: Side) -> dict[str, Tensor]:
        """What is held of some tokens. It must not depend on the other tokens.

        Args:
            states: keys or values as they came, ``[batch, heads, tokens, head_dim]``; of no token too.
            side: ``"keys"`` or ``"values"``.

        Returns:
            Tensors ``[batch, heads, tokens, …]`` by name. Names, dtypes and sizes after the tokens are always the same.
        """

    @abstractmethod
    def decode(self, held: Mapping[str, Tensor], side: Side, like: Tensor) -> Tensor:
        """The states again, ``[batch, heads, tokens, head_dim]``: in new memory, unless the storage is exact.

        Args:
            held: what `encode` returned, of any tokens.
            side: ``"keys"`` or ``"values"``.
            like: states of no token, of the shape, dtype and device in which they came.
        """

    def check(self, keys: Tensor, values: Tensor) -> None:  # noqa: B027  (most hold whatever comes)
        """Raise `GeometryError` for states ``[batch, heads, tokens, head_dim]`` that cannot be held so."""

    def by_token(self) -> "Storage":
        """The same for a layer whose tokens may leave one by one, from anywhere."""
        return self

    @property
    def group_size(self) -> int | None:
        """How many neighbouring tokens are held together, where the policy lets them; None: each by itself."""
        return None


@dataclass(frozen=True)
class Plain(Storage):
    """Keys and values as they came."""

    exact: ClassVar[bool] = True
    plain: ClassVar[bool] = True

    def encode(self, states: Tensor, side: Side) -> dict[str, Tensor]:
        return {AS_CAME: states}

    def decode(self, held: Mapping[str, Tensor], side: Side, like: Tensor) -> Tensor:
        return held[AS_CAME]


@lru_cache(maxsize=256)
def held_bytes(storage: Storage, token: Token) -> tuple[int, int]:
    """Bytes that a token's key and value are held in, over all heads."""
    heads, key_dim, value_dim, dtype = token
    sizes = []
    for side, dim in zip(SIDES, (key_dim, value_dim), strict=True):
        held = storage.encode(torch.zeros(1, heads, 1, dim, dtype=dtype), side)
        sizes.append(sum(part.numel() * part.element_size() for part in held.values()))
    return sizes[0], sizes[1]
