"""A layer whose oldest tokens leave first, in one buffer of slots.

A full cache, a bounded one and a sliding window with sinks are the same buffer; they differ in what happens at its end:
it grows, it refuses, or it wraps. What is stored is always the buffer's first slots, so it is handed out as a view.

Slots need not be in the order of the tokens: attention does not care once keys carry their positions. A full window
therefore overwrites the slot of the token that leaves, and nothing is ever rolled along. In rows that were padded on the
left, the pads leave first, last slot first; so what remains of the padding is always the row's first slots, which is
where the caller's 2-D attention mask expects it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from kvcache.cache._attended import Attended
from kvcache.cache._budget import Token, Whole
from kvcache.cache._buffer import Buffer, held_of, states_like, token_of
from kvcache.cache._by_age import ByAge, column_of
from kvcache.cache._layer import Expected, plain_keys
from kvcache.cache._policies import SizePolicy, schedule
from kvcache.cache._rope import KeyRotation
from kvcache.cache._slots import slots_for, staying, take
from kvcache.cache._storage import Storage
from kvcache.errors import CorruptError, GeometryError, PositionsError


class KVLayer(ByAge):
    """Keys and values of one layer, ``[batch, heads, tokens, head_dim]``, under a size policy, in slots.

    Args:
        policy, storage, max_length, padding, expected: as of `LayerCache`.
        static: take the memory for `max_length` (or the policy's limit) at the first append, not as it is needed.
        rotation: turn the pinned keys so that they sit next to the window (StreamingLLM); needs rotary keys.
    """

    def __init__(
        self,
        policy: SizePolicy | None = None,
        storage: Storage | None = None,
        *,
        max_length: int | None = None,
        static: bool = False,
        rotation: KeyRotation | None = None,
        padding: Tensor | None = None,
        expected: Expected | None = None,
    ) -> None:
        self.static = static
        self.rotation = rotation
        by_token = None if storage is None else storage.by_token()
        super().__init__(policy, by_token, max_length=max_length, padding=padding, expected=expected)
        if self.padding is not None and rotation is not None:
            raise PositionsError(
                "re-rotated positions need rows without padding; run the rows apart, or keep positions='absolute'"
            )
        self._buffer: Buffer | None = None
        self._pinned_keys: Tensor | None = None  # as they came, for re-rotation
        self._clear()

    # ------------------------------------------------------------------ what it holds

    @property
    def capacity(self) -> int:
        return 0 if self._buffer is None else self._buffer.slots

    @property
    def rows(self) -> int | None:
        return self._rows if self._buffer is None else self._buffer.rows

    @property
    def initialized(self) -> bool:
        return self._buffer is not None

    @property
    def rolls_back(self) -> bool:
        return not self.policy.evicts

    @property
    def nbytes(self) -> int:
        pinned = 0 if self._pinned_keys is None else self._pinned_keys.numel() * self._pinned_keys.element_size()
        return (0 if self._buffer is None else self._buffer.nbytes) + pinned

    @property
    def keys(self) -> Tensor | None:
        return None if self._buffer is None else self._buffer.read_side("keys", self.stored)

    @property
    def values(self) -> Tensor | None:
        return None if self._buffer is None else self._buffer.read_side("values", self.stored)

    @property
    def _token(self) -> Token | None:
        return None if self._buffer is None else token_of(*self._buffer.like.values())

    # ------------------------------------------------------------------ append

    def append(self, keys: Tensor, values: Tensor) -> Attended:
        self.check_append(keys, values)
        fresh = keys.shape[2]
        buffer = self._buffer
        if buffer is None or (self.seen == 0 and not buffer.made_for(keys, values)):
            buffer = self._allocate(keys, values)
        if fresh == 0:
            return Attended(*buffer.read(self.stored))
        keys, values = keys.detach(), values.detach()
        self._remember_pinned(keys)
        after = self.stored + fresh
        if not self._overwritten and (self.policy.limit is None or after <= self.policy.limit):
            return self._extend(buffer, keys, values)
        if self._overwrites(fresh):
            return self._overwrite(buffer, keys, values)
        return self._replace(buffer, keys, values)

    def _overwrites(self, fresh: int) -> bool:
        return fresh == 1 and self.policy.keep(self.stored + 1) == self.stored and not self._pads_to_come()

    def _extend(self, buffer: Buffer, keys: Tensor, values: Tensor) -> Attended:
        """Write into the slots that are still free: nothing leaves."""
        start, end = self.stored, self.stored + keys.shape[2]
        self._reserve(buffer, end)
        buffer.write(start, keys, values)
        if self._pads is not None:
            self._pads = self._pads + self._pads_among(keys.shape[2])
        self.seen += keys.shape[2]
        self.stored = end
        return self._as_came(buffer.read(end), start, keys, values)

    def _overwrite(self, buffer: Buffer, keys: Tensor, values: Tensor) -> Attended:
        """Write one token into the slot of the one that leaves: a ring, without rolling."""
        slot = self.policy.pinned + self._overwritten % (self.stored - self.policy.pinned)
        slots: Tensor | None = None
        if self._pads is None:
            buffer.write(slot, keys, values)
        else:
            slots = self._overwritten_slots(torch.tensor([self._overwritten]))[:, 0].to(keys.device)
            buffer.write_each(slots, keys, values)
        self._overwritten += 1
        self.seen += 1
        self._floor = self.seen
        self._turn_pinned(buffer, self.evicted)
        attended = buffer.read(self.stored)
        if slots is None:
            return self._as_came(attended, slot, keys, values)
        if not self.storage.exact:
            rows = torch.arange(keys.shape[0], device=keys.device)
            for held, came in zip(attended, (keys, values), strict=True):
                held[rows, :, slots] = came[:, :, 0]
        return Attended(*attended)

    def _as_came(self, held: tuple[Tensor, Tensor], at: int, keys: Tensor, values: Tensor) -> Attended:
        """What is held, where it has come back, with the new tokens as they came in the columns from `at` on."""
        if not self.storage.exact:
            for states, came in zip(held, (keys, values), strict=True):
                states[:, :, at : at + came.shape[2]] = came
        return Attended(*held)

    def _replace(self, buffer: Buffer, keys: Tensor, values: Tensor) -> Attended:
        """The general case: several tokens come or leave; what stays is copied together, in order."""
        fresh = keys.shape[2]
        counts = schedule(self.policy, self.stored, fresh)
        self._straighten()
        leaving = self.stored + 1 - counts[0]  # to make room for the first new token
        held, attended = buffer.encode(keys, values), Attended(keys, values)
        if self.stored > leaving:
            columns = staying(self.stored, leaving, self.policy.pinned, self._pads_column())
            left = {
                side: {name: take(part, columns) for name, part in parts.items()}
                for side, parts in buffer.first(self.stored).items()
            }
            held = buffer.behind(left, held)
            attended = self._as_came(buffer.decode(held), columns.shape[1], keys, values)
            self._turn(attended.keys, self.evicted + leaving)
        pads = None
        if self._pads is not None:
            pads = (self._pads - leaving).clamp_min(0) + self._pads_among(fresh)
        columns_in_all, stay = attended.keys.shape[2], counts[-1]
        self._reserve(buffer, max(counts))  # as many as single appends would have taken
        buffer.fill(held, staying(columns_in_all, columns_in_all - stay, self.policy.pinned, column_of(pads)))
        self._pads = None if pads is None else (pads - (columns_in_all - stay)).clamp_min(0)
        self._note_evicted(counts)
        self.seen += fresh
        self.stored = stay
        self._turn_pinned(buffer, self.evicted)
        return attended

    # ------------------------------------------------------------------ going back, trimming

    def truncate(self, length: int) -> None:
        self.check_truncate(length)
        if length >= self._floor:
            if self._pads is not None:
                assert self.padding is not None
                self._pads = self._pads - (self.padding.clamp_max(self.seen) - length).clamp_min(0)
            self.stored -= self.seen - length
            self.seen = length
            return
        self._clear()
        self.seen = self.stored = length
        if self._pinned_keys is not None and self._buffer is not None:
            self._buffer.write_keys(self._pinned_keys[:, :, :length])

    def trim(self, max_tokens: int | None = None) -> int:
        max_tokens = self._trimmed_to(max_tokens)
        leaving = self.stored - max_tokens
        if leaving <= 0 or self._buffer is None:
            return 0
        self._straighten()
        columns = staying(self.stored, leaving, self.policy.pinned, self._pads_column())
        self._buffer.fill(self._buffer.first(self.stored), columns)
        if self._pads is not None:
            self._pads = (self._pads - leaving).clamp_min(0)
        self.stored = max_tokens
        self._floor = self.seen
        self._turn_pinned(self._buffer, self.evicted)
        return leaving

    def shrink_to_fit(self) -> None:
        if self._buffer is not None:
            self._buffer.cut(slots_for(self.stored, self._bound(), self.static))

    # ------------------------------------------------------------------ as assigned

    def replace(self, keys: Tensor, values: Tensor) -> None:
        tokens, same = keys.shape[2], keys.shape[2] == self.stored
        what, instead = f"keys {list(keys.shape)} cannot be assigned", "make the cache anew, and run the text on it"
        if self._pinned_keys is not None or self.padding is not None:
            kind = "rows with pads" if self._pinned_keys is None else "re-rotated positions"
            raise GeometryError(f"{what} to {kind}, of which the layer knows more than keys and values; {instead}")
        if self.evicted and not same:
            raise GeometryError(
                f"{what}: {self.evicted} tokens have left, so only as many as are stored, {self.stored}, can take their "
                f"places; {instead}"
            )
        self.storage.check(keys, values)
        policy = self._resolved(keys.shape[0], token_of(keys, values))
        bound = self.max_length if policy.limit is None else policy.limit
        if bound is not None and tokens > bound:
            raise GeometryError(f"{tokens} tokens were assigned to a layer that holds {bound}; give at most {bound}")
        keys, values = keys.detach().clone(), values.detach().clone()  # they may be views of what is held
        self._rows = None
        if not same:
            self._clear()
        buffer, self.stored = self._allocate(keys, values), 0
        self._reserve(buffer, tokens)
        buffer.write(0, keys, values)
        self.stored = tokens
        if not same:
            self.seen = tokens

    # ------------------------------------------------------------------ as tensors

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        if self.padding is not None:
            raise GeometryError("rows padded on the left cannot be saved; run the rows apart")
        counts = {"seen": self.seen, "stored": self.stored, "overwritten": self._overwritten, "floor": self._floor}
        tensors = {} if self._buffer is None else self._buffer.tensors(self.stored)
        if self._pinned_keys is not None:
            tensors["pinned_keys"] = self._pinned_keys.clone()
        return tensors, counts | {"tensors": len(tensors)}

    def restore(self, tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
        self._check_numbers(tensors, counts)
        if not tensors:
            return
        keys, values = states_like(tensors)
        self._check_counts(counts, keys, values)
        seen, stored, turned = counts["seen"], counts["stored"], counts["overwritten"]
        limit = self.policy.limit if self.policy.limit is not None else self._resolved_limit(keys, values)
        if not 0 <= turned <= seen - stored or seen - turned < stored or (turned and limit is None):
            raise CorruptError(f"{turned} tokens overwritten of {seen} seen and {stored} stored")
        buffer = self._allocate(keys, values)
        pinned = tensors.get("pinned_keys")
        if (pinned is None) != (self._pinned_keys is None) or (
            pinned is not None and self._pinned_keys is not None and pinned.shape != self._pinned_keys.shape
        ):
            raise CorruptError("the pinned keys do not fit the policy")
        self._restored(buffer, tensors, stored, {"pinned_keys"})
        if pinned is not None:
            self._pinned_keys = pinned.clone()
        self.seen, self._overwritten, self._floor = seen, turned, counts["floor"]

    def _resolved_limit(self, keys: Tensor, values: Tensor) -> int | None:
        return self._resolved(keys.shape[0], token_of(keys, values)).limit

    # ------------------------------------------------------------------ inside

    def _sizes(self, whole: Whole) -> tuple[int, int]:
        small, reserved = super()._sizes(whole)
        return small, reserved + (self.given.pinned * plain_keys(whole) if self.rotation is not None else 0)

    def _check_shapes(self, keys: Tensor, values: Tensor) -> None:
        super()._check_shapes(keys, values)
        if self._buffer is not None and (self.seen or self._buffer.made_for(keys, values)):
            self._check_alike(keys, values, self._buffer.like)
            return
        self._check_first(keys, values)
        if self._buffer is not None:
            self._check_budget(keys, values)

    def _allocate(self, keys: Tensor, values: Tensor) -> Buffer:
        """Slots for tokens like these, of which none is stored yet."""
        self.policy = policy = self._resolved(keys.shape[0], token_of(keys, values))
        self._buffer = Buffer(self.storage, keys, values, slots_for(0, self._bound(), self.static))
        if self.rotation is not None and policy.pinned and policy.limit is not None:
            with torch.inference_mode(False):
                self._pinned_keys = keys.new_empty((*keys.shape[:2], policy.pinned, keys.shape[3]))
        return self._buffer

    def _reserve(self, buffer: Buffer, tokens: int) -> None:
        """Have room for so many tokens."""
        if tokens > buffer.slots:
            buffer.grow(slots_for(tokens, self._bound(), self.static), self.stored)

    def _restored(self, buffer: Buffer, tensors: Mapping[str, Tensor], stored: int, others: set[str]) -> None:
        """Fill an empty buffer with what was saved of one like it."""
        held = held_of(buffer, tensors, stored, others)
        self._reserve(buffer, stored)
        buffer.fill(held)
        self.stored = stored

    def _select_held(self, rows: Tensor) -> None:
        if self._buffer is not None:
            same = rows.shape[0] == self._buffer.rows
            self._buffer.select(rows, self.stored)
            if self._pinned_keys is not None:
                with torch.inference_mode(False):
                    chosen = self._pinned_keys.index_select(0, rows.to(self._pinned_keys.device))
                self._pinned_keys = self._pinned_keys.copy_(chosen) if same else chosen

    def _cut(self, policy: SizePolicy) -> None:
        if self._buffer is not None and policy.limit is not None:
            self._buffer.cut(policy.limit)

    def _straighten(self) -> None:
        """Bring the slots back into the order of the tokens."""
        if self._overwritten and self._buffer is not None:
            self._buffer.fill(self._buffer.first(self.stored), self.positions().argsort(1))
            if self._pads is not None:
                self._pads = (self._pads - self._overwritten).clamp_min(0)
            self._overwritten = 0

    def _remember_pinned(self, keys: Tensor) -> None:
        if self._pinned_keys is not None and self.seen < self.policy.pinned:
            end = min(self.policy.pinned, self.seen + keys.shape[2])
            self._pinned_keys[:, :, self.seen : end] = keys[:, :, : end - self.seen]

    def _turned(self, delta: int) -> Tensor | None:
        """The pinned keys next to the window, from which so many tokens have left; None where they stay as they came."""
        if self.rotation is None or self._pinned_keys is None or delta <= 0:
            return None
        return self.rotation(self._pinned_keys, delta)

    def _turn(self, keys: Tensor, delta: int) -> None:
        if (turned := self._turned(delta)) is not None:
            keys[:, :, : self.policy.pinned] = turned

    def _turn_pinned(self, buffer: Buffer, delta: int) -> None:
        if (turned := self._turned(delta)) is not None:
            buffer.write_keys(turned)
