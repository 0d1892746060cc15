"""What a scheduler of requests of one kind has of the `Scheduler` that it puts them to."""

from typing_extensions import Self

from kvcache.decoding._ledger import SchedulerMetrics
from kvcache.decoding._scheduler import Scheduler


class SchedulerFront:
    """Begins and ends with a `Scheduler`, and tells how it is.

    Args:
        scheduler: that requests are put to.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    async def __aenter__(self) -> Self:
        await self._scheduler.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all requests, whose clients are told, and the threads."""
        await self._scheduler.close()

    @property
    def closed(self) -> bool:
        """Whether it takes no requests: not yet begun, closed, or ended by an error."""
        return self._scheduler.closed

    @property
    def error(self) -> BaseException | None:
        """What ended it, or came up when it was closed; None while all is well."""
        return self._scheduler.error

    def metrics(self) -> SchedulerMetrics:
        """What it does and has done; ``ttfa`` is to the first that a client was given."""
        return self._scheduler.metrics()
