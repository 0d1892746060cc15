"""The keys, or the values, of a `GroupedLayer`; and what groups take."""

import torch
from torch import Tensor

from kvcache.cache._bits import KVQuantization, quantized, scale_dtype
from kvcache.cache._budget import Token, Whole
from kvcache.cache._policies import SizePolicy, check_policy
from kvcache.cache._storage import Side


class GroupedSide:
    """The keys, or the values, of a layer.

    Attributes:
        parts: ``pinned`` and ``tail``, ``[batch, heads, tokens, dim]``; then what groups are stored as, codes, scales and
            minima, ``[batch, heads, groups, …]``. See `layout`.
    """

    def __init__(self, like: Tensor, storage: KVQuantization, pinned: int, side: Side) -> None:
        self.group, self.bits, self.per_channel = storage.group_size or 0, storage.bits(side), side == "keys"
        sizes = {"pinned": pinned, "tail": self.group}
        with torch.inference_mode(False):  # a buffer made in inference mode could not be written to outside of it
            self.parts = {
                name: like.new_empty((*like.shape[:2], sizes.get(name, 0), *shape), dtype=dtype)
                for name, (shape, dtype) in layout(like, storage, side).items()
            }
        self.names = [name for name in self.parts if name not in sizes]  # of the groups

    @property
    def pinned(self) -> Tensor:
        """The pinned tokens, as they came."""
        return self.parts["pinned"]

    @property
    def tail(self) -> Tensor:
        """The newest tokens, as they came."""
        return self.parts["tail"]

    def slots(self) -> int:
        """For how many tokens there is room."""
        return self.pinned.shape[2] + self.group * (1 + self.parts["codes"].shape[2])

    def select(self, rows: Tensor) -> None:
        """Have copies of these rows."""
        with torch.inference_mode(False):
            self.parts = {name: held.index_select(0, rows.to(held.device)) for name, held in self.parts.items()}

    def move(self, dropped: int, held: int, slots: int) -> None:
        """Forget the first of the groups held, let the others take their place, and have room for `slots` in all."""
        kept = max(0, held - dropped)
        for name in self.names:
            old = self.parts[name]
            if slots > old.shape[2]:
                with torch.inference_mode(False):
                    self.parts[name] = old.new_empty((*old.shape[:2], slots, *old.shape[3:]))
                self.parts[name][:, :, :kept] = old[:, :, held - kept : held]
            elif dropped and kept:
                old[:, :, :kept] = old[:, :, dropped:held].clone()

    def cut(self, slots: int) -> None:
        """Give back the memory of all but the first `slots` groups."""
        with torch.inference_mode(False):
            for name in self.names:
                if slots < self.parts[name].shape[2]:
                    self.parts[name] = self.parts[name][:, :, :slots].clone()

    def _grouped(self, states: Tensor) -> Tensor:
        """A view, ``[batch, heads, groups, group, dim]``."""
        return torch.unflatten(states, 2, (-1, self.group))

    def write(self, at: int, states: Tensor) -> None:
        """Quantize whole groups of states, ``[batch, heads, groups * group, dim]``, into the groups from `at` on."""
        if states.shape[2] == 0:
            return
        found = quantized(self._grouped(states), self.bits, -2 if self.per_channel else -1)
        if self.bits == 4:
            first, second = found["codes"].chunk(2, -2)  # of the tokens
            found["codes"] = first | second << 4
        for name, new in found.items():
            self.parts[name][:, :, at : at + new.shape[2]] = new

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Dequantize groups into a view, ``[batch, heads, (stop - start) * group, dim]``."""
        if start == stop:
            return
        codes, scale, *low = (self.parts[name][:, :, start:stop] for name in self.names)
        out = self._grouped(out)
        if not low:
            out.copy_(codes).mul_(scale)
            return
        half = codes.shape[3]
        out[:, :, :, :half].copy_(codes & 15)
        out[:, :, :, half:].copy_(codes >> 4)
        out.mul_(scale).add_(low[0])


def layout(like: Tensor, storage: KVQuantization, side: Side) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The parts of a `GroupedSide`: shape after ``[batch, heads, n]``, and dtype."""
    dim, few = like.shape[3], torch.int8 if storage.bits(side) == 8 else torch.uint8
    shapes = _shapes(storage, dim, side)
    groups = {name: (shape, few if name == "codes" else scale_dtype(like.dtype)) for name, shape in shapes.items()}
    return {"pinned": ((dim,), like.dtype), "tail": ((dim,), like.dtype), **groups}


def _shapes(storage: KVQuantization, dim: int, side: Side) -> dict[str, tuple[int, int]]:
    """What one head's group of states is stored as: codes, scales and, for 4 bits, minima."""
    group = storage.group_size or 0
    shared = (1, dim) if side == "keys" else (group, 1)
    if storage.bits(side) == 8:
        return {"codes": (group, dim), "scale": shared}
    return {"codes": (group // 2, dim), "scale": shared, "low": shared}


def _sizes(storage: KVQuantization, token: Token) -> tuple[int, int]:
    """Bytes of a token in full precision and of a group, in one row."""
    heads, key_dim, value_dim, dtype = token
    full = heads * (key_dim + value_dim) * dtype.itemsize
    parts = [*_shapes(storage, key_dim, "keys").items(), *_shapes(storage, value_dim, "values").items()]
    scale = scale_dtype(dtype).itemsize
    return full, heads * sum(a * b * (1 if name == "codes" else scale) for name, (a, b) in parts)


def group_sizes(storage: KVQuantization, whole: Whole, pinned: int) -> tuple[int, int]:
    """Bytes of a token in one row of all layers that share a budget, rounded up, and of what is held besides: the tail, a
    group that has begun, and what the pinned tokens take more.
    """
    small, reserved, group_size = 0, whole.beside, storage.group_size or 1
    for token in whole.tokens:
        full, group = _sizes(storage, token)
        small += (one := -(-group // group_size))
        reserved += full * group_size + group + pinned * (full - one)
    return small, reserved


def most_groups(policy: SizePolicy, group: int, seen: int) -> int:
    """The most groups that a layer holds by the time it has seen so many tokens one by one."""
    full = max(0, seen - policy.pinned) // group
    return full if policy.limit is None else min(full, -(-(policy.limit - policy.pinned) // group))


def grouped_bytes(
    token: Token, storage: KVQuantization, policy: SizePolicy, tokens: int, rows: int, whole: Whole, most: int | None
) -> int:
    """Bytes of one layer once `tokens` have gone through it, exactly.

    Args:
        token: of the keys and values that come.
        storage: as of the layer.
        policy: as it is given to the layer; `most` is its max_length.
        tokens: per row, pads among them.
        rows: batch size.
        whole: what shares a budget in bytes.
        most: tokens at most.
    """
    small, reserved = group_sizes(storage, whole, policy.pinned)
    policy = policy.resolve(small * rows, reserved * rows, most)
    check_policy(policy)
    full, group = _sizes(storage, token)
    size = storage.group_size or 0
    return rows * (full * (policy.pinned + size) + group * most_groups(policy, size, tokens))
