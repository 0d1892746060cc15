"""A layer that quantizes neighbouring tokens together, after KIVI (Liu et al., arXiv:2402.02750).

Keys are quantized per channel over groups of tokens, as some of their channels are large in every token; values per
token over their head_dim. In full precision stay the tail, the tokens that do not yet fill a group, and the pinned
tokens: they are few, and attention rests on them. A group is quantized once, from what came in, so no error adds up.

The first token that is not pinned begins the first group, so what is where follows from two counts: the tokens seen and
the tokens stored. Everything is in the order of the tokens.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from kvcache.cache._attended import Attended
from kvcache.cache._bits import KVQuantization
from kvcache.cache._budget import Token, Whole
from kvcache.cache._buffer import token_of
from kvcache.cache._by_age import ByAge
from kvcache.cache._group_sides import GroupedSide, group_sizes, layout, most_groups
from kvcache.cache._layer import Expected
from kvcache.cache._policies import SizePolicy, schedule
from kvcache.errors import CorruptError, GeometryError, KVCacheError, PositionsError, RollbackError, said


class GroupedLayer(ByAge):
    """A `LayerCache` that holds all but its pinned tokens and its newest in 8 or 4 bits.

    Memory: the pinned tokens, a tail of `group_size` tokens, and groups. With a policy of `limit` tokens there are at most
    as many groups as hold those that are not pinned, rounded up; of the oldest some tokens may be hidden, and once all
    are it is dropped. Groups grow one by one: moving them costs little beside reading them, which each append does.

    A `MaxBytes` budget counts what is held here, scales and tail too. A state that is not finite makes NaN of its own
    value and head, or of its key channel in its group: such attention is NaN anyway. For int4, the spread of a group must
    be a number of the dtype; what is beyond is cut.

    Args:
        policy, max_length, expected: as of `LayerCache`.
        storage: bits, and tokens in a group.
        padding: pads on the left of each row, ``[batch]``; only where no token is evicted.

    Raises:
        PositionsError: if padded rows are to evict.
        PolicyError: for a policy or limit that cannot work.
    """

    storage: KVQuantization

    def __init__(
        self,
        policy: SizePolicy | None,
        storage: KVQuantization,
        *,
        max_length: int | None = None,
        padding: Tensor | None = None,
        expected: Expected | None = None,
    ) -> None:
        self._group = storage.group_size or 0
        super().__init__(policy, storage, max_length=max_length, padding=padding, expected=expected)
        if self.padding is not None and self.policy.evicts:
            raise PositionsError(
                f"{policy!r} cannot evict from padded rows whose tokens are quantized in groups, as these would begin at "
                "different tokens; quantize each token by itself, KVQuantization(…, group_size=None), run the rows apart, or "
                "use KeepAll()"
            )
        self._sides: tuple[GroupedSide, GroupedSide] | None = None
        self._clear()

    # ------------------------------------------------------------------ what it holds

    @property
    def rows(self) -> int | None:
        return self._rows if self._sides is None else self._sides[0].tail.shape[0]

    @property
    def initialized(self) -> bool:
        return self._sides is not None

    @property
    def capacity(self) -> int:
        """Slots for tokens now: pinned ones, those in groups and the tail."""
        return 0 if self._sides is None else self._sides[0].slots()

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for side in self._sides or () for t in side.parts.values())

    @property
    def keys(self) -> Tensor | None:
        return None if self._sides is None else self._read(self._sides[0], self.stored)

    @property
    def values(self) -> Tensor | None:
        return None if self._sides is None else self._read(self._sides[1], self.stored)

    def positions(self) -> Tensor:
        pinned = min(self.seen, self.policy.pinned)
        return torch.cat((torch.arange(pinned), torch.arange(self.evicted + pinned, self.seen)))[None]

    @property
    def _token(self) -> Token | None:
        return None if self._sides is None else token_of(*(side.tail for side in self._sides))

    # ------------------------------------------------------------------ append

    def append(self, keys: Tensor, values: Tensor) -> Attended:
        self.check_append(keys, values)
        fresh = keys.shape[2]
        sides = self._sides
        if sides is None or (self.seen == 0 and not self._made_for(keys, values)):
            sides = self._allocate(keys, values)
        keys, values = keys.detach(), values.detach()
        counts = schedule(self.policy, self.stored, fresh) or (self.stored + 1,)
        attended = Attended(self._read(sides[0], counts[0] - 1, keys), self._read(sides[1], counts[0] - 1, values))
        if fresh:
            self._store(sides, keys, values, counts)
        return attended

    def _store(
        self, sides: tuple[GroupedSide, GroupedSide], keys: Tensor, values: Tensor, counts: tuple[int, ...]
    ) -> None:
        seen, group = self.seen + len(counts), self._group
        first, full = self._groups()
        new_first, new_full = self._groups(seen, counts[-1])
        begin, end = min(self.seen, self.policy.pinned), min(seen, self.policy.pinned)
        tail = self.seen - begin - full * group
        needed = self._most_groups(seen) if self.policy.limit is not None else new_full - new_first
        for side, states in zip(sides, (keys, values), strict=True):
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
        self._note_evicted(counts)
        if self._pads is not None:
            self._pads = self._pads + self._pads_among(len(counts))
        self.seen, self.stored = seen, counts[-1]

    def _groups(self, seen: int | None = None, stored: int | None = None) -> tuple[int, int]:
        """The first group of which a token is stored, and how many have ever been full."""
        seen, stored = self.seen if seen is None else seen, self.stored if stored is None else stored
        body = max(0, seen - self.policy.pinned)
        full = body // self._group
        return min(full, (seen - stored) // self._group), full

    def _most_groups(self, seen: int) -> int:
        return most_groups(self.policy, self._group, seen)

    def _read(self, side: GroupedSide, count: int, fresh: Tensor | None = None) -> Tensor:
        """The pinned and the newest of the stored tokens, `count` in all, dequantized; then the fresh ones."""
        group, pinned = self._group, min(self.seen, self.policy.pinned)
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

    # ------------------------------------------------------------------ going back, trimming

    def check_truncate(self, length: int) -> None:
        """Raise `RollbackError` if the layer cannot be rolled back to `length` tokens.

        It can to lengths within the tail, within the pinned tokens, and to those at which a group had just been filled.
        Between them it cannot: the tokens of a group are known only in few bits, and were in full precision then.
        """
        super().check_truncate(length)
        pinned, group = self.policy.pinned, self._group
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
        max_tokens = self._trimmed_to(max_tokens)
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
                f"cannot trim {self.stored} tokens to {max_tokens}: padded rows that are quantized in groups evict nothing; "
                "run the rows apart, or quantize each token by itself, KVQuantization(…, group_size=None)"
            )

    def shrink_to_fit(self) -> None:
        first, full = self._groups()
        for side in self._sides or ():
            side.cut(full - first)

    # ------------------------------------------------------------------ saving, assigning

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """As of a `LayerCache`, but all tokens count from the beginning, and are quantized anew."""
        if self.padding is not None:
            raise GeometryError(
                f"keys {list(keys.shape)} cannot be assigned to rows with pads, of which the layer knows more than keys and "
                "values; make the cache anew, and run the text on it"
            )
        self.storage.check(keys, values)
        policy = self._resolved(keys.shape[0], token_of(keys, values))
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
        tensors = {}
        if self._sides is not None:
            used = self._used(self.seen, self.stored)
            for name, side in zip(("keys", "values"), self._sides, strict=True):
                for part, held in side.parts.items():
                    with torch.inference_mode(False):
                        tensors[f"{name}.{part}"] = held[:, :, : used.get(part, used["groups"])].clone()
        counts = {"seen": self.seen, "stored": self.stored, "floor": self._floor, "group_size": self._group}
        return tensors, counts | {"tensors": len(tensors)}

    def restore(self, tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
        self._check_numbers(tensors, counts)
        if counts.get("group_size") != self._group:
            raise CorruptError(f"it is of groups of {counts.get('group_size')!r} tokens, this layer of {self._group}")
        if not tensors:
            return
        try:
            empty = [tensors[f"{name}.tail"][:, :, :0] for name in ("keys", "values")]
            self._check_saved(tensors, counts, empty[0], empty[1])
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, KVCacheError) as error:
            raise CorruptError(
                f"not a state of this layer: {said(error)}; it will not be used, save it again"
            ) from error
        sides = self._allocate(empty[0], empty[1])
        self.seen, self.stored, self._floor = counts["seen"], counts["stored"], counts["floor"]
        first, full = self._groups()
        for name, side in zip(("keys", "values"), sides, strict=True):
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
        return {"pinned": pinned, "groups": full - first, "tail": seen - pinned - full * self._group}

    def _check_saved(
        self, tensors: Mapping[str, Tensor], counts: Mapping[str, int], keys: Tensor, values: Tensor
    ) -> None:
        """Raise an error for what is no state of such a layer; keys and values are of no token."""
        seen, stored, floor = (counts[name] for name in ("seen", "stored", "floor"))
        self.storage.check(keys, values)
        self._check_counts(counts, keys, values)
        # What an eviction left must still be there: at least the pinned tokens, and one.
        evicted = self.padding is None and stored < seen and stored - (seen - floor) >= max(1, self.policy.pinned)
        if not (evicted or (stored == seen and floor == 0)):
            raise ValueError(f"{stored} tokens stored of {seen}, evicted up to length {floor}, with {self.given!r}")
        used, names = self._used(seen, stored), set()
        for name, like in (("keys", keys), ("values", values)):
            for part, (shape, dtype) in layout(like, self.storage, "keys" if name == "keys" else "values").items():
                held = tensors[f"{name}.{part}"]
                names.add(f"{name}.{part}")
                expected = (*like.shape[:2], used.get(part, used["groups"]), *shape)
                if (tuple(held.shape), held.dtype, held.device) != (expected, dtype, keys.device):
                    raise ValueError(f"{name}.{part} is {held.dtype} {list(held.shape)}, not {dtype} {list(expected)}")
        if set(tensors) != names:
            raise ValueError(f"it has {sorted(set(tensors) - names)} besides")

    # ------------------------------------------------------------------ inside

    def _like(self) -> dict[str, Tensor]:
        return {name: side.tail[:, :, :0] for name, side in zip(("keys", "values"), self._sides or (), strict=False)}

    def _made_for(self, keys: Tensor, values: Tensor) -> bool:
        return all(
            (new.shape[:2], new.shape[3], new.dtype, new.device) == (at.shape[:2], at.shape[3], at.dtype, at.device)
            for new, at in zip((keys, values), self._like().values(), strict=True)
        )

    def _check_shapes(self, keys: Tensor, values: Tensor) -> None:
        super()._check_shapes(keys, values)
        if self._sides is not None and (self.seen or self._made_for(keys, values)):
            self._check_alike(keys, values, self._like())
            return
        self._check_first(keys, values)
        if self._sides is not None:
            self._check_budget(keys, values)

    def _allocate(self, keys: Tensor, values: Tensor) -> tuple[GroupedSide, GroupedSide]:
        self.policy = policy = self._resolved(keys.shape[0], token_of(keys, values))
        self._sides = (
            GroupedSide(keys, self.storage, policy.pinned, "keys"),
            GroupedSide(values, self.storage, policy.pinned, "values"),
        )
        return self._sides

    def _sizes(self, whole: Whole) -> tuple[int, int]:
        return group_sizes(self.storage, whole, self.given.pinned)

    def _select_held(self, rows: Tensor) -> None:
        for side in self._sides or ():
            side.select(rows)

    def _cut(self, policy: SizePolicy) -> None:
        for side in self._sides or ():
            side.cut(self._most_groups(self.seen))
