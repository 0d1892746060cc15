"""Several stores as one: memory over disk over remote."""

import os
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from threading import Lock

from kvcache.errors import InputError
from kvcache.io import shown_value
from kvcache.prefixes._snapshot import PrefixKey, PrefixSnapshot
from kvcache.prefixes.stores._base import Store, StoreEntry, log
from kvcache.prefixes.stores._memory import MemoryStore

_MOST_PENDING = 16  # writes; beyond them one is dropped, so that memory stays bounded and no request waits


class TieredStore(Store):
    """Asks the fastest tier first, and moves what it finds further down up (promotion).

    What is put goes to every tier: to the first at once, to the others by a thread in the background, in order. Where that
    cannot keep up, what it would have written is dropped, with a line in the log: it is computed again when it has left the
    first tier. What the memory tier evicts is written to the next one if it is not there (demotion).

    Args:
        *tiers: the fastest first.
        write_behind: False writes to all tiers before `put` returns.

    Raises:
        InputError: without a tier, or for one that is no store.

    Attributes:
        dropped: writes that were dropped so far.
    """

    name = "tiered"

    def __init__(self, *tiers: Store, write_behind: bool = True) -> None:
        super().__init__()
        if not tiers:
            raise InputError("TieredStore() has no tier; give at least one, such as MemoryStore()")
        for tier in tiers:
            if not isinstance(tier, Store):
                raise InputError(
                    f"TieredStore() was given {shown_value(tier)}, which is no Store; give for example MemoryStore('1GiB'), "
                    "DiskStore(folder) or RedisStore('redis://…')"
                )
        self._tiers = tiers
        self._write_behind = write_behind
        self.dropped = 0
        self._start()
        if isinstance(tiers[0], MemoryStore) and len(tiers) > 1:
            tiers[0].on_evict = self._demote

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self._tiers))})"

    def _start(self) -> None:
        self._process = os.getpid()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kvcache-write") if self._write_behind else None
        self._pending: dict[int, tuple[Future[None], PrefixSnapshot]] = {}
        self._crowded = False
        self._lock = Lock()

    def _after_fork(self) -> None:
        if self._process != os.getpid():  # the thread stayed in the parent, which writes what was put there
            self._start()

    @property
    def tiers(self) -> tuple[Store, ...]:
        return self._tiers

    def get(self, key: PrefixKey) -> PrefixSnapshot | None:
        best: PrefixSnapshot | None = None
        for i, tier in enumerate(self._tiers):
            found = tier.get(key)
            if i == 0 and (found is None or len(found) < len(key)):
                found = self._being_written(key) or found  # evicted from the first tier, and not yet in the next
            if found is not None and (best is None or len(found) > len(best)):
                best = found
            if found is not None and len(found) == len(key):
                if i:
                    self._put(found, self._tiers[:i])
                break
        return self._counted(key, best)

    def has(self, key: PrefixKey) -> bool:
        return any(tier.has(key) for tier in self._tiers)

    def put(self, snapshot: PrefixSnapshot) -> None:
        self._put(snapshot, self._tiers)

    def delete(self, key: PrefixKey) -> None:
        self._after_fork()
        with self._lock:  # or a write that is still to come would bring it back
            coming = [future for future, snapshot in self._pending.values() if snapshot.key == key]
        for future in coming:
            if not future.cancel():
                future.result()  # the one that is being written now
        for tier in self._tiers:
            tier.delete(key)

    def pin(self, key: PrefixKey, pinned: bool = True) -> None:
        for tier in self._tiers:
            tier.pin(key, pinned)

    def entries(self) -> list[StoreEntry]:
        return [entry for tier in self._tiers for entry in tier.entries()]

    @property
    def nbytes(self) -> int:
        return sum(tier.nbytes for tier in self._tiers)

    def flush(self) -> None:
        """Wait until everything put so far has been written."""
        self._after_fork()
        with self._lock:
            futures = [future for future, _ in self._pending.values()]
        for future in futures:
            with suppress(CancelledError):  # what it would have written was deleted
                future.result()

    def close(self) -> None:
        self.flush()
        if self._pool is not None:
            self._pool.shutdown()
        for tier in self._tiers:
            tier.close()

    def _put(self, snapshot: PrefixSnapshot, tiers: tuple[Store, ...]) -> None:
        tiers[0].put(snapshot)
        self._later(snapshot, tiers[1:])

    def _demote(self, snapshot: PrefixSnapshot) -> None:
        if self._being_written(snapshot.key) is None:
            self._later(snapshot, self._tiers[1:2], unless_there=True)

    def _later(self, snapshot: PrefixSnapshot, tiers: tuple[Store, ...], unless_there: bool = False) -> None:
        def write() -> None:
            for tier in tiers:
                if not (unless_there and tier.has(snapshot.key)):
                    tier.put(snapshot)

        if not tiers:
            return
        self._after_fork()
        if self._pool is None:
            write()
            return
        with self._lock:
            if len(self._pending) >= _MOST_PENDING:
                self.dropped += 1
                if not self._crowded:  # once, however many follow
                    log.warning("%s: %r is not written: %d others wait to be", self.name, snapshot, _MOST_PENDING)
                self._crowded = True
                return
            self._crowded = False
            try:
                future = self._pool.submit(write)
            except RuntimeError:  # the interpreter is on its way out
                log.warning("%s: %r is not written: the program is ending", self.name, snapshot)
                return
            self._pending[id(future)] = future, snapshot
        future.add_done_callback(self._written)

    def _written(self, future: "Future[None]") -> None:
        with self._lock:
            self._pending.pop(id(future), None)

    def _being_written(self, key: PrefixKey) -> PrefixSnapshot | None:
        self._after_fork()
        with self._lock:
            waiting = [snapshot for _, snapshot in self._pending.values()]
        return next((snapshot for snapshot in waiting if snapshot.key == key), None)
