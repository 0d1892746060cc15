"""A clock that only the test moves."""


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
