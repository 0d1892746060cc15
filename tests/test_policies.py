"""Size policies against lists of tokens, and what they refuse."""

import re
from dataclasses import FrozenInstanceError, dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.searching import search

from kvcache import KeepAll, KVLayer, MaxBytes, MaxTokens, Pinned, PolicyError, SizePolicy, SlidingWindow
from kvcache.cache import check_policy, schedule
from kvcache.io import parse_bytes

pytestmark = pytest.mark.one_release

SEARCH = search(100)


@dataclass(frozen=True)
class Halving(SizePolicy):
    limit: int

    def keep(self, count: int) -> int:
        return count if count <= self.limit else self.limit // 2


def leave(policy, tokens):
    """What stays of a list of tokens, by each policy's description and without its arithmetic."""
    match policy:
        case SlidingWindow(window, sinks):
            return [t for i, t in enumerate(tokens) if i < sinks or i >= len(tokens) - window]
        case MaxTokens(limit, low_water):
            return tokens if len(tokens) <= limit else tokens[-low_water:]
        case Pinned(count, inner):
            return tokens[:count] + leave(inner, tokens[count:])
        case Halving(limit):
            return tokens if len(tokens) <= limit else tokens[-(limit // 2) :]
    return tokens


limits = st.integers(1, 20).flatmap(lambda limit: st.tuples(st.just(limit), st.integers(1, limit)))
simple = (
    st.just(KeepAll())
    | st.builds(SlidingWindow, st.integers(1, 12), sinks=st.integers(0, 5))
    | limits.map(lambda marks: MaxTokens(*marks))
    | st.builds(Halving, st.integers(2, 20))
)
policies = st.recursive(simple, lambda inner: st.builds(Pinned, st.integers(0, 6), inner), max_leaves=3)


@SEARCH
@given(policies, st.integers(0, 60), st.integers(0, 30))
def test_schedule_is_the_policy_token_by_token(policy, before, fresh):
    check_policy(policy)
    tokens = []
    for t in range(before):
        tokens = leave(policy, [*tokens, t])
    stored, counts = len(tokens), []
    for t in range(before, before + fresh):
        tokens = leave(policy, [*tokens, t])
        counts.append(len(tokens))
        assert tokens[: policy.pinned] == list(range(min(t + 1, policy.pinned)))
    assert schedule(policy, stored, fresh) == tuple(counts)
    assert policy.limit is None or max(counts, default=0) <= policy.limit


def test_limits_and_pins_add_up():
    nested = Pinned(3, Pinned(2, SlidingWindow(10, sinks=4)))
    assert (nested.pinned, nested.limit, nested.evicts) == (9, 19, True)
    assert (Pinned(3, KeepAll()).pinned, Pinned(3, KeepAll()).limit, Pinned(3, KeepAll()).evicts) == (3, None, False)
    assert (MaxTokens(8).pinned, MaxTokens(8).limit) == (0, 8)
    assert MaxBytes(100).evicts
    assert MaxBytes(100).limit is None


@pytest.mark.parametrize(("limit", "low"), [(1, 1), (2, 1), (8, 7), (100, 87), (1024, 896)])
def test_default_low_water_is_seven_eighths(limit, low):
    assert MaxTokens(limit) == MaxTokens(limit, low)
    assert MaxTokens(limit).keep(limit + 1) == low


def test_repr_is_the_configuration():
    policy = Pinned(5, SlidingWindow(1024, sinks=4))
    assert repr(policy) == "Pinned(count=5, policy=SlidingWindow(window=1024, sinks=4))"
    for each in (policy, KeepAll(), MaxTokens(9), MaxTokens(9, 4), MaxBytes("2MiB", low_water=0.5)):
        assert eval(repr(each)) == each
        assert hash(eval(repr(each))) == hash(each)
    with pytest.raises(FrozenInstanceError):
        policy.count = 6


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (1, 1), (123456789, 123456789), ("17", 17), ("17B", 17), ("2 kB", 2_000), ("512MiB", 2**29), ("1.5GB", 1_500_000_000),
        (" 3 gib ", 3 * 2**30), ("0.5KiB", 512), ("1MB", 10**6),
    ],
)  # fmt: skip
def test_sizes_are_read(size, count):
    assert parse_bytes(size) == count


@pytest.mark.parametrize(
    ("size", "says"),
    [
        (text, f"cannot read {text!r} as a size; write for example '512MiB'")
        for text in ("", "MiB", "3 parsecs", "-1", "1,5GB", "1 2")
    ]
    + [
        (size, f"bytes={int(float(str(size).rstrip('B')))} must be a whole number of at least 1")
        for size in (0, -5, "0", "0.1B")
    ]
    + [(size, f"bytes={size!r} must be a whole number") for size in (True, 1.5, None)],
)
def test_what_is_no_size_is_refused(size, says):
    with pytest.raises(PolicyError, match=re.escape(says)):
        MaxBytes(size)


def test_a_budget_becomes_tokens():
    # Tokens of 100 bytes: what is pinned, and what others take of the budget, is counted in it.
    assert MaxBytes(1000).resolve(100) == MaxTokens(10, 8)
    assert MaxBytes(1099, low_water=1).resolve(100) == MaxTokens(10, 10)
    assert MaxBytes(100).resolve(100) == MaxTokens(1, 1)
    assert Pinned(3, MaxBytes(1000)).resolve(100) == Pinned(3, MaxTokens(7, 6))
    assert Pinned(3, MaxBytes(1000)).resolve(100, 250) == Pinned(3, MaxTokens(4, 3))
    assert MaxBytes(1000).resolve(100, most=6) == MaxTokens(6, 5)
    assert Pinned(3, MaxBytes(1000)).resolve(100, most=8) == Pinned(3, MaxTokens(5, 4))
    for policy in (KeepAll(), SlidingWindow(4, sinks=2), MaxTokens(5), Pinned(2, MaxTokens(5))):
        assert policy.resolve(100) == policy


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SlidingWindow(0), "window=0 must be a whole number of at least 1.*sinks="),
        (lambda: SlidingWindow(-3, sinks=4), "window=-3"),
        (lambda: SlidingWindow(8, sinks=-1), "sinks=-1 must be a whole number of at least 0"),
        (lambda: SlidingWindow(2.5), "window=2.5"),
        (lambda: SlidingWindow(True), "window=True"),
        (lambda: MaxTokens(0), "limit=0 must be a whole number of at least 1"),
        (lambda: MaxTokens(-8), "limit=-8"),
        (lambda: MaxTokens(8, low_water=0), "low_water=0"),
        (lambda: MaxTokens(8, low_water=9), "low_water=9 is above limit=8; give a mark of at most the limit"),
        (lambda: MaxBytes(100, low_water=0), "low_water=0"),
        (lambda: MaxBytes(100, low_water=1.5), r"low_water=1.5 must be a fraction in \(0, 1\]"),
        (lambda: MaxBytes("12 parsecs"), "cannot read '12 parsecs' as a size; write for example '512MiB'"),
        (lambda: Pinned(-1, KeepAll()), "count=-1 must be a whole number of at least 0"),
        (lambda: MaxBytes(99).resolve(100), "does not hold one token of 100 bytes.*give at least 100"),
        (lambda: Pinned(3, MaxBytes(399)).resolve(100), "300 bytes that are pinned; give at least 400"),
        (lambda: KVLayer(max_length=0), "max_length=0 must be at least 1; leave it out"),
        (
            lambda: KVLayer(SlidingWindow(6, sinks=3), max_length=8),
            r"keeps up to 9 tokens, but max_length .*is 8; lower",
        ),
        (lambda: KVLayer("window"), r"policy='window' is no SizePolicy; give for example SlidingWindow\("),
    ],
)
def test_what_cannot_work_is_refused_with_the_next_step(make, says):
    with pytest.raises(PolicyError, match=says):
        make()


@dataclass(frozen=True)
class Broken(SizePolicy):
    """Keeps what its table says, and is honest otherwise."""

    limit: int
    table: tuple = ()
    pinned: int = 0

    def keep(self, count: int) -> int:
        return dict(self.table).get(count, min(count, self.limit))


class NoLimit(SizePolicy):
    def __repr__(self) -> str:  # the same in every process, as test names must be
        return "NoLimit()"

    def keep(self, count: int) -> int:
        return min(count, 8)


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (Broken(8, ((9, 9),)), r"keep\(9\) is 9; it must be from 1 to 8"),  # over the limit
        (Broken(8, ((9, 0),)), r"keep\(9\) is 0; it must be from 1 to 8"),  # not even the current token
        (Broken(8, ((9, 3),), pinned=3), r"keep\(9\) is 3; it must be from 4 to 8"),  # nor the pinned ones beside it
        (Broken(8, ((8, 7),)), r"keep\(8\) is 7; it must be from 8 to 8"),  # evicts within the limit
        (Broken(8, ((1, 0),)), r"keep\(1\) is 0; it must be from 1 to 1"),
        (Broken(3, pinned=3), "3 must be a whole number of at least 4: the pinned tokens and the current one must fit"),
        (Broken(0), "must be a whole number of at least 1"),
        (Broken("8"), "must be a whole number"),
        (NoLimit(), "does not say its limit; give it a field or property `limit`"),
    ],
    ids=repr,
)
def test_a_policy_that_breaks_its_contract_is_refused(policy, says):
    with pytest.raises(PolicyError, match=says):
        KVLayer(policy)


def test_an_honest_policy_of_ones_own_is_taken():
    for policy in (Halving(7), Broken(8), Broken(8, pinned=7)):
        assert KVLayer(policy).policy == policy
