"""Clocks that only the test moves."""

from threading import Lock


class Clock:
    """In place of the module `time`, where the code under test reads seconds from it.

    Attributes:
        now: seconds, on all its faces.
    """

    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now


class Ticking:
    """In place of `time.perf_counter`: goes on by a tick whenever it is looked at, and as far as it is told to.

    So every stretch of time is longer than nothing, and none depends on what the machine does meanwhile.

    Args:
        tick: seconds.
    """

    def __init__(self, tick: float = 1e-6) -> None:
        self.tick = tick
        self._now, self._lock = 0.0, Lock()

    def __call__(self) -> float:
        return self.go_on(self.tick)

    def go_on(self, seconds: float) -> float:
        """Let so much time pass; the time then."""
        with self._lock:
            self._now += seconds
            return self._now
