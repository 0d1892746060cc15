"""A batch that opens at once, and requests of a scheduler whose tokens are known beforehand."""

import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from kvcache.decoding import Batch, Chunk, Scheduler, SchedulerMetrics, Stream
from support.tables import TABLE, chain, link, linked


class Gate:
    """Lets so many steps through, or all of them; a step that is told to fails."""

    def __init__(self) -> None:
        self.changed, self.left = threading.Condition(), float("inf")
        self.fails: list[BaseException] = []

    def let(self, steps: float = float("inf")) -> None:
        """From now on so many steps pass, and then none: a batch that is stopped in the middle, not when the clock says."""
        with self.changed:
            self.left = steps
            self.changed.notify_all()

    def __call__(self, tokens: Tensor, made: Tensor, given: Any) -> Tensor:
        with self.changed:
            assert self.changed.wait_for(lambda: self.left, 60)
            self.left -= 1
        if self.fails:
            raise self.fails.pop()
        return TABLE[tokens]


class Opened:
    """Opens batches for a scheduler, and keeps them for a look from outside."""

    def __init__(self, places: int = 3, **options: Any) -> None:
        self.places, self.gate, self.options = places, Gate(), options
        self.batches: list[Batch] = []
        self.closed = 0

    @contextmanager
    def __call__(self) -> Iterator[Batch]:
        self.batches.append(Batch(chain(self.places, forward=self.gate), **self.options))
        try:
            yield self.batches[-1]
        finally:
            self.closed += 1

    @property
    def batch(self) -> Batch:
        return self.batches[-1]


def both(chunk: Chunk) -> Iterator[tuple[int, Any]]:
    """What a consumer is given: two items for a chunk, the tokens and whether it is the last of its job."""
    yield chunk.index, chunk.tokens.tolist()
    yield chunk.index, chunk.last


def ask(
    scheduler: Scheduler,
    lengths: Sequence[int],
    size: int = 4,
    through: Callable[[Chunk], Iterable[Any]] = both,
    **options: Any,
) -> Stream[Any]:
    return scheduler.submit(
        len(lengths),
        lambda index, before: link(index, lengths[index], seed=index),
        size=size,
        through=through,
        **options,
    )


def due(lengths: Sequence[int], size: int = 4) -> list[tuple[int, Any]]:
    """All that `both` gives of such a request."""
    items: list[tuple[int, Any]] = []
    for index, length in enumerate(lengths):
        said = linked(index, length, index)
        for at in range(0, length, size):
            items += [(index, said[at : at + size]), (index, at + size >= length)]
    return items


async def read(stream: AsyncIterator[Any], items: list[Any]) -> None:
    async for item in stream:
        items.append(item)  # noqa: PERF401  # one by one, as what follows may fail


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name in ("kvcache-scheduler", "kvcache-prepare")]


def counted(metrics: SchedulerMetrics) -> tuple[int, int, int, int]:
    return metrics.finished, metrics.cancelled, metrics.failed, metrics.refused
