"""The keys and values of one attention layer, in one preallocated buffer of slots.

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

from kvcache.cache._budget import Whole
from kvcache.cache._policies import KeepAll, SizePolicy, check_policy, schedule
from kvcache.cache._rope import KeyRotation
from kvcache.cache._slots import overwritten, slots_for, staying, take
from kvcache.errors import CapacityError, CorruptError, GeometryError, PolicyError, PositionsError, RollbackError


class KVLayer:
    """Keys and values of one layer, ``[batch, heads, tokens, head_dim]``, under a size policy.

    Appending a chunk of tokens is, by definition, appending them one by one: the same tokens stay, however they came.
    For inference only: what is stored is detached, so no gradient flows through the cache.

    Args:
        policy: which tokens stay.
        max_length: refuse, with a `CapacityError`, to hold more tokens than this.
        preallocate: take the memory for `max_length` (or the policy's limit) at the first append, not as it is needed.
        rotation: turn the pinned keys so that they sit next to the window (StreamingLLM); needs rotary keys.
        padding: pads on the left of each row, ``[batch]``. Needed only where tokens may be evicted.
        layers: how many layers of the same shape share the budget of a `MaxBytes` policy.
        whole: what shares it, where that is not so many layers of this shape and nothing besides.
        rows: refuse a first append with another batch size.
        token_bytes: of one token's key and value in one row of this layer; with `rows` it lets `mask` know a `MaxBytes`
            budget before the first append.
    """

    def __init__(
        self,
        policy: SizePolicy | None = None,
        *,
        max_length: int | None = None,
        preallocate: bool = False,
        rotation: KeyRotation | None = None,
        padding: Tensor | None = None,
        layers: int = 1,
        whole: Whole | None = None,
        rows: int | None = None,
        token_bytes: tuple[int, int] | None = None,
    ) -> None:
        if max_length is not None and not isinstance(max_length, int):
            raise PolicyError(f"max_length={max_length!r} must be a whole number of tokens, or left out")
        if max_length is not None and max_length < 1:
            raise PolicyError(f"max_length={max_length} must be at least 1; leave it out for a cache that grows")
        self._given = KeepAll() if policy is None else policy
        self._layers, self._whole = layers, whole
        self._rows = rows
        self._expected = token_bytes
        self.max_length = max_length
        self.preallocate = preallocate
        self.rotation = rotation
        self.padding = None if padding is None or not bool((padding > 0).any()) else padding.detach().cpu().long()
        if self.padding is not None and rotation is not None:
            raise PositionsError(
                "re-rotated positions need rows without padding; run the rows apart, or keep positions='absolute'"
            )
        check_policy(self._given)
        self.policy = self._given if rows is None or token_bytes is None else self._resolved(rows, *token_bytes)
        self._check_bounds(self.policy)
        self._keys: Tensor | None = None  # [B, H, slots, D]
        self._values: Tensor | None = None
        self._pinned_keys: Tensor | None = None  # as they came, for re-rotation
        self._clear()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.policy!r}, seen={self.seen}, stored={self.stored}, nbytes={self.nbytes})"

    def _clear(self) -> None:
        self.seen = 0  # tokens appended since the start, evicted ones too
        self.stored = 0  # tokens held, in the first slots
        self._overwritten = 0  # slots overwritten since the tokens were last in order
        self._pads: Tensor | None = (
            None if self.padding is None else torch.zeros_like(self.padding)
        )  # held, when in order
        self._floor = 0  # no roll back below this length: tokens have been evicted since

    # ------------------------------------------------------------------ what it holds

    @property
    def by_head(self) -> bool:
        """Whether attention must go through `kvcache.models.observed_copy`, as its heads keep tokens of their own."""
        return False

    @property
    def evicted(self) -> int:
        """Tokens (pads among them) that have left."""
        return self.seen - self.stored

    @property
    def retained(self) -> int:
        """How many of the stored tokens the next append will still attend to: one more must fit beside them."""
        return self.policy.keep(self.stored + 1) - 1

    @property
    def capacity(self) -> int:
        """Slots in the buffer now."""
        return 0 if self._keys is None else self._keys.shape[2]

    @property
    def rows(self) -> int | None:
        """The batch size; None before it is known."""
        return self._rows if self._keys is None else self._keys.shape[0]

    @property
    def holds_pads(self) -> bool:
        """Whether any row still has pads among what is stored."""
        return self._pads is not None and bool(self._pads.any())

    @property
    def initialized(self) -> bool:
        """Whether it knows the shape of its tokens."""
        return self._keys is not None

    @property
    def rolls_back(self) -> bool:
        """Whether any number of the newest tokens can be taken out again, now and later."""
        return not self.policy.evicts

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that this layer holds."""
        held = (self._keys, self._values, self._pinned_keys)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    @property
    def keys(self) -> Tensor | None:
        """The stored keys, in slot order: a view, valid until the next append. None before the first."""
        return None if self._keys is None else self._keys[:, :, : self.stored]

    @property
    def values(self) -> Tensor | None:
        """The stored values, in slot order: a view, valid until the next append. None before the first."""
        return None if self._values is None else self._values[:, :, : self.stored]

    def positions(self) -> Tensor:
        """The position of the token in each slot, ``[batch, stored]``, or ``[1, stored]`` if all rows have the same.

        Positions count all tokens from 0, pads too.
        """
        pads = self._pads_column()
        column = torch.arange(self.stored)[None]
        real = column - pads
        first = torch.zeros_like(pads) if self.padding is None else self.padding[:, None]
        in_order = self.seen - self._overwritten  # tokens seen when the slots were last in order
        result = torch.where(real < self.policy.pinned, first + real, in_order - self.stored + column)
        if self._overwritten:
            # The first turns, which took the pads, and the last round; where both took a slot, the later token is there.
            first_turns = torch.arange(min(int(pads.max()), self._overwritten))
            turns = torch.cat((first_turns, torch.arange(max(0, self._overwritten - self.stored), self._overwritten)))
            newest = (in_order + turns).expand(result.shape[0], -1)
            result = result.scatter_reduce(1, self._overwritten_slots(turns), newest, "amax")
        return result

    # ------------------------------------------------------------------ append

    def check(self, fresh: int) -> None:
        """Raise `CapacityError` if `fresh` more tokens cannot be appended."""
        if self.max_length is not None and not self.policy.evicts and self.stored + fresh > self.max_length:
            raise CapacityError(
                f"cannot append {fresh} tokens: {self.stored} of {self.max_length} slots used; "
                "raise max_length (max_cache_length), or use a policy that evicts, such as SlidingWindow"
            )

    def check_append(self, keys: Tensor, values: Tensor) -> None:
        """Raise `GeometryError` or `CapacityError` if these cannot be appended."""
        self._check_shapes(keys, values)
        self.check(keys.shape[2])

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens and return all that they attend to: the retained tokens, then the new ones.

        Args:
            keys: ``[batch, heads, tokens, head_dim]``.
            values: the same, but for its own head_dim.

        Returns:
            Keys and values ``[batch, heads, retained + tokens, head_dim]``. Views of the buffer where possible: valid
            until the next append. Where several tokens come at once and some are evicted meanwhile, they hold all that
            any of them attends to; `mask` says which query sees what.

        Raises:
            CapacityError, GeometryError: before anything has changed.
        """
        self.check_append(keys, values)
        fresh = keys.shape[2]
        if self._keys is None or (self.seen == 0 and not self._made_for(keys, values)):
            self._allocate(keys, values)
        if fresh == 0:
            return self._valid()
        keys, values = keys.detach(), values.detach()
        self._remember_pinned(keys)
        after = self.stored + fresh
        if not self._overwritten and (self.policy.limit is None or after <= self.policy.limit):
            return self._extend(keys, values)
        if self._overwrites(fresh):
            return self._overwrite(keys, values)
        return self._replace(keys, values)

    def _overwrites(self, fresh: int) -> bool:
        """Whether the next tokens, which do not all fit, are one that takes the slot of another."""
        return fresh == 1 and self.policy.keep(self.stored + 1) == self.stored and not self._pads_to_come()

    def _extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write into the slots that are still free: nothing leaves."""
        start, end = self.stored, self.stored + keys.shape[2]
        key_slots, value_slots = self._reserve(end)
        key_slots[:, :, start:end].copy_(keys)
        value_slots[:, :, start:end].copy_(values)
        if self._pads is not None:
            self._pads = self._pads + self._pads_among(keys.shape[2])
        self.seen += keys.shape[2]
        self.stored = end
        return self._valid()

    def _overwrite(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token into the slot of the one that leaves: a ring, without rolling."""
        assert self._keys is not None and self._values is not None
        if self._pads is None:
            slot = self.policy.pinned + self._overwritten % (self.stored - self.policy.pinned)
            self._keys[:, :, slot : slot + 1].copy_(keys)
            self._values[:, :, slot : slot + 1].copy_(values)
        else:
            slots = self._overwritten_slots(torch.tensor([self._overwritten]))[:, 0].to(keys.device)
            rows = torch.arange(keys.shape[0], device=keys.device)
            self._keys[rows, :, slots] = keys[:, :, 0]
            self._values[rows, :, slots] = values[:, :, 0]
        self._overwritten += 1
        self.seen += 1
        self._floor = self.seen
        self._turn_pinned(self._keys, self.evicted)
        return self._valid()

    def _valid(self) -> tuple[Tensor, Tensor]:
        assert self._keys is not None and self._values is not None
        return self._keys[:, :, : self.stored], self._values[:, :, : self.stored]

    def _replace(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The general case: several tokens come or leave; what stays is copied together, in order."""
        fresh = keys.shape[2]
        counts = schedule(self.policy, self.stored, fresh)
        self._straighten()
        assert self._keys is not None and self._values is not None
        leaving = self.stored + 1 - counts[0]  # to make room for the first new token
        if self.stored > leaving:
            columns = staying(self.stored, leaving, self.policy.pinned, self._pads_column())
            keys = torch.cat([take(self._keys, columns), keys], 2)
            values = torch.cat([take(self._values, columns), values], 2)
            self._turn_pinned(keys, self.evicted + leaving)
        pads = None
        if self._pads is not None:
            pads = (self._pads - leaving).clamp_min(0) + self._pads_among(fresh)
        attended = keys.shape[2]
        stay = counts[-1]
        columns = staying(attended, attended - stay, self.policy.pinned, _column(pads))
        key_slots, value_slots = self._reserve(max(counts))  # as many as single appends would have taken
        key_slots[:, :, :stay] = take(keys, columns)
        value_slots[:, :, :stay] = take(values, columns)
        self._pads = None if pads is None else (pads - (attended - stay)).clamp_min(0)
        for i, count in enumerate(counts):
            before = self.stored if i == 0 else counts[i - 1]
            if count <= before:
                self._floor = self.seen + i + 1
        self.seen += fresh
        self.stored = stay
        self._turn_pinned(key_slots, self.evicted)
        return keys, values

    def mask(self, fresh: int) -> Tensor:
        """What each of the next `fresh` tokens sees, ``[batch or 1, 1, fresh, retained + fresh]``, True for "sees".

        Columns are those that `append` returns. To be asked before it.
        """
        stay = schedule(self.policy, self.stored, fresh)
        counts, retained = torch.tensor(stay), stay[0] - 1
        query = torch.arange(fresh)[None, :, None]
        column = torch.arange(retained + fresh)[None, None]
        pads = self._pads_column()
        if self._pads is not None:
            held = (pads - self._overwritten - (self.stored - retained)).clamp_min(0)
            pads = held + self._pads_among(fresh)[:, None]
        hidden = (retained + 1 + query - counts[None, :, None] - pads[..., None]).clamp_min(
            0
        )  # real tokens, [R, fresh, 1]
        real = column - pads[..., None]
        pinned = self.policy.pinned
        seen = (real >= 0) & (column <= retained + query) & ((real < pinned) | (real >= pinned + hidden))
        # A pad sees itself: a row of the softmax without any key would be NaN.
        return (seen | (column == retained + query))[:, None]

    def columns(self, fresh: int) -> Tensor:
        """The position of the token in each column that `append` returns of the next `fresh`, ``[batch or 1, columns]``."""
        at, new = self.positions(), torch.arange(self.seen, self.seen + fresh)
        leaving = self.stored - self.retained
        if leaving and self._overwrites(fresh):
            slot = self._overwritten_slots(torch.tensor([self._overwritten])).expand(at.shape[0], -1)
            return at.scatter(1, slot, self.seen)
        if leaving or self._overwritten:
            at = at.sort(1).values
            pads = (self._pads_column() - self._overwritten).clamp_min(0)
            order = staying(self.stored, leaving, self.policy.pinned, pads)
            at = at.gather(1, order.expand(at.shape[0], -1))
        return torch.cat([at, new.expand(at.shape[0], -1)], 1)

    # ------------------------------------------------------------------ going back

    def check_truncate(self, length: int) -> None:
        """Raise `RollbackError` if the layer cannot be rolled back to `length` tokens."""
        if not 0 <= length <= self.seen:
            raise RollbackError(
                f"cannot roll back to {length} tokens: {self.seen} were seen; give a length of 0 to {self.seen}"
            )
        if length >= self._floor or length == 0 or (length <= self.policy.pinned and self.padding is None):
            return
        kept = "nothing" if self.padding is not None else f"the {self.policy.pinned} pinned tokens"
        raise RollbackError(
            f"cannot roll back to {length} tokens: tokens were evicted up to length {self._floor}, before it only {kept} "
            f"can be returned to; give {self._floor} or more, pin the prefix with Pinned(n, policy), or reset"
        )

    def truncate(self, length: int) -> None:
        """Roll back to the first `length` tokens, keeping the memory. `seen` becomes `length`.

        Raises:
            RollbackError: if tokens have been evicted since, unless all that remain are pinned.
        """
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
        if self._pinned_keys is not None and self._keys is not None:
            self._keys[:, :, :length] = self._pinned_keys[:, :, :length]

    def reset(self) -> None:
        """Forget all tokens, keeping the memory; but another batch size, dtype or device may come next."""
        self._clear()
        self._rows = None

    def trim(self, max_tokens: int | None = None) -> int:
        """Evict the oldest unpinned tokens now, down to `max_tokens`, or to where the policy trims to. How many left.

        Raises:
            PolicyError: if the pinned tokens alone are more.
        """
        if max_tokens is None:
            limit = self.policy.limit
            target = self.stored if limit is None else min(self.stored, self.policy.keep(limit + 1))
            max_tokens = max(1, self.policy.pinned, target)
        self.check_trim(max_tokens)
        leaving = self.stored - max_tokens
        if leaving <= 0 or self._keys is None or self._values is None:
            return 0
        self._straighten()
        columns = staying(self.stored, leaving, self.policy.pinned, self._pads_column())
        self._keys[:, :, :max_tokens] = take(self._keys, columns)
        self._values[:, :, :max_tokens] = take(self._values, columns)
        if self._pads is not None:
            self._pads = (self._pads - leaving).clamp_min(0)
        self.stored = max_tokens
        self._floor = self.seen
        self._turn_pinned(self._keys, self.evicted)
        return leaving

    def check_trim(self, max_tokens: int) -> None:
        """Raise `PolicyError` if the layer cannot be trimmed to `max_tokens`."""
        if max_tokens < max(1, self.policy.pinned):
            raise PolicyError(
                f"cannot trim to {max_tokens} tokens: {self.policy.pinned} are pinned; "
                f"give at least {max(1, self.policy.pinned)}"
            )

    def fit(self) -> None:
        """Give back the slots that what is stored does not need, as after a `trim`; not those that were preallocated."""
        slots = slots_for(self.stored, self._bound(), self.preallocate)
        if self._keys is not None and self._values is not None and slots < self.capacity:
            with torch.inference_mode(False):
                self._keys, self._values = self._keys[:, :, :slots].clone(), self._values[:, :, :slots].clone()

    # ------------------------------------------------------------------ as assigned

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Hold copies of these keys and values instead, in the order of the slots.

        As many tokens as are stored take their places; another number counts as a text from its beginning.

        Args:
            keys: ``[batch, heads, tokens, head_dim]``.
            values: the same, but for its own head_dim.

        Raises:
            GeometryError, PolicyError: if then nobody could tell which tokens these are. Nothing has changed.
        """
        tokens, same = keys.shape[2], keys.shape[2] == self.stored
        self._check_replaced(keys, values)
        policy = self._resolved(keys.shape[0], *_token_bytes(keys, values))
        bound = self.max_length if policy.limit is None else policy.limit
        if bound is not None and tokens > bound:
            raise GeometryError(f"{tokens} tokens were assigned to a layer that holds {bound}; give at most {bound}")
        keys, values = keys.detach().clone(), values.detach().clone()  # they may be views of what is held
        self._rows = None
        if not same:
            self._clear()
        self._allocate(keys[:, :, :0], values[:, :, :0])
        self.stored = 0
        self._fill(keys, values)
        if not same:
            self.seen = tokens

    def _check_replaced(self, keys: Tensor, values: Tensor) -> None:
        """Refuse what `replace` cannot do."""
        what, instead = f"keys {list(keys.shape)} cannot be assigned", "make the cache anew, and run the text on it"
        if self.by_head:
            raise PolicyError(f"{what}: under {self.policy!r} each head holds tokens of its own; {instead}")
        if self._pinned_keys is not None or self.padding is not None:
            kind = "rows with pads" if self._pinned_keys is None else "re-rotated positions"
            raise GeometryError(f"{what} to {kind}, of which the layer knows more than keys and values; {instead}")
        if self.evicted and keys.shape[2] != self.stored:
            raise GeometryError(
                f"{what}: {self.evicted} tokens have left, so only as many as are stored, {self.stored}, can take their "
                f"places; {instead}"
            )

    # ------------------------------------------------------------------ rows

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order, ``[new batch]``: beam search reorders, a finished request leaves.

        Raises:
            GeometryError: without any row.
            PolicyError: if a `MaxBytes` budget does not hold a token of so many rows.
        """
        if rows.numel() == 0:
            raise GeometryError("cannot select no rows: give at least one, or reset the cache")
        policy = self.policy
        if self._keys is not None and self._values is not None:
            policy = self._resolved(rows.shape[0], *_token_bytes(self._keys, self._values))
            self._select_slots(rows.to(self._keys.device))
        elif self._rows is not None:
            if self._expected is not None:
                policy = self._resolved(rows.shape[0], *self._expected)
            self._rows = rows.shape[0]
        if self.padding is not None and self._pads is not None:
            self.padding, self._pads = self.padding[rows.cpu()], self._pads[rows.cpu()]
        self._adopt(policy)

    def _select_slots(self, rows: Tensor) -> None:
        assert self._keys is not None and self._values is not None
        if rows.shape[0] == self._keys.shape[0]:
            for slots in (*self._valid(), self._pinned_keys):
                if slots is not None:
                    slots.copy_(slots.index_select(0, rows))
            return
        with torch.inference_mode(False):
            self._keys, self._values = self._keys.index_select(0, rows), self._values.index_select(0, rows)
            if self._pinned_keys is not None:
                self._pinned_keys = self._pinned_keys.index_select(0, rows)

    def share(self, whole: Whole) -> None:
        """Share a budget in bytes with these layers from now on, where the policy has one. What no longer fits leaves.

        Raises:
            PolicyError: if it does not hold a token; nothing has changed then.
        """
        if self._whole is None or (self._whole == whole and self.rows is not None):
            return
        before, self._whole = self._whole, whole
        try:
            policy = self._resolved(self.rows or 1, 0, 0)
        except PolicyError:
            self._whole = before
            raise
        if self.rows is not None:
            self._adopt(policy)

    def _adopt(self, policy: SizePolicy) -> None:
        """Follow another policy from now on: with more rows, a budget in bytes holds fewer tokens."""
        shrinking = policy.limit is not None and policy.limit < self.capacity
        self.policy = policy
        if shrinking and policy.limit is not None and self._keys is not None and self._values is not None:
            if self.stored > policy.limit:
                self.trim(policy.limit)
            with torch.inference_mode(False):
                self._keys = self._keys[:, :, : policy.limit].clone()
                self._values = self._values[:, :, : policy.limit].clone()

    def repeat(self, times: int) -> None:
        """Repeat each row `times` times, the copies side by side."""
        held = self._keys if self._keys is not None else self.padding
        rows = self._rows if held is None else held.shape[0]
        if rows is not None:
            self.select(torch.arange(rows).repeat_interleave(times))

    # ------------------------------------------------------------------ as tensors

    @property
    def given(self) -> SizePolicy:
        """The policy as it was given, before a budget in bytes became one in tokens."""
        return self._given

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """All that it takes to go on exactly from here: copies of tensors, and counts.

        Raises:
            GeometryError: of rows with pads.
        """
        if self.padding is not None:
            raise GeometryError("rows padded on the left cannot be saved; run the rows apart")
        counts = {"seen": self.seen, "stored": self.stored, "overwritten": self._overwritten, "floor": self._floor}
        held = {"keys": self.keys, "values": self.values, "pinned_keys": self._pinned_keys}
        tensors = {name: states.clone() for name, states in held.items() if states is not None}
        return tensors, counts | {"tensors": len(tensors)}

    def restore(self, tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
        """Continue, in an empty layer made alike, as the layer of which this is the `state`; tensors are copied.

        Raises:
            CorruptError: if these are not a state of such a layer.
        """
        seen, stored = self._check_state(tensors, counts, {"keys", "values", "pinned_keys"})
        if not tensors:
            return
        overwritten = counts["overwritten"]
        in_order = seen - overwritten
        limit = self.policy.limit
        if not 0 <= overwritten <= seen - stored or in_order < stored or (overwritten and limit is None):
            raise CorruptError(f"{overwritten} tokens overwritten of {seen} seen and {stored} stored")
        pinned = tensors.get("pinned_keys")
        self._allocate(tensors["keys"][:, :, :0], tensors["values"][:, :, :0])
        if (pinned is None) != (self._pinned_keys is None) or (
            pinned is not None and self._pinned_keys is not None and pinned.shape != self._pinned_keys.shape
        ):
            raise CorruptError("the pinned keys do not fit the policy")
        self._fill(tensors["keys"], tensors["values"])
        if pinned is not None:
            self._pinned_keys = pinned.clone()
        self.seen, self._overwritten, self._floor = seen, overwritten, counts["floor"]

    def _fill(self, keys: Tensor, values: Tensor) -> None:
        stored = keys.shape[2]
        key_slots, value_slots = self._reserve(stored)
        key_slots[:, :, :stored], value_slots[:, :, :stored] = keys, values
        self.stored = stored

    def _check_state(
        self, tensors: Mapping[str, Tensor], counts: Mapping[str, int], known: set[str]
    ) -> tuple[int, int]:
        """Tokens seen and stored, if keys, values and counts fit each other and this layer, which is empty."""
        if self.seen:
            raise CorruptError(f"the layer already holds {self.seen} tokens; a state goes into an empty one")
        numbers = [counts.get(name) for name in ("seen", "stored", "floor")]
        if (
            any(type(n) is not int or n < 0 for n in counts.values())
            or None in numbers
            or set(tensors) - known
            or (counts.get("tensors") != len(tensors))
        ):
            raise CorruptError(f"counts {dict(counts)} with tensors {sorted(tensors)} are no state of a layer")
        seen, stored, floor = counts["seen"], counts["stored"], counts["floor"]
        if not tensors:
            if seen or stored:
                raise CorruptError(f"{stored} tokens stored, and no tensors")
            return 0, 0
        keys, values = tensors["keys"], tensors["values"]
        self._check_shapes(keys, values)
        policy = self._resolved(keys.shape[0], *_token_bytes(keys, values))
        most = self.max_length if policy.limit is None else policy.limit
        if keys.shape[2] != stored or stored > seen or floor > seen or (most is not None and stored > most):
            raise CorruptError(f"{stored} tokens stored of {seen} seen, in keys {list(keys.shape)}, under {policy!r}")
        if (stored < seen) != (floor > 0) or (stored < seen and policy.limit is None and floor == 0):
            raise CorruptError(f"{seen - stored} tokens have left, the last at length {floor}")
        return seen, stored

    # ------------------------------------------------------------------ inside

    def _check_bounds(self, policy: SizePolicy) -> None:
        if self.max_length is not None and policy.limit is not None and policy.limit > self.max_length:
            raise PolicyError(
                f"{policy!r} keeps up to {policy.limit} tokens, but max_length (max_cache_length) is {self.max_length}; "
                "lower the one or raise the other"
            )

    def _resolved(self, rows: int, key_bytes: int, value_bytes: int) -> SizePolicy:
        """The policy once the shape of a token is known: a budget in bytes becomes one in tokens."""
        keys, values = rows * key_bytes * self._layers, rows * value_bytes * self._layers
        if self._whole is not None:
            keys, values = rows * self._whole.keys, rows * self._whole.values
        twice = self._given.pinned * keys if self.rotation is not None else 0
        beside = 0 if self._whole is None else rows * self._whole.beside
        try:
            policy = self._given.resolve(keys + values, twice + beside, self.max_length)
        except PolicyError as error:
            if beside:
                raise PolicyError(f"{error}. {beside} of them are what the model keeps its own way") from error
            raise
        check_policy(policy)
        self._check_bounds(policy)
        return policy

    def _made_for(self, keys: Tensor, values: Tensor) -> bool:
        """Whether the buffers are those of such tokens."""
        return all(
            held is not None
            and (new.shape[0], new.shape[1], new.shape[3]) == (held.shape[0], held.shape[1], held.shape[3])
            and (new.dtype, new.device) == (held.dtype, held.device)
            for new, held in ((keys, self._keys), (values, self._values))
        )

    def _check_shapes(self, keys: Tensor, values: Tensor) -> None:
        if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3]:
            raise GeometryError(
                f"keys {list(keys.shape)} and values {list(values.shape)} must be [batch, heads, tokens, head_dim], alike but for head_dim"
            )
        if self._keys is None or self._values is None or (self.seen == 0 and not self._made_for(keys, values)):
            if self._rows is not None and keys.shape[0] != self._rows:
                raise GeometryError(
                    f"the cache was made for {self._rows} rows, got {keys.shape[0]}; make it with new_cache(batch_size={keys.shape[0]})"
                )
            if self.padding is not None and keys.shape[0] != self.padding.shape[0]:
                raise GeometryError(
                    f"padding is known for {self.padding.shape[0]} rows, got {keys.shape[0]}; give it for every row"
                )
            if self._keys is not None:
                self._check_budget(keys, values)
            return
        for name, new, held in (("keys", keys, self._keys), ("values", values, self._values)):
            if (new.shape[0], new.shape[1], new.shape[3]) != (held.shape[0], held.shape[1], held.shape[3]):
                raise GeometryError(
                    f"{name} {list(new.shape)} do not fit a cache of [{held.shape[0]}, {held.shape[1]}, tokens, {held.shape[3]}]; "
                    "use a new cache for another model or batch size"
                )
            if (new.dtype, new.device) != (held.dtype, held.device):
                raise GeometryError(
                    f"{name} are {new.dtype} on {new.device}, the cache holds {held.dtype} on {held.device}; "
                    "convert them, or use a new cache"
                )

    def _check_budget(self, keys: Tensor, values: Tensor) -> None:
        """Refuse, after a reset, a first chunk for which a mask was made from what a budget in bytes held before."""
        policy, tokens = self._resolved(keys.shape[0], *_token_bytes(keys, values)), keys.shape[2]
        limits = [p.limit for p in (policy, self.policy) if p.limit is not None]
        if policy != self.policy and tokens > min(limits):
            raise PolicyError(
                f"{self._given!r} holds {policy.limit} tokens of {keys.shape[0]} rows like these, and held "
                f"{self.policy.limit} before the reset: too late for a chunk of {tokens}; make a new cache for them"
            )

    def _allocate(self, keys: Tensor, values: Tensor) -> None:
        self.policy = policy = self._resolved(keys.shape[0], *_token_bytes(keys, values))
        slots = slots_for(0, self._bound(), self.preallocate)
        with torch.inference_mode(False):  # a buffer made in inference mode could not be written to outside of it
            self._keys = keys.new_empty((*keys.shape[:2], slots, keys.shape[3]))
            self._values = values.new_empty((*values.shape[:2], slots, values.shape[3]))
            if self.rotation is not None and policy.pinned and policy.limit is not None:
                self._pinned_keys = keys.new_empty((*keys.shape[:2], policy.pinned, keys.shape[3]))

    def _bound(self) -> int | None:
        return self.max_length if self.policy.limit is None else self.policy.limit

    def _reserve(self, tokens: int) -> tuple[Tensor, Tensor]:
        """The buffers, grown to hold `tokens`; what is stored moves along."""
        assert self._keys is not None and self._values is not None
        if tokens > self.capacity:
            slots = slots_for(tokens, self._bound(), self.preallocate)
            with torch.inference_mode(False):
                for name in ("_keys", "_values"):
                    old: Tensor = getattr(self, name)
                    new = old.new_empty((*old.shape[:2], slots, old.shape[3]))
                    new[:, :, : self.stored] = old[:, :, : self.stored]
                    setattr(self, name, new)
        return self._keys, self._values

    def _straighten(self) -> None:
        """Bring the slots back into the order of the tokens."""
        if self._overwritten and self._keys is not None and self._values is not None:
            order = self.positions().argsort(1)
            self._keys[:, :, : self.stored] = take(self._keys, order)
            self._values[:, :, : self.stored] = take(self._values, order)
            if self._pads is not None:
                self._pads = (self._pads - self._overwritten).clamp_min(0)
            self._overwritten = 0

    def _overwritten_slots(self, turns: Tensor) -> Tensor:
        return overwritten(turns, self.stored, self.policy.pinned, self._pads_column())

    def _pads_column(self) -> Tensor:
        return _column(self._pads)

    def _pads_among(self, fresh: int) -> Tensor:
        """How many of the next `fresh` tokens are pads, per row."""
        assert self.padding is not None
        return (self.padding - self.seen).clamp(0, fresh)

    def _pads_to_come(self) -> bool:
        return self.padding is not None and bool((self.padding > self.seen).any())

    def _remember_pinned(self, keys: Tensor) -> None:
        if self._pinned_keys is not None and self.seen < self.policy.pinned:
            end = min(self.policy.pinned, self.seen + keys.shape[2])
            self._pinned_keys[:, :, self.seen : end] = keys[:, :, : end - self.seen]

    def _turn_pinned(self, keys: Tensor, delta: int) -> None:
        """Let the pinned keys, the first columns of `keys`, sit next to the window: turned by as many as left between."""
        if self.rotation is not None and self._pinned_keys is not None and delta > 0:
            keys[:, :, : self.policy.pinned] = self.rotation(self._pinned_keys, delta)


def _token_bytes(keys: Tensor, values: Tensor) -> tuple[int, int]:
    """Bytes of one token's key and value, in one row."""
    heads = keys.shape[1]
    return heads * keys.shape[3] * keys.element_size(), heads * values.shape[3] * values.element_size()


def _column(pads: Tensor | None) -> Tensor:
    """Pads as ``[batch, 1]``, or the ``[1, 1]`` of rows without any."""
    return torch.zeros(1, 1, dtype=torch.long) if pads is None else pads[:, None]
