"""What Redis forgets by itself, and a store above another."""

import threading
from concurrent.futures import Future

import pytest
from support.inside import stores as inside
from support.snapshots import cold, exact, ids, voice
from support.stores import size
from support.waiting import until

from kvcache.prefixes.stores import DiskStore, MemoryStore, RedisStore, TieredStore

pytestmark = pytest.mark.one_release

# ---------------------------------------------------------------------- Redis


def test_redis_forgets_what_is_old_unless_it_is_pinned(redis_url):
    early, late, plain, released = map(voice, range(4))
    # The server's clock is the real one; what is asserted holds however long it takes.
    with RedisStore(redis_url, namespace="ttl", ttl=0.05, max_bytes="1MB", timeout=20) as store:
        store.pin(early)
        for key in (early, late, plain, released):
            store.put(cold(key))
        for key in (late, released):
            store.pin(key)
            store.put(cold(key))  # also if it was slow, and had expired before it was pinned
        store.pin(released, False)
        until(lambda: not (store.has(plain) or store.has(released)))
        assert all(
            inside.client_of(store).ttl(inside.key_of(store, key.address)) == -1 for key in (early, late)
        )  # they have no end
        assert [store.has(key) for key in (early, late, plain, released)] == [True, True, False, False]
        assert store.nbytes == sum(size(store, key) for key in (early, late))
        store.put(cold(early))  # strikes the others from the books
        assert (
            inside.client_of(store).hlen(inside.books_of(store)[1])
            == inside.client_of(store).zcard(inside.books_of(store)[0])
            == 2
        )


def test_to_pin_is_to_stop_the_clock(redis_url):
    key = voice(0)
    with RedisStore(redis_url, namespace="clock", ttl=1000, timeout=20) as store:
        store.put(cold(key))
        for pinned in (False, True, False):
            store.pin(key, pinned)
            assert (inside.client_of(store).pttl(inside.key_of(store, key.address)) == -1) == pinned


# ---------------------------------------------------------------------- tiers


class Gated(DiskStore):
    """Writes when it is let."""

    def __init__(self, folder):
        super().__init__(folder)
        self.gate = threading.Event()

    def _write(self, address, data):
        assert self.gate.wait(10)
        super()._write(address, data)


def small_over_gated(folder):
    """Memory for one voice, over a disk that is not yet let write."""
    disk = Gated(folder)
    return TieredStore(MemoryStore(cold(voice(0)).nbytes), disk), disk


def when_waited_for(monkeypatch, act):
    """From now on `act` is called as soon as somebody waits for the end of a write."""
    result = Future.result

    def waits(future, timeout=None):
        act()
        return result(future, timeout)

    monkeypatch.setattr(Future, "result", waits)


def test_what_is_found_below_is_moved_up(stores, redis_url, tmp_path):
    key = voice(0)
    with RedisStore(redis_url, namespace="up", timeout=20) as far:
        far.put(cold(key))
    with TieredStore(MemoryStore(), DiskStore(tmp_path), RedisStore(redis_url, namespace="up", timeout=20)) as store:
        memory, disk, far = store.tiers
        assert exact(store.get(key), key)
        store.flush()
        assert memory.has(key) and disk.has(key)
        assert exact(store.get(key), key)
        assert [tier.hits for tier in store.tiers] == [1, 0, 1]
        far.delete(key)
        memory.delete(key)
        assert exact(store.get(key), key) and memory.has(key)
        assert [tier.hits for tier in store.tiers] == [1, 1, 1]
        assert not far.has(key)  # nothing moves down by being asked for


def test_what_memory_evicts_is_written_below_if_it_is_not_there(tmp_path):
    first, second = voice(0), voice(1)
    with TieredStore(MemoryStore(cold(first).nbytes), DiskStore(tmp_path)) as store:
        memory, disk = store.tiers
        memory.put(cold(first))
        assert not disk.has(first)
        store.put(cold(second))
        store.flush()
        assert not memory.has(first) and disk.has(first)
        written = inside.path_of(disk, first.address).stat().st_ino
        assert exact(store.get(first), first)  # drives out the second, and is driven out by it
        assert exact(store.get(second), second)
        store.flush()
        assert inside.path_of(disk, first.address).stat().st_ino == written


def test_what_is_still_to_be_written_is_served(tmp_path):
    store, disk = small_over_gated(tmp_path)
    with store:
        for i in range(5):
            store.put(cold(voice(i)))
        assert not any(disk.has(voice(i)) for i in range(5))
        assert all(exact(store.get(voice(i)), voice(i)) for i in range(5))
        disk.gate.set()
        store.flush()
        assert all(disk.has(voice(i)) for i in range(5))
    assert store.hits == 5 and store.misses == 0


def test_a_beginning_in_memory_does_not_hide_what_is_still_to_be_written(tmp_path):
    disk, short, long = Gated(tmp_path), ids(1, 2), ids(1, 2, 3)
    with TieredStore(MemoryStore(cold(long).nbytes), disk) as store:
        store.put(cold(long))
        store.tiers[0].delete(long)
        store.tiers[0].put(cold(short))
        found = store.get(long)
        disk.gate.set()
    assert exact(found, long)


def test_what_is_deleted_before_it_was_written_stays_deleted(tmp_path, monkeypatch):
    store, disk = small_over_gated(tmp_path)
    with store:
        for i in range(4):
            store.put(cold(voice(i)))
        when_waited_for(monkeypatch, disk.gate.set)
        store.delete(voice(1))
        store.flush()
        assert [store.has(voice(i)) for i in range(4)] == [True, False, True, True]
        assert store.get(voice(1)) is None


def test_s4_writes_that_wait_are_bounded_and_nobody_waits_for_them(tmp_path, caplog, monkeypatch):
    store, disk = small_over_gated(tmp_path)
    when_waited_for(monkeypatch, lambda: pytest.fail("a request waits for a write"))
    for i in range(40):
        store.put(cold(voice(i)))  # the disk is not let write: each of them returns at once
        assert len(inside.still_to_write(store)) <= 16
    assert store.dropped >= 24 and len(caplog.messages) == 1 and "16 others wait" in caplog.text
    store.delete(voice(15))
    assert store.get(voice(15)) is None
    monkeypatch.undo()
    disk.gate.set()
    store.flush()
    assert [disk.has(voice(i)) for i in range(40)] == [i < 15 for i in range(40)]
    store.close()


def test_closing_writes_what_waits_and_later_puts_are_logged(tmp_path, caplog, monkeypatch):
    store, disk = small_over_gated(tmp_path)
    store.put(cold(voice(0)))
    when_waited_for(monkeypatch, disk.gate.set)
    store.close()
    assert disk.has(voice(0)) and not caplog.records
    store.put(cold(voice(1)))
    store.close()
    assert "is not written" in caplog.text and not disk.has(voice(1))


def test_without_writing_behind_all_tiers_have_it_at_once(tmp_path):
    disk = DiskStore(tmp_path)
    with TieredStore(MemoryStore(), disk, write_behind=False) as store:
        store.put(cold(voice(0)))
        assert disk.has(voice(0))
