"""What a budget in bytes is divided among: the tokens of a cache's layers, and what the cache holds besides."""

from dataclasses import dataclass

import torch

Token = tuple[int, int, int, torch.dtype]
"""KV heads, size of a key and of a value, and their dtype."""


@dataclass(frozen=True)
class Whole:
    """What a budget in bytes is divided among: one row of a whole cache.

    Attributes:
        tokens: of the managed layers, which share it.
        beside: bytes that the others take at most.
    """

    tokens: tuple[Token, ...]
    beside: int = 0

    @property
    def keys(self) -> int:
        """Bytes of a token's keys in all managed layers."""
        return sum(bytes_of(token)[0] for token in self.tokens)

    @property
    def values(self) -> int:
        """The same of its values."""
        return sum(bytes_of(token)[1] for token in self.tokens)


def bytes_of(token: Token) -> tuple[int, int]:
    """Bytes of a key and of a value, over its heads."""
    heads, key_dim, value_dim, dtype = token
    return heads * key_dim * dtype.itemsize, heads * value_dim * dtype.itemsize
