"""What the example server tells Prometheus: the scheduler's figures, and how long requests took, by how they ended."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Histogram
from server_errors import REFUSED

from kvcache.monitoring import SchedulerCollector
from kvcache_chatterbox import SpeechScheduler

SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 30, 60, 120)  # buckets of the histograms


class Figures:
    """What Prometheus is told: the scheduler's figures, and two histograms of requests."""

    def __init__(self, scheduler: SpeechScheduler) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(SchedulerCollector(scheduler))
        common = {"buckets": SECONDS, "registry": self.registry}
        self._first = Histogram("kvcache_ttfa_seconds", "From request to first audio.", **common)
        self._end = Histogram("kvcache_request_seconds", "From request to its end.", ["outcome"], **common)

    def begin(self) -> "Timing":
        """The clock of a request."""
        return Timing(self._first, self._end)


class Timing:
    """The clock of a request. `outcome` is how it ends: finished, cancelled, failed or refused."""

    def __init__(self, first: Histogram, end: Histogram) -> None:
        self._first, self._end, self._begin = first, end, time.perf_counter()
        self._heard = False
        self.outcome = "cancelled"

    def heard(self) -> None:
        """The first audio is here."""
        self._heard = True
        self._first.observe(time.perf_counter() - self._begin)

    def over(self) -> None:
        """The request has ended."""
        self._end.labels(self.outcome).observe(time.perf_counter() - self._begin)

    @contextmanager
    def unless_heard(self) -> Iterator[None]:
        """What ends in here before the first audio has ended the request."""
        try:
            yield
        except Exception as error:
            self.outcome = "refused" if isinstance(error, REFUSED) else "failed"
            raise
        finally:
            if not self._heard:
                self.over()
