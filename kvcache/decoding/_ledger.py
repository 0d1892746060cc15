"""What has become of a scheduler's requests, and how long they took."""

import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

_LATEST = 1000  # requests that percentiles are over
_LAST = 32  # requests whose length says how soon another may come


@dataclass(frozen=True)
class SchedulerMetrics:
    """What a scheduler does and has done.

    Attributes:
        rows: jobs that can decode together.
        busy: jobs that do.
        waiting: requests none of whose jobs has begun.
        running: requests that have begun.
        finished: requests whose consumers were given all of it.
        cancelled: that were closed, cancelled or forgotten before that.
        failed: that ended by an error once they could begin, in decoding or in what is made of its chunks.
        refused: of which nothing has run: there was no room, or they cannot be run as given.
        tokens: decoded since the start.
        ttfa: seconds from `submit` to the first item at the consumer, of the last 1000 requests: ``p50``, ``p90``,
            ``p99``; nothing before there are any.
    """

    rows: int
    busy: int
    waiting: int
    running: int
    finished: int
    cancelled: int
    failed: int
    refused: int
    tokens: int
    ttfa: dict[str, float] = field(default_factory=dict)


class Ledger:
    """Counts requests by how they ended, and keeps how long the last ones took.

    Attributes:
        counts: how many ended how: ``"finished"``, ``"cancelled"``, ``"failed"``, ``"refused"``.
        firsts: seconds from `Scheduler.submit` to the first item, of the last requests.
    """

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("finished", "cancelled", "failed", "refused"), 0)
        self.firsts: deque[float] = deque(maxlen=_LATEST)
        self._lengths: deque[float] = deque(maxlen=_LAST)  # seconds from a request's begin to its end

    def now(self) -> float:
        """Seconds by the clock that all of this is measured with."""
        return time.perf_counter()

    def first(self, since: float) -> None:
        """A request that was submitted then has given its first item."""
        self.firsts.append(self.now() - since)

    def over(self, began: float) -> None:
        """A request that began then is over."""
        self._lengths.append(self.now() - began)

    def until_room(self, waiting: int, began: Sequence[float]) -> float:
        """Seconds in which those who wait will have begun, if requests go on to take as long as the last ones.

        Args:
            waiting: how many.
            began: when those that run have begun.
        """
        now = self.now()
        ages = [now - one for one in began]
        means = [sum(one) / len(one) for one in (ages, list(self._lengths)) if one]
        return max(1.0, waiting * max(means, default=0.0) / max(1, len(began)))

    def percentiles(self) -> dict[str, float]:
        """``p50``, ``p90`` and ``p99`` of the seconds to the first item; nothing before there are any."""
        firsts = list(self.firsts)
        if not firsts:
            return {}
        cuts = statistics.quantiles(firsts * 2 if len(firsts) == 1 else firsts, n=100, method="inclusive")
        return {f"p{p}": cuts[p - 1] for p in (50, 90, 99)}
