"""Storages, and keys and values that each of them holds exactly: so every law can be held to it bit by bit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcache import KVQuantization, Storage
from kvcache.cache import Plain, Side


@dataclass(frozen=True)
class Halves(Storage):
    """A storage of one's own that loses nothing: each token in two parts, the second of them backwards."""

    exact: ClassVar[bool] = True

    def encode(self, states: Tensor, side: Side) -> dict[str, Tensor]:
        front, back = states.tensor_split(2, dim=3)
        return {"front": front, "back": back.flip(3)}

    def decode(self, held: Mapping[str, Tensor], side: Side, like: Tensor) -> Tensor:
        return torch.cat([held["front"], held["back"].flip(3)], 3)


STORAGES: dict[str, Storage] = {
    "plain": Plain(),
    "halves": Halves(),
    "int8": KVQuantization(8, group_size=None),
    "int4": KVQuantization(4, group_size=None),
}


def exact_in(storage: Storage, states: Tensor, side: Side) -> Tensor:
    """States like these, ``[…, head_dim]``, that quantizing each token by itself does not change.

    Their scale is a power of two, and the ends of the range are there: 127 / 64 in 8 bits, -1 and 7 / 8 in 4 bits.
    """
    if not isinstance(storage, KVQuantization):
        return states
    exact = states.float()
    if storage.bits(side) == 8:
        codes = (exact * 64).round().clamp(-127, 127)
        codes[..., 0] = torch.where(codes[..., 0] < 0, -127.0, 127.0)
        found = codes / 64
    else:
        codes = ((exact + 1) * 8).round().clamp(0, 15)
        codes[..., 0], codes[..., 1] = 0, 15
        found = codes / 8 - 1
    return found.to(states.dtype)
