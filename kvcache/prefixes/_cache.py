"""`PrefixCache`: prefixes (voices, system prompts) that are computed once and served to every request."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any

import torch

from kvcache.errors import CorruptError, InputError
from kvcache.events import Event, emit, has_listeners
from kvcache.io import shown_value
from kvcache.prefixes._snapshot import PrefixKey, PrefixSnapshot
from kvcache.prefixes.stores._base import Store, log
from kvcache.prefixes.stores._disk import DiskStore
from kvcache.prefixes.stores._memory import MemoryStore
from kvcache.prefixes.stores._tiered import TieredStore


@dataclass(frozen=True)
class PrefixStats:
    """What a `PrefixCache` has done so far.

    Attributes:
        hits: whole prefixes found, by tier.
        extended: prefixes of which a beginning was found and the rest computed.
        built: prefixes computed from nothing.
        refused: snapshots that were found and not used, because they were corrupt or of another content.
        nbytes: bytes held now, by tier.
        build_seconds: spent on computing prefixes.
        seconds_saved: what it would have taken to compute those that were found.
    """

    hits: dict[str, int]
    extended: int = 0
    built: int = 0
    refused: int = 0
    nbytes: dict[str, int] = field(default_factory=dict)
    build_seconds: float = 0.0
    seconds_saved: float = 0.0


class PrefixCache:
    """Prefixes by content: computed once, whoever asks first, and served from then on.

    Args:
        store: where they live; by default memory over disk (see `default_store`).

    Raises:
        InputError: for what is no store.
    """

    def __init__(self, store: Store | None = None) -> None:
        if store is not None and not isinstance(store, Store):
            raise InputError(
                f"store={shown_value(store)} must be a Store; give for example MemoryStore('1GiB'), DiskStore(folder) or "
                "TieredStore(MemoryStore(), DiskStore())"
            )
        self.store = default_store() if store is None else store
        self._lock = Lock()
        self._building: dict[PrefixKey, Lock] = {}
        self._waiting: dict[PrefixKey, int] = {}
        self._extended = self._built = self._refused = 0
        self._build_seconds = self._seconds_saved = 0.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.store!r})"

    def get(self, key: PrefixKey) -> PrefixSnapshot | None:
        """The snapshot of exactly this content, if it is stored."""
        found = self._find(key)
        return self._hit(found) if found is not None and len(found) == len(key) else None

    def get_or_build(self, key: PrefixKey, build: Callable[[], PrefixSnapshot]) -> PrefixSnapshot:
        """The snapshot of `key`, from the store or from `build`.

        Several threads that ask for the same at once wait for the first of them, which builds. If it fails, its error is
        its own, and the next one tries.

        Raises:
            InputError: if `build` returns the snapshot of something else.
        """
        return self._get(key, lambda start: build(), extending=False)

    def get_or_extend(
        self, key: PrefixKey, extend: Callable[[PrefixSnapshot | None], PrefixSnapshot]
    ) -> PrefixSnapshot:
        """As `get_or_build`, but `extend` is given the longest known beginning of `key`, or None, to go on from."""
        return self._get(key, extend)

    def find(self, key: PrefixKey) -> PrefixSnapshot | None:
        """The longest beginning of `key` that is stored, which may be all of it."""
        found = self._find(key)
        with self._lock:
            self._seconds_saved += 0.0 if found is None else found.build_seconds
        return self._hit(found) if found is not None and len(found) == len(key) else found

    def compute(
        self,
        key: PrefixKey,
        start: PrefixSnapshot | None,
        extend: Callable[[PrefixSnapshot | None], PrefixSnapshot],
    ) -> PrefixSnapshot:
        """What `extend` makes of `start`, None for nothing, counted and told. It is not stored, and no store is asked.

        Raises:
            InputError: if `extend` returns the snapshot of something else.
        """
        began = time.perf_counter()
        built = extend(start)
        seconds = time.perf_counter() - began
        if built.key != key:
            raise InputError(f"asked for {key!r}, built {built.key!r}; build exactly what the key says")
        if start is not None:
            built = replace(built, parent=start.key.address)
        with self._lock:
            self._build_seconds += seconds
            self._extended += start is not None
            self._built += start is None
        numbers = {"tokens": len(key), "nbytes": built.nbytes, "seconds": seconds}
        if start is not None:
            numbers["known"] = len(start)
        emit(Event("built" if start is None else "extended", repr(key), numbers))
        return built

    def keep(self, snapshot: PrefixSnapshot) -> None:
        """Store what `compute` gave."""
        self.store.put(snapshot)

    def pin(self, key: PrefixKey, pinned: bool = True) -> None:
        """Never evict this one from any tier; it need not be there yet."""
        self.store.pin(key, pinned)

    def evict(self, key: PrefixKey) -> None:
        """Forget this one in all tiers, pinned or not."""
        self.store.delete(key)

    def stats(self) -> PrefixStats:
        """What was found, computed and refused so far, and what is held now."""
        tiers = self.store.tiers
        with self._lock:
            return PrefixStats(
                {tier.name: tier.hits for tier in tiers},
                self._extended,
                self._built,
                self._refused + sum(tier.refused for tier in tiers),
                {tier.name: tier.nbytes for tier in tiers},
                self._build_seconds,
                self._seconds_saved,
            )

    def close(self) -> None:
        """Wait for what is still being written, and let go of connections."""
        self.store.close()

    # ------------------------------------------------------------------ inside

    def _get(
        self, key: PrefixKey, extend: Callable[[PrefixSnapshot | None], PrefixSnapshot], extending: bool = True
    ) -> PrefixSnapshot:
        with self._alone_with(key):  # looking it up too: a file is read once, however many ask for it
            found = self._find(key) if extending else self.get(key)
            with self._lock:
                self._seconds_saved += 0.0 if found is None else found.build_seconds
            if found is not None and len(found) == len(key):
                return self._hit(found) if extending else found
            built = self.compute(key, found, extend)
            self.keep(built)
            return built

    @staticmethod
    def _hit(found: PrefixSnapshot) -> PrefixSnapshot:
        if has_listeners("hit"):
            numbers = {"tokens": len(found), "nbytes": found.nbytes, "seconds": found.build_seconds}
            emit(Event("hit", repr(found.key), numbers))
        return found

    def _find(self, key: PrefixKey) -> PrefixSnapshot | None:
        """What the store has, if that is what was asked for: no store is trusted, whoever wrote it."""
        found = self.store.get(key)
        if found is not None:
            try:
                found.check(key)
            except CorruptError as error:
                log.warning("%s gave %r for %r (%s); it will not be used", self.store.name, found.key, key, error)
                with self._lock:
                    self._refused += 1
                emit(Event("refused", repr(key), reason=f"{self.store.name} gave another one: {error}"))
                return None
        return found

    @contextmanager
    def _alone_with(self, key: PrefixKey) -> Iterator[None]:
        """One thread at a time for each key."""
        with self._lock:
            turn = self._building.setdefault(key, Lock())
            self._waiting[key] = self._waiting.get(key, 0) + 1
        try:
            with turn:
                yield
        finally:
            with self._lock:
                self._waiting[key] -= 1
                if not self._waiting[key]:
                    del self._waiting[key], self._building[key]


SpeakerCache = PrefixCache  # what speech calls it: there a prefix is a voice


def default_store(device: torch.device | str | None = None) -> TieredStore:
    """A gibibyte of memory over four of disk; no server needed.

    Args:
        device: where the memory tier holds them; by default where they were computed.
    """
    return TieredStore(MemoryStore("1GiB", device=device), DiskStore())


def check_prefix_cache(prefix_cache: Any) -> None:
    """Raise `InputError` for what is no `PrefixCache`."""
    if prefix_cache is not None and not isinstance(prefix_cache, PrefixCache):
        raise InputError(
            f"prefix_cache={shown_value(prefix_cache)} must be a PrefixCache; give for example PrefixCache(MemoryStore('1GiB')), or "
            "PrefixCache(RedisStore('redis://…'))"
        )
