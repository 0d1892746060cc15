"""`check_policy` and `check_layer`: the laws, searched with hypothesis for a scenario that breaks one."""

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcache.cache import (
    AdaKV,
    CacheSpec,
    Expected,
    KeepAll,
    LayerCache,
    MaxBytes,
    MaxTokens,
    PerHead,
    Pinned,
    SizePolicy,
    SlidingWindow,
    chosen_by_head,
    short_ladder,
)
from kvcache.cache import check_policy as check_keeps
from kvcache.errors import InputError
from kvcache.monitoring import positions_by_head
from kvcache.testing import _laws as held

TRIED: dict[str, SizePolicy] = {
    "all": KeepAll(),
    "window": SlidingWindow(5),
    "sinks": SlidingWindow(4, sinks=2),
    "max": MaxTokens(9, low_water=3),
    "pinned": Pinned(3, MaxTokens(6, low_water=6)),
}
VARIANTS = ("plain", "padded", "rerotated")


@dataclass(frozen=True)
class Made:
    """Layers by a function of the user's."""

    make: Callable[..., LayerCache]
    under: SizePolicy
    variant: str = "plain"
    tolerance: float = 0.0

    def policy(self, rows: int, dtype: torch.dtype = torch.float32, layers: int = 1) -> SizePolicy:  # noqa: ARG002  # as other cases
        return self.under

    def tokens(self, rows: int, count: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
        return held.tokens(rows, count, seed, dtype)

    def __call__(
        self, padding: list[int], dtype: torch.dtype = torch.float32, layers: int = 1, **options: Any
    ) -> LayerCache:
        return held.layer_of(self.make, self.under, self.variant, padding, dtype, layers, **options)


def made_by(spec: CacheSpec) -> Callable[..., LayerCache]:
    """What makes the layers of a cache, under any policy, of any length."""

    def make(policy: SizePolicy, *, max_length: int | None = None, static: bool = False, **given: Any) -> LayerCache:
        return replace(spec, max_length=max_length, static=static).layer(policy, **given)

    return make


def search(strategy: st.SearchStrategy[Any], examples: int, law: Callable[[Any], None]) -> None:
    """Try a law on so many scenarios, the same on every run; the smallest that breaks it is in the error.

    Raises:
        AssertionError: whatever the law raised.
    """
    tried: list[Any] = []

    def one(scenario: Any) -> None:
        tried[:] = [scenario]
        law(scenario)

    found = settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    try:
        given(strategy)(found(one))()
    except Exception as error:
        said = str(error) or type(error).__name__
        raise AssertionError(f"{said}, in {tried[0] if tried else 'no scenario'}") from error


def check_layer(
    make: Callable[..., LayerCache],
    policies: Mapping[str, SizePolicy] | Sequence[SizePolicy] | None,
    variants: Collection[str],
    laws: Collection[str] | None,
    tolerance: float,
    examples: int,
) -> None:
    """See `kvcache.testing.check_layer`."""
    known = {law.__name__: law for law in held.LAWS}
    chosen = tuple(known) if laws is None else tuple(laws)
    for name, given_, there in (("laws", chosen, tuple(known)), ("variants", tuple(variants), VARIANTS)):
        if isinstance(given_, str) or not set(given_) <= set(there):
            raise InputError(f"{name}={given_!r}: choose from {', '.join(there)}")
    tried = TRIED if policies is None else policies
    if not isinstance(tried, Mapping):
        tried = {repr(policy): policy for policy in tried}
    with short_ladder():
        for name, policy in tried.items():
            for variant in variants:
                if variant == "rerotated" and not (policy.evicts and policy.pinned):
                    continue
                for law in chosen:
                    made = Made(make, policy, variant, tolerance)
                    try:
                        search(held.scenarios(variant), examples, partial(known[law], made))
                    except AssertionError as error:
                        raise AssertionError(f"{law} is broken under {name}, {variant}: {error}") from error


def check_policy(policy: SizePolicy, examples: int) -> None:
    """See `kvcache.testing.check_policy`."""
    check_keeps(policy)
    _check_value(policy)
    if isinstance(policy, MaxBytes) or (policy.evicts and policy.limit is None):
        token = held.HEADS * (held.KEY_DIM + held.VALUE_DIM) * 4
        policy = policy.resolve(token)  # as a cache of one row makes it
        check_keeps(policy)
    most = 4 * (policy.limit or 16)
    search(st.integers(1, most), 10 * examples, partial(_check_count, policy))
    for count in range(1, min(most, 2048) + 1):
        _check_count(policy, count)
    if chosen_by_head(policy):
        make = made_by(CacheSpec())
        for name, law in (("kept", _kept_by_head), ("rows", _rows_by_head)):
            search(_by_head(policy), examples, partial(_named, name, partial(law, make, policy)))
    elif (
        policy.limit or 0
    ) <= held.MAX_LENGTH - 4:  # beyond, no scenario reaches the limit, and all were checked above
        check_layer(made_by(CacheSpec()), [policy], ("plain", "padded"), None, 0.0, examples)


def _named(name: str, law: Callable[[Any], None], scenario: Any) -> None:
    try:
        law(scenario)
    except AssertionError as error:
        raise AssertionError(f"{name} by head is broken: {error}") from error


def _check_value(policy: SizePolicy) -> None:
    """Equal policies share what is worked out for one of them, so a policy must be a value."""
    try:
        alike = hash(copy(policy)) == hash(policy) and copy(policy) == policy
    except TypeError as error:
        raise AssertionError(f"{policy!r} is no value: {error}; make it a frozen dataclass") from error
    assert alike, f"a copy of {policy!r} is another policy; make it a frozen dataclass"


def _check_count(policy: SizePolicy, count: int) -> None:
    limit, kept = policy.limit, policy.keep(count)
    assert type(kept) is int, f"keep({count}) is {kept!r}, which is no whole number"
    assert kept == policy.keep(count) == copy(policy).keep(count), f"keep({count}) has two answers"
    if limit is None or count <= limit:
        assert kept == count, f"keep({count}) is {kept}: within the limit ({limit}) nothing may leave"
        return
    assert kept <= limit, f"keep({count}) is {kept}: more than its limit, {limit}"
    assert kept > policy.pinned, f"keep({count}) is {kept}: {policy.pinned} are pinned, and the current token stays"


# ---------------------------------------------------------------------- policies whose heads choose


@dataclass(frozen=True)
class Fed:
    """What goes into a layer whose heads choose: pads of each row, chunks, and the rows that are chosen afterwards."""

    padding: list[int]
    chunks: list[int]
    rows: list[int]
    seed: int


def _by_head(policy: SizePolicy) -> st.SearchStrategy[Fed]:
    most = (policy.limit or 16) + 12
    # Up to the limit in one go, then about it: chunks and single tokens.
    begin = st.integers(1, most).map(lambda n: [n])
    rest = st.lists(st.integers(1, 9), min_size=1, max_size=12)
    return st.builds(
        Fed,
        padding=st.lists(st.integers(0, 5), min_size=1, max_size=2),
        chunks=st.builds(lambda a, b: a + b, begin, rest),
        rows=st.lists(st.integers(0, 1), min_size=1, max_size=3),
        seed=st.integers(0, 1000),
    )


class _Feed:
    """A layer, and all that went into it."""

    def __init__(self, layer: LayerCache, rows: int, heads: int, seed: int) -> None:
        self.layer, self.heads = layer, heads
        self._draw = torch.Generator().manual_seed(seed)
        self.keys = torch.zeros(rows, heads, 0, held.KEY_DIM)
        self.values = torch.zeros(rows, heads, 0, held.VALUE_DIM)

    def draw(self, count: int) -> list[Tensor]:
        """Queries, keys and values of so many tokens."""
        shape = self.keys.shape[0], self.heads, count
        dims = (held.KEY_DIM, held.KEY_DIM, held.VALUE_DIM)
        return [torch.randn(*shape, dim, generator=self._draw) for dim in dims]

    def append(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Append, and let the layer see what was attended to."""
        self.keys, self.values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        for span in self.layer.append(keys, values).spans:
            if span.observe is not None:
                span.observe(queries[:, list(span.heads)], held.KEY_DIM**-0.5)

    def parts(self) -> list[tuple[list[int], LayerCache, Tensor]]:
        """Of each part: its heads, itself, and the positions that it holds, ``[rows, heads, stored]``."""
        rows = self.keys.shape[0]
        found = []
        for (which, at), (_, part) in zip(positions_by_head(self.layer), self.layer.parts(), strict=True):
            heads = list(range(self.heads)) if which is None else list(which)
            found.append((heads, part, at.expand(rows, len(heads), -1)))
        return found

    def kept(self) -> dict[tuple[int, int], set[int]]:
        """The positions that each row and head holds."""
        return {
            (b, head): set(at[b, i].tolist())
            for heads, _, at in self.parts()
            for b in range(at.shape[0])
            for i, head in enumerate(heads)
        }

    def select(self, rows: list[int]) -> None:
        """Choose rows."""
        self.layer.select(torch.tensor(rows))
        self.keys, self.values = self.keys[rows], self.values[rows]


def _layer(make: Callable[..., LayerCache], policy: SizePolicy, fed: Fed) -> _Feed:
    inner = _inner(policy)
    heads = len(inner.heads) if isinstance(inner, PerHead) else held.HEADS
    token = heads, held.KEY_DIM, held.VALUE_DIM, torch.float32
    layer = make(policy, padding=torch.tensor(fed.padding), expected=Expected(len(fed.padding), token))
    return _Feed(layer, len(fed.padding), heads, fed.seed)


def _kept_by_head(make: Callable[..., LayerCache], policy: SizePolicy, fed: Fed) -> None:
    """Laws 3 and 8: what holds whatever the scores are."""
    feed = _layer(make, policy, fed)
    layer, before = feed.layer, feed.kept()
    for count in fed.chunks:
        start = layer.seen
        feed.append(*feed.draw(count))
        assert layer.seen == start + count, f"seen is {layer.seen}, {start + count} tokens went in"
        kept = feed.kept()
        total = sum(len(one) for (row, _), one in kept.items() if row == 0)
        if policy.limit is not None:
            assert total <= policy.limit * feed.heads, f"{total} tokens in {feed.heads} heads, {policy.limit} each"
        told, found = layer.nbytes, held.held_bytes(layer)
        assert told == found, f"{told} bytes are reported, {found} are held"
        for heads, part, at in feed.parts():
            window_size = getattr(part.policy.ranking, "window_size", 1)
            for (b, pads), (i, head) in product(enumerate(fed.padding), enumerate(heads)):
                pinned = range(pads, min(layer.seen, pads + part.policy.pinned))
                lost = {*pinned, *range(max(pads, layer.seen - window_size), layer.seen)} - kept[b, head]
                assert not lost, f"head {head} has lost the pinned or recent tokens {sorted(lost)}"
                back = kept[b, head] - before.get((b, head), set()) - {*range(start, layer.seen), *range(pads)}
                assert not back, f"head {head} has the tokens {sorted(back)} again, which had left"
                where = at[b, i].long()
                real = where >= pads  # which pads are left is all one
                for name, now, came in (("keys", part.keys, feed.keys), ("values", part.values, feed.values)):
                    alike = now is not None and torch.equal(now[b, i][real], came[b, head, where[real]])
                    assert alike, f"head {head} holds other {name} than came at their positions"
        before = kept


def _rows_by_head(make: Callable[..., LayerCache], policy: SizePolicy, fed: Fed) -> None:
    """Law 6: rows that are chosen before the last chunk keep what they keep where they were so from the start."""
    rows = [row % len(fed.padding) for row in fed.rows]
    if isinstance(_inner(policy), AdaKV):  # whose shares are those of all rows together
        rows = list(range(len(fed.padding)))
    first = _layer(make, policy, fed)
    second = _layer(make, policy, replace(fed, padding=[fed.padding[row] for row in rows]))
    for count in fed.chunks[:-1]:
        drawn = first.draw(count)
        first.append(*drawn)
        second.append(*(t[rows] for t in drawn))
    last = [t[rows] for t in first.draw(fed.chunks[-1])]
    first.select(rows)
    first.append(*last)
    second.append(*last)
    assert first.kept() == second.kept(), (
        "rows that were chosen keep other tokens than rows that were so from the start"
    )


def _inner(policy: SizePolicy) -> SizePolicy:
    """What is pinned around."""
    return _inner(policy.policy) if isinstance(policy, Pinned) else policy
