"""Snapshots in this process's memory: the fastest tier, and the one that finds shared beginnings."""

import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from threading import RLock

import torch

from kvcache.io import parse_bytes
from kvcache.prefixes._snapshot import PrefixKey, PrefixSnapshot
from kvcache.prefixes.stores._base import LONGEST_LIFE, Store, StoreEntry, check_seconds, log


@dataclass
class _Entry:
    snapshot: PrefixSnapshot
    nbytes: int
    stored: float


class MemoryStore(Store):
    """Snapshots within a budget of bytes; the least recently used leave first, those that are pinned never.

    A snapshot serves every beginning of its content. So of two, one of which begins with the other, only the longer is
    kept, unless the shorter one is pinned.

    Args:
        max_bytes: the budget, such as ``"1GiB"``.
        ttl: seconds after which a snapshot that is not pinned is forgotten, counted from when it was stored.
        device: where to hold them; by default where they were computed.
    """

    name = "memory"

    def __init__(
        self, max_bytes: int | str = "1GiB", ttl: float | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        check_seconds("ttl", ttl, LONGEST_LIFE, or_none=True)
        self.max_bytes = parse_bytes(max_bytes)
        self.ttl = ttl
        self.device = device
        self.on_evict: Callable[[PrefixSnapshot], None] | None = None
        self._entries: OrderedDict[PrefixKey, _Entry] = OrderedDict()  # least recently used first
        self._families: defaultdict[tuple[object, ...], set[PrefixKey]] = defaultdict(set)
        self._pinned: set[PrefixKey] = set()
        self._nbytes = 0
        self._lock = RLock()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(max_bytes={self.max_bytes}, {len(self._entries)} snapshots, nbytes={self._nbytes})"
        )

    def get(self, key: PrefixKey) -> PrefixSnapshot | None:
        with self._lock:
            return self._counted(key, self._longest(key))

    def has(self, key: PrefixKey) -> bool:
        with self._lock:
            self._expire()
            return key in self._entries

    def put(self, snapshot: PrefixSnapshot) -> None:
        snapshot = (snapshot if self.device is None else snapshot.to(self.device)).compact()
        key, nbytes, evicted = snapshot.key, snapshot.nbytes, []
        with self._lock:
            self._expire()
            pinned = sum(self._entries[other].nbytes for other in self._pinned - {key} if other in self._entries)
            if pinned + nbytes > self.max_bytes:
                log.warning(
                    "%s: %r does not fit beside %d pinned bytes into %d; it is not kept",
                    self.name, snapshot, pinned, self.max_bytes,
                )  # fmt: skip
                return
            if key in self._entries:
                self._drop(key)
            relatives = [(other, other.common(key)) for other in self._families.get(key.family, ())]
            if key not in self._pinned and any(common == len(key) for _, common in relatives):
                return  # a longer one serves it
            for other, common in relatives:
                if common == len(other) and other not in self._pinned:
                    self._drop(other)
            for other in [other for other in self._entries if other not in self._pinned]:
                if self._nbytes + nbytes <= self.max_bytes:
                    break
                evicted.append(self._entries[other].snapshot)
                self._drop(other)
            self._entries[key] = _Entry(snapshot, nbytes, time.monotonic())
            self._families[key.family].add(key)
            self._nbytes += nbytes
        if self.on_evict is not None:
            for old in evicted:
                self.on_evict(old)

    def delete(self, key: PrefixKey) -> None:
        with self._lock:
            self._pinned.discard(key)
            if key in self._entries:
                self._drop(key)

    def pin(self, key: PrefixKey, pinned: bool = True) -> None:
        with self._lock:
            if not pinned:
                self._pinned.discard(key)
                return
            self._pinned.add(key)
            found = None if key in self._entries else self._longest(key)
            if found is not None and len(found) == len(key):
                self.put(found)  # so far it was only the beginning of a longer one, which may leave

    def entries(self) -> list[StoreEntry]:
        with self._lock:
            self._expire()
            started = time.time() - time.monotonic()
            return [
                StoreEntry(key.address, entry.nbytes, started + entry.stored, key in self._pinned)
                for key, entry in self._entries.items()
            ]

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def __len__(self) -> int:
        return len(self._entries)

    def _longest(self, key: PrefixKey) -> PrefixSnapshot | None:
        self._expire()
        best, length = (key, len(key)) if key in self._entries else (None, 0)
        for candidate in () if best else self._families.get(key.family, ()):
            if (common := candidate.common(key)) > length:
                best, length = candidate, common
        if best is None:
            return None
        self._entries.move_to_end(best)
        return self._entries[best].snapshot.first(length)

    def _drop(self, key: PrefixKey) -> None:
        self._nbytes -= self._entries.pop(key).nbytes
        family = self._families[key.family]
        family.discard(key)
        if not family:
            del self._families[key.family]

    def _expire(self) -> None:
        if self.ttl is not None:
            before = time.monotonic() - self.ttl
            for key in [k for k, entry in self._entries.items() if entry.stored < before and k not in self._pinned]:
                self._drop(key)
