"""Asking a store, and writing to it, for who must not wait: a store may be slow, or hang, and costs a computation at most."""

import logging
import threading
from collections import deque
from typing import Protocol

from kvcache.prefix import PrefixKey, PrefixSnapshot

log = logging.getLogger("kvcache.stores")

_PATIENCE = 0.25  # seconds; most of what is known takes milliseconds to find, and computing it tenths of a second
_MOST_PENDING = 16  # writes; each holds the memory of a prefix


class _Speakers(Protocol):
    def find(self, key: PrefixKey) -> PrefixSnapshot | None: ...

    def keep(self, snapshot: PrefixSnapshot) -> None: ...


class Aside:
    """Reads and writes of prefixes in threads of their own, which end when there is nothing to do.

    Args:
        speakers: a `SpeakerCache`.
        patience: seconds that `find` waits for it.
    """

    def __init__(self, speakers: _Speakers, patience: float = _PATIENCE) -> None:
        self._speakers, self._patience = speakers, patience
        self._changed = threading.Condition()
        self._asking = False
        self._pending: deque[PrefixSnapshot] = deque()  # the first is being written
        self.dropped = 0  # writes

    def find(self, key: PrefixKey) -> PrefixSnapshot | None:
        """The longest beginning of `key` that is known, which may be all of it; None also if the store takes too long.

        While a question that was given up is still under way, the store is not asked again.
        """
        if (waiting := self.pending(key)) is not None:
            return waiting
        with self._changed:
            if self._asking:
                return None
            self._asking = True
        found: list[PrefixSnapshot | None] = []

        def ask() -> None:
            try:
                found.append(self._speakers.find(key))
            except Exception as error:  # a store never should
                log.warning("could not look for %r (%s: %s); it is computed", key, type(error).__name__, error)
                found.append(None)
            with self._changed:
                self._asking = False
                self._changed.notify_all()

        threading.Thread(target=ask, name="kvcache-find", daemon=True).start()
        with self._changed:
            if not self._changed.wait_for(lambda: found, self._patience):
                log.warning("the store has not found %r within %g s; it is computed", key, self._patience)
        return found[0] if found else None

    def pending(self, key: PrefixKey) -> PrefixSnapshot | None:
        """What is still to be written for just this key. Never waits."""
        with self._changed:
            waiting = list(self._pending)
        return next((snapshot for snapshot in waiting if snapshot.key == key), None)

    def put(self, snapshot: PrefixSnapshot) -> None:
        """Write a snapshot some time soon; not at all where too many wait to be written. Never waits."""
        with self._changed:
            if len(self._pending) >= _MOST_PENDING:
                self.dropped += 1
                log.warning("%d prefixes wait to be written; %r is not kept", len(self._pending), snapshot)
                return
            self._pending.append(snapshot)
            if len(self._pending) == 1:
                threading.Thread(target=self._write, name="kvcache-keep", daemon=True).start()

    def flush(self, seconds: float) -> bool:
        """Wait so long at most until all has been written; whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending, max(0.0, seconds))

    def _write(self) -> None:
        while True:
            with self._changed:
                if not self._pending:
                    return
                snapshot = self._pending[0]
            try:
                self._speakers.keep(snapshot)
            except Exception as error:  # a store never should
                log.warning("could not write %r (%s: %s)", snapshot, type(error).__name__, error)
            with self._changed:
                self._pending.popleft()
                self._changed.notify_all()
                if not self._pending:
                    return
