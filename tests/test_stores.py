"""What every store promises: the bits that were put, for the content that was asked for, within its budget."""

from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.clocks import Clock
from support.inside.stores import MEMORY_CLOCK
from support.snapshots import BLOBS, KINDS, cold, exact, ids, voice
from support.stores import SORTS, VOICES, search, settled, size, tell_apart

from kvcache.prefixes.stores import MemoryStore

pytestmark = pytest.mark.one_release

# ---------------------------------------------------------------------- every store


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_put_comes_back_bit_for_bit(kind, stores):
    store = stores(kind)
    for i, key in enumerate(SORTS):
        assert store.get(key) is None and not store.has(key)
        store.put(cold(key))
        assert exact(settled(store).get(key), key) and store.has(key)
        assert (store.hits, store.misses) == (i + 1, i + 1)
    assert all(exact(store.get(key), key) for key in SORTS)
    for other in (voice(2), voice(1, model="n"), ids(1, 2, 3), voice(1, tokens=7)):
        assert not store.has(other)
        found = store.get(other)
        assert found is None or len(found) < len(other)  # the memory tier has its beginning


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "memory"])
def test_what_one_has_put_another_finds(kind, stores):
    with stores(kind) as store:
        for key in SORTS:
            store.put(cold(key))
    again = stores(kind)
    assert all(exact(again.get(key), key) for key in SORTS)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_deleted_is_gone_pinned_or_not(kind, stores):
    store, (kept, gone, pinned) = stores(kind), map(voice, range(3))
    store.pin(pinned)
    for key in (kept, gone, pinned):
        store.put(cold(key))
    for key in (gone, pinned):
        store.delete(key)
        store.delete(key)  # what is not there is no error
    assert [settled(store).has(key) for key in (kept, gone, pinned)] == [True, False, False]
    assert store.get(gone) is store.get(pinned) is None
    assert exact(store.get(kept), kept)


@pytest.mark.parametrize("kind", KINDS)
def test_pinned_ones_stay_until_they_are_released(kind, stores):
    early, late, deleted, *others = map(voice, range(12))
    store = stores(kind, max_bytes=4 * len(cold(early).to_bytes()))
    store.pin(early)
    store.pin(deleted)
    store.delete(deleted)  # its pin too
    store.put(cold(deleted))
    for key in (early, late):
        store.put(cold(key))
    settled(store).pin(late)
    for key in others:
        store.put(cold(key))
    assert exact(settled(store).get(early), early) and exact(store.get(late), late)
    assert not store.has(deleted)
    for key in (early, late):
        store.pin(key, False)
        store.pin(key, False)
    for key in others:
        store.put(cold(key))
    assert not settled(store).has(early) and not store.has(late)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_reported_are_bytes_held(kind, stores):
    store, keys = stores(kind), [voice(i, tokens=i + 1) for i in range(4)]
    assert store.nbytes == 0
    for count, key in enumerate(keys, 1):
        store.put(cold(key))
        store.put(cold(key))
        for tier in settled(store).tiers:
            assert tier.nbytes == sum(size(tier, held) for held in keys[:count])
    assert store.nbytes == sum(tier.nbytes for tier in store.tiers)
    store.delete(keys[2])
    assert all(tier.nbytes == sum(size(tier, keys[i]) for i in (0, 1, 3)) for tier in store.tiers)


@pytest.mark.parametrize("kind", KINDS)
def test_what_can_never_fit_drives_nothing_out(kind, stores, caplog):
    small, pinned, large, huge = voice(0, 2), voice(1, 20), voice(2, 25), voice(3, 50)
    store = stores(kind, max_bytes=len(cold(large).to_bytes()) + 500)
    store.pin(pinned)
    for key in (small, pinned):
        store.put(cold(key))
    for key in (large, huge):  # one does not fit beside what is pinned, the other not at all
        settled(store).put(cold(key))
    assert [settled(store).has(key) for key in (small, pinned, large, huge)] == [True, True, False, False]
    assert exact(store.get(small), small)
    tiers = len(store.tiers)
    assert sum(f"fit beside {size(tier, pinned)} pinned" in caplog.text for tier in store.tiers) == tiers
    assert len(caplog.records) == 2 * tiers


class Oracle:
    """A store with a budget as its documentation describes it: a list, from the one that leaves first."""

    def __init__(self, budget, reading_is_using):
        self.budget, self.reading_is_using = budget, reading_is_using
        self.held, self.pinned = {}, set()

    def put(self, name, size):
        rest = {other: held for other, held in self.held.items() if other != name}
        if sum(rest[other] for other in self.pinned & rest.keys()) + size > self.budget:
            return
        for other in list(rest):
            if sum(rest.values()) + size > self.budget and other not in self.pinned:
                del rest[other]
        self.held = {**rest, name: size}

    def get(self, name):
        if self.reading_is_using and name in self.held:
            self.held[name] = self.held.pop(name)

    def delete(self, name):
        self.held.pop(name, None)
        self.pinned.discard(name)


ACTIONS = ("put",) * 6 + ("get",) * 5 + ("pin", "unpin", "delete")  # mostly what makes others leave
actions = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 4)), min_size=15, max_size=40)


@pytest.mark.search
@pytest.mark.parametrize("kind", ["memory", *BLOBS])
def test_the_least_recently_used_leave_first_and_the_budget_holds(kind, stores, tmp_path):
    places = iter(range(10**6))

    @search(60)
    @given(st.floats(1.5, 4), actions)
    def check(room, todo):
        where = next(places)
        with stores(kind, where, max_bytes=int(room * len(cold(VOICES[3]).to_bytes()))) as store:
            oracle = Oracle(store.max_bytes, reading_is_using=not kind.startswith("remote"))
            for tick, (action, i) in enumerate(todo):
                key = VOICES[i]
                match action:
                    case "put":
                        store.put(cold(key))
                        oracle.put(i, size(store, key))
                    case "get":
                        found = store.get(key)
                        assert exact(found, key) if i in oracle.held else found is None
                        oracle.get(i)
                    case "pin":
                        store.pin(key)
                        oracle.pinned.add(i)
                    case "unpin":
                        store.pin(key, False)
                        oracle.pinned.discard(i)
                    case "delete":
                        store.delete(key)
                        oracle.delete(i)
                if kind in ("disk", "remote-file"):
                    tell_apart(tmp_path / f"{kind.removesuffix('-file')}-{where}", tick)
                assert {j for j in range(len(VOICES)) if store.has(VOICES[j])} == oracle.held.keys(), (tick, action, i)
                assert store.nbytes == sum(oracle.held.values()) <= store.max_bytes

    check()


@pytest.mark.search
@pytest.mark.parametrize("kind", ["memory+disk", "memory+disk+redis"])
def test_tiers_keep_their_budgets_their_pins_and_their_word(kind, stores):
    places = iter(range(10**6))

    @search(40)
    @given(st.floats(1.5, 4), actions)
    def check(room, todo):
        budget, safe = int(room * len(cold(VOICES[3]).to_bytes())), set()
        with stores(kind, next(places), max_bytes=budget) as store:
            pinned = set()
            for action, i in todo:
                key = VOICES[i]
                match action:
                    case "put":
                        store.put(cold(key))
                        assert len(cold(key).to_bytes()) > budget or pinned or exact(store.get(key), key)
                    case "get":
                        found = store.get(key)
                        assert found is None or exact(found, key)
                    case "pin":
                        store.pin(key)
                        pinned.add(i)
                    case "unpin":
                        store.pin(key, False)
                        pinned.discard(i)
                    case "delete":
                        store.delete(key)
                        pinned.discard(i)
                        assert store.get(key) is None
                assert all(tier.nbytes <= budget for tier in store.tiers)
                store.flush()
                assert all(tier.nbytes <= budget for tier in store.tiers)
                safe &= pinned
                assert all(store.has(VOICES[j]) for j in safe)
                safe |= {j for j in pinned if store.has(VOICES[j])}

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_threads_may_share_a_store(kind, stores):
    keys = [voice(i, tokens=3 + i) for i in range(6)]
    budget = 3 * len(cold(keys[-1]).to_bytes())
    store = stores(kind, max_bytes=budget)

    def work(seed):
        random = Random(seed)
        for _ in range(60):
            key = random.choice(keys)
            match random.choice(("get", "get", "put", "put", "pin", "unpin", "delete")):
                case "get":
                    found = store.get(key)
                    assert found is None or exact(found, key)
                case "put":
                    store.put(cold(key))
                case "delete":
                    store.delete(key)
                case pin:
                    store.pin(key, pin == "pin")
            assert all(tier.nbytes <= budget for tier in store.tiers if tier.name != "remote")  # as well as it can

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    for key in keys:
        store.delete(key)
    assert store.nbytes == 0


# ---------------------------------------------------------------------- memory


@search(150)
@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "put", "wait", "wait", "pin", "unpin", "delete"]), st.integers(0, 3)),
        min_size=5,
        max_size=30,
    )
)
def test_what_is_old_is_forgotten_unless_it_is_pinned(todo):
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(MEMORY_CLOCK, clock)
        store, stored, pinned = MemoryStore(ttl=5), {}, set()
        for action, i in todo:
            match action:
                case "put":
                    store.put(cold(VOICES[i]))
                    stored[i] = clock.now
                case "wait":
                    clock.now += 1 + 2 * i
                case "pin":
                    store.pin(VOICES[i])
                    pinned.add(i)
                case "unpin":
                    store.pin(VOICES[i], False)
                    pinned.discard(i)
                case "delete":
                    store.delete(VOICES[i])
                    stored.pop(i, None)
                    pinned.discard(i)
            stored = {j: at for j, at in stored.items() if clock.now - at <= 5 or j in pinned}
            first, second = ("has", "get") if i % 2 else ("get", "has")  # either finds out what has become old
            assert {j for j in range(4) if getattr(store, first)(VOICES[j])} == stored.keys()
            assert {j for j in range(4) if getattr(store, second)(VOICES[j])} == stored.keys()
            assert store.nbytes == sum(size(store, VOICES[j]) for j in stored)


beginnings = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)


@search(200)
@given(
    st.lists(st.tuples(st.sampled_from(["put", "put", "put", "pin", "unpin"]), st.sampled_from("mn"), beginnings)),
    st.lists(beginnings, min_size=1, max_size=8),
    st.integers(1, 20) | st.just(10**6),
)
def test_the_longest_beginning_is_found(todo, asked, room):
    store, put = MemoryStore(room * cold(ids(*range(6))).nbytes), set()
    for action, model, tokens in todo:
        key = ids(*tokens, model=model)
        if action == "put":
            store.put(cold(key))
            put.add((model, tokens))
        else:
            store.pin(key, action == "pin")
        assert store.nbytes <= store.max_bytes
    for tokens in asked:
        best = max(
            (n for n in range(7) if any(model == "m" and known[:n] == tokens[:n] != () for model, known in put)),
            default=0,
        )
        best = min(best, len(tokens))
        found = store.get(ids(*tokens))
        if room == 10**6:
            assert (0 if found is None else len(found)) == best
        assert found is None or (len(found) <= best and exact(found, ids(*tokens[: len(found)])))


def test_of_two_that_begin_alike_the_longer_serves_both():
    store, short, long = MemoryStore(), ids(1, 2), ids(1, 2, 3)
    store.put(cold(short))
    store.put(cold(long))
    assert len(store) == 1 and store.nbytes == cold(long).nbytes
    store.put(cold(short))
    assert len(store) == 1 and not store.has(short) and exact(store.get(short), short)
    store.pin(short)  # from now on it has to outlive the longer one
    assert (store.hits, store.misses) == (1, 0)  # to pin is not to ask
    store.delete(long)
    assert store.has(short) and exact(store.get(ids(1, 2, 9)), short)


def test_a_snapshot_that_was_cut_from_a_longer_one_takes_no_more_than_its_own():
    store, part = MemoryStore(), cold(ids(*range(100))).first(2)
    store.put(part)
    assert store.nbytes == cold(part.key).nbytes < part.nbytes
    assert exact(store.get(part.key), part.key)
