"""Layers of which the oldest tokens leave first: what follows from counts alone, however tokens are held."""

from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from kvcache.cache._budget import Token, Whole
from kvcache.cache._buffer import token_of
from kvcache.cache._layer import LayerCache
from kvcache.cache._policies import SizePolicy, schedule
from kvcache.cache._slots import overwritten, staying
from kvcache.errors import GeometryError, PolicyError, RollbackError


class ByAge(LayerCache):
    """Keeps the pinned tokens and the most recent ones, as many as the policy says, in every head the same."""

    def _clear(self) -> None:
        self.seen = self.stored = 0
        self._overwritten = 0  # slots overwritten since the tokens were last in order
        # Pads held, when in order, [batch]
        self._pads: Tensor | None = None if self.padding is None else torch.zeros_like(self.padding)
        self._floor = 0  # no roll back below this length: tokens have been evicted since

    # ------------------------------------------------------------------ what it holds

    @property
    def retained(self) -> int:
        return self.policy.keep(self.stored + 1) - 1  # one more must fit beside them

    @property
    def holds_pads(self) -> bool:
        return self._pads is not None and bool(self._pads.any())

    def positions(self) -> Tensor:
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

    # ------------------------------------------------------------------ what the next tokens see

    def mask(self, fresh: int) -> Tensor:
        stay = schedule(self.policy, self.stored, fresh)
        counts, retained = torch.tensor(stay), stay[0] - 1
        query = torch.arange(fresh)[None, :, None]
        column = torch.arange(retained + fresh)[None, None]
        pads = self._pads_column()
        if self._pads is not None:
            held = (pads - self._overwritten - (self.stored - retained)).clamp_min(0)
            pads = held + self._pads_among(fresh)[:, None]
        # Real tokens, [rows, fresh, 1]
        hidden = (retained + 1 + query - counts[None, :, None] - pads[..., None]).clamp_min(0)
        real = column - pads[..., None]
        pinned = self.policy.pinned
        seen = (real >= 0) & (column <= retained + query) & ((real < pinned) | (real >= pinned + hidden))
        # A pad sees itself: a row of the softmax without any key would be NaN.
        return (seen | (column == retained + query))[:, None]

    def columns(self, fresh: int) -> Tensor:
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

    def _overwrites(self, fresh: int) -> bool:
        """Whether the next tokens, which do not all fit, are one that takes the slot of another."""
        return False

    # ------------------------------------------------------------------ going back, trimming

    def check_truncate(self, length: int) -> None:
        super().check_truncate(length)
        if length >= self._floor or length == 0 or (length <= self.policy.pinned and self.padding is None):
            return
        kept = "nothing" if self.padding is not None else f"the {self.policy.pinned} pinned tokens"
        raise RollbackError(
            f"cannot roll back to {length} tokens: tokens were evicted up to length {self._floor}, before it only {kept} "
            f"can be returned to; give {self._floor} or more, pin the prefix with Pinned(n, policy), or reset"
        )

    def reset(self) -> None:
        self._clear()
        self._rows = None

    def _trimmed_to(self, max_tokens: int | None) -> int:
        """How many tokens `trim` leaves, at most."""
        if max_tokens is None:
            limit = self.policy.limit
            target = self.stored if limit is None else min(self.stored, self.policy.keep(limit + 1))
            max_tokens = max(1, self.policy.pinned, target)
        self.check_trim(max_tokens)
        return max_tokens

    def _note_evicted(self, counts: tuple[int, ...]) -> None:
        """Remember when tokens last left: `counts` stood there after each of the next tokens."""
        for i, count in enumerate(counts):
            if count <= (self.stored if i == 0 else counts[i - 1]):
                self._floor = self.seen + i + 1

    # ------------------------------------------------------------------ rows, and a budget in bytes

    @property
    @abstractmethod
    def _token(self) -> Token | None:
        """The shape of what is held; None before the first append."""

    @abstractmethod
    def _select_held(self, rows: Tensor) -> None:
        """Keep these rows of what is held."""

    @abstractmethod
    def _cut(self, policy: SizePolicy) -> None:
        """Hold no more than a policy with a smaller limit does."""

    def select(self, rows: Tensor) -> None:
        if rows.numel() == 0:
            raise GeometryError("cannot select no rows: give at least one, or reset the cache")
        policy = self.policy
        if self._token is not None:
            policy = self._resolved(rows.shape[0], self._token)
            self._select_held(rows)
        elif self._rows is not None:
            if self.expected.token is not None:
                policy = self._resolved(rows.shape[0], self.expected.token)
            self._rows = rows.shape[0]
        if self.padding is not None and self._pads is not None:
            self.padding, self._pads = self.padding[rows.cpu()], self._pads[rows.cpu()]
        self._adopt(policy)

    def share(self, whole: Whole) -> None:
        if self.expected.whole is None or (self.expected.whole == whole and self.rows is not None):
            return
        before, self.expected = self.expected, replace(self.expected, whole=whole)
        try:
            policy = self._resolved(self.rows or 1, whole.tokens[0])
        except PolicyError:
            self.expected = before
            raise
        if self.rows is not None:
            self._adopt(policy)

    def _adopt(self, policy: SizePolicy) -> None:
        """Follow another policy from now on: with more rows, a budget in bytes holds fewer tokens."""
        self.policy = policy
        if policy.limit is not None and self._token is not None:
            if self.stored > policy.limit:
                self.trim(policy.limit)
            self._cut(policy)

    def _check_budget(self, keys: Tensor, values: Tensor) -> None:
        """Refuse, after a reset, a first chunk for which a mask was made from what a budget in bytes held before."""
        policy, tokens = self._resolved(keys.shape[0], token_of(keys, values)), keys.shape[2]
        limits = [p.limit for p in (policy, self.policy) if p.limit is not None]
        if policy != self.policy and tokens > min(limits):
            raise PolicyError(
                f"{self.given!r} holds {policy.limit} tokens of {keys.shape[0]} rows like these, and held "
                f"{self.policy.limit} before the reset: too late for a chunk of {tokens}; make a new cache for them"
            )

    # ------------------------------------------------------------------ pads

    def _pads_column(self) -> Tensor:
        return column_of(self._pads)

    def _pads_among(self, fresh: int) -> Tensor:
        """How many of the next `fresh` tokens are pads, per row."""
        assert self.padding is not None
        return (self.padding - self.seen).clamp(0, fresh)

    def _pads_to_come(self) -> bool:
        return self.padding is not None and bool((self.padding > self.seen).any())

    def _overwritten_slots(self, turns: Tensor) -> Tensor:
        return overwritten(turns, self.stored, self.policy.pinned, self._pads_column())


def column_of(pads: Tensor | None) -> Tensor:
    """Pads as ``[batch, 1]``, or the ``[1, 1]`` of rows without any."""
    return torch.zeros(1, 1, dtype=torch.long) if pads is None else pads[:, None]
