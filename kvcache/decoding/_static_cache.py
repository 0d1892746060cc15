"""Keys and values of rows that decode together: fixed memory, and every row's length on the device.

A step writes one token per row at the row's own position and reads what the row still sees, and the host need not know
either: nothing in a step depends on a Python number, so it can be captured once and replayed. Each layer's buffer is a
ring whose first slots are pinned; with as many slots as tokens it is simply a buffer.

The host keeps its own count of the tokens, which needs no look at the device: each step adds one to every row.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from kvcache.cache import (
    CacheGeometry,
    CacheReport,
    KeepAll,
    LayerCache,
    LayerReport,
    SizePolicy,
    ring_sees,
    ring_slot,
    staying_of,
)
from kvcache.errors import CapacityError, GeometryError, PolicyError
from kvcache.events import Event, emit
from kvcache.memory import zeros
from kvcache.models import check_positions

_ENDLESS = 2**62


class StaticKV:
    """Keys and values of all layers for `rows` rows of up to `slots` tokens.

    Args:
        geometry: of the model.
        rows: how many.
        slots: of each row.
        dtype: of what is held; by default the model's. The keys of a bf16 cache are rounded once, as they are written.

    Attributes:
        keys, values: a buffer per layer, ``[rows, heads, slots, dim]``. What no token was written to is zero.
        length: tokens seen by each row, on the device, ``[rows]``.
        taken: 1 for rows that have been loaded, 0 for free ones, which count nothing.
        seen: the same on the host.
    """

    def __init__(self, geometry: CacheGeometry, rows: int, slots: int, *, dtype: torch.dtype | None = None) -> None:
        if rows < 1 or slots < 1:
            raise GeometryError(f"a cache of {rows} rows and {slots} slots holds nothing; give at least 1 of each")
        self.rows = rows
        device, dtype = geometry.device, dtype or geometry.dtype
        shape = rows, geometry.kv_heads, slots
        with torch.inference_mode(False):
            # Zeros, not whatever was there: what is masked still takes part, times nothing, and NaN times nothing is NaN.
            self.keys = [zeros((*shape, geometry.head_dim), dtype, device) for _ in range(geometry.layers)]
            self.values = [zeros((*shape, geometry.value_dim), dtype, device) for _ in range(geometry.layers)]
            self.length, self.pinned, self.low, self.taken = (
                torch.zeros(rows, dtype=torch.long, device=device) for _ in range(4)
            )
            self.limit = torch.full_like(self.length, _ENDLESS)
            self.order = torch.arange(slots, device=device)
            self._row = torch.arange(rows, device=device)
        self.seen = [0] * rows
        self.positions = geometry.max_positions
        self._policies: list[SizePolicy | None] = [None] * rows
        self._pending: list[tuple[range, Callable[[], None]]] = []
        # Of the step that is running:
        self.slot = self.length
        self.columns = slots

    @property
    def slots(self) -> int:
        """Tokens that a row has room for. It is read off a tensor, so that a compiled step serves any number of them."""
        return self.keys[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values; on a CPU the system hands out their memory as it is written to."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def first_rows(self, rows: int) -> "StaticKV":
        """The first rows as a cache of their own: the same memory, lengths and policies."""
        new = copy.copy(self)
        new.rows = rows
        new.keys, new.values = [t[:rows] for t in self.keys], [t[:rows] for t in self.values]
        new.length, new.pinned, new.low, new.limit, new.taken, new._row = (
            t[:rows] for t in (self.length, self.pinned, self.low, self.limit, self.taken, self._row)
        )
        return new

    # ------------------------------------------------------------------ between steps

    def load(
        self, first: int, layers: Sequence[LayerCache], pads: Tensor | None = None, *, later: bool = False
    ) -> None:
        """Begin the rows from `first` on with what was prefilled: all of it, or as much as its policy has left.

        Args:
            first: the first of as many rows as the layers hold.
            layers: after a prefill, all under the same policy. They may be forgotten afterwards.
            pads: on the left of each row, ``[batch]``, which are left out; by default as the layers know them.
            later: copy when `settle` is called. The layers must not change until then.

        Raises:
            PolicyError, GeometryError, CapacityError: if that cannot be held here; nothing has changed then.
        """
        rows = self.check_load(first, layers)
        source = layers[0]
        policy, pads = source.policy, source.padding if pads is None else pads.cpu()
        lengths = [source.seen] * len(rows) if pads is None else [source.seen - int(p) for p in pads]
        positions = source.positions() - (0 if pads is None else pads[:, None])  # [B or 1, stored]; pads below zero
        pinned = policy.pinned if policy.evicts else 0
        limit, low = _marks(policy)
        held, kept = (positions >= 0).sum(1), staying_of(torch.tensor(lengths), limit, low)
        if bool((held != kept).any()):
            raise PolicyError(
                f"rows that hold {held.tolist()} tokens, where {policy!r} keeps {kept.tolist()} of {lengths}, cannot go on "
                "here: they were trimmed, or tokens left together with pads; decode without a backend"
            )
        device = self.length.device
        for row, length in zip(rows, lengths, strict=True):
            self.seen[row], self._policies[row] = length, policy
        chosen = slice(first, first + len(rows))
        self.length[chosen] = torch.tensor(lengths, device=device)
        self.pinned[chosen], self.taken[chosen] = pinned, 1
        self.limit[chosen], self.low[chosen] = limit, low
        self._pending.append((rows, partial(self._copy, rows, layers, positions.expand(len(rows), -1), pinned)))
        if not later:
            self.settle()

    def settle(self) -> None:
        """Copy what was loaded for later."""
        while self._pending:
            self._pending.pop(0)[1]()

    def _copy(self, rows: range, layers: Sequence[LayerCache], positions: Tensor, pinned: int) -> None:
        """The tokens at these positions, ``[rows, stored]``, to their slots; pads stand below zero."""
        slots = ring_slot(positions, torch.tensor(pinned), self.slots)
        stored = torch.arange(positions.shape[1])
        for i, row in enumerate(rows):
            real = stored[positions[i] >= 0]
            inorder = torch.equal(slots[i][real], stored[: len(real)])
            to = slice(len(real)) if inorder else slots[i][real].to(self.length.device)
            taken = slice(len(stored) - len(real), None) if inorder else real.to(self.length.device)
            for kv, keys, values in zip(layers, self.keys, self.values, strict=True):
                assert kv.keys is not None and kv.values is not None
                keys[row][:, to] = kv.keys[i][:, taken].to(keys.dtype)
                values[row][:, to] = kv.values[i][:, taken].to(values.dtype)

    def check_load(self, first: int, layers: Sequence[LayerCache]) -> range:
        """The rows that `load` would begin, if these layers fit there; raises if they do not."""
        held = layers[0].keys
        if held is None or len(layers) != len(self.keys):
            raise GeometryError(
                f"{len(layers)} layers{' without any token' if held is None else ''} cannot be loaded into {len(self.keys)}; prefill them first"
            )
        for kv, keys in zip(layers, self.keys, strict=True):
            if kv.keys is None or kv.keys.shape[1::2] != keys.shape[1::2]:
                raise GeometryError(
                    f"a layer of heads and head_dim {None if kv.keys is None else list(kv.keys.shape[1::2])} does not fit {list(keys.shape[1::2])}; load the cache of the model that this one was made for"
                )
        rows = range(first, first + held.shape[0])
        if first < 0 or rows.stop > self.rows:
            raise GeometryError(f"rows {first} to {rows.stop - 1} are not among the {self.rows} rows of this cache")
        policy = layers[0].policy
        if any(kv.policy != policy or kv.seen != layers[0].seen for kv in layers):
            raise PolicyError("layers with policies of their own cannot decode together; give all of them the same")
        if layers[0].rotation is not None and policy.evicts:
            raise PolicyError("re-rotated positions cannot be decoded on the device; use positions='absolute'")
        needed = policy.limit if policy.limit is not None else layers[0].stored
        if needed > self.slots:
            raise CapacityError(f"{needed} tokens do not fit {self.slots} slots; make a cache with more")
        return rows

    def free(self, first: int, rows: int) -> None:
        """Empty these rows. They go on taking part in steps, for nothing."""
        self._pending[:] = [(loaded, copy) for loaded, copy in self._pending if not first <= loaded[0] < first + rows]
        chosen = slice(first, first + rows)
        self.length[chosen] = 0
        self.limit[chosen] = _ENDLESS
        self.pinned[chosen] = self.taken[chosen] = 0
        for row in range(first, first + rows):
            self.seen[row], self._policies[row] = 0, None

    def move(self, first: int, to: int, rows: int) -> None:
        """Bring these rows to others, which they replace."""
        self.settle()
        source, target = slice(first, first + rows), slice(to, to + rows)
        used = min(max(self.seen[source]), self.slots)
        for held in (*self.keys, *self.values):
            held[target, :, :used] = held[source, :, :used]
        for marks in (self.length, self.pinned, self.low, self.limit, self.taken):
            marks[target] = marks[source].clone()
        self.seen[target], self._policies[target] = self.seen[source], self._policies[source]
        self.free(first, rows)

    def check(self, steps: int) -> None:
        """Raise `CapacityError` if a row has no room, or no positions, for so many more tokens."""
        for row, (seen, policy) in enumerate(self._accounts()):
            if policy is not None:
                check_positions(self.positions, seen, steps)
            if policy is not None and not policy.evicts and seen + steps > self.slots:
                raise CapacityError(
                    f"cannot decode {steps} tokens: row {row} uses {seen} of {self.slots} slots; raise max_cache_length, "
                    "or use a policy that evicts, such as SlidingWindow"
                )

    def room(self) -> int:
        """How many more tokens `check` lets pass."""
        room = _ENDLESS
        for seen, policy in self._accounts():
            if policy is not None and self.positions is not None:
                room = min(room, self.positions - seen)
            if policy is not None and not policy.evicts:
                room = min(room, self.slots - seen)
        return max(0, room)

    def spare(self) -> int:
        """How many tokens more can be written to each row and taken back, in place of none that stays."""
        known = [(seen, policy.limit) for seen, policy in self._accounts() if policy is not None]
        held = [seen if limit is None else limit - 1 for seen, limit in known]  # where one comes, another leaves
        return self.slots - max(held, default=0)

    def advance(self, steps: int) -> None:
        """Count what so many steps have written."""
        for row in range(self.rows):
            self.seen[row] += steps * (self._policies[row] is not None)

    def evicted(self) -> list[int]:
        """How many tokens have left each row, in every layer."""
        bounded = [(seen, policy) if policy is not None else (0, KeepAll()) for seen, policy in self._accounts()]
        return [seen - self._stored(seen, policy) for seen, policy in bounded]

    def emit_evictions(self, before: Sequence[int]) -> None:
        """Tell what has left since `evicted` was `before`, see `kvcache.events`."""
        left = [max(0, now - then) for now, then in zip(self.evicted(), before, strict=True)]
        if total := sum(left):
            row = max(range(len(left)), key=left.__getitem__)
            rows, layers = sum(n > 0 for n in left), len(self.keys)
            numbers = {"tokens": total * layers, "layers": layers, "rows": rows, "seen": self.seen[row]}
            emit(Event("evicted", repr(self._policies[row]), numbers))

    @staticmethod
    def _stored(seen: int, policy: SizePolicy) -> int:
        return int(staying_of(torch.tensor(seen), *_marks(policy)))

    def _accounts(self) -> list[tuple[int, SizePolicy | None]]:
        """Of each row: tokens seen, and its policy; None where nothing has been loaded."""
        return list(zip(self.seen, self._policies, strict=True))[: self.rows]

    def reach(self) -> tuple[int, bool]:
        """What the next step has to read: how many slots, and whether every row sees all of them."""
        busy = [(seen + 1, policy) for seen, policy in self._accounts() if policy is not None]
        longest = max((length for length, _ in busy), default=1)
        alike = len(busy) == self.rows and all(
            length == longest and (policy.limit is None or length <= policy.limit) for length, policy in busy
        )
        return min(longest, self.slots), alike and longest <= self.slots

    def report(self) -> CacheReport:
        """The account of the rows in use, as `KVCacheManager.report` gives it."""
        busy = [row for row, (_, policy) in enumerate(self._accounts()) if policy is not None]
        longest = max(busy, key=lambda row: self.seen[row], default=0)
        policy, seen = self._policies[longest], self.seen[longest]
        stored = seen if policy is None else self._stored(seen, policy)
        layers = (
            LayerReport(
                repr(policy), seen, stored, seen - stored, self.slots, sum(t.numel() * t.element_size() for t in pair)
            )
            for pair in zip(self.keys, self.values, strict=True)
        )
        return CacheReport(tuple(layers))

    # ------------------------------------------------------------------ within a step

    def begin(self, columns: int, fresh: int = 1) -> None:
        """Say where this step's tokens go, so many of each row, and how many slots are read."""
        torch._check(columns <= self.slots)  # type: ignore[no-untyped-call]  # what a compiler that knows neither number has to be told
        length, pinned = self.length, self.pinned
        if fresh > 1:
            length, pinned = length[:, None] + self.order[:fresh], pinned[:, None]
        self.slot = ring_slot(length, pinned, self.slots)
        self.columns = columns

    def counts(self) -> Tensor:
        """Of each row: tokens seen, the current one among them; how many of them stay; how many are pinned, ``[rows, 3]``."""
        length = self.length + 1
        return torch.stack((length, staying_of(length, self.limit, self.low), self.pinned), 1)

    def mask(self, order: Tensor, fresh: int = 1) -> Tensor:
        """What each row's current tokens see of the slots in `order`, ``[rows, 1, fresh, columns]``.

        Of several tokens each sees those before it. A policy that evicts needs as many slots more than it keeps.
        """
        marks = (self.length + 1, self.limit, self.low, self.pinned)
        if fresh > 1:
            later = self.order[:fresh].repeat(self.rows)
            length, limit, low, pinned = (mark.repeat_interleave(fresh) for mark in marks)
            length = length + later
        else:
            length, limit, low, pinned = marks
        seen = ring_sees(length, staying_of(length, limit, low), pinned, self.slots, order)
        return seen.view(self.rows, 1, fresh, -1)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the current tokens of each row, ``[rows, heads, fresh, dim]``; the slots to read, a view."""
        held_keys, held_values = self.keys[layer], self.values[layer]
        if self.slot.dim() == 1:
            held_keys[self._row, :, self.slot] = keys[:, :, 0].to(held_keys.dtype)
            held_values[self._row, :, self.slot] = values[:, :, 0].to(held_values.dtype)
        else:
            held_keys[self._row[:, None], :, self.slot] = keys.transpose(1, 2).to(held_keys.dtype)
            held_values[self._row[:, None], :, self.slot] = values.transpose(1, 2).to(held_values.dtype)
        return held_keys[:, :, : self.columns], held_values[:, :, : self.columns]


def _marks(policy: SizePolicy) -> tuple[int, int]:
    """The most tokens that a policy keeps, and to how many it trims when one more comes."""
    return (_ENDLESS, 0) if policy.limit is None else (policy.limit, policy.keep(policy.limit + 1))
