"""The static cache of the decode engine against `KVLayer`, and the pool that keeps such caches."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.decoders import CPU
from support.inside import decoding as inside
from support.searching import search
from support.static_rows import (
    GEOMETRY,
    HEADS,
    KEY_DIM,
    LAYERS,
    POLICIES,
    VALUE_DIM,
    Row,
    assert_shows,
    assert_state,
    layer,
    prefilled,
    state_of,
    step,
)

from kvcache import CapacityError, GeometryError, KeepAll, KeyRotation, MaxTokens, Pinned, PolicyError, SlidingWindow
from kvcache.cache import ring_sees, ring_slot, staying_of
from kvcache.decoding import Decoding, Pool, Sampler, StaticKV

# ---------------------------------------------------------------------- the arithmetic of slots


@search(150)
@given(policy=st.sampled_from(POLICIES), length=st.integers(1, 60), spare=st.integers(0, 7))
def test_a_ring_shows_what_the_policy_keeps(policy, length, spare):
    stays, held = 0, []
    for position in range(length):
        held.append(position)
        stays = policy.keep(len(held))
        del held[policy.pinned : policy.pinned + len(held) - stays]
    limit = 2**62 if policy.limit is None else policy.limit
    low = 0 if policy.limit is None else policy.keep(policy.limit + 1)
    pinned = policy.pinned if policy.evicts else 0
    slots = (length if policy.limit is None else policy.limit) + spare
    one = [torch.tensor([n]) for n in (length, limit, low, pinned)]
    stored = staying_of(*one[:3])
    assert stored.tolist() == [stays]
    places = [int(ring_slot(torch.tensor([position]), one[3], slots)) for position in held]
    assert len(set(places)) == stays
    sees = ring_sees(one[0], stored, one[3], slots, torch.arange(slots))
    assert sees[0].nonzero()[:, 0].tolist() == sorted(places)
    if pinned:
        assert places[: min(pinned, length)] == list(range(min(pinned, length)))


# ---------------------------------------------------------------------- StaticKV against KVLayer


@st.composite
def plans(draw):
    """Groups of rows: policy, length, pads of each row, chunks; and how many slots are to spare, how many steps."""
    groups = []
    for _ in range(draw(st.integers(1, 3))):
        policy = draw(st.sampled_from(POLICIES))
        length = draw(st.integers(1, 24))
        rows = draw(st.integers(1, 2))
        pads = [draw(st.integers(0, length - 1)) for _ in range(rows)] if draw(st.booleans()) else [0] * rows
        chunks = draw(st.lists(st.integers(1, 9), max_size=5))
        groups.append((policy, length, pads, chunks))
    return groups, draw(st.integers(0, 5)), draw(st.integers(1, 25)), draw(st.booleans()), draw(st.booleans())


@search(120)
@given(plan=plans(), seed=st.integers(0, 2**20))
def test_what_is_seen_is_what_a_layer_keeps_token_by_token(plan, seed):
    groups, spare, steps, later, again = plan
    needed = max(length + steps if policy.limit is None else policy.limit for policy, length, _, _ in groups)
    total = sum(len(pads) for _, _, pads, _ in groups)
    kv = StaticKV(GEOMETRY, total, needed + spare)
    assert kv.nbytes == total * (needed + spare) * LAYERS * HEADS * (KEY_DIM + VALUE_DIM) * 4
    rows, policies, first = [None] * total, [None] * total, 0
    for number, (policy, length, pads, chunks) in enumerate(groups):
        mine = [Row(policy, length + 3 * steps, seed + 10 * number + i) for i in range(len(pads))]
        for row, p in zip(mine, pads, strict=True):
            row.append(length - p)
        layers = prefilled(policy, mine, length, pads, chunks, told=True)
        positions = layers[0].positions().expand(len(pads), -1) - torch.tensor(pads)[:, None]
        held = [sorted(p for p in row.tolist() if p >= 0) for row in positions]
        if held == [sorted(row.kept(0)) for row in mine]:
            kv.load(first, layers, later=later)
            rows[first : first + len(pads)], policies[first : first + len(pads)] = mine, [policy] * len(pads)
        else:  # pads made the policy trim sooner than these tokens alone would have
            assert isinstance(policy, MaxTokens | Pinned) and any(pads)
            with pytest.raises(PolicyError, match="cannot go on here"):
                kv.load(first, layers)
        first += len(pads)
    kv.settle()
    for _ in range(steps):
        assert_shows(kv, rows, policies, step(kv, rows))
    report = kv.report()
    longest = max((row for row in rows if row is not None), key=lambda row: row.seen, default=None)
    if longest is not None:
        ours = longest.layers[0]
        assert [(one.seen, one.stored, one.evicted) for one in report.layers] == [
            (ours.seen, ours.stored, ours.seen - ours.stored)
        ] * LAYERS
        assert report.nbytes == kv.nbytes
    if again and rows[0] is not None:  # a row is freed and used again, while the others go on
        kv.free(0, len(groups[0][2]))
        rows[: len(groups[0][2])] = [None] * len(groups[0][2])
        assert_shows(kv, rows, policies, step(kv, rows))
        fresh = Row(groups[0][0], 3 * steps + 3, seed + 99)
        fresh.append(1)
        kv.load(0, prefilled(groups[0][0], [fresh], 1, [0], [], told=True))
        rows[0] = fresh
        for _ in range(steps - 1):
            assert_shows(kv, rows, policies, step(kv, rows))


@search(30)
@given(length=st.integers(1, 12), data=st.data())
def test_pads_that_the_layers_do_not_know_are_left_out(length, data):
    pads = data.draw(st.lists(st.integers(0, length - 1), min_size=2, max_size=2))
    rows = [Row(KeepAll(), length + 6, i) for i in range(2)]
    for row, p in zip(rows, pads, strict=True):
        row.append(length - p)
    kv = StaticKV(GEOMETRY, 2, length + 6)
    kv.load(0, prefilled(KeepAll(), rows, length, pads, [], told=False), torch.tensor(pads))
    assert kv.seen == kv.length.tolist() == [length - p for p in pads]
    for _ in range(6):
        assert_shows(kv, rows, [KeepAll()] * 2, step(kv, rows))


def test_a_cache_of_its_own_dtype_rounds_once():
    rows = [Row(SlidingWindow(6), 40, 3)]
    rows[0].append(9)
    kv = StaticKV(GEOMETRY, 1, 8, dtype=torch.bfloat16)
    assert kv.nbytes == 8 * LAYERS * HEADS * (KEY_DIM + VALUE_DIM) * 2
    assert {t.dtype for t in (*kv.keys, *kv.values)} == {torch.bfloat16}
    kv.load(0, prefilled(SlidingWindow(6), rows, 9, [0], [], told=True))
    for _ in range(12):
        assert_shows(kv, rows, [SlidingWindow(6)], step(kv, rows))


def trimmed(policy, length, to):
    kv = layer(policy, length)
    kv.trim(to)
    return kv


TURN = KeyRotation(torch.tensor([1.0, 0.1]))
REFUSED = {
    "policies": (PolicyError, "the same", 0, lambda: [layer(SlidingWindow(4)), layer(SlidingWindow(5))]),
    "lengths": (PolicyError, "the same", 0, lambda: [layer(), layer(length=3)]),
    "rerotated": (PolicyError, "absolute", 0, lambda: [layer(SlidingWindow(4), rotation=TURN) for _ in range(2)]),
    "rows": (GeometryError, "not among the 2 rows", 1, lambda: [layer(rows=2), layer(rows=2)]),
    "below": (GeometryError, "not among the 2 rows", -1, lambda: [layer(), layer()]),
    "empty": (GeometryError, "without any token", 0, lambda: [layer(length=0), layer(length=0)]),
    "one empty": (GeometryError, "does not fit", 0, lambda: [layer(), layer(length=0)]),
    "too few layers": (GeometryError, "cannot be loaded into 2", 0, lambda: [layer()]),
    "heads": (GeometryError, "does not fit", 0, lambda: [layer(heads=3), layer(heads=3)]),
    "too long": (CapacityError, "9 tokens do not fit 8", 0, lambda: [layer(length=9), layer(length=9)]),
    "window": (CapacityError, "9 tokens do not fit 8", 0, lambda: [layer(SlidingWindow(9)) for _ in range(2)]),
    "trimmed": (PolicyError, "trimmed", 0, lambda: [trimmed(SlidingWindow(6), 9, 3) for _ in range(2)]),
    "all trimmed": (PolicyError, "trimmed", 0, lambda: [trimmed(KeepAll(), 9, 3) for _ in range(2)]),
    "trimmed with pads": (
        PolicyError,
        "cannot go on here",
        0,
        lambda: [layer(MaxTokens(7, 2), 8, padding=torch.tensor([2])) for _ in range(2)],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_loaded_is_refused_before_anything_changed(name):
    error, words, first, layers = REFUSED[name]
    kv = StaticKV(GEOMETRY, 2, 8)
    kv.load(0, [layer(length=2, rows=2), layer(length=2, rows=2)])
    before = state_of(kv)
    with pytest.raises(error, match=words):
        kv.load(first, layers())
    assert_state(kv, before)


def test_room_is_asked_for_before_anything_changes():
    kv = StaticKV(GEOMETRY, 2, 8)
    kv.load(0, [layer(SlidingWindow(4), 6) for _ in range(2)])
    kv.check(1000)
    kv.load(1, [layer(length=6) for _ in range(2)])
    kv.check(2)
    with pytest.raises(CapacityError, match="cannot decode 3 tokens: row 1 uses 6 of 8 slots"):
        kv.check(3)
    kv.free(1, 1)
    kv.check(1000)
    table = StaticKV(replace(GEOMETRY, max_positions=10), 1, 64)
    table.load(0, [layer(SlidingWindow(4), 6) for _ in range(2)])
    table.check(4)
    with pytest.raises(CapacityError, match="10"):
        table.check(5)
    for rows, slots in ((0, 4), (1, 0)):
        with pytest.raises(GeometryError, match="holds nothing"):
            StaticKV(GEOMETRY, rows, slots)


# ---------------------------------------------------------------------- the pool


def pooled(pool, kind, slots):
    def make(slots):
        kv = StaticKV(GEOMETRY, 1, slots)
        return Decoding(None, kv, Sampler(1, 9, inside.TRANSFORMERS, CPU))

    return pool.lent(kind, slots, make)


def test_a_pool_keeps_one_of_a_kind_and_the_larger():
    pool = Pool()
    with pooled(pool, "a", 8) as first:
        assert first.kv.slots == 8
    with pooled(pool, "a", 5) as again, pooled(pool, "b", 5) as other:
        assert again is first and other is not first
        with pooled(pool, "a", 16) as beside:  # the first is lent already
            assert beside is not first
    with pooled(pool, "a", 9) as kept:
        assert kept is beside and kept.kv.slots == 16
    with pooled(pool, "a", 20) as longer:
        assert longer.kv.slots == 20
    with pooled(pool, "a", 1) as kept, pooled(pool, "b", 1) as others:
        assert kept is longer and others is other


def test_a_pool_lets_go():
    pool = Pool()
    with pooled(pool, "a", 8) as lent:
        held = weakref.ref(lent)
    del lent
    gc.collect()
    assert held() is not None
    with pooled(pool, "a", 9) as lent:  # one that is too short goes before another is made
        gc.collect()
        assert held() is None
        held = weakref.ref(lent)
    del lent
    pool.clear()
    gc.collect()
    assert held() is None


def test_rows_are_free_again_after_an_error():
    pool, lent = Pool(), []

    def fails():
        with pooled(pool, "a", 8) as decoding:
            lent.append(decoding)
            decoding.load(0, [layer(length=5) for _ in range(2)])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    with pooled(pool, "a", 8) as again:
        assert again is lent[0]
        assert (again.kv.seen, again.kv.length.tolist(), inside.policies_of(again.kv)) == ([0], [0], [None])
        assert inside.pending_of(again.kv) == []
        again.kv.check(1000)
