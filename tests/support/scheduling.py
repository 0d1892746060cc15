"""A batch that opens at once, and requests of a scheduler whose tokens are known beforehand."""

import threading
from contextlib import contextmanager

from kvcache.decoding import Batch
from support.tables import TABLE, chain, link, linked


class Gate:
    """Lets so many steps through, or all of them; a step that is told to fails."""

    def __init__(self):
        self.changed, self.left, self.fails = threading.Condition(), float("inf"), []

    def let(self, steps=float("inf")):
        """From now on so many steps pass, and then none: a batch that is stopped in the middle, not when the clock says."""
        with self.changed:
            self.left = steps
            self.changed.notify_all()

    def __call__(self, tokens, made, given):
        with self.changed:
            assert self.changed.wait_for(lambda: self.left, 60)
            self.left -= 1
        if self.fails:
            raise self.fails.pop()
        return TABLE[tokens]


class Opened:
    """Opens batches for a scheduler, and keeps them for a look from outside."""

    def __init__(self, places=3, **options):
        self.places, self.gate, self.options = places, Gate(), options
        self.batches, self.closed = [], 0

    @contextmanager
    def __call__(self):
        self.batches.append(Batch(chain(self.places, forward=self.gate), **self.options))
        try:
            yield self.batches[-1]
        finally:
            self.closed += 1

    @property
    def batch(self):
        return self.batches[-1]


def both(chunk):
    """What a consumer is given: two items for a chunk, the tokens and whether it is the last of its job."""
    yield chunk.index, chunk.tokens.tolist()
    yield chunk.index, chunk.last


def ask(scheduler, lengths, size=4, through=both, **options):
    return scheduler.submit(
        len(lengths),
        lambda index, before: link(index, lengths[index], seed=index),
        size=size,
        through=through,
        **options,
    )


def due(lengths, size=4):
    """All that `both` gives of such a request."""
    items = []
    for index, length in enumerate(lengths):
        said = linked(index, length, index)
        for at in range(0, length, size):
            items += [(index, said[at : at + size]), (index, at + size >= length)]
    return items


async def read(stream, items):
    async for item in stream:
        items.append(item)


def threads():
    return [thread for thread in threading.enumerate() if thread.name in ("kvcache-scheduler", "kvcache-prepare")]


def counted(metrics):
    return metrics.finished, metrics.cancelled, metrics.failed, metrics.refused
