"""A layer whose KV heads are held by several layers, each with some of them; and heads that share one budget."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from kvcache.cache._attended import Attended, Observer, Span, place
from kvcache.cache._layer import Expected, LayerCache
from kvcache.cache._policies import SizePolicy, schedule
from kvcache.cache._policies_by_head import AdaKV
from kvcache.cache._ranked import RankedLayer
from kvcache.errors import CorruptError, GeometryError, RollbackError

Part = tuple[Sequence[int], LayerCache]


class SplitLayer(LayerCache):
    """A layer whose KV heads are held by several layers, each with a policy of its own.

    Args:
        policy: of all of them together.
        parts: KV heads and the layer that holds them; each head once.
        max_length, padding, expected: as of `LayerCache`, and as the parts have them.
    """

    by_head = True

    def __init__(
        self,
        policy: SizePolicy,
        parts: Sequence[Part],
        *,
        max_length: int | None = None,
        padding: Tensor | None = None,
        expected: Expected | None = None,
    ) -> None:
        super().__init__(
            policy, parts[0][1].storage if parts else None, max_length=max_length, padding=padding, expected=expected
        )
        self._parts = list(parts)
        self.seen = 0

    def reset(self) -> None:
        self.seen = 0
        self._rows = None
        for _, part in self._parts:
            part.reset()

    # ------------------------------------------------------------------ what it holds

    def parts(self) -> Iterator[Part]:
        yield from self._parts

    @property
    def rehearsing(self) -> range | None:
        """As a `RankedLayer`'s."""
        return next((part.rehearsing for part in self._ranked() if part.rehearsing is not None), None)

    @rehearsing.setter
    def rehearsing(self, part: range | None) -> None:
        for layer in self._ranked():
            layer.rehearsing = part

    def begin_rehearsal(self) -> Callable[[], None]:
        """As a `RankedLayer`'s."""
        undone = [part.begin_rehearsal() for part in self._ranked()]

        def undo() -> None:
            for one in undone:
                one()

        return undo

    def _ranked(self) -> list[RankedLayer]:
        return [part for _, part in self._parts if isinstance(part, RankedLayer)]

    def _refuse_waiting(self, what: str) -> None:
        """Refuse before any part has changed."""
        for part in self._ranked():
            part.refuse_waiting(what)

    @property
    def heads(self) -> tuple[int, ...]:
        held = {head: part.stored for heads, part in self._parts for head in heads}
        return tuple(held[head] for head in sorted(held))

    @property
    def stored(self) -> int:  # type: ignore[override]
        """Tokens held by the fullest head."""
        return max((part.stored for _, part in self._parts), default=0)

    @property
    def retained(self) -> int:
        return max(part.retained for _, part in self._parts)

    @property
    def capacity(self) -> int:
        return max((part.capacity for _, part in self._parts), default=0)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for _, part in self._parts)

    @property
    def initialized(self) -> bool:
        return all(part.initialized for _, part in self._parts)

    @property
    def rows(self) -> int | None:
        return self._parts[0][1].rows

    @property
    def keys(self) -> Tensor | None:
        """The stored keys, where all heads hold as many; see `parts` where they do not.

        Raises:
            GeometryError: if they do not.
        """
        return self._together([part.keys for _, part in self._parts])

    @property
    def values(self) -> Tensor | None:
        """The stored values, as `keys`."""
        return self._together([part.values for _, part in self._parts])

    def _together(self, held: Sequence[Tensor | None]) -> Tensor | None:
        states = [states for states in held if states is not None]
        if not states or len(states) < len(held):
            return None
        if len({part.shape[2] for part in states}) > 1:
            raise GeometryError(f"the heads hold {list(self.heads)} tokens, which is no tensor; read them from parts()")
        order = torch.tensor([head for heads, _ in self._parts for head in heads]).argsort()
        return torch.cat(states, 1)[:, order.to(states[0].device)]

    def positions(self) -> Tensor:
        """The position of the token in each slot of the fullest head, ``[batch or 1, stored]`` or by head."""
        return max((part for _, part in self._parts), key=lambda part: part.stored).positions()

    # ------------------------------------------------------------------ append

    def check(self, fresh: int) -> None:
        for _, part in self._parts:
            part.check(fresh)

    def append(self, keys: Tensor, values: Tensor) -> Attended:
        """Store new tokens. What they attend to is in the spans; keys and values are those given."""
        count = sum(len(heads) for heads, _ in self._parts)
        if keys.dim() != 4 or keys.shape[1] != count or values.dim() != 4 or values.shape[:3] != keys.shape[:3]:
            raise GeometryError(
                f"keys {list(keys.shape)} and values {list(values.shape)} must be [batch, {count}, tokens, head_dim]: "
                f"the policy is for {count} KV heads"
            )
        divided = [(keys[:, at], values[:, at]) for at in (place(heads) for heads, _ in self._parts)]
        for (_, part), given in zip(self._parts, divided, strict=True):
            part.check_append(*given)
        fresh, spans = keys.shape[2], []
        for (heads, part), given in zip(self._parts, divided, strict=True):
            mask = _mask(part, fresh, keys.device)
            found = part.append(*given)
            own = found.spans[0] if found.spans else Span((), *found.states, mask)
            spans.append(Span(heads, own.keys, own.values, own.mask, self._observer(part, own.observe)))
        self.seen += fresh if self.rehearsing is None else 0
        return Attended(keys, values, tuple(spans))

    def _observer(self, part: LayerCache, then: Observer | None) -> Observer | None:
        """What is told the queries of a part, which itself is told by `then`."""
        return then

    # ------------------------------------------------------------------ as tensors

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        tensors: dict[str, Tensor] = {}
        counts = {"seen": self.seen, "parts": len(self._parts)}
        for i, (_, part) in enumerate(self._parts):
            own, numbers = part.state()
            tensors |= {f"{i}.{name}": tensor for name, tensor in own.items()}
            counts |= {f"{i}.{name}": number for name, number in numbers.items()}
        return tensors, counts

    def restore(self, tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
        if counts.get("parts") != len(self._parts):
            raise CorruptError(f"heads were saved in {counts.get('parts')} parts, here they are in {len(self._parts)}")
        left = set(tensors)
        for i, (_, part) in enumerate(self._parts):
            begin = f"{i}."
            own = {name[len(begin) :]: tensor for name, tensor in tensors.items() if name.startswith(begin)}
            part.restore(own, {name[len(begin) :]: n for name, n in counts.items() if name.startswith(begin)})
            left -= {f"{begin}{name}" for name in own}
        if left or {part.seen for _, part in self._parts} - {counts["seen"]}:
            raise CorruptError("the heads that were saved do not belong together")
        self.seen = counts["seen"]

    # ------------------------------------------------------------------ going back, trimming, rows

    def check_truncate(self, length: int) -> None:
        if not 0 <= length <= self.seen:
            raise RollbackError(f"cannot roll back to {length} tokens: {self.seen} were seen; give 0 to {self.seen}")
        for _, part in self._parts:
            part.check_truncate(length)

    def truncate(self, length: int) -> None:
        self.check_truncate(length)
        for _, part in self._parts:
            part.truncate(length)
        self.seen = length

    def check_trim(self, max_tokens: int) -> None:
        for _, part in self._parts:
            part.check_trim(max_tokens)

    def trim(self, max_tokens: int | None = None) -> int:
        self._refuse_waiting("trim")
        if max_tokens is not None:
            self.check_trim(max_tokens)
        return max(part.trim(max_tokens) for _, part in self._parts)

    def shrink_to_fit(self) -> None:
        for _, part in self._parts:
            part.shrink_to_fit()

    def select(self, rows: Tensor) -> None:
        if rows.numel() == 0:
            raise GeometryError("cannot select no rows: give at least one, or reset the cache")
        self._refuse_waiting("choose rows")
        padding = None if self.padding is None else self.padding[rows.cpu()]
        for _, part in self._parts:
            part.select(rows)
        self.padding = padding
        self._rows = None if self._rows is None else rows.shape[0]


def _mask(part: LayerCache, fresh: int, device: torch.device) -> Tensor | None:
    """What each of the next tokens sees of a part whose oldest tokens leave first; None where it sees all before it."""
    if fresh == 0 or part.by_head:
        return None
    whole = schedule(part.policy, part.stored, fresh)[-1] == part.stored + fresh
    if part.padding is None and (fresh == 1 or (part.stored == 0 and whole)):
        return None
    return part.mask(fresh).to(device)


class AdaKVLayer(SplitLayer):
    """KV heads that share one budget, see `AdaKV`. In a batch a head's share is the same in all rows.

    Args:
        policy: of the layer: an `AdaKV`, maybe with tokens pinned around it.
        shared: that `AdaKV`.
        heads: a layer for each KV head, without a limit of its own.
        max_length, padding, expected: as of `LayerCache`.
    """

    def __init__(
        self,
        policy: SizePolicy,
        shared: AdaKV,
        heads: Sequence[RankedLayer],
        *,
        max_length: int | None = None,
        padding: Tensor | None = None,
        expected: Expected | None = None,
    ) -> None:
        self._shared = shared
        self._first = policy.pinned - shared.pinned
        self._told = 0
        parts = [([head], layer) for head, layer in enumerate(heads)]
        super().__init__(policy, parts, max_length=max_length, padding=padding, expected=expected)

    @property
    def retained(self) -> int:
        return self.stored

    def append(self, keys: Tensor, values: Tensor) -> Attended:
        """Store new tokens, which attend to all that is stored and to themselves; the ranking follows their attention."""
        attended = super().append(keys, values)
        self._told = 0
        return attended

    def _observer(self, part: LayerCache, then: Observer | None) -> Observer:
        return partial(self._observe, then)

    def _observe(self, then: Observer | None, queries: Tensor, scaling: float) -> None:
        if then is not None:
            then(queries, scaling)
        self._told += 1
        if self._told == len(self._parts) and sum(self.heads) > self._most:
            share_budget([self], self.policy.keep(self._shared.limit + self._first + 1))

    def restore(self, tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
        super().restore(tensors, counts)
        if sum(self.heads) > self._most:
            raise CorruptError(f"the heads hold {list(self.heads)} tokens, more than {self.policy!r} allows")

    def floor(self, mean: int) -> int:
        """What each head is sure to keep where it keeps `mean` tokens on average."""
        protected = self._first + self._shared.policy.sinks + self._shared.policy.window_size
        return max(protected, int(self._shared.alpha_safeguard * mean))

    @property
    def _most(self) -> int:
        return (self._shared.limit + self._first) * len(self._parts)

    def trim(self, max_tokens: int | None = None) -> int:
        if max_tokens is not None:
            self.check_trim(max_tokens)
        self._refuse_waiting("trim")
        before = sum(self.heads)
        mean = self.policy.keep(self._shared.limit + self._first + 1) if max_tokens is None else max_tokens
        if before > mean * len(self._parts):
            share_budget([self], mean)
        return (before - sum(self.heads)) // len(self._parts)


@torch.no_grad()
def share_budget(layers: Sequence[AdaKVLayer], mean: int) -> None:
    """Rank the heads of all these layers together, down to `mean` tokens a head."""
    parts = [part for layer in layers for _, part in layer.parts() if isinstance(part, RankedLayer)]
    floors = [layer.floor(mean) for layer in layers for _ in layer.parts()]
    ranked = [part.worth().mean(0)[0] for part in parts]  # best first, of each head
    sure = [min(floor, len(worth)) for floor, worth in zip(floors, ranked, strict=True)]
    rest = [worth[first:] for first, worth in zip(sure, ranked, strict=True)]
    owner = torch.cat([torch.full_like(worth, i, dtype=torch.long) for i, worth in enumerate(rest)])
    left = max(0, mean * len(parts) - sum(sure))
    best = torch.cat(rest).topk(min(left, len(owner))).indices
    counts = torch.bincount(owner[best], minlength=len(parts)).tolist()
    for part, first, count in zip(parts, sure, counts, strict=True):
        part.rank_to(first + count)
        part.shrink_to_fit()


def compress(layers: Sequence[LayerCache], max_tokens: int) -> None:
    """Keep the best `max_tokens` a head, on average over all layers where all their heads share one budget.

    Raises:
        PolicyError: if what must stay is more.
    """
    sharing = [layer for layer in layers if isinstance(layer, AdaKVLayer)]
    if len(sharing) < len(layers):
        for layer in layers:
            layer.trim(max_tokens)
            layer.shrink_to_fit()
    elif layers[0].stored > max_tokens:
        share_budget(sharing, max_tokens)
