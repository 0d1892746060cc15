"""Keys and values of one attention layer in 8 or 4 bits, after KIVI (Liu et al., arXiv:2402.02750).

Keys are quantized per channel over groups of tokens, as some of their channels are large in every token; values per
token over their head_dim. In full precision stay the tail, the tokens that do not yet fill a group, and the pinned
tokens: they are few, and attention rests on them. A group is quantized once, from what came in, so no error adds up.

The first token that is not pinned begins the first group, so what is where follows from two counts: the tokens seen and
the tokens stored. Everything is in the order of the tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcache.cache._budget import Token, Whole
from kvcache.cache._geometry import CacheGeometry
from kvcache.cache._growing import KVLayer
from kvcache.cache._policies import KeepAll, SizePolicy, check_policy, schedule
from kvcache.errors import CorruptError, GeometryError, InputError, KVCacheError, PositionsError, RollbackError, said


@dataclass(frozen=True)
class Quantization:
    """How keys and values are kept in few bits.

    int8 is symmetric around zero; int4 counts from the smallest value of its group, two tokens to a byte. Scales and
    minima have the dtype of the states, so that a large one does not overflow; those of fp32 states are bf16.
    What is read back is off by at most half a scale, and its rounding to that dtype.

    Attributes:
        bits: 8 or 4.
        group: tokens that share the scale of a key channel; at least 8, and even.

    Raises:
        InputError: for anything else.
    """

    bits: int
    group: int = 64

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in (8, 4):
            raise InputError(f"bits={self.bits!r} must be 8 or 4; for full precision use a cache without quantization")
        if not isinstance(self.group, int) or self.group < 8 or self.group % 2:
            raise InputError(f"group={self.group!r} must be an even number of tokens, at least 8; 32 and 64 are common")

    def _shapes(self, dim: int, per_channel: bool) -> dict[str, tuple[int, int]]:
        """What one head's group of states is stored as: codes, scales and, for 4 bits, minima."""
        shared = (1, dim) if per_channel else (self.group, 1)
        if self.bits == 8:
            return {"codes": (self.group, dim), "scale": shared}
        return {"codes": (self.group // 2, dim), "scale": shared, "low": shared}

    def _group_bytes(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one head's group of keys and values."""
        sides = (self._shapes(key_dim, True), self._shapes(value_dim, False))
        scale = _scale_dtype(dtype).itemsize
        sizes = [(a * b, 1 if name == "codes" else scale) for side in sides for name, (a, b) in side.items()]
        return sum(count * size for count, size in sizes)


class QuantizedLayer(KVLayer):
    """A `KVLayer` that holds all but its pinned tokens and its newest in 8 or 4 bits.

    Which tokens stay is the policy's, exactly as in a `KVLayer`. What an append returns of its own tokens is as they came;
    so appending a chunk equals appending its tokens one by one up to the error of quantization.

    Memory: the pinned tokens, a tail of `group` tokens, and groups. With a policy of `limit` tokens there are at most
    as many groups as hold those that are not pinned, rounded up; of the oldest some tokens may be hidden, and once all
    are it is dropped. Groups grow one by one: moving them costs little beside reading them, which each append does.

    A `MaxBytes` budget counts what is held here, scales and tail too. A state that is not finite makes NaN of its own
    value and head, or of its key channel in its group: such attention is NaN anyway. For int4, the spread of a group must
    be a number of the dtype; what is beyond is cut.

    Args:
        policy, max_length, layers, whole, rows: as of `KVLayer`.
        quantization: bits, and tokens in a group.
        padding: pads on the left of each row, ``[batch]``; only where no token is evicted.
        geometry: of the model; with `rows` it lets `mask` know a `MaxBytes` budget before the first append.

    Raises:
        PositionsError: if padded rows are to evict.
        PolicyError: for a policy or limit that cannot work.
    """

    def __init__(
        self,
        policy: SizePolicy | None = None,
        quantization: Quantization = Quantization(8),
        *,
        max_length: int | None = None,
        padding: Tensor | None = None,
        layers: int = 1,
        whole: Whole | None = None,
        rows: int | None = None,
        geometry: CacheGeometry | None = None,
    ) -> None:
        self.quantization = quantization
        self._token = None if geometry is None else _token(geometry)
        token_bytes = None if geometry is None else geometry.layer_token_bytes
        super().__init__(
            policy,
            max_length=max_length,
            padding=padding,
            layers=layers,
            whole=whole,
            rows=rows,
            token_bytes=token_bytes,
        )
        if self.padding is not None and self.policy.evicts:
            raise PositionsError(
                f"{policy!r} cannot evict from padded rows that are quantized: their groups would begin at different "
                "tokens; run the rows apart, or use KeepAll()"
            )
        self._sides: tuple[_Side, _Side] | None = None  # their tails are the _keys and _values of a KVLayer

    # ------------------------------------------------------------------ what it holds

    @property
    def rolls_back(self) -> bool:
        """Never: a group that was filled is known only in few bits; see `check_truncate`."""
        return False

    @property
    def initialized(self) -> bool:
        return self._sides is not None

    @property
    def capacity(self) -> int:
        """Slots for tokens now: pinned ones, those in groups and the tail."""
        return 0 if self._sides is None else self._sides[0].slots()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that this layer holds."""
        return sum(t.numel() * t.element_size() for side in self._sides or () for t in side.parts.values())

    @property
    def keys(self) -> Tensor | None:
        """The stored keys in the order of the tokens, dequantized: a copy. None before the first."""
        return None if self._sides is None else self._read(self._sides[0], self.stored)

    @property
    def values(self) -> Tensor | None:
        """The stored values in the order of the tokens, dequantized: a copy. None before the first."""
        return None if self._sides is None else self._read(self._sides[1], self.stored)

    def positions(self) -> Tensor:
        """The position of the token in each slot, ``[1, stored]``: all rows have the same, counted from 0, pads too."""
        pinned = min(self.seen, self.policy.pinned)
        return torch.cat((torch.arange(pinned), torch.arange(self.evicted + pinned, self.seen)))[None]

    # ------------------------------------------------------------------ append

    def _overwrites(self, fresh: int) -> bool:
        return False  # tokens stay in order

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens and return all that they attend to: the retained tokens, dequantized, then the new ones.

        Args:
            keys: ``[batch, heads, tokens, head_dim]``.
            values: the same, but for its own head_dim.

        Returns:
            Keys and values ``[batch, heads, retained + tokens, head_dim]``, in the dtype that came; copies.

        Raises:
            CapacityError, GeometryError: before anything has changed.
        """
        self.check_append(keys, values)
        fresh = keys.shape[2]
        if self._sides is None or (self.seen == 0 and not self._made_for(keys, values)):
            self._allocate(keys, values)
        assert self._sides is not None
        keys, values = keys.detach(), values.detach()
        counts = schedule(self.policy, self.stored, fresh) or (self.stored + 1,)
        attended = self._read(self._sides[0], counts[0] - 1, keys), self._read(self._sides[1], counts[0] - 1, values)
        if fresh:
            self._store(keys, values, counts)
        return attended

    def _store(self, keys: Tensor, values: Tensor, counts: tuple[int, ...]) -> None:
        seen, group = self.seen + len(counts), self.quantization.group
        first, full = self._groups()
        new_first, new_full = self._groups(seen, counts[-1])
        begin, end = min(self.seen, self.policy.pinned), min(seen, self.policy.pinned)
        tail = self.seen - begin - full * group
        needed = self._most_groups(seen) if self.policy.limit is not None else new_full - new_first
        for side, states in zip(self._sides or (), (keys, values), strict=True):
            side.move(new_first - first, full - first, needed)
            side.pinned[:, :, begin:end] = states[:, :, : end - begin]
            states = states[:, :, end - begin :]
            if new_full == full:
                side.tail[:, :, tail : tail + states.shape[2]] = states
                continue
            states = torch.cat((side.tail[:, :, :tail], states), 2)  # they begin where the last full group ended
            start, stop = (max(full, new_first) - full) * group, (new_full - full) * group
            side.write(max(full, new_first) - new_first, states[:, :, start:stop])
            side.tail[:, :, : states.shape[2] - stop] = states[:, :, stop:]
        for i, count in enumerate(counts):
            if count <= (self.stored if i == 0 else counts[i - 1]):
                self._floor = self.seen + i + 1
        if self._pads is not None:
            self._pads = self._pads + self._pads_among(len(counts))
        self.seen, self.stored = seen, counts[-1]

    def _groups(self, seen: int | None = None, stored: int | None = None) -> tuple[int, int]:
        """The first group of which a token is stored, and how many have ever been full."""
        seen, stored = self.seen if seen is None else seen, self.stored if stored is None else stored
        body = max(0, seen - self.policy.pinned)
        full = body // self.quantization.group
        return min(full, (seen - stored) // self.quantization.group), full

    def _most_groups(self, seen: int) -> int:
        return _most_groups(self.policy, self.quantization.group, seen)

    def _read(self, side: "_Side", count: int, fresh: Tensor | None = None) -> Tensor:
        """The pinned and the newest of the stored tokens, `count` in all, dequantized; then the fresh ones."""
        group, pinned = self.quantization.group, min(self.seen, self.policy.pinned)
        held, full = self._groups()
        first, _ = self._groups(stored=count)
        oldest = self.seen - count  # of those not pinned, counted from the first of them
        hidden = oldest - first * group if first < full else 0
        spare = max(0, hidden - pinned)  # columns for what is hidden, as far as the pinned tokens do not cover it
        batch, heads, _, dim = side.tail.shape
        total = spare + count + (0 if fresh is None else fresh.shape[2])
        out = side.tail.new_empty((batch, heads, total, dim))
        start = spare + pinned - hidden
        stop = start + (full - first) * group
        side.read(first - held, full - held, out[:, :, start:stop])
        out[:, :, spare : spare + pinned] = side.pinned[:, :, :pinned]
        tail = self.seen - pinned - full * group
        out[:, :, stop : spare + count] = side.tail[:, :, max(0, oldest - full * group) : tail]
        if fresh is not None:
            out[:, :, spare + count :] = fresh
        return out[:, :, spare:]

    # ------------------------------------------------------------------ going back

    def check_truncate(self, length: int) -> None:
        """Raise `RollbackError` if the layer cannot be rolled back to `length` tokens.

        It can to lengths within the tail, within the pinned tokens, and to those at which a group had just been filled.
        Between them it cannot: the tokens of a group are known only in few bits, and were in full precision then.
        """
        super().check_truncate(length)
        pinned, group = self.policy.pinned, self.quantization.group
        exact = pinned + self._groups()[1] * group
        if pinned < length < exact and (length - pinned) % group:
            below = length - (length - pinned) % group
            lower = f"{below}, " if below >= max(self._floor, pinned) else ""
            raise RollbackError(
                f"cannot roll back to {length} tokens: it is within a group of {group} that has been quantized; "
                f"give {lower}{below + group} or another length that is {pinned} and a multiple of {group}, "
                f"or {exact} to {self.seen}, or reset"
            )

    def truncate(self, length: int) -> None:
        """Roll back to the first `length` tokens, keeping the memory. `seen` becomes `length`.

        Raises:
            RollbackError: within a quantized group, or if tokens have been evicted since, unless all that remain are
                pinned.
        """
        self.check_truncate(length)
        if length >= self._floor:
            if self._pads is not None and self.padding is not None:
                self._pads = self.padding.clamp_max(length)
            self.stored -= self.seen - length
            self.seen = length
        else:
            self._clear()
            self.seen = self.stored = length

    def trim(self, max_tokens: int | None = None) -> int:
        """Evict the oldest unpinned tokens now, down to `max_tokens`, or to where the policy trims to. How many left.

        Raises:
            PolicyError: if the pinned tokens alone are more.
            PositionsError: if rows are padded.
        """
        if max_tokens is None:
            limit = self.policy.limit
            target = self.stored if limit is None else min(self.stored, self.policy.keep(limit + 1))
            max_tokens = max(1, self.policy.pinned, target)
        self.check_trim(max_tokens)
        leaving = self.stored - max_tokens
        if leaving <= 0 or self._sides is None:
            return 0
        first, full = self._groups()
        new_first, _ = self._groups(stored=max_tokens)
        for side in self._sides:
            side.move(new_first - first, full - first, 0)
        self.stored = max_tokens
        self._floor = self.seen
        return leaving

    def check_trim(self, max_tokens: int) -> None:
        """Raise `PolicyError`, or for padded rows `PositionsError`, if the layer cannot be trimmed to `max_tokens`."""
        super().check_trim(max_tokens)
        if self.padding is not None and max_tokens < self.stored:
            raise PositionsError(
                f"cannot trim {self.stored} tokens to {max_tokens}: padded rows that are quantized evict nothing; "
                "run the rows apart, or without quantization"
            )

    def fit(self) -> None:
        """Give back the groups that hold nothing, as after a `trim`."""
        first, full = self._groups()
        for side in self._sides or ():
            side.cut(full - first)

    # ------------------------------------------------------------------ saving, assigning

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """As of a `KVLayer`, but all tokens count from the beginning, and are quantized anew."""
        self._check_replaced(keys, values)
        policy = self._resolve(keys.shape[0], (keys.shape[1], keys.shape[3], values.shape[3], keys.dtype))
        bound = self.max_length if policy.limit is None else policy.limit
        if self.evicted or (bound is not None and keys.shape[2] > bound):
            raise GeometryError(
                f"keys {list(keys.shape)} cannot be assigned: {self.evicted} tokens have left their groups, and there is "
                f"room for {bound}; make the cache anew, and run the text on it"
            )
        keys, values = keys.detach().clone(), values.detach().clone()
        self.reset()
        self.append(keys, values)

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """All there is to save: tensors (copies, without unused slots) and counts. See `restore`."""
        tensors = {}
        if self._sides is not None:
            used = self._used(self.seen, self.stored)
            for name, side in zip(("keys", "values"), self._sides, strict=True):
                for part, held in side.parts.items():
                    with torch.inference_mode(False):
                        tensors[f"{name}.{part}"] = held[:, :, : used.get(part, used["groups"])].clone()
        counts = {"seen": self.seen, "stored": self.stored, "floor": self._floor}
        return tensors, counts | {"bits": self.quantization.bits, "group": self.quantization.group}

    def restore(self, tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
        """Continue, in an empty layer made alike, exactly as the layer of which this is the `state`; tensors are copied.

        Raises:
            InputError: if this layer is not empty.
            CorruptError: if the tensors and counts do not fit each other, or not this layer; it stays empty.
        """
        if self.seen:
            raise InputError(
                f"the layer already holds {self.seen} tokens; a state goes into an empty one: reset it first"
            )
        try:
            self._check_parts(tensors, counts)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, KVCacheError) as error:
            raise CorruptError(
                f"not a state of this layer: {said(error)}; it will not be used, save it again"
            ) from error
        if not tensors:
            return
        empty = [tensors[f"{name}.tail"][:, :, :0] for name in ("keys", "values")]
        if self._sides is None:
            self._allocate(empty[0], empty[1])
        self.seen, self.stored, self._floor = counts["seen"], counts["stored"], counts["floor"]
        first, full = self._groups()
        for name, side in zip(("keys", "values"), self._sides or (), strict=True):
            side.move(0, 0, full - first if self.policy.limit is None else self._most_groups(self.seen))
            for part, held in side.parts.items():
                saved = tensors[f"{name}.{part}"]
                held[:, :, : saved.shape[2]] = saved
        if self.padding is not None:
            self._pads = self.padding.clamp_max(self.seen)

    def _used(self, seen: int, stored: int) -> dict[str, int]:
        """How much of each part is in use, along its third dimension."""
        first, full = self._groups(seen, stored)
        pinned = min(seen, self.policy.pinned)
        return {"pinned": pinned, "groups": full - first, "tail": seen - pinned - full * self.quantization.group}

    def _check_parts(self, tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
        known = {"bits": self.quantization.bits, "group": self.quantization.group}
        seen, stored, floor = (counts[name] for name in ("seen", "stored", "floor"))
        if set(counts) != {"seen", "stored", "floor", *known} or any(type(n) is not int for n in counts.values()):
            raise ValueError(f"its counts are {dict(counts)}")
        if given := {name: counts[name] for name in known if counts[name] != known[name]}:
            raise ValueError(f"it is of {given}, this layer of {known}")
        if not tensors and seen == stored == floor == 0:
            return
        keys, values = tensors["keys.tail"], tensors["values.tail"]
        self._check_shapes(keys[:, :, :0], values[:, :, :0])
        if not (keys.is_floating_point() and keys.dtype == values.dtype):
            raise ValueError(f"its keys are {keys.dtype}, its values {values.dtype}")
        for side, states in zip(self._sides or (), (keys, values), strict=False):
            made = side.parts["tail"]
            if (made.dtype, *made.shape[:2], made.shape[3]) != (states.dtype, *states.shape[:2], states.shape[3]):
                raise ValueError(
                    f"it is of {states.dtype} and {list(states.shape)}, and this layer was made for {made.dtype} and "
                    f"{list(made.shape)}"
                )
        policy = self._resolve(keys.shape[0], (keys.shape[1], keys.shape[3], values.shape[3], keys.dtype))
        most = policy.limit if policy.limit is not None else self.max_length
        # What an eviction left must still be there: at least the pinned tokens, and one.
        evicted = self.padding is None and stored < seen and stored - (seen - floor) >= max(1, policy.pinned)
        fits = 0 <= stored <= (seen if most is None else min(seen, most)) and 0 <= floor <= seen
        if not fits or not (evicted or (stored == seen and floor == 0)):
            raise ValueError(f"{stored} tokens stored of {seen}, evicted up to length {floor}, with {policy!r}")
        used, names = self._used(seen, stored), set()
        for name, tail in (("keys", keys), ("values", values)):
            for part, (shape, dtype) in _layout(tail, self.quantization, name == "keys").items():
                held = tensors[f"{name}.{part}"]
                names.add(f"{name}.{part}")
                expected = (*tail.shape[:2], used.get(part, used["groups"]), *shape)
                if (tuple(held.shape), held.dtype, held.device) != (expected, dtype, keys.device):
                    raise ValueError(f"{name}.{part} is {held.dtype} {list(held.shape)}, not {dtype} {list(expected)}")
        if set(tensors) != names:
            raise ValueError(f"it has {sorted(set(tensors) - names)} besides")

    # ------------------------------------------------------------------ inside

    def _allocate(self, keys: Tensor, values: Tensor) -> None:
        if not keys.is_floating_point() or keys.dtype != values.dtype:
            raise GeometryError(
                f"keys are {keys.dtype} and values {values.dtype}; to be quantized both must be of one floating-point dtype"
            )
        token = (keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
        policy = self._resolve(keys.shape[0], token)
        sides = (
            _Side(keys, self.quantization, policy.pinned, True),
            _Side(values, self.quantization, policy.pinned, False),
        )
        self.policy, self._token, self._sides = policy, token, sides
        self._keys, self._values = sides[0].tail, sides[1].tail

    def _resolved(self, rows: int, key_bytes: int, value_bytes: int) -> SizePolicy:
        assert self._token is not None  # known wherever bytes are
        return self._resolve(rows, self._token)

    def _resolve(self, rows: int, token: Token) -> SizePolicy:
        whole = Whole((token,) * self._layers) if self._whole is None else self._whole
        policy = _resolve(self._given, self.quantization, whole, rows, self.max_length)
        self._check_bounds(policy)
        return policy

    def _select_slots(self, rows: Tensor) -> None:
        assert self._sides is not None
        selected = [side.selected(rows) for side in self._sides]
        for side, parts in zip(self._sides, selected, strict=True):
            side.parts = parts
        self._keys, self._values = (side.tail for side in self._sides)

    def _adopt(self, policy: SizePolicy) -> None:
        """Follow another policy from now on: with more rows, a budget in bytes holds fewer tokens."""
        self.policy = policy
        if policy.limit is None or self._sides is None:
            return
        if self.stored > policy.limit:
            self.trim(policy.limit)
        for side in self._sides:
            side.cut(self._most_groups(self.seen))


class _Side:
    """The keys, or the values, of a layer.

    Attributes:
        parts: ``pinned`` and ``tail``, ``[batch, heads, tokens, dim]``; then what groups are stored as, codes, scales and
            minima, ``[batch, heads, groups, …]``. See `_layout`.
    """

    def __init__(self, like: Tensor, quantization: Quantization, pinned: int, per_channel: bool) -> None:
        self.quantization, self.per_channel = quantization, per_channel
        sizes = {"pinned": pinned, "tail": quantization.group}
        with torch.inference_mode(False):  # a buffer made in inference mode could not be written to outside of it
            self.parts = {
                name: like.new_empty((*like.shape[:2], sizes.get(name, 0), *shape), dtype=dtype)
                for name, (shape, dtype) in _layout(like, quantization, per_channel).items()
            }
        self.names = [name for name in self.parts if name not in sizes]  # of the groups

    @property
    def pinned(self) -> Tensor:
        return self.parts["pinned"]

    @property
    def tail(self) -> Tensor:
        return self.parts["tail"]

    def slots(self) -> int:
        return self.pinned.shape[2] + self.quantization.group * (1 + self.parts["codes"].shape[2])

    def selected(self, rows: Tensor) -> dict[str, Tensor]:
        """Copies of these rows."""
        with torch.inference_mode(False):
            return {name: held.index_select(0, rows) for name, held in self.parts.items()}

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
        return torch.unflatten(states, 2, (-1, self.quantization.group))

    def write(self, at: int, states: Tensor) -> None:
        """Quantize whole groups of states, ``[batch, heads, groups * group, dim]``, into the groups from `at` on."""
        if states.shape[2] == 0:
            return
        for name, new in _quantize(
            self._grouped(states), self.quantization.bits, -2 if self.per_channel else -1
        ).items():
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


def _layout(
    like: Tensor, quantization: Quantization, per_channel: bool
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The parts of a `_Side`: shape after ``[batch, heads, n]``, and dtype."""
    dim, few = like.shape[3], torch.int8 if quantization.bits == 8 else torch.uint8
    shapes = quantization._shapes(dim, per_channel)
    groups = {name: (shape, few if name == "codes" else _scale_dtype(like.dtype)) for name, shape in shapes.items()}
    return {"pinned": ((dim,), like.dtype), "tail": ((dim,), like.dtype), **groups}


def _scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of scales and minima: 16 bits. Those of fp32 states have its range."""
    return torch.bfloat16 if dtype.itemsize > 2 else dtype


def _rounded_down(low: Tensor, dtype: torch.dtype) -> Tensor:
    """The next number of a 16-bit dtype that is not above, in fp32."""
    rounded = low.to(dtype)
    lower = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    return torch.where((rounded.float() > low) & lower.isfinite(), lower, rounded).float()


def _quantize(states: Tensor, bits: int, dim: int) -> dict[str, Tensor]:
    """Codes, and scales (for 4 bits minima too) shared along `dim`, of states ``[…, group, head_dim]``."""
    exact, dtype = states.float(), _scale_dtype(states.dtype)
    levels = 127 if bits == 8 else 15
    low = _rounded_down(exact.amin(dim, keepdim=True), dtype) if bits == 4 else None
    spread = exact.abs().amax(dim, keepdim=True) if low is None else exact.amax(dim, keepdim=True) - low
    # Rounded to nearest, a scale below fp16's normal numbers could be much too small: so it is rounded up, to be off by
    # no more than half. And 0 is no scale; nor is one by which the largest value would come back as infinity.
    info = torch.finfo(dtype)
    least = info.smallest_normal * (info.eps if dtype == torch.float16 else 1)
    most = (info.max - (torch.zeros_like(spread) if low is None else low.clamp_min(0))) / levels * (1 - info.eps)
    up = 1 + torch.finfo(dtype).eps / 2 if states.dtype != dtype else 1
    scale = (spread / levels * up + least / 2).clamp(max=most)  # NaN stays NaN
    scale = scale.masked_fill_(spread.isinf(), torch.nan).to(dtype).clamp_min_(least)
    codes = exact / scale.float() if low is None else (exact - low).div_(scale.float())
    codes.round_().nan_to_num_(0).clamp_(-127 if low is None else 0, levels)
    if low is None:
        return {"codes": codes.to(torch.int8), "scale": scale}
    first, second = codes.to(torch.uint8).chunk(2, -2)  # of the tokens
    packed = first | second << 4
    return {"codes": packed, "scale": scale, "low": low.to(dtype)}


# ---------------------------------------------------------------------- what it takes


def _token(geometry: CacheGeometry) -> Token:
    return geometry.kv_heads, geometry.head_dim, geometry.value_dim, geometry.dtype


def _sizes(quantization: Quantization, token: Token) -> tuple[int, int]:
    """Bytes of a token in full precision and of a group, in one row."""
    heads, key_dim, value_dim, dtype = token
    full = heads * (key_dim + value_dim) * dtype.itemsize
    return full, heads * quantization._group_bytes(key_dim, value_dim, dtype)


def _resolve(
    given: SizePolicy, quantization: Quantization, whole: Whole, rows: int, max_length: int | None
) -> SizePolicy:
    """The policy once the shape of a token is known: a budget in bytes becomes one in tokens, at most a group too few."""
    small, reserved = 0, whole.beside
    for token in whole.tokens:
        full, group = _sizes(quantization, token)
        small += (one := -(-group // quantization.group))
        reserved += (
            full * quantization.group + group + given.pinned * (full - one)
        )  # the tail, a group begun, the pinned
    policy = given.resolve(small * rows, reserved * rows, max_length)
    check_policy(policy)
    return policy


def _most_groups(policy: SizePolicy, group: int, seen: int) -> int:
    """The most groups that a layer holds by the time it has seen so many tokens one by one."""
    full = max(0, seen - policy.pinned) // group
    return full if policy.limit is None else min(full, -(-(policy.limit - policy.pinned) // group))


def quantized_bytes(
    heads: int,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    quantization: Quantization,
    tokens: int,
    rows: int = 1,
    policy: SizePolicy | None = None,
    max_length: int | None = None,
    layers: int = 1,
    whole: Whole | None = None,
) -> int:
    """Bytes of one layer once `tokens` have gone through it, exactly.

    Args:
        heads, head_dim, value_dim, dtype: of the keys and values that come.
        quantization: as of the layer.
        tokens: per row, pads among them.
        rows: batch size.
        policy, max_length: as of the layer.
        layers: how many share the budget of a `MaxBytes` policy.
        whole: what shares it, where that is not so many layers of this shape and nothing besides.
    """
    token = (heads, head_dim, value_dim, dtype)
    policy = KeepAll() if policy is None else policy
    policy = _resolve(policy, quantization, whole or Whole((token,) * layers), rows, max_length)
    full, group = _sizes(quantization, token)
    return rows * (
        full * (policy.pinned + quantization.group) + group * _most_groups(policy, quantization.group, tokens)
    )


def check_quantization(quantization: Any) -> None:
    """Raise `InputError` for what is no `Quantization`."""
    if quantization is not None and not isinstance(quantization, Quantization):
        raise InputError(
            f"quantization={quantization!r} must be a Quantization; give Quantization(8) or Quantization(4)"
        )
