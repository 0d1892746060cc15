"""Decodings that wait for their next request: what was captured or compiled serves again."""

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from threading import Lock

from kvcache.decoding._engine import Decoding
from kvcache.models import Signature


class Pool:
    """Lends a `Decoding` to one request at a time, and keeps one of a kind for the next.

    Args:
        most: kinds that one request and those that wait may come to; None: any number. Where memory is planned, one: then
            what waits is what the last request held, and it is gone before another kind is made.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._idle: dict[Hashable, Decoding] = {}
        self._of: Signature | None = None  # the model that those are for
        self._lock = Lock()

    @contextmanager
    def lent(
        self,
        kind: Hashable,
        slots: int,
        make: Callable[[int], Decoding],
        exactly: bool = False,
        signature: Signature | None = None,
    ) -> Iterator[Decoding]:
        """A decoding of this kind with at least so many slots; a new one if none waits.

        Args:
            kind: what must be alike, such as the number of rows.
            slots: what the request needs.
            make: makes one with so many slots.
            exactly: or with just so many, where memory is bounded.
            signature: of the model that it is made from. What was made from the model as it was before is let go of; who
                has it lent finishes with it.
        """
        with self._lock:
            if self._of is not signature:
                self._idle.clear()
                self._of = signature
            decoding = self._idle.pop(kind, None)
            captured = self._let_go(1)
        if decoding is None or decoding.kv.slots < slots or (exactly and decoding.kv.slots != slots):
            captured |= decoding is not None and decoding.backend != "eager"
            decoding = None  # its memory first
            if captured and self._most is not None:
                gc.collect()  # what was captured refers to its decoding, and that to it
            decoding = make(slots)
        try:
            yield decoding
        finally:
            decoding.free(0, len(decoding.token))
            if decoding.backend == "eager":
                decoding.beside.clear()  # they refer to it, so that its memory would wait for a collection
            with self._lock:
                waiting = self._idle.get(kind)
                fits = waiting is None or exactly or waiting.kv.slots < decoding.kv.slots
                if fits and self._of is signature:
                    self._idle.pop(kind, None)
                    self._idle[kind] = decoding
                    self._let_go(0)

    def _let_go(self, lent: int) -> bool:
        """Let go of those that have waited longest, while there are more kinds than may be; `lent` are in use.

        Returns:
            Whether there was anything captured or compiled among them.
        """
        captured = False
        while self._most is not None and len(self._idle) + lent > self._most:
            captured |= self._idle.pop(next(iter(self._idle))).backend != "eager"
        return captured

    def clear(self) -> None:
        """Let go of what waits, and of its memory."""
        with self._lock:
            self._idle.clear()
