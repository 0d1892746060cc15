"""Requests on one batch: the async front."""

import asyncio
import gc
import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from support.clocks import Clock
from support.inside import decoding as inside
from support.scheduling import Opened, ask, both, counted, due, read, threads
from support.tables import Breaks, assert_empty, link
from support.waiting import until_async

from kvcache import BusyError, ClosedError, InputError
from kvcache.decoding import Scheduler, SchedulerMetrics, Work

pytestmark = pytest.mark.one_release


def test_streams_are_whole_and_in_order():
    lengths = [[9, 17, 1, 4], [30], [2, 2, 2], [12, 25], [1], [8], [16, 4], [40]]

    async def main():
        opened = Opened()
        async with Scheduler(opened, 3) as scheduler:
            streams = [ask(scheduler, one, sequence=i % 2 == 1) for i, one in enumerate(lengths)]
            said = [[] for _ in streams]
            await asyncio.gather(*map(read, streams, said))
            assert said == [due(one) for one in lengths]
            for stream in streams:  # what is over stays so
                with pytest.raises(StopAsyncIteration):
                    await anext(stream)
                await stream.aclose()
            metrics = scheduler.metrics()
            assert counted(metrics) == (8, 0, 0, 0)
            assert (metrics.rows, metrics.busy, metrics.waiting, metrics.running) == (3, 0, 0, 0)
            assert metrics.tokens == sum(map(sum, lengths))
            assert_empty(opened.batch)
        assert scheduler.metrics().tokens == sum(map(sum, lengths))
        assert opened.closed == 1

    asyncio.run(main())
    assert threads() == []


def test_closing_cancelling_and_forgetting_each_end_a_request():
    async def main():
        opened = Opened(3)
        async with Scheduler(opened, 3) as scheduler:
            kept = ask(scheduler, [60])
            closed, cancelled, forgotten = (ask(scheduler, [60, 60]) for _ in range(3))
            await anext(kept)
            await anext(closed)
            await closed.aclose()
            await closed.aclose()
            assert scheduler.metrics().cancelled == 1

            opened.gate.let(0)
            task = asyncio.create_task(read(cancelled, []))
            await asyncio.sleep(0)  # it begins, and waits for its first item
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert scheduler.metrics().cancelled == 2

            del forgotten
            gc.collect()
            await until_async(lambda: scheduler.metrics().cancelled == 3)
            opened.gate.let()
            assert [item async for item in kept] == due([60])[1:]
            await until_async(lambda: scheduler.metrics().busy == 0)
            assert counted(scheduler.metrics()) == (1, 3, 0, 0)
            assert_empty(opened.batch)
            assert inside.turns_of(scheduler).requests == []
            assert [item async for item in ask(scheduler, [9])] == due([9])

    asyncio.run(main())
    assert threads() == []


def test_what_a_request_has_to_close_is_closed_however_it_ends():
    async def main():
        opened, closed = Opened(6), []

        def fail(chunk):
            raise OSError("gone")

        async with Scheduler(opened, 6) as scheduler:

            def begun(name, through=both):
                def make(index, before):
                    return link(index, 60, seed=index)

                work = Work(1, make, through, close=lambda: closed.append(name))
                return scheduler.submit_prepared(lambda: work, size=4)

            names = ["read", "closed", "cancelled", "failed", "forgotten"]
            streams = {name: begun(name, fail if name == "failed" else both) for name in names}
            for name in names[:3]:
                await anext(streams[name])
            assert closed == []
            await read(streams["read"], [])
            await streams["closed"].aclose()
            task = asyncio.create_task(read(streams["cancelled"], []))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises((asyncio.CancelledError, asyncio.InvalidStateError)):
                await task
            with pytest.raises(OSError, match="gone"):
                await anext(streams["failed"])
            del streams["forgotten"]
            gc.collect()
            assert closed == names
            ended = begun("ended")
            await anext(ended)
        with pytest.raises(ClosedError):
            await read(ended, [])
        assert closed == [*names, "ended"]

    asyncio.run(main())


def test_a_closed_stream_gives_nothing_more():
    async def main():
        async with Scheduler(Opened(1), 1) as scheduler:
            stream = ask(scheduler, [20])
            assert await anext(stream) == due([20])[0]  # one of two items that its first chunk makes
            await stream.aclose()
            with pytest.raises(StopAsyncIteration):
                await anext(stream)

    asyncio.run(main())


def test_more_than_may_wait_are_refused_and_may_come_again():
    async def main():
        opened = Opened(1)
        async with Scheduler(opened, 1, max_waiting=2) as scheduler:
            opened.gate.let(0)
            first = ask(scheduler, [20])
            await until_async(lambda: scheduler.metrics().running == 1)
            waiting = [ask(scheduler, [5]), ask(scheduler, [5])]
            assert scheduler.metrics().waiting == 2
            with pytest.raises(BusyError, match="2 requests wait already, max_waiting is 2"):
                ask(scheduler, [5])
            await waiting.pop().aclose()  # one that has not begun
            waiting.append(ask(scheduler, [7]))
            with pytest.raises(BusyError):
                ask(scheduler, [5])
            assert counted(scheduler.metrics()) == (0, 1, 0, 2)
            opened.gate.let()
            for stream, lengths in ((first, [20]), (waiting[0], [5]), (waiting[1], [7])):
                assert [item async for item in stream] == due(lengths)
            assert counted(scheduler.metrics()) == (3, 1, 0, 2)

    asyncio.run(main())


def test_what_is_closed_takes_and_gives_nothing():
    async def main():
        opened = Opened(1)
        scheduler = Scheduler(opened, 1)
        with pytest.raises(ClosedError, match="use it within `async with`"):
            ask(scheduler, [5])
        await scheduler.close()  # nothing to do
        scheduler = Scheduler(opened, 1)
        async with scheduler:
            done = ask(scheduler, [5])
            assert [item async for item in done] == due([5])
            opened.gate.let(0)
            running, waiting = ask(scheduler, [60]), ask(scheduler, [5])
            said = [], []
            reading = [asyncio.create_task(read(*one)) for one in zip((running, waiting), said, strict=True)]
            await until_async(lambda: scheduler.metrics().running == 1)
            closing = asyncio.create_task(scheduler.close())
            await until_async(lambda: scheduler.closed)
            opened.gate.let()
            await closing
            for task in reading:
                with pytest.raises(ClosedError, match="closed before this request had ended"):
                    await task
            assert (said[0], said[1]) == (due([60])[: len(said[0])], [])
            assert len(said[0]) < 10  # no turn after the one that was under way
            for stream in (running, waiting):
                with pytest.raises(StopAsyncIteration):
                    await anext(stream)
            with pytest.raises(ClosedError):
                ask(scheduler, [5])
            assert counted(scheduler.metrics()) == (1, 0, 2, 0)
            assert threads() == []
            await scheduler.close()
        with pytest.raises(InputError, match="starts once"):
            async with scheduler:
                pass
        assert opened.closed == 1
        assert_empty(opened.batch)

    asyncio.run(main())


def test_a_consumer_that_fails_ends_its_request_only():
    def fails(chunk):
        if chunk.index == 1:
            raise Breaks("no vocoder")
        yield chunk.index

    def at_once(chunk):
        raise Breaks("before the first item")

    async def main():
        opened = Opened(3)
        async with Scheduler(opened, 3) as scheduler:
            other = ask(scheduler, [30, 30])
            bad, worse = ask(scheduler, [8, 60, 60], through=fails), ask(scheduler, [60], through=at_once)
            assert [await anext(bad), await anext(bad)] == [0, 0]
            for stream, words in ((bad, "no vocoder"), (worse, "before the first")):
                with pytest.raises(Breaks, match=words):
                    await anext(stream)
                with pytest.raises(StopAsyncIteration):
                    await anext(stream)
            assert [item async for item in other] == due([30, 30])
            await until_async(lambda: scheduler.metrics().busy == 0)
            assert counted(scheduler.metrics()) == (1, 0, 2, 0)  # whether all had been decoded by then or not

    asyncio.run(main())


@pytest.mark.parametrize("lazily", [True, False])
def test_what_is_made_of_a_chunk_is_made_in_another_thread(lazily):
    seen = []

    def makes(chunk):
        seen.append(threading.current_thread())
        return [chunk.index]

    def yields(chunk):
        yield from makes(chunk)

    async def main():
        async with Scheduler(Opened(1), 1) as scheduler:
            assert [item async for item in ask(scheduler, [9], through=yields if lazily else makes)] == [0, 0, 0]

    asyncio.run(main())
    assert len(seen) == 3 and threading.main_thread() not in seen


def test_any_number_of_streams_may_wait_in_their_threads_for_what_they_share():
    """A vocoder, for one: the threads of an event loop are six on two cores, and the seventh stream came to it last."""
    together = threading.Barrier(9)

    def waits(chunk):
        together.wait(60)
        return [chunk.index]

    async def main():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        async with Scheduler(Opened(9), 9) as scheduler:
            streams = [ask(scheduler, [4], through=waits) for _ in range(9)]
            assert await asyncio.gather(*map(anext, streams)) == [0] * 9
            await asyncio.gather(*(stream.aclose() for stream in streams))

    asyncio.run(main())


def test_one_that_cannot_begin_fails_alone_and_a_step_that_fails_fails_all_that_run():
    def broken():
        raise Breaks("no prefill")

    async def main():
        opened = Opened(2)
        async with Scheduler(opened, 2, reserved=0) as scheduler:

            def bad(index, before):
                if index == 1:
                    raise Breaks("no second job")
                return link(index, 6)

            def worse(index, before):
                job = link(index, 6)
                job.prefill = broken
                return job

            good = ask(scheduler, [30])
            second = scheduler.submit(2, bad, size=2, through=both)
            first = scheduler.submit(1, worse, size=2, through=both)
            with pytest.raises(Breaks, match="no prefill"):
                await anext(first)
            items = []
            with pytest.raises(Breaks, match="no second job"):
                await read(second, items)
            assert items and items == due([6], 2)[: len(items)]
            assert [item async for item in good] == due([30])
            assert counted(scheduler.metrics()) == (1, 0, 2, 0)

            opened.gate.let(0)
            running = [ask(scheduler, [30]), ask(scheduler, [30, 30])]
            opened.gate.let(8)  # the turn in which the first may be alone
            await until_async(lambda: scheduler.metrics().busy == 2)
            waiting = ask(scheduler, [12])
            opened.gate.fails.append(Breaks("no memory"))
            opened.gate.let()
            for stream in running:
                with pytest.raises(Breaks, match="no memory"):
                    [item async for item in stream]
            assert [item async for item in waiting] == due([12])
            assert counted(scheduler.metrics()) == (2, 0, 4, 0)
            assert_empty(opened.batch)

    asyncio.run(main())


def test_a_batch_that_cannot_open_says_so():
    @contextmanager
    def opens():
        raise Breaks("no such device")
        yield

    def not_even():
        raise Breaks("no engine")

    async def main():
        for how, words in ((opens, "no such device"), (not_even, "no engine")):
            scheduler = Scheduler(how, 1)
            with pytest.raises(Breaks, match=words):
                async with scheduler:
                    pass
            with pytest.raises(ClosedError):
                ask(scheduler, [5])
            await scheduler.close()

    asyncio.run(main())
    assert threads() == []


def test_a_start_that_is_cancelled_leaves_no_thread():
    async def main():
        opened, entered, idle = Opened(1), threading.Event(), threading.Event()

        class Changed(threading.Condition):
            def wait(self, timeout=None):
                idle.set()
                return super().wait(timeout)

        @contextmanager
        def opens():
            assert entered.wait(10)
            with opened() as batch:
                yield batch

        scheduler = Scheduler(opens, 1)
        inside.told_of_changes_by(scheduler, Changed())
        starting = asyncio.create_task(scheduler.__aenter__())
        await asyncio.sleep(0)  # it begins, and waits for the thread
        entered.set()
        assert idle.wait(30)  # the thread has come to wait for requests, and the loop has not heard of it
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        try:
            await until_gone(inside.threads_of(scheduler)[0])
            assert opened.closed == 1
        finally:
            await scheduler.close()

    async def until_gone(thread):
        await asyncio.to_thread(thread.join, 2)
        assert not thread.is_alive()

    asyncio.run(main())


def test_a_slow_consumer_holds_up_no_other_and_no_job_of_its_own_that_has_begun():
    async def main():
        opened = Opened(3)
        async with Scheduler(opened, 3, ahead=2, reserved=0) as scheduler:
            slow = ask(scheduler, [8, 24, 24, 24, 24], size=4)
            assert await anext(slow) == due([8], 4)[0]
            # One chunk lies there and three jobs begin; they are decoded to their end, and the last one does not begin.
            await until_async(lambda: scheduler.metrics().tokens == 8 + 3 * 24)
            tokens, entered = 8 + 3 * 24, 4
            await until_async(lambda: scheduler.metrics().busy == 0 and inside.turns_of(scheduler).idle)
            assert (scheduler.metrics().tokens, inside.inbox_of(slow).request.entered) == (tokens, entered)
            assert inside.inbox_of(slow).told - inside.inbox_of(slow).taken >= 2
            assert scheduler.metrics().running == 1
            assert [item async for item in ask(scheduler, [40, 9])] == due([40, 9])
            assert inside.inbox_of(slow).request.entered == entered
            assert [item async for item in slow] == due([8, 24, 24, 24, 24])[1:]
            assert counted(scheduler.metrics()) == (2, 0, 0, 0)

    asyncio.run(main())


def test_the_time_to_the_first_item_is_told_in_percentiles(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(inside.SCHEDULER_CLOCK, clock)

    async def main():
        opened = Opened(1)
        async with Scheduler(opened, 1) as scheduler:
            assert scheduler.metrics().ttfa == {}
            opened.gate.let(0)
            stream = ask(scheduler, [9])
            reading = asyncio.create_task(anext(stream))
            clock.now += 0.25
            opened.gate.let()
            await reading
            one = scheduler.metrics().ttfa
            assert 0.25 == one["p50"] == one["p90"] == one["p99"]
            clock.now += 1
            async for _ in stream:
                pass
            assert scheduler.metrics().ttfa == one  # only the first counts
            unread = ask(scheduler, [9])
            await until_async(lambda: scheduler.metrics().tokens == 18)
            assert scheduler.metrics().ttfa == one
            del unread
            assert [item async for item in ask(scheduler, [1])]  # at once
            assert scheduler.metrics().ttfa == pytest.approx({"p50": 0.125, "p90": 0.225, "p99": 0.2475})
            inside.first_items_of(scheduler).extend(i / 1000 for i in range(1001))
            found = scheduler.metrics().ttfa
            assert found == pytest.approx({"p50": 0.5, "p90": 0.9, "p99": 0.99}, abs=2e-3)
            assert len(inside.first_items_of(scheduler)) == 1000

    asyncio.run(main())


def test_what_makes_no_scheduler_is_refused():
    for name in ("rows", "max_waiting", "max_running", "ahead", "prefills"):
        for wrong in (0, 1.5, True, math.nan, math.inf, "2"):
            with pytest.raises(InputError, match=re.escape(f"{name}={wrong!r} must be a whole number of at least 1")):
                Scheduler(Opened(), **{"rows": 2, name: wrong})
    for reserved, told in (
        (-1, "must be a whole number of at least 0"),
        (0.5, "whole number"),
        (2, "one of the 2 rows"),
    ):
        with pytest.raises(InputError, match=f"reserved={reserved} .*{told}"):
            Scheduler(Opened(), 2, reserved=reserved)
    assert inside.order_of(Scheduler(Opened(), 2)) == (8, 1, 4)
    assert inside.order_of(Scheduler(Opened(), 1)) == (8, 0, 2)
    metrics = Scheduler(Opened(), 2).metrics()
    assert metrics == SchedulerMetrics(2, 0, 0, 0, 0, 0, 0, 0, 0)
