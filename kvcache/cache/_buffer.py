"""Slots for the tokens of one layer, held as its storage holds them."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from kvcache.cache._budget import Token
from kvcache.cache._slots import take
from kvcache.cache._storage import AS_CAME, SIDES, Side, Storage
from kvcache.errors import CorruptError

Held = dict[Side, dict[str, Tensor]]
"""What a storage makes of keys and of values: tensors ``[batch, heads, tokens, …]`` by name."""


class Buffer:
    """The keys and values of one layer; what is stored is in the first slots.

    Args:
        storage: how they are held.
        keys: as they will come, ``[batch, heads, any, head_dim]``.
        values: the same, but for their own head_dim.
        slots: for so many tokens.

    Attributes:
        like: keys and values of no token, of the shape, dtype and device in which they come.
        parts: what is held, ``[batch, heads, slots, …]`` each.
    """

    def __init__(self, storage: Storage, keys: Tensor, values: Tensor, slots: int) -> None:
        self.storage = storage
        with torch.inference_mode(False):  # a buffer made in inference mode could not be written to outside of it
            self.like: dict[Side, Tensor] = {
                side: states.new_empty((*states.shape[:2], 0, states.shape[3]))
                for side, states in zip(SIDES, (keys, values), strict=True)
            }
            self.parts: Held = {
                side: {name: _sized(part, slots) for name, part in storage.encode(self.like[side], side).items()}
                for side in SIDES
            }

    @property
    def slots(self) -> int:
        """For how many tokens there is room."""
        return next(iter(self.parts["keys"].values())).shape[2]

    @property
    def rows(self) -> int:
        """The batch size."""
        return self.like["keys"].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(part.numel() * part.element_size() for held in self.parts.values() for part in held.values())

    def made_for(self, keys: Tensor, values: Tensor) -> bool:
        """Whether the slots are for states like these."""
        return all(
            (new.shape[:2], new.shape[3], new.dtype, new.device) == (at.shape[:2], at.shape[3], at.dtype, at.device)
            for new, at in zip((keys, values), self.like.values(), strict=True)
        )

    # ------------------------------------------------------------------ written and read

    def encode(self, keys: Tensor, values: Tensor) -> Held:
        """What is held of these states."""
        return {side: self.storage.encode(states, side) for side, states in zip(SIDES, (keys, values), strict=True)}

    def decode(self, held: Mapping[Side, Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
        """Keys and values of what is held."""
        keys, values = (self.storage.decode(held[side], side, self.like[side]) for side in SIDES)
        return keys, values

    def write(self, at: int, keys: Tensor, values: Tensor) -> None:
        """Put states into the slots from `at` on."""
        end = at + keys.shape[2]
        for side, held in self.encode(keys, values).items():
            for name, part in held.items():
                self.parts[side][name][:, :, at:end].copy_(part)

    def write_keys(self, keys: Tensor) -> None:
        """Put keys into the first slots, and leave the values as they are."""
        for name, part in self.storage.encode(keys, "keys").items():
            self.parts["keys"][name][:, :, : keys.shape[2]] = part

    def write_each(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put one token of each row into the slot of that row, ``[batch]``."""
        rows = torch.arange(keys.shape[0])
        for side, held in self.encode(keys, values).items():
            for name, part in held.items():
                into = self.parts[side][name]
                into[rows.to(into.device), :, slots.to(into.device)] = part[:, :, 0].to(into.device)

    def read(self, stored: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first tokens: views where the storage is exact."""
        return self.read_side("keys", stored), self.read_side("values", stored)

    def read_side(self, side: Side, stored: int) -> Tensor:
        """The same of one side alone."""
        held = {name: part[:, :, :stored] for name, part in self.parts[side].items()}
        return self.storage.decode(held, side, self.like[side])

    def first(self, stored: int) -> Held:
        """What is held of the first tokens: views."""
        return {side: {name: part[:, :, :stored] for name, part in held.items()} for side, held in self.parts.items()}

    def behind(self, held: Held, came: Held) -> Held:
        """What is held of some tokens, and behind them what came."""
        return {
            side: {name: torch.cat([part, came[side][name]], 2) for name, part in parts.items()}
            for side, parts in held.items()
        }

    def fill(self, held: Held, columns: Tensor | None = None) -> None:
        """Put what is held into the first slots, or only these of its columns; see `take`."""
        for side, parts in held.items():
            for name, part in parts.items():
                chosen = part if columns is None else take(part, columns)
                self.parts[side][name][:, :, : chosen.shape[2]] = chosen

    # ------------------------------------------------------------------ slots and rows

    def grow(self, slots: int, stored: int) -> None:
        """Have at least so many slots; what is stored moves along."""
        if slots > self.slots:
            self._resize(slots, stored)

    def cut(self, slots: int) -> None:
        """Give back all slots but the first."""
        if slots < self.slots:
            self._resize(slots, slots)

    def _resize(self, slots: int, stored: int) -> None:
        with torch.inference_mode(False):
            for held in self.parts.values():
                for name, part in held.items():
                    new = _sized(part, slots)
                    new[:, :, :stored] = part[:, :, :stored]
                    held[name] = new

    def select(self, rows: Tensor, stored: int) -> None:
        """Have these rows instead, ``[new batch]``; as many as before stay where they are in memory."""
        if rows.shape[0] == self.rows:
            for held in self.parts.values():
                for part in held.values():
                    part[:, :, :stored] = part[:, :, :stored].index_select(0, rows.to(part.device))
            return
        with torch.inference_mode(False):
            chosen = [
                {name: part.index_select(0, rows.to(part.device)) for name, part in held.items()}
                for held in self.parts.values()
            ]
            self.like = {side: like.new_empty((rows.shape[0], *like.shape[1:])) for side, like in self.like.items()}
        self.parts = dict(zip(SIDES, chosen, strict=True))

    # ------------------------------------------------------------------ as tensors

    def tensors(self, stored: int) -> dict[str, Tensor]:
        """Copies of all that is stored, by name; with it `from_tensors` makes such a buffer again."""
        found: dict[str, Tensor] = {}
        for side, held in self.first(stored).items():
            found |= {_named(side, name): part.clone() for name, part in held.items()}
            if not self.storage.plain:  # how states come cannot be seen from what is held of them
                found[f"{side}.like"] = self.like[side].clone()
        return found


def states_like(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values of no token, like those whose `Buffer.tensors` these are.

    Raises:
        CorruptError: if they are not there.
    """
    found = []
    for side in SIDES:
        like = tensors.get(f"{side}.like", tensors.get(side))
        if like is None or like.dim() != 4 or (f"{side}.like" in tensors and like.shape[2]):
            raise CorruptError(f"the {side} of the tokens that are stored are missing; save the cache again")
        found.append(like[:, :, :0])
    return found[0], found[1]


def held_of(buffer: Buffer, tensors: Mapping[str, Tensor], stored: int, others: Collection[str] = ()) -> Held:
    """What `Buffer.tensors` gave, if it fits a buffer like this, and nothing is there besides but `others`.

    Raises:
        CorruptError: if it does not.
    """
    found: Held = {"keys": {}, "values": {}}
    left = set(tensors) - set(others)
    for side, held in buffer.parts.items():
        left -= set() if buffer.storage.plain else {f"{side}.like"}
        for name, part in held.items():
            saved = tensors.get(_named(side, name))
            expected = (*part.shape[:2], stored, *part.shape[3:])
            if saved is None or (tuple(saved.shape), saved.dtype) != (expected, part.dtype):
                given = "missing" if saved is None else f"{saved.dtype} {list(saved.shape)}"
                raise CorruptError(f"{_named(side, name)} is {given}, not {part.dtype} {list(expected)}")
            found[side][name] = saved
            left.discard(_named(side, name))
    if left:
        raise CorruptError(f"{sorted(left)} are no tensors of such a layer")
    return found


def token_of(keys: Tensor, values: Tensor) -> Token:
    """The shape of a token of which these are some, ``[batch, heads, tokens, head_dim]``."""
    dtype = keys.dtype if keys.element_size() >= values.element_size() else values.dtype
    return keys.shape[1], keys.shape[3], values.shape[3], dtype


def _sized(part: Tensor, slots: int) -> Tensor:
    return part.new_empty((*part.shape[:2], slots, *part.shape[3:]))


def _named(side: Side, name: str) -> str:
    """States that are held as they came are called by their side alone."""
    return side if name == AS_CAME else f"{side}.{name}"
