"""Nothing of a request stays behind in a scheduler."""

import asyncio
import gc
import random
import weakref
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from support.inside import decoding as inside
from support.scheduling import Opened, ask, counted, due, read, threads
from support.searching import examples
from support.tables import assert_empty, chain
from support.waiting import until_async

from kvcache.decoding import Batch, Pool, Request, Scheduler

pytestmark = pytest.mark.one_release


def tensors():
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


async def one_of_many(scheduler, i, chosen, seen):
    """One request; some are closed, cancelled, forgotten, or fail."""
    lengths = [chosen.randint(1, 14) for _ in range(chosen.randint(1, 4))]
    size, items = chosen.randint(1, 5), []
    stream = ask(scheduler, lengths, size=size, sequence=chosen.random() < 0.3)
    fate, stops = chosen.choice(["read", "read", "close", "cancel", "forget", "fail"]), chosen.randint(0, 4)
    if fate == "fail":
        inside.inbox_of(stream).through = partial(map, {}.__getitem__)  # no item for any chunk
        with pytest.raises(TypeError):
            await anext(stream)
    elif fate == "cancel":
        reading = asyncio.create_task(read(stream, items))
        await until_async(lambda: len(items) >= stops or reading.done())
        if not reading.done():
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
    else:
        for _ in range(1000 if fate == "read" else stops):
            try:
                items.append(await anext(stream))
            except StopAsyncIteration:
                break
        if fate == "close":
            await stream.aclose()
    seen[fate] = seen.get(fate, 0) + 1
    expected = due(lengths, size)
    assert items == (expected if fate == "read" else expected[: len(items)])


def test_a_scheduler_with_nothing_to_do_holds_no_request():
    async def main():
        async with Scheduler(Opened(2), 2) as scheduler:
            streams = [ask(scheduler, [9]) for _ in range(4)]
            held = [weakref.ref(inside.inbox_of(stream).request) for stream in streams]
            assert [item async for item in streams[0]] == due([9])
            await streams[1].aclose()
            del streams
            await until_async(lambda: scheduler.metrics().cancelled + scheduler.metrics().finished == 4)
            await until_async(lambda: inside.turns_of(scheduler).requests == [] and inside.dropped_by(scheduler) == [])

            def gone():
                gc.collect()
                return [one() for one in held] == [None] * 4

            await until_async(gone)

    asyncio.run(main())


@pytest.mark.search
def requests():
    return {id(one) for one in gc.get_objects() if issubclass(type(one), Request)}


def test_two_hundred_requests_leave_nothing_behind():
    pool = Pool()

    @contextmanager
    def opens():
        with pool.lent("batch", 64, lambda slots: chain(4, slots), exactly=True) as decoding:
            for places in range(1, 5):  # what is made when it is needed, and stays
                decoding.first_rows(places).kv.begin(1)
            yield Batch(decoding)

    counts, seen = [], {}

    async def main():
        chosen = random.Random(8)
        async with Scheduler(opens, 4, max_waiting=200) as scheduler:
            held = tensors()
            for _ in range(examples(4)):
                await asyncio.gather(*(one_of_many(scheduler, i, chosen, seen) for i in range(50)))
                gc.collect()
                await until_async(lambda: scheduler.metrics().busy == 0 and not inside.inboxes_of(scheduler))
                await until_async(lambda: inside.turns_of(scheduler).requests == [])
                assert_empty(inside.turns_of(scheduler).batch)
                assert asyncio.all_tasks() == {asyncio.current_task()}
                metrics = scheduler.metrics()
                assert (metrics.busy, metrics.waiting, metrics.running) == (0, 0, 0)
                counts.append(sum(counted(metrics)))
                await until_async(lambda: tensors() <= held, 40)  # what was on its way to a consumer is gone too
            assert metrics.finished >= seen["read"] and metrics.cancelled > 10
            assert metrics.failed == seen["fail"]
        assert_empty_pool()

    def assert_empty_pool():
        [decoding] = inside.idle(pool).values()
        assert_empty(Batch(decoding))

    others = requests()  # the runner keeps what was logged in other tests, errors with all that they went through
    before = tensors()
    asyncio.run(main())
    assert counts == [50 * i for i in range(1, 1 + examples(4))]
    assert len(seen) == 5 and min(seen.values()) > 10
    assert threads() == []
    pool.clear()
    assert tensors() <= before
    assert requests() <= others
