"""Many that ask a `SpeakerCache` at once: one builds, and all are served."""

import threading
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
import torch
from support.clocks import Clock
from support.inside.stores import CACHE_CLOCK, building, waiting
from support.snapshots import KINDS, cold, exact, ids, voice
from support.stores import settled
from support.waiting import until

from kvcache import InputError, SpeakerCache
from kvcache.prefixes.stores import MemoryStore

pytestmark = pytest.mark.one_release


@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_that_ask_for_the_same_wait_for_one_that_builds(kind, stores, monkeypatch):
    store, key, built, all_there = stores(kind), voice(0), [], threading.Barrier(16)
    cache, clock = SpeakerCache(store), Clock()
    monkeypatch.setattr(CACHE_CLOCK, clock)

    def build():
        built.append(threading.get_ident())
        until(lambda: waiting(cache)[key] == 16)
        clock.now += 0.25
        return cold(key)

    def ask(_):
        all_there.wait()
        return cache.get_or_build(key, build)

    with ThreadPoolExecutor(16) as pool:
        assert all(exact(found, key) for found in pool.map(ask, range(16)))
    assert len(built) == cache.stats().built == 1
    assert store.hits == 15 and cache.stats().build_seconds == 0.25
    assert not building(cache) and not waiting(cache)


def test_those_that_ask_for_different_ones_do_not_wait_for_each_other():
    cache, both = SpeakerCache(MemoryStore()), threading.Barrier(2, timeout=30)

    def ask(i):
        def build():
            both.wait()  # passes only if both are building
            return cold(voice(i))

        return cache.get_or_build(voice(i), build)

    with ThreadPoolExecutor(2) as pool:
        assert all(exact(found, voice(i)) for i, found in enumerate(pool.map(ask, range(2))))


def test_an_error_is_its_callers_and_the_next_one_tries():
    cache, key, tries, all_there = SpeakerCache(MemoryStore()), voice(0), [], threading.Barrier(8)

    def build():
        tries.append(1)
        until(lambda: waiting(cache)[key] == 9 - len(tries))  # all but those that have failed
        if len(tries) <= 2:
            raise ZeroDivisionError
        return cold(key)

    def ask(_):
        all_there.wait()
        try:
            return cache.get_or_build(key, build)
        except ZeroDivisionError as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert sum(isinstance(answer, ZeroDivisionError) for answer in answers) == 2
    assert sum(exact(answer, key) for answer in answers if not isinstance(answer, ZeroDivisionError)) == 6
    assert len(tries) == 3 and not building(cache)
    assert cache.stats().built == 1


def test_extending_goes_on_from_the_longest_known_beginning():
    cache, starts = SpeakerCache(MemoryStore()), []

    def ask(*tokens):
        key = ids(*tokens)

        def extend(start):
            starts.append(0 if start is None else len(start))
            assert start is None or exact(start, key.first(len(start)))
            return cold(key)

        assert exact(cache.get_or_extend(key, extend), key)

    for tokens in ((1, 2, 3), (1, 2, 3, 4, 5), (1, 2, 3, 4, 6, 7), (1, 2), (1, 9), (2,), (1, 2, 3, 4, 6)):
        ask(*tokens)
    assert starts == [0, 3, 4, 1, 0]
    stats = cache.stats()
    assert (stats.built, stats.extended, stats.hits) == (2, 3, {"memory": 2})


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_found_extended_and_built_adds_up_to_what_was_asked(kind, stores):
    store, random = stores(kind, max_bytes=3 * len(cold(voice(0)).to_bytes())), Random(0)
    cache, built = SpeakerCache(store), []
    for asked in range(1, 80):
        key = ids(random.randrange(2), *(random.randrange(3) for _ in range(random.randrange(5))))

        def extend(start, key=key):
            built.append(start)
            return cold(key)

        assert exact(cache.get_or_extend(key, extend), key)
        settled(store)
        if asked % 10 == 0:
            cache.evict(key)
            assert not store.has(key)
        stats = cache.stats()
        assert sum(stats.hits.values()) + stats.extended + stats.built == asked == store.hits + store.misses
        assert (stats.built, stats.extended) == (built.count(None), len(built) - built.count(None))
        assert stats.nbytes == {tier.name: tier.nbytes for tier in store.tiers}


def test_what_is_pinned_ahead_stays(stores):
    store, keys = stores("memory+disk", max_bytes=2 * len(cold(voice(0)).to_bytes())), [voice(i) for i in range(6)]
    cache = SpeakerCache(store)
    cache.pin(keys[0])
    for key in keys:
        cache.get_or_build(key, lambda key=key: cold(key))
    assert exact(cache.get(keys[0]), keys[0])
    assert not all(store.has(key) for key in keys)
    cache.evict(keys[0])
    assert cache.get(keys[0]) is None


@pytest.mark.parametrize("other", [voice(1), voice(0, tokens=5), voice(0, model="n"), voice(0, dtype=torch.float16)])
def test_a_build_of_something_else_is_refused_and_not_kept(other):
    cache, key = SpeakerCache(MemoryStore()), voice(0)
    for ask in (
        lambda: cache.get_or_build(key, lambda: cold(other)),
        lambda: cache.get_or_extend(key, lambda _: cold(other)),
    ):
        with pytest.raises(InputError, match="build exactly what the key says"):
            ask()
    assert cache.stats().nbytes == {"memory": 0} and cache.get(key) is None
    assert exact(cache.get_or_build(key, lambda: cold(key)), key)
