"""KV heads with budgets of their own: some keep everything and others a window, or they share one budget by need.

A layer is then several smaller ones, of the kinds that there are, each with some of the KV heads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvcache.cache._growing import KVLayer
from kvcache.cache._policies import KeepAll, Pinned, SizePolicy, check_policy, schedule
from kvcache.cache._ranked import Observer, Piece, RankedLayer, place
from kvcache.cache._ranking import RankingPolicy
from kvcache.errors import CorruptError, GeometryError, PolicyError, RollbackError

_ENDLESS = 2**31 - 1


@dataclass(frozen=True)
class PerHead(SizePolicy):
    """A policy for each KV head of a layer."""

    heads: tuple[SizePolicy, ...]

    def __post_init__(self) -> None:
        if not self.heads:
            raise PolicyError("PerHead has no heads; give a policy for each KV head of the layer")
        for policy in self.heads:
            check_policy(policy)
            inner = policy
            while isinstance(inner, Pinned):
                inner = inner.policy
            if isinstance(inner, PerHead | AdaKV) or (policy.evicts and policy.limit is None):
                raise PolicyError(f"{policy!r} cannot be that of one head; give it a limit in tokens")

    @property
    def pinned(self) -> int:
        return min(policy.pinned for policy in self.heads)

    @property
    def limit(self) -> int | None:
        limits = [policy.limit for policy in self.heads]
        return None if None in limits else max(limit for limit in limits if limit is not None)

    @property
    def evicts(self) -> bool:
        return any(policy.evicts for policy in self.heads)

    def keep(self, count: int) -> int:
        return max(policy.keep(count) for policy in self.heads)


@dataclass(frozen=True)
class AdaKV(SizePolicy):
    """The heads of a layer share the budget of all of them: tokens stay where they score highest (Feng et al., Ada-KV,
    arXiv:2407.11550).

    Args:
        policy: ranks the tokens; its `limit` is the mean over the heads.
        floor: what share of its own part each head is sure to keep.
    """

    policy: RankingPolicy
    floor: float = 0.2

    def __post_init__(self) -> None:
        if not isinstance(self.policy, RankingPolicy):
            raise PolicyError(f"policy={self.policy!r} ranks no tokens; give for example SnapKV(1024)")
        if not 0 <= self.floor <= 1:
            raise PolicyError(f"floor={self.floor} must be from 0 to 1")

    @property
    def pinned(self) -> int:
        return self.policy.pinned

    @property
    def ranking(self) -> RankingPolicy:
        return self.policy

    @property
    def limit(self) -> int:
        return self.policy.limit

    def keep(self, count: int) -> int:
        return self.policy.keep(count)


def chosen_by_head(policy: SizePolicy) -> bool:
    """Whether the heads of a layer may keep different tokens."""
    while isinstance(policy, Pinned):
        policy = policy.policy
    return policy.ranking is not None or isinstance(policy, PerHead | AdaKV)


def turns(policy: SizePolicy) -> bool:
    """Whether any head's policy turns queries to other positions."""
    while isinstance(policy, Pinned):
        policy = policy.policy
    if isinstance(policy, PerHead):
        return any(map(turns, policy.heads))
    return isinstance(policy.ranking, RankingPolicy) and policy.ranking.turns


def layer_for(policy: SizePolicy, rotation: Any = None, *, turn: Any = None, **given: Any) -> KVLayer:
    """The layer that a policy needs.

    Args:
        turn: as for `RankedLayer`.
        rotation, **given: as for `KVLayer`.
    """
    count, inner = 0, policy
    while isinstance(inner, Pinned) and isinstance(inner.policy, Pinned | PerHead | AdaKV):
        count, inner = count + inner.count, inner.policy
    if isinstance(inner, PerHead):
        return SplitLayer(
            PerHead(tuple(Pinned(count, head) if count else head for head in inner.heads)), turn=turn, **given
        )
    if isinstance(inner, AdaKV):
        return AdaKVLayer(inner, first=count, turn=turn, **given)
    if policy.ranking is not None:
        return RankedLayer(policy, turn=turn, **given)
    return KVLayer(policy, rotation=rotation, **given)


class SplitLayer(KVLayer):
    """A layer whose KV heads are held by several layers, each with a policy of its own.

    What a token attends to differs by head, so attention goes through `kvcache.models.observed_copy`; `append` returns only what it
    was given.
    """

    def __init__(self, policy: PerHead, **given: Any) -> None:
        self.parts: list[tuple[list[int], KVLayer]] = []
        self._pieces: list[Piece] = []
        self._checked(given)
        super().__init__(
            KeepAll(), max_length=given.get("max_length"), padding=given.get("padding"), rows=given.get("rows")
        )
        self.policy = policy
        for one in dict.fromkeys(policy.heads):
            heads = [head for head, other in enumerate(policy.heads) if other == one]
            self.parts.append((heads, layer_for(one, **given)))

    @staticmethod
    def _checked(given: dict[str, Any]) -> None:
        if given.get("rotation") is not None:
            raise PolicyError("heads with policies of their own keep positions='absolute'")
        given.pop("token_bytes", None)  # of all heads together; no part has a budget in bytes

    def _clear(self) -> None:
        self.seen = 0
        self._pieces = []
        self._keys = self._values = self._pinned_keys = None
        for _, part in self.parts:
            part.reset()

    # ------------------------------------------------------------------ what it holds

    @property
    def by_head(self) -> bool:
        return True

    @property
    def rehearsing(self) -> range | None:
        """As a `RankedLayer`'s."""
        said = (part.rehearsing for _, part in self.parts if isinstance(part, RankedLayer))
        return next((part for part in said if part is not None), None)

    @rehearsing.setter
    def rehearsing(self, part: range | None) -> None:
        for _, layer in self.parts:
            if isinstance(layer, RankedLayer):
                layer.rehearsing = part

    def begin_rehearsal(self) -> Callable[[], None]:
        """As a `RankedLayer`'s."""
        undone = [part.begin_rehearsal() for _, part in self.parts if isinstance(part, RankedLayer)]

        def undo() -> None:
            for one in undone:
                one()

        return undo

    @property
    def heads(self) -> tuple[int, ...]:
        """How many tokens each KV head holds."""
        held = {head: part.stored for heads, part in self.parts for head in heads}
        return tuple(held[head] for head in sorted(held))

    @property
    def stored(self) -> int:
        """Tokens held by the fullest head."""
        return max((part.stored for _, part in self.parts), default=0)

    @stored.setter
    def stored(self, value: int) -> None:
        """Is what the parts hold."""

    @property
    def retained(self) -> int:
        return max(part.retained for _, part in self.parts)

    @property
    def capacity(self) -> int:
        return max(part.capacity for _, part in self.parts)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for _, part in self.parts)

    @property
    def initialized(self) -> bool:
        return all(part.initialized for _, part in self.parts)

    @property
    def rows(self) -> int | None:
        return self.parts[0][1].rows if self.parts else self._rows

    @property
    def keys(self) -> Tensor | None:
        """The stored keys, where all heads hold as many; see `parts` where they do not.

        Raises:
            GeometryError: if they do not.
        """
        return self._together([part.keys for _, part in self.parts])

    @property
    def values(self) -> Tensor | None:
        """The stored values, as `keys`."""
        return self._together([part.values for _, part in self.parts])

    def _together(self, held: Sequence[Tensor | None]) -> Tensor | None:
        states = [states for states in held if states is not None]
        if not states or len(states) < len(held):
            return None
        if len({part.shape[2] for part in states}) > 1:
            raise GeometryError(f"the heads hold {list(self.heads)} tokens, which is no tensor; read them from parts")
        order = torch.tensor([head for heads, _ in self.parts for head in heads]).argsort()
        return torch.cat(states, 1)[:, order.to(states[0].device)]

    def positions(self) -> Tensor:
        """The position of the token in each slot of the fullest head, ``[batch or 1, stored]`` or by head."""
        if not self.parts:
            return torch.zeros(1, 1, 0, dtype=torch.long)
        return max((part for _, part in self.parts), key=lambda part: part.stored).positions()

    # ------------------------------------------------------------------ append

    def check(self, fresh: int) -> None:
        for _, part in self.parts:
            part.check(fresh)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens. What they attend to is in `pieces`; returned is what was given."""
        count = sum(len(heads) for heads, _ in self.parts)
        if keys.dim() != 4 or keys.shape[1] != count or values.dim() != 4 or values.shape[:3] != keys.shape[:3]:
            raise GeometryError(
                f"keys {list(keys.shape)} and values {list(values.shape)} must be [batch, {count}, tokens, head_dim]: "
                f"the policy is for {count} KV heads"
            )
        divided = [(keys[:, at], values[:, at]) for at in (place(heads) for heads, _ in self.parts)]
        for (_, part), given in zip(self.parts, divided, strict=True):
            part.check_append(*given)
        fresh = keys.shape[2]
        pieces = []
        for (heads, part), given in zip(self.parts, divided, strict=True):
            mask = None if isinstance(part, RankedLayer) else _mask(part, fresh, keys.device)
            own = part.append(*given)
            if isinstance(part, RankedLayer):
                piece = part.piece(*own, fresh)
                mask, observe = piece.mask, piece.observe
            else:
                observe = None
            pieces.append(Piece(heads, *own, mask, self._observer(part, observe)))
        self._pieces = pieces
        self.seen += fresh if self.rehearsing is None else 0
        return keys, values

    def _observer(self, part: KVLayer, then: Observer | None) -> Observer | None:
        """What is told the queries of a part, which itself is told by `then`."""
        return then

    def pieces(self, keys: Tensor, values: Tensor, fresh: int) -> list[Piece]:
        """What the last append's tokens attend to, by head: handed over, as it may be far more than what stays."""
        pieces, self._pieces = self._pieces, []
        return pieces

    # ------------------------------------------------------------------ as tensors

    @property
    def given(self) -> SizePolicy:
        return self.policy

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        tensors: dict[str, Tensor] = {}
        counts = {"seen": self.seen, "parts": len(self.parts)}
        for i, (_, part) in enumerate(self.parts):
            own, numbers = part.state()
            tensors |= {f"{i}.{name}": tensor for name, tensor in own.items()}
            counts |= {f"{i}.{name}": number for name, number in numbers.items()}
        return tensors, counts

    def restore(self, tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
        if counts.get("parts") != len(self.parts):
            raise CorruptError(f"heads were saved in {counts.get('parts')} parts, here they are in {len(self.parts)}")
        left = set(tensors)
        for i, (_, part) in enumerate(self.parts):
            begin = f"{i}."
            own = {name[len(begin) :]: tensor for name, tensor in tensors.items() if name.startswith(begin)}
            part.restore(own, {name[len(begin) :]: n for name, n in counts.items() if name.startswith(begin)})
            left -= {f"{begin}{name}" for name in own}
        if left or {part.seen for _, part in self.parts} - {counts["seen"]}:
            raise CorruptError("the heads that were saved do not belong together")
        self.seen = counts["seen"]

    # ------------------------------------------------------------------ going back, trimming, rows

    def check_truncate(self, length: int) -> None:
        if not 0 <= length <= self.seen:
            raise RollbackError(f"cannot roll back to {length} tokens: {self.seen} were seen; give 0 to {self.seen}")
        for _, part in self.parts:
            part.check_truncate(length)

    def truncate(self, length: int) -> None:
        self.check_truncate(length)
        for _, part in self.parts:
            part.truncate(length)
        self.seen = length

    def check_trim(self, max_tokens: int) -> None:
        for _, part in self.parts:
            part.check_trim(max_tokens)

    def trim(self, max_tokens: int | None = None) -> int:
        if max_tokens is not None:
            self.check_trim(max_tokens)
        return max(part.trim(max_tokens) for _, part in self.parts)

    def fit(self) -> None:
        for _, part in self.parts:
            part.fit()

    def select(self, rows: Tensor) -> None:
        if rows.numel() == 0:
            raise GeometryError("cannot select no rows: give at least one, or reset the cache")
        padding = None if self.padding is None else self.padding[rows.cpu()]
        for _, part in self.parts:
            part.select(rows)
        self.padding = padding
        self._rows = None if self._rows is None else rows.shape[0]

    def repeat(self, times: int) -> None:
        rows = self.rows if self.padding is None else self.padding.shape[0]
        if rows is not None:
            self.select(torch.arange(rows).repeat_interleave(times))


def _mask(part: KVLayer, fresh: int, device: torch.device) -> Tensor | None:
    """What each of the next tokens sees of a part; None where it sees all before it."""
    if fresh == 0:
        return None
    whole = schedule(part.policy, part.stored, fresh)[-1] == part.stored + fresh
    if part.padding is None and (fresh == 1 or (part.stored == 0 and whole)):
        return None
    return part.mask(fresh).to(device)


class AdaKVLayer(SplitLayer):
    """KV heads that share one budget, see `AdaKV`. In a batch a head's share is the same in all rows.

    Args:
        policy: of the layer.
        first: tokens that are pinned before the policy's own.
    """

    def __init__(self, policy: AdaKV, *, first: int = 0, **given: Any) -> None:
        self._adaptive = policy
        self._first = first
        # No part has a bound of its own: one head may hold the budget of all.
        self._given_parts = {**given, "preallocate": False, "max_length": None}
        self._told = 0
        super().__init__(PerHead((KeepAll(),)), **given)
        self.parts = []
        self.policy = Pinned(first, policy) if first else policy
        self._check_bounds(self.policy)

    def _clear(self) -> None:
        super()._clear()
        self._told = 0

    @property
    def initialized(self) -> bool:
        return bool(self.parts) and super().initialized

    @property
    def retained(self) -> int:
        return self.stored

    @property
    def capacity(self) -> int:
        return max((part.capacity for _, part in self.parts), default=0)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens, which attend to all that is stored and to themselves; the ranking follows their attention."""
        divided = bool(self.parts)
        if not divided and keys.dim() == 4:
            self._divide(keys.shape[1])
        try:
            result = super().append(keys, values)
        except Exception:
            if not divided:
                self.parts = []  # of the heads of what was refused
            raise
        self._told = 0
        return result

    def _observer(self, part: KVLayer, then: Observer | None) -> Observer:
        return partial(self._observe, part, then)

    def _divide(self, heads: int) -> None:
        inner = replace(self._adaptive.policy, limit=_ENDLESS, low_water=_ENDLESS)
        given = {name: value for name, value in self._given_parts.items() if name != "token_bytes"}
        given |= {"padding": self.padding, "rows": self._rows}  # of the rows that there are now
        for head in range(heads):
            self.parts.append(([head], RankedLayer(Pinned(self._first, inner) if self._first else inner, **given)))

    def restore(self, tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
        parts = counts.get("parts")
        if type(parts) is not int or not 0 <= parts <= 1024 or self.parts:
            raise CorruptError(f"a state of {parts!r} heads, in a layer of {len(self.parts)}; give it to an empty one")
        self._divide(parts)
        super().restore(tensors, counts)
        if sum(self.heads) > self._first_budget:
            raise CorruptError(f"the heads hold {list(self.heads)} tokens, more than {self.policy!r} allows")

    def _observe(self, part: KVLayer, then: Observer | None, queries: Tensor, scaling: float) -> None:
        if then is not None:
            then(queries, scaling)
        self._told += 1
        if self._told == len(self.parts) and sum(self.heads) > self._first_budget:
            self._share(self.policy.keep(self._adaptive.limit + self._first + 1))

    def floor(self, mean: int) -> int:
        """What each head is sure to keep where it keeps `mean` tokens on average."""
        protected = self._first + self._adaptive.policy.sinks + self._adaptive.policy.recent
        return max(protected, int(self._adaptive.floor * mean))

    @property
    def _first_budget(self) -> int:
        return (self._adaptive.limit + self._first) * len(self.parts)

    def _share(self, mean: int) -> None:
        share([self], mean)

    def trim(self, max_tokens: int | None = None) -> int:
        if max_tokens is not None:
            self.check_trim(max_tokens)
        for _, part in self.parts:
            if isinstance(part, RankedLayer):
                part._refuse_waiting("trim")
        before = sum(self.heads)
        mean = self.policy.keep(self._adaptive.limit + self._first + 1) if max_tokens is None else max_tokens
        if self.parts and before > mean * len(self.parts):
            self._share(mean)
        return (before - sum(self.heads)) // max(1, len(self.parts))


@torch.no_grad()
def share(layers: Sequence[AdaKVLayer], mean: int) -> None:
    """Rank the heads of all these layers together, down to `mean` tokens a head."""
    parts = [part for layer in layers for _, part in layer.parts if isinstance(part, RankedLayer)]
    floors = [layer.floor(mean) for layer in layers for _ in layer.parts]
    ranked = [part.worth().mean(0)[0] for part in parts]  # best first, of each head
    sure = [min(floor, len(worth)) for floor, worth in zip(floors, ranked, strict=True)]
    rest = [worth[first:] for first, worth in zip(sure, ranked, strict=True)]
    owner = torch.cat([torch.full_like(worth, i, dtype=torch.long) for i, worth in enumerate(rest)])
    left = max(0, mean * len(parts) - sum(sure))
    best = torch.cat(rest).topk(min(left, len(owner))).indices
    counts = torch.bincount(owner[best], minlength=len(parts)).tolist()
    for part, first, count in zip(parts, sure, counts, strict=True):
        part.rank_to(first + count)
        part.fit()
