"""Asking a store, and writing to it, for who must not wait: a store may be slow, or hang, and costs a computation at most."""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from kvcache.io import Redactor
from kvcache.prefixes._snapshot import PrefixKey, PrefixSnapshot

log = logging.getLogger("kvcache.stores")

_PATIENCE = 0.25  # seconds; most of what is known takes milliseconds to find, and computing it tenths of a second
_MOST_PENDING = 16  # writes; each holds the memory of a prefix


class _Finds(Protocol):
    def find(self, key: PrefixKey) -> PrefixSnapshot | None: ...

    def keep(self, snapshot: PrefixSnapshot) -> None: ...


class Aside:
    """Reads and writes of prefixes in threads of their own, which end when there is nothing to do.

    Args:
        prefix_cache: a `PrefixCache`.
        patience: seconds that `find` waits for it.
    """

    def __init__(self, prefix_cache: _Finds, patience: float = _PATIENCE) -> None:
        self._prefix_cache, self._patience = prefix_cache, patience
        self.dropped = 0  # writes
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._asking = False
        self._pending: deque[PrefixSnapshot] = deque()  # the first is being written

    def _after_fork(self) -> None:
        if self._process != os.getpid():  # the threads stayed in the parent, which ends what was begun there
            self._start()

    def find(self, key: PrefixKey) -> PrefixSnapshot | None:
        """The longest beginning of `key` that is known, which may be all of it; None also if the store takes too long.

        While a question that was given up is still under way, the store is not asked again.
        """
        self._after_fork()
        if (waiting := self.pending(key)) is not None:
            return waiting
        with self._changed:
            if self._asking:
                return None
            self._asking = True
        found: list[PrefixSnapshot | None] = []

        def ask() -> None:
            try:
                found.append(self._prefix_cache.find(key))
            except BaseException as error:  # a store never should
                log.warning("could not look for %r (%s); it is computed", key, _told(error))
                found.append(None)
            with self._changed:
                self._asking = False
                self._changed.notify_all()

        if not _started(ask, "kvcache-find"):
            with self._changed:
                self._asking = False
            return None
        with self._changed:
            if not self._changed.wait_for(lambda: found, self._patience):
                log.warning("the store has not found %r within %g s; it is computed", key, self._patience)
        return found[0] if found else None

    def pending(self, key: PrefixKey) -> PrefixSnapshot | None:
        """What is still to be written for just this key. Never waits."""
        self._after_fork()
        with self._changed:
            waiting = list(self._pending)
        return next((snapshot for snapshot in waiting if snapshot.key == key), None)

    def put(self, snapshot: PrefixSnapshot) -> None:
        """Write a snapshot some time soon; not at all where too many wait to be written. Never waits."""
        self._after_fork()
        with self._changed:
            if len(self._pending) >= _MOST_PENDING:
                self.dropped += 1
                log.warning("%d prefixes wait to be written; %r is not kept", len(self._pending), snapshot)
                return
            self._pending.append(snapshot)
            if len(self._pending) == 1 and not _started(self._write, "kvcache-keep"):
                self._pending.clear()
                self.dropped += 1

    def flush(self, seconds: float) -> bool:
        """Wait so long at most until all has been written; whether it has."""
        self._after_fork()
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending, max(0.0, seconds))

    def _write(self) -> None:
        while True:
            with self._changed:
                if not self._pending:
                    return
                snapshot = self._pending[0]
            try:
                self._prefix_cache.keep(snapshot)
            except BaseException as error:  # a store never should
                log.warning("could not write %r (%s)", snapshot, _told(error))
            with self._changed:
                self._pending.popleft()
                self._changed.notify_all()
                if not self._pending:
                    return


def _started(target: Callable[[], None], name: str) -> bool:
    """Whether a thread could be started for it."""
    try:
        threading.Thread(target=target, name=name, daemon=True).start()
    except RuntimeError as error:  # too many, or the interpreter ends
        log.warning("no thread could be started to ask a store (%s)", error)
        return False
    return True


def _told(error: BaseException) -> str:
    return Redactor().error(error)  # it may be of somebody's own store, and name a place with a password
