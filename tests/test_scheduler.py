"""Requests on one batch: whose turn it is and what is delivered, against a model in plain Python; the async front."""

import asyncio
import gc
import math
import random
import re
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.clocks import Clock
from support.searching import examples, search
from support.tables import SYMBOLS, TABLE, Breaks, assert_empty, chain, link, linked
from support.waiting import until_async

from kvcache import BusyError, ClosedError, InputError
from kvcache.decoding import Batch, Piece, Pool, Request, Scheduler, SchedulerMetrics, Turns

pytestmark = pytest.mark.one_release

# ---------------------------------------------------------------------- whose turn it is


class Said:
    """A job that says these tokens."""

    def __init__(self, asked, index):
        self.asked, self.tokens, self.made = asked, asked.tokens[index], 0


class Places:
    """A batch that decodes `quantum` tokens of each job a turn, and tells `watch` before it does."""

    def __init__(self, places, quantum, watch=None, fails=()):
        self.places, self.quantum, self.jobs = places, quantum, []
        self.watch, self.fails, self.turns = watch, set(fails), 0

    @property
    def busy(self):
        return len(self.jobs)

    def enter(self, job):
        assert self.busy < self.places
        if job.asked.fails == ("enter", job.asked.entered - 1):
            raise Breaks("prefill")
        self.jobs.append(job)
        return self._piece(job, 1)

    def leave(self, job):
        if job in self.jobs:
            self.jobs.remove(job)

    def turn(self):
        self.watch()
        self.turns += 1
        if self.jobs and self.turns in self.fails:
            raise Breaks("step")
        return [self._piece(job, self.quantum) for job in list(self.jobs)]

    def _piece(self, job, steps):
        tokens = job.tokens[job.made : job.made + steps]
        job.made += steps
        over = job.made >= len(job.tokens)
        if over:
            self.leave(job)
        return Piece(job, torch.tensor(tokens, dtype=torch.long), over)


class Asked:
    """A request, and what a plain account of it says about whether it may go on."""

    def __init__(self, number, world, lengths, size, alone, sequence, fails, blocked):
        self.world, self.size, self.sequence, self.fails, self.blocked = world, size, sequence, fails, blocked
        self.alone = alone
        self.tokens = [[100 * number + 10 * i + t for t in range(n)] for i, n in enumerate(lengths)]
        self.chunks, self.entered, self.failed = [], 0, False
        self.passed, self.bound = 0, 0  # jobs of others that entered while it waits, and how many those may be
        self.request = Request(
            len(lengths),
            self.make,
            size=size,
            alone=alone,
            sequence=sequence,
            deliver=self.deliver,
            blocked=lambda: self.blocked and not self.world.unblocked,
        )

    @property
    def running(self):
        return sum(job.asked is self for job in self.world.batch.jobs)

    @property
    def ready(self):
        if self.failed or self.entered == len(self.tokens):
            return False
        if self.entered == 0:
            return True
        opened = any(last for _, _, last in self.chunks) or sum(len(said) for _, said, _ in self.chunks) >= self.alone
        return self.contends and opened and not (self.sequence and self.running)

    @property
    def contends(self):
        behind = self.blocked and not self.world.unblocked
        return 0 < self.entered < len(self.tokens) and not self.failed and not behind

    @property
    def may(self):
        """Whether its next job may enter, as far as it is about how many have begun."""
        several = sum(one.contends for one in self.world.there) < self.world.begun
        return self.entered > 0 or len(self.tokens) == 1 or several

    def make(self, index, before):
        self.world.entering(self)
        said = self.tokens[index - 1] if self.sequence and index else None
        self.world.rule("before", (None if before is None else before.tolist()) == said)
        self.world.rule("index", index == self.entered)
        self.entered += 1
        if self.fails == ("make", index):
            self.failed = True
            raise Breaks("make")
        self.failed = self.fails == ("enter", index)
        return Said(self, index)

    def deliver(self, chunk):
        self.world.rule("deliver", not self.failed and self in self.world.there)
        if self.fails == ("deliver", len(self.chunks)):
            self.failed = True
            raise Breaks("deliver")
        self.chunks.append((chunk.index, chunk.tokens.tolist(), chunk.last))

    def expected(self):
        """All chunks of it, if nothing happens."""
        chunks = []
        for index, tokens in enumerate(self.tokens):
            cuts = range(0, max(len(tokens), 1), self.size)
            chunks += [(index, tokens[at : at + self.size], at == cuts[-1]) for at in cuts]
        return chunks


class World:
    """Requests that come and are dropped while turns are taken, each checked against the rules."""

    def __init__(self, places, quantum, prefills, reserved, fails, begun=None):
        self.batch = Places(places, quantum, self.decoding, fails)
        self.turns = Turns(self.batch, prefills, reserved, begun)
        self.prefills, self.reserved, self.begun = prefills, reserved, begun or 2 * places
        self.there, self.unblocked, self.tried, self.broken = [], False, 0, []
        self.line = []  # who waits and has no job that decodes, since when

    def rule(self, name, holds):
        """Not an assertion where it is found: what a request raises is its own failure."""
        if not holds:
            self.broken.append(name)

    def eligible(self):
        free = self.batch.places - self.batch.busy
        ready = [a for a in self.there if a.ready and a.may]
        return [a for a in ready if free > (self.reserved if a.running else 0)]

    def look(self):
        """See who waits from now on, and for how many jobs of others at most."""
        places = self.batch.places
        self.line = [one for one in self.line if one in self.there and one.ready and not one.running]
        for one in self.there:
            if one.ready and not one.running and one not in self.line:
                self.line.append(one)
                others = sum(other.contends for other in self.there if other is not one)
                newcomers = sum(not other.entered for other in self.line)
                one.passed = 0
                one.bound = others + others // places + 1 if one.entered else newcomers * (places + 1) - 1

    def entering(self, asked):
        self.look()
        eligible, waiting = self.eligible(), [one for one in self.line if one.may]
        if asked.running:
            fewest = min((one.running for one in eligible), default=None)
            self.rule("further", not waiting and asked is next((a for a in eligible if a.running == fewest), None))
        else:
            alike = [one for one in waiting if bool(one.entered) == bool(asked.entered)]
            self.rule("first come", asked is next(iter(alike), None) and asked in eligible)
        for one in waiting:
            one.passed += one is not asked
            self.rule("bound", one.passed <= one.bound)
        self.line = [one for one in self.line if one is not asked]  # it may end as it enters, and wait again
        self.tried += 1
        self.rule("prefills", self.tried <= self.prefills)

    def decoding(self):
        # No place is left empty that somebody could have.
        self.look()
        self.rule("empty", self.tried == self.prefills or not self.eligible())

    def turn(self):
        self.tried = 0
        step_fails = self.batch.turns + 1 in self.batch.fails
        before = {id(asked): asked.entered for asked in self.there}
        over = self.turns.turn()
        assert self.broken == []
        if step_fails and any(isinstance(one.request.error, Breaks) for one in self.there):
            for asked in self.there:
                asked.failed = asked.failed or str(asked.request.error) == "step"
        for asked in list(self.there):
            expected = asked.expected()
            assert asked.chunks == expected[: len(asked.chunks)]  # in order, whole and with nothing between
            done = asked.failed or asked.chunks == expected
            assert (asked.request in over) == asked.request.over == done
            assert (asked.request.error is not None) == asked.failed
            assert asked.entered - before[id(asked)] <= self.prefills
            if done:
                assert asked.running == 0 and asked.request.running == {}
                self.there.remove(asked)
        assert [asked.request for asked in self.there] == self.turns.requests
        assert all(job.asked in self.there for job in self.batch.jobs)


@st.composite
def worlds(draw):
    places = draw(st.integers(1, 4))
    failing = draw(st.booleans())
    what = st.tuples(st.sampled_from(["make", "enter", "deliver", "deliver"]), st.integers(0, 2))
    asked = st.fixed_dictionaries(
        {
            "lengths": st.lists(st.integers(1, 9), min_size=1, max_size=4),
            "size": st.sampled_from([1, 1, 2, 3, 5]),
            "alone": st.sampled_from([1, 1, 3, 6]),
            "sequence": st.booleans(),
            "fails": st.none() | what if failing else st.none(),
            "blocked": st.sampled_from([False, False, True]),
        }
    )
    plan = st.tuples(asked, st.integers(0, 4), st.none() | st.integers(0, 3))  # when it comes, and when it is dropped
    return {
        "places": places,
        "quantum": draw(st.integers(1, 4)),
        "prefills": draw(st.integers(1, 4)),
        "reserved": draw(st.integers(0, places - 1)),
        "begun": draw(st.none() | st.integers(1, 3)),
        "fails": draw(st.lists(st.integers(1, 12), max_size=2)) if failing else [],
        "plans": draw(st.lists(plan, min_size=1, max_size=7)),
    }


@search(400)
@given(world=worlds())
def test_turns_are_fair_and_chunks_in_order(world):
    plans = world.pop("plans")
    here = World(**world)
    all_asked = [Asked(number, here, **asked) for number, (asked, _, _) in enumerate(plans)]
    dropped = []
    for turn in range(200):
        for asked, (_, comes, _) in zip(all_asked, plans, strict=True):
            if comes == turn:
                here.there.append(asked)
                here.turns.add(asked.request)
        for asked, (_, comes, stays) in zip(all_asked, plans, strict=True):
            if stays is not None and comes + stays == turn and asked in here.there:
                here.turns.drop(asked.request)
                here.there.remove(asked)
                dropped.append(asked)
                assert asked.running == 0
                here.turns.drop(asked.request)  # nothing happens
        if turn > 8 and here.batch.busy == 0 and not here.eligible():
            assert all(one.blocked and one.chunks for one in here.there)  # all that is left waits for its consumer
            here.turn()
            here.unblocked = True
        here.turn()
        if turn > 4 and not here.there:
            break
    assert here.there == here.turns.requests == here.batch.jobs == []  # nobody waits for ever
    for asked in all_asked:
        if asked not in dropped:
            assert asked.failed or asked.chunks == asked.expected()
            assert str(asked.request.error) in ("None", "step", *(asked.fails or ("None",))[:1], "prefill")
    assert here.turns.tokens >= sum(len(tokens) for asked in all_asked for _, tokens, _ in asked.chunks)


def quietly(lengths, size=3, **options):
    """A request of so many jobs, and its chunks."""
    chunks = []

    def make(index, before):
        return link(index, lengths[index], seed=index)

    return Request(len(lengths), make, size=size, deliver=chunks.append, **options), chunks


def assert_said(chunks, lengths):
    for index, length in enumerate(lengths):
        mine = [chunk for chunk in chunks if chunk.index == index]
        assert [token for chunk in mine for token in chunk.tokens.tolist()] == linked(index, length, index)
        assert [chunk.last for chunk in mine] == [False] * (len(mine) - 1) + [True]


@pytest.mark.parametrize("sequence", [False, True])
def test_a_real_batch_says_what_each_says_alone(sequence):
    batch = Batch(chain(3))
    turns = Turns(batch, reserved=1)
    lengths = [[9, 17, 1, 4], [30], [2, 2, 2], [12, 25], [1]]
    asked = [quietly(one, sequence=sequence) for one in lengths]
    for request, _ in asked:
        turns.add(request)
    over = []
    while turns.requests:
        over += turns.turn()
    assert set(over) == {request for request, _ in asked} and len(over) == 5
    for (request, chunks), one in zip(asked, lengths, strict=True):
        assert request.error is None
        assert_said(chunks, one)
    assert turns.tokens == sum(map(sum, lengths))
    assert_empty(batch)


def test_the_first_chunk_comes_before_further_jobs():
    batch = Batch(chain(4), quantum=2)
    turns, (request, chunks) = Turns(batch), quietly([30, 5, 5], size=7)
    turns.add(request)
    for entered, given_ in ((1, 0), (1, 0), (1, 1), (3, 1)):
        turns.turn()
        assert (request.entered, len(chunks)) == (entered, given_)


def test_a_newcomer_finds_the_reserved_place():
    for reserved, waits in ((1, False), (0, True)):
        batch = Batch(chain(3), quantum=2)
        turns, (long, _) = Turns(batch, reserved=reserved), quietly([60] * 6, size=1)
        turns.add(long)
        for _ in range(3):
            turns.turn()
        assert len(long.running) == 3 - reserved
        newcomer, chunks = quietly([9], size=1)
        turns.add(newcomer)
        turns.turn()
        assert (chunks == []) == waits


def test_who_fails_to_deliver_its_first_token_leaves_no_job_behind():
    def fails(chunk):
        raise Breaks("the consumer is gone")

    batch = Batch(chain(2))
    turns = Turns(batch)
    bad = Request(2, lambda index, before: link(index, 20), size=1, deliver=fails)
    good, chunks = quietly([20])
    turns.add(bad)
    turns.add(good)
    assert turns.turn() == [bad]
    assert str(bad.error) == "the consumer is gone" and batch.busy == 1
    while turns.requests:
        turns.turn()
    assert_said(chunks, [20])
    assert_empty(batch)


def test_an_end_that_is_not_said_still_ends_its_job():
    batch, chunks = Batch(chain(2)), []
    said = linked(3, 20, 1)
    stop = next(t for i, t in enumerate(said) if i > 3 and t not in said[:i])
    at = said.index(stop)
    for size in (at, at + 1, 1):
        chunks.clear()
        turns = Turns(batch)
        make = [
            link(3, 20, 1, ends=[stop], include_stop_token=False),
            link(4, 2, 5, ends=range(SYMBOLS), include_stop_token=False),
        ]
        befores = []
        turns.add(
            Request(
                2,
                lambda index, before, make=make, befores=befores: befores.append(before) or make[index],
                size=size,
                sequence=True,
                deliver=chunks.append,
            )
        )
        while turns.requests:
            turns.turn()
        assert [t for c in chunks for t in c.tokens.tolist() if c.index == 0] == said[:at]
        assert [(c.index, c.last) for c in chunks if c.last] == [(0, True), (1, True)]
        assert chunks[-1].tokens.tolist() == []
        assert (befores[0], befores[1].tolist()) == (None, said[:at])


def test_requests_of_nothing_are_refused():
    for jobs, size, name in ((0, 5, "jobs"), (1.5, 5, "jobs"), (1, 0, "size"), (1, math.nan, "size"), (1, 2.5, "size")):
        with pytest.raises(InputError, match=f"{name}=.* must be a whole number of at least 1"):
            Request(jobs, lambda index, before: None, size=size)
    for total in (0, -3, 2.5):
        with pytest.raises(InputError, match=f"total={total} must be a whole number"):
            link(0, total)


def test_errors_of_what_a_request_makes_are_no_sign_of_a_broken_batch():
    def fails(index, before):
        raise KeyError("a voice's field")

    turns, others = Turns(Batch(chain(1))), []
    for _ in range(20):
        bad = Request(1, fails, size=1, deliver=others.append)
        turns.add(bad)
        assert turns.turn() == [bad] and isinstance(bad.error, KeyError)
    good, chunks = quietly([5])
    turns.add(good)
    while turns.requests:
        turns.turn()
    assert_said(chunks, [5])


# ---------------------------------------------------------------------- the async front


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
            assert scheduler._turns.requests == []
            assert [item async for item in ask(scheduler, [9])] == due([9])

    asyncio.run(main())
    assert threads() == []


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
        scheduler._changed = Changed()
        starting = asyncio.create_task(scheduler.__aenter__())
        await asyncio.sleep(0)  # it begins, and waits for the thread
        entered.set()
        assert idle.wait(30)  # the thread has come to wait for requests, and the loop has not heard of it
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        try:
            await until_gone(scheduler._threads[0])
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
            await until_async(lambda: scheduler.metrics().busy == 0 and scheduler._turns.idle)
            assert (scheduler.metrics().tokens, slow._inbox.request.entered) == (tokens, entered)
            assert slow._inbox.told - slow._inbox.taken >= 2
            assert scheduler.metrics().running == 1
            assert [item async for item in ask(scheduler, [40, 9])] == due([40, 9])
            assert slow._inbox.request.entered == entered
            assert [item async for item in slow] == due([8, 24, 24, 24, 24])[1:]
            assert counted(scheduler.metrics()) == (2, 0, 0, 0)

    asyncio.run(main())


def test_the_time_to_the_first_item_is_told_in_percentiles(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("kvcache.decoding._scheduler.time", clock)

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
            scheduler._firsts.extend(i / 1000 for i in range(1001))
            found = scheduler.metrics().ttfa
            assert found == pytest.approx({"p50": 0.5, "p90": 0.9, "p99": 0.99}, abs=2e-3)
            assert len(scheduler._firsts) == 1000

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
    assert Scheduler(Opened(), 2)._order == (8, 1, 4)
    assert Scheduler(Opened(), 1)._order == (8, 0, 2)
    metrics = Scheduler(Opened(), 2).metrics()
    assert metrics == SchedulerMetrics(2, 0, 0, 0, 0, 0, 0, 0, 0)


# ---------------------------------------------------------------------- nothing stays behind


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
        stream._inbox.through = partial(map, {}.__getitem__)  # no item for any chunk
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
            held = [weakref.ref(stream._inbox.request) for stream in streams]
            assert [item async for item in streams[0]] == due([9])
            await streams[1].aclose()
            del streams
            await until_async(lambda: scheduler.metrics().cancelled + scheduler.metrics().finished == 4)
            await until_async(lambda: scheduler._turns.requests == [] and scheduler._dropped == [])

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
                await until_async(lambda: scheduler.metrics().busy == 0 and not scheduler._inboxes)
                await until_async(lambda: scheduler._turns.requests == [])
                assert_empty(scheduler._turns.batch)
                assert asyncio.all_tasks() == {asyncio.current_task()}
                metrics = scheduler.metrics()
                assert (metrics.busy, metrics.waiting, metrics.running) == (0, 0, 0)
                counts.append(sum(counted(metrics)))
                await until_async(lambda: tensors() <= held, 40)  # what was on its way to a consumer is gone too
            assert metrics.finished >= seen["read"] and metrics.cancelled > 10
            assert metrics.failed == seen["fail"]
        assert_empty_pool()

    def assert_empty_pool():
        [decoding] = pool._idle.values()
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
