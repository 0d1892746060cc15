"""Schedulers under load, behind slow stores, and with batches that break: everybody's wait is bounded, and everybody is told."""

import asyncio
import gc
import os
import random
import threading
import weakref
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.clocks import Clock
from support.inside import decoding as inside
from support.inside.speech import TEXTS_SPLIT, passing, reuse_of
from support.scheduling import Opened, ask, both, counted, due, read, threads
from support.searching import search
from support.speech import SHORT, TEXT, audio
from support.t3_models import tiny_t3
from support.tables import Breaks, chain, link
from support.turns import Asked, Places, World
from support.waiting import until, until_async

from kvcache import BusyError, ClosedError, InputError, MemoryStore, SpeakerCache, TieredStore
from kvcache.decoding import Batch, Request, Scheduler, Turns
from kvcache.prefixes.stores import Aside
from kvcache_chatterbox import (
    ChatterboxEngine,
    SpeechScheduler,
    Voice,
    byte_tokens,
    random_conditionals,
    split,
    stand_in,
)

pytestmark = pytest.mark.one_release

# ---------------------------------------------------------------------- S1: whose turn it is


@st.composite
def arrivals(draw):
    """How many come in each turn, and of how many jobs of which length each is: books among single sentences."""
    job = st.integers(1, 6)
    text = st.one_of(st.lists(job, min_size=1, max_size=1), st.lists(job, min_size=2, max_size=12))
    return draw(st.lists(st.lists(text, max_size=3), min_size=1, max_size=25))


@search(150)
@given(
    coming=arrivals(),
    places=st.integers(1, 4),
    quantum=st.integers(1, 4),
    reserved=st.integers(0, 3),
    begun=st.none() | st.integers(1, 4),
)
def test_s1_nobody_waits_longer_than_the_bound(coming, places, quantum, reserved, begun):
    here = World(places, quantum, 8, min(reserved, places - 1), (), begun)
    number = 0
    for texts in coming + [[]] * 2000:
        for lengths in texts:
            number += 1
            asked = Asked(number, here, lengths, 3, 1, False, None, False)
            here.there.append(asked)
            here.turns.add(asked.request)
        here.step()  # which checks both bounds at every job that enters
        assert sum(one.contends for one in here.there) <= here.begun
        if not here.there:
            break
    assert not here.there


def passed_over(rows, clients, books):
    """Jobs of others that enter while a book of 20 segments waits between two of its own, the most; and a newcomer."""
    batch = Places(rows, 4, lambda: None)
    turns = Turns(batch, reserved=min(1, rows - 1))
    waits, most = {}, {"book": 0, "newcomer": 0}

    def request(kind, jobs):
        asked = SimpleNamespace(fails=None, tokens=[[1] * 8] * jobs, entered=0)

        def make(index, before):
            for other in turns.requests:
                if other is not made and other.ready and not other.running:
                    waits[other] = waits.get(other, 0) + 1
            most[kind if index else "newcomer"] = max(most[kind if index else "newcomer"], waits.pop(made, 0))
            return SimpleNamespace(asked=asked, tokens=asked.tokens[index], made=0)

        made = Request(jobs, make, size=4)
        turns.add(made)
        return made

    running = [request("book", 20) for _ in range(books)]
    for _ in range(clients):
        request("sentence", 1)
    for _ in range(4000):
        if all(book.over for book in running):
            return most
        for over in turns.step():
            if over.jobs == 1:
                request("sentence", 1)  # who has heard one asks for the next
    raise AssertionError("the books do not end")


@pytest.mark.parametrize(("rows", "clients", "books"), [(1, 3, 1), (2, 6, 1), (2, 6, 4), (8, 40, 16)])
def test_s1_books_among_newcomers_that_come_and_come(rows, clients, books):
    most = passed_over(rows, clients, books)
    others = books - 1
    assert most["book"] <= others + others // rows + 1
    assert most["newcomer"] <= (clients + books) * (rows + 1) - 1


def test_s1_a_long_text_and_short_ones_on_a_real_model():
    ours = ChatterboxEngine(stand_in(tiny_t3("english")))  # whose texts do not end: all segments are 12 tokens
    made, entered = ours.job, []

    def job(utterance):
        entered.append(utterance.sampling.temperature)
        return made(utterance)

    ours.job = job
    short = {"segment_characters": None, "max_new_tokens": 12}

    async def again(scheduler, book):
        while not book.done():
            async for _ in scheduler.submit("Hello there.", temperature=0.5, **short):
                pass

    async def main():
        async with SpeechScheduler(ours, max_rows=2) as scheduler:
            long = scheduler.submit(TEXT, segment_characters=50, max_new_tokens=12, temperature=0.9)
            book = asyncio.ensure_future(read(long, []))
            await asyncio.gather(book, *(again(scheduler, book) for _ in range(4)))
            assert scheduler.metrics().failed == 0

    asyncio.run(main())
    own = [i for i, temperature in enumerate(entered) if temperature == 0.9]
    assert len(own) > 4 and len(entered) > 2 * len(own) - 4  # others were heard beside it
    # While one of its segments decodes, one or two others enter on the other row; then one may go before it.
    assert max(after - before - 1 for before, after in pairwise(own)) <= 3


# ---------------------------------------------------------------------- S2: what is accepted is bounded


def test_s2_begun_and_waiting_requests_are_bounded_together():
    async def main():
        opened = Opened(2)
        async with Scheduler(opened, 2, max_waiting=3, max_running=2, ahead=1) as scheduler:
            stalled = []
            for _ in range(3 + 2 + 2):  # clients that read nothing: held up by themselves, they keep no place
                stalled.append(ask(scheduler, [8, 8, 8]))
                await until_async(lambda: scheduler.metrics().waiting == 0)
            with pytest.raises(BusyError, match="7 requests are held already") as caught:
                ask(scheduler, [5])
            assert caught.value.retry_after >= 1 and scheduler.metrics().refused == 1
            await stalled.pop().aclose()
            assert [item async for item in ask(scheduler, [5])] == due([5])

    asyncio.run(main())


def test_s2_what_is_no_request_is_not_held():
    async def main():
        async with Scheduler(Opened(1), 1) as scheduler:
            for lengths, size in (([], 3), ([5], 0)):
                with pytest.raises(InputError, match="at least 1"):
                    ask(scheduler, lengths, size=size)
            assert scheduler.metrics().waiting == 0 and not inside.inboxes_of(scheduler)

    asyncio.run(main())


def test_s2_a_refusal_says_when_to_come_again(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(inside.SCHEDULER_CLOCK, clock)

    async def main():
        opened = Opened(2)
        async with Scheduler(opened, 2, max_waiting=4) as scheduler:

            async def refused():
                with pytest.raises(BusyError, match="come again in about") as caught:
                    ask(scheduler, [5])
                return caught.value.retry_after

            for _ in range(3):  # two requests at a time, each takes 3 seconds
                opened.gate.let(0)
                running = [ask(scheduler, [20]), ask(scheduler, [20])]
                opened.gate.let(8)  # the turn in which the first may be alone
                await until_async(lambda: scheduler.metrics().running == 2)
                clock.now += 3
                opened.gate.let()
                assert [item async for item in running[0]] and [item async for item in running[1]]
            opened.gate.let(0)
            running = [ask(scheduler, [20]), ask(scheduler, [20])]
            opened.gate.let(8)
            await until_async(lambda: scheduler.metrics().running == 2)
            waiting = [ask(scheduler, [20]) for _ in range(4)]
            assert await refused() == pytest.approx(4 * 3 / 2)  # four wait, and two begin every 3 seconds
            clock.now += 20  # these take longer than any before
            assert await refused() == pytest.approx(4 * 20 / 2)
            opened.gate.let()
            for stream in running + waiting:
                await read(stream, [])

    asyncio.run(main())


# ---------------------------------------------------------------------- S3: a refusal costs nothing


def test_s3_a_refusal_divides_tokenizes_and_plans_nothing_and_no_text_does_so_on_the_loop(monkeypatch):
    ours = ChatterboxEngine(stand_in(tiny_t3("english")))
    where, prepare = [], ours.long_text

    def long_text(*args, **options):
        where.append(threading.current_thread().name)
        return prepare(*args, **options)

    monkeypatch.setattr(ours, "long_text", long_text)
    monkeypatch.setattr(TEXTS_SPLIT, watched(where))

    async def main():
        async with SpeechScheduler(ours, max_rows=1, max_waiting=1) as scheduler:
            running = scheduler.submit(TEXT, **SHORT)
            await anext(running)
            waiting = scheduler.submit(TEXT, **SHORT)
            await until_async(lambda: len(where) == 4)
            for _ in range(200):
                with pytest.raises(BusyError):
                    scheduler.submit("word " * 4000)
            assert scheduler.metrics().refused == 200
            await waiting.aclose()

    asyncio.run(main())
    assert where == ["kvcache-prepare"] * 4
    assert threads() == []


def watched(where):
    def seen(*args):
        where.append(threading.current_thread().name)
        return split(*args)

    return seen


def test_s3_who_leaves_while_being_prepared_is_not_begun():
    async def main():
        entered, go_on, made = threading.Event(), threading.Event(), []

        def prepare():
            entered.set()
            assert go_on.wait(30)
            raise Breaks("cannot be prepared")

        async with Scheduler(Opened(1), 1) as scheduler:
            first = scheduler.submit_prepared(prepare, size=3)
            await asyncio.to_thread(entered.wait, 30)
            second = scheduler.submit_prepared(lambda: made.append(1), size=3)
            assert scheduler.metrics().waiting == 2
            await second.aclose()
            go_on.set()
            with pytest.raises(Breaks, match="cannot be prepared"):
                await anext(first)
            assert [item async for item in ask(scheduler, [5])] == due([5])
            assert counted(scheduler.metrics()) == (1, 1, 1, 0)
        assert made == []

    asyncio.run(main())


# ---------------------------------------------------------------------- S4: a slow store


class Slow(MemoryStore):
    """A store that answers when it is let to."""

    def __init__(self):
        super().__init__()
        self.opened, self.asked, self.by = threading.Event(), [], set()
        self.opened.set()

    def get(self, key):
        self.asked.append("get")
        self.by.add(threading.current_thread().name)
        assert self.opened.wait(60)
        return super().get(key)

    def put(self, snapshot):
        self.asked.append("put")
        self.by.add(threading.current_thread().name)
        assert self.opened.wait(60)
        super().put(snapshot)


@pytest.mark.parametrize("tiered", [pytest.param(False, marks=pytest.mark.slow), True])
def test_s4_a_store_that_hangs_holds_up_no_stream(tiered):
    slow = Slow()
    store = TieredStore(MemoryStore(), slow) if tiered else slow
    ours = ChatterboxEngine(stand_in(tiny_t3("english")), prefix_cache=SpeakerCache(store))
    ours.add_voice("known", conditionals=stand_in(ours.t3, 1).conds)
    store.close()
    new = [Voice.of(ours.t3, stand_in(ours.t3, i).conds) for i in (2, 3)]
    few = {**SHORT, "max_new_tokens": 9}
    expected = [audio(ours.generate_stream(TEXT, voice=one, **few)) for one in ("known", *new)]
    for one in new:
        ours.prefix_cache.evict(reuse_of(ours).key(one.t3))
    store.close()

    slow.by.clear()

    async def main():
        async with SpeechScheduler(ours, max_rows=3) as scheduler:
            running = scheduler.submit(TEXT, voice="known", **few)
            heard = [[await anext(running)], [], []]
            slow.opened.clear()
            # The running stream, and two voices that nobody knows: what the store does not say is computed.
            others = [scheduler.submit(TEXT, voice=one, **few) for one in new]
            await asyncio.wait_for(
                asyncio.gather(*(read(s, h) for s, h in zip((running, *others), heard, strict=True))), 60
            )
            assert not slow.opened.is_set()
            for got, want in zip(heard, expected, strict=True):
                torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-6, rtol=0)
            slow.opened.set()
        assert all(ours.prefix_cache.get(reuse_of(ours).key(one.t3)) is not None for one in new)  # written at last

    asyncio.run(main())
    assert slow.by <= {"kvcache-find", "kvcache-keep", "kvcache-write_0", threading.current_thread().name}


def test_s4_writes_are_dropped_rather_than_waited_for_and_hanging_questions_are_not_repeated():
    slow = Slow()
    prefix_cache = SpeakerCache(slow)
    ours = ChatterboxEngine(stand_in(tiny_t3("english")), prefix_cache=prefix_cache)
    snapshots = [reuse_of(ours).prepare(random_conditionals(ours.t3, i)) for i in range(20)]
    del slow.asked[:]
    slow.opened.clear()
    aside = Aside(prefix_cache, patience=0.01)
    assert aside.find(snapshots[0].key) is None and slow.asked == ["get"]
    assert [aside.find(one.key) for one in snapshots] == [None] * 20 and slow.asked == ["get"]
    for one in snapshots:
        aside.put(one)
    assert aside.dropped == 4 and not aside.flush(0)
    assert aside.find(snapshots[3].key) is snapshots[3]  # what waits to be written is at hand
    slow.opened.set()
    assert aside.flush(30)
    assert sorted(slow.asked) == ["get"] + ["put"] * 16
    until(lambda: not [t for t in threading.enumerate() if t.name in ("kvcache-find", "kvcache-keep")])
    assert aside.find(snapshots[2].key) is not None


class Panics(BaseException):
    """What no store should raise."""


class Raises(MemoryStore):
    """A store whose every answer is this error, while there is one."""

    error = None

    def get(self, key):
        if self.error is not None:
            raise self.error
        return super().get(key)

    def put(self, snapshot):
        if self.error is not None:
            raise self.error
        super().put(snapshot)


def snapshots_of(number):
    ours = ChatterboxEngine(stand_in(tiny_t3("english")), prefix_cache=SpeakerCache(MemoryStore()))
    return [reuse_of(ours).prepare(random_conditionals(ours.t3, i)) for i in range(number)]


@pytest.mark.parametrize("how", ["error", "thread"])
def test_s4_what_goes_wrong_once_is_not_for_ever(how, monkeypatch):
    one, two = snapshots_of(2)
    store = Raises()
    aside = Aside(SpeakerCache(store))
    with monkeypatch.context() as patched:
        if how == "error":
            store.error = Panics("once")
        else:
            patched.setattr(threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("no thread")))
        assert aside.find(one.key) is None
        aside.put(one)
        assert aside.flush(30)
    store.error = None
    aside.put(two)
    assert aside.flush(30) and aside.find(two.key) is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_s4_a_fork_waits_for_no_thread_of_its_parent():
    one, two = snapshots_of(2)
    slow = Slow()
    aside = Aside(SpeakerCache(slow), patience=0.01)
    slow.opened.clear()
    assert aside.find(one.key) is None
    aside.put(one)
    child = os.fork()
    if child == 0:
        slow.opened = threading.Event()
        slow.opened.set()
        aside.put(two)
        os._exit(not (aside.flush(30) and aside.find(two.key) is not None))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    slow.opened.set()
    assert aside.flush(30)


def test_s4_what_a_store_says_when_it_fails_is_told_without_its_secrets(caplog):
    store = Raises()
    store.error = OSError("GET https://user:hunter2@host/x?token=t0ken failed: 403")
    aside = Aside(SpeakerCache(store))
    [one] = snapshots_of(1)
    assert aside.find(one.key) is None
    aside.put(one)
    assert aside.flush(30)
    assert "403" in caplog.text and "hunter2" not in caplog.text and "t0ken" not in caplog.text


# ---------------------------------------------------------------------- S5: a number fills no store


def test_s5_emotions_that_requests_bring_are_not_stored():
    ours = ChatterboxEngine(stand_in(tiny_t3("english")), prefix_cache=SpeakerCache(MemoryStore()))
    for i, name in enumerate(("alba", "finn")):
        ours.add_voice(name, conditionals=stand_in(ours.t3, i).conds)
    store = ours.prefix_cache.store
    store.max_bytes = 3 * store.nbytes  # room for six
    held = {entry.address for entry in store.entries()}

    async def main():
        async with SpeechScheduler(ours, max_waiting=100) as scheduler:
            streams = [
                scheduler.submit("Hi.", voice="alba", exaggeration=i / 100, max_new_tokens=2, seed=1) for i in range(8)
            ]
            return [await anext(stream) for stream in streams]

    sounds = asyncio.run(main())
    for i in range(8, 16):
        list(ours.generate_stream("Hi.", voice="finn", exaggeration=i / 100, max_new_tokens=2, seed=1))
    assert {entry.address for entry in store.entries()} == held
    alone = ChatterboxEngine(ours.t3, reuse="none")
    assert len(passing(ours)) == 2 and len(sounds) == 8
    named = ours.add_voice("moved", conditionals=ours.voices["alba"], exaggeration=0.07)
    assert len(store.entries()) == 3 and named.kept  # what a named voice asks for stays
    words = byte_tokens(ours.t3, "Hello.")
    for exaggeration in (0.07, 0.33):
        asked = {"text_tokens": words, "max_new_tokens": 20, "temperature": 0.0, "seed": 1}
        mine = torch.cat(list(ours.inference_stream(voice="alba", exaggeration=exaggeration, **asked)), 1)
        changed = ours.voices["alba"].with_emotion(exaggeration)
        assert torch.equal(mine, torch.cat(list(alone.inference_stream(t3_cond=changed.t3, **asked)), 1))


# ---------------------------------------------------------------------- S10: errors that stay


class Faulty:
    """A batch of which a call fails, once or from then on all of them."""

    def __init__(self, batch, call, lasting, closing):
        self._batch, self._call, self._lasting, self._closing = batch, call, lasting, closing
        self.armed = self.broken = False
        self.failed = 0

    def _passes(self, call):
        if self.broken or (self.armed and call == self._call):
            self.armed, self.broken = False, self._lasting
            self.failed += 1
            raise Breaks(f"{call} is broken")

    @property
    def places(self):
        self._passes("places")
        return self._batch.places

    @property
    def busy(self):
        self._passes("busy")
        return self._batch.busy

    def add(self, job):
        self._passes("add")
        return self._batch.add(job)

    def cancel(self, job):
        self._passes("cancel")
        self._batch.cancel(job)

    def step(self):
        self._passes("step")
        return self._batch.step()

    @contextmanager
    def opened(self):
        self._passes("open")
        yield self
        self._passes("exit")


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize("call", ["places", "busy", "add", "step", "cancel", "exit"])
def test_s10_every_consumer_is_told_of_an_error(call, lasting):
    async def main():
        opened = Opened(2)
        with opened() as batch:
            faulty = Faulty(batch, call, lasting, opened)
            scheduler = Scheduler(faulty.opened, 2, reserved=0)
            async with scheduler:
                opened.gate.let(0)
                running = [ask(scheduler, [60]), ask(scheduler, [60, 9])]
                opened.gate.let(16)  # two turns (one may be alone in the first): both are heard, neither ends
                await asyncio.gather(*map(anext, running))
                waiting = [ask(scheduler, [9]) for _ in range(9)]
                faulty.armed = True
                if call in ("cancel", "add"):
                    await running.pop().aclose()  # who leaves makes it happen
                if call == "exit":
                    closing = asyncio.ensure_future(scheduler.close())
                    await until_async(lambda: scheduler.closed)
                opened.gate.let()
                told = await asyncio.wait_for(
                    asyncio.gather(*(read(s, []) for s in running + waiting), return_exceptions=True), 30
                )
                if call == "exit":
                    await closing
                wrong = [one for one in told if one is not None]
                assert faulty.failed and wrong
                assert all(isinstance(one, ClosedError if call == "exit" else Breaks) for one in wrong)
                if lasting or call not in ("add", "step"):  # it cannot be used any more
                    await until_async(lambda: scheduler.closed)
                    assert isinstance(scheduler.error, Breaks)
                    with pytest.raises(ClosedError, match=f"ended by an error .Breaks: {call} is broken"):
                        ask(scheduler, [9])
                else:
                    assert [item async for item in ask(scheduler, [9])] == due([9])
                    assert scheduler.error is None
            _, cancelled, failed, refused = counted(scheduler.metrics())
            assert failed == len(wrong) and refused == 0 and cancelled == (call in ("cancel", "add"))

    asyncio.run(main())
    assert threads() == []


def test_s10_a_batch_of_which_nothing_but_errors_come_is_given_up():
    async def main():
        opened = Opened(1)
        with opened() as batch:
            faulty = Faulty(batch, "step", True, opened)
            async with Scheduler(faulty.opened, 1) as scheduler:
                faulty.armed = True
                for _ in range(8):
                    with pytest.raises((Breaks, ClosedError)):
                        await read(ask(scheduler, [9]), [])
                await until_async(lambda: scheduler.closed)
                assert isinstance(scheduler.error, Breaks)

    asyncio.run(main())


@pytest.mark.parametrize("call", ["open", "busy"])
def test_s10_a_start_that_breaks_is_told(call):
    async def main():
        opened = Opened(1)
        with opened() as batch:
            faulty = Faulty(batch, call, True, opened)
            faulty.armed = True
            scheduler = Scheduler(faulty.opened, 1)
            if call == "open":
                with pytest.raises(Breaks, match="open is broken"):
                    await asyncio.wait_for(scheduler.__aenter__(), 30)
            else:
                await scheduler.__aenter__()
                await until_async(lambda: scheduler.closed)
            assert scheduler.closed and isinstance(scheduler.error, Breaks)
            await scheduler.close()

    asyncio.run(main())


@pytest.mark.parametrize("part", ["make", "through", "deliver", "watch"])
def test_s10_what_breaks_in_one_request_ends_that_one(part):
    batch = Batch(chain(2))
    turns = Turns(batch)

    def breaks(*given):
        raise Breaks(f"{part} is broken")

    chunks = []
    bad = {"make": lambda index, before: link(index, 9), "deliver": lambda chunk: None}
    if part != "through":
        bad[part] = breaks
        broken = Request(2, bad.pop("make"), size=3, **bad)
        good = Request(1, lambda index, before: link(index, 9), size=3, deliver=chunks.append)
        for request in (broken, good):
            turns.add(request)
        while turns.requests:
            turns.step()
        assert str(broken.error) == f"{part} is broken" and good.error is None and batch.busy == 0
        assert sum(len(chunk.tokens) for chunk in chunks) == 9

    async def main():
        async with Scheduler(Opened(2), 2) as scheduler:
            how = {"through": breaks} if part == "through" else {}
            other, one = ask(scheduler, [9]), ask(scheduler, [1, 1], **how)
            if part == "through":  # what a vocoder is: all has been decoded by now, and still it is no success
                await until_async(lambda: scheduler.metrics().running == 0)
                with pytest.raises(Breaks):
                    await anext(one)
                assert counted(scheduler.metrics()) == (0, 0, 1, 0)
            else:
                await read(one, [])
            assert [item async for item in other] == due([9])

    asyncio.run(main())


# ---------------------------------------------------------------------- S11: another event loop


def test_s11_another_event_loop_is_told_so_and_one_that_ends_ends_the_thread():
    scheduler, kept = Scheduler(Opened(1), 1), []

    async def first():
        await scheduler.__aenter__()
        kept.append(ask(scheduler, [9]))
        assert await anext(kept[0]) == due([9])[0]

    async def second():
        for _ in range(2):
            with pytest.raises(ClosedError, match="belongs to the event loop"):
                ask(scheduler, [9])
        with pytest.raises(ClosedError, match="belongs to the event loop"):
            await asyncio.wait_for(anext(kept[0]), 30)
        assert scheduler.closed
        with pytest.raises(InputError, match="starts once"):
            await scheduler.__aenter__()

    asyncio.run(first())  # and nobody closes it
    asyncio.run(second())
    kept.clear()

    def ended():
        gc.collect()
        return not threads()

    until(ended)


def test_s11_a_loop_that_lives_is_named_and_close_may_come_from_anywhere():
    scheduler, done, entered = Scheduler(Opened(1), 1), threading.Event(), threading.Event()

    async def owner():
        async with scheduler:
            stream = ask(scheduler, [9])
            assert await anext(stream) == due([9])[0]
            entered.set()
            await asyncio.to_thread(done.wait, 30)
            await stream.aclose()

    async def stranger():
        with pytest.raises(ClosedError, match=r"belongs to the event loop .*EventLoop.*used outside of it"):
            ask(scheduler, [9])
        assert not scheduler.closed
        await scheduler.close()
        assert scheduler.closed

    thread = threading.Thread(target=asyncio.run, args=(owner(),))
    thread.start()
    assert entered.wait(30)
    asyncio.run(stranger())
    done.set()
    thread.join(30)
    assert not thread.is_alive() and threads() == []


@pytest.mark.parametrize("raised", [StopIteration, StopAsyncIteration, asyncio.CancelledError, SystemExit, KeyError])
@pytest.mark.parametrize("where", ["through", "prepare"])
def test_s10_an_error_that_steers_a_program_is_told_as_an_error(where, raised):
    def fails(*_):
        raise raised("by accident")

    async def main():
        async with Scheduler(Opened(1), 1) as scheduler:
            if where == "through":
                stream = ask(scheduler, [9], through=fails)
            else:
                stream = scheduler.submit_prepared(fails, size=1)
            with pytest.raises(KeyError if raised is KeyError else RuntimeError, match="by accident") as caught:
                await asyncio.wait_for(anext(stream), 30)
            assert raised is KeyError or isinstance(caught.value.__cause__, raised)
            assert [item async for item in ask(scheduler, [9])] == due([9])
            assert counted(scheduler.metrics()) == (1, 0, 1, 0)

    asyncio.run(main())


@pytest.mark.parametrize("failing", ["kvcache-scheduler", "kvcache-prepare"])
def test_s10_a_thread_that_cannot_start_is_told_and_leaves_nothing(failing, monkeypatch):
    start = threading.Thread.start

    def starts(thread):
        if thread.name == failing:
            raise RuntimeError("can't start new thread")
        start(thread)

    async def main():
        scheduler = Scheduler(Opened(1), 1)
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", starts)
            with pytest.raises(RuntimeError, match="can't start"):
                await scheduler.__aenter__()
        with pytest.raises(ClosedError):
            ask(scheduler, [9])
        await asyncio.wait_for(scheduler.close(), 30)

    asyncio.run(main())
    assert threads() == []


class Text:
    """What a request brings along."""

    def nothing(self):
        raise InputError("there is nothing in it")


def test_s2_what_is_dropped_before_it_is_prepared_is_held_no_longer():
    let = threading.Event()

    async def main():
        async with Scheduler(Opened(1), 1, max_waiting=3) as scheduler:
            first = scheduler.submit_prepared(lambda: let.wait(30) and None, size=1)
            held = []
            for _ in range(50):
                text = Text()
                held.append(weakref.ref(text))
                stream = scheduler.submit_prepared(partial(text.nothing), size=1)
                await stream.aclose()
            del stream, text
            gc.collect()
            assert not [one for one in held if one() is not None]
            await first.aclose()
            let.set()

    asyncio.run(main())
    assert threads() == []


# ---------------------------------------------------------------------- leaving


def test_nothing_is_given_after_a_close_however_long_it_is_made():
    begun, let = threading.Event(), threading.Event()

    def slowly(chunk):
        begun.set()
        assert let.wait(30)
        return chunk.tokens.tolist()

    async def main():
        async with Scheduler(Opened(1), 1) as scheduler:
            stream = ask(scheduler, [9], through=slowly)
            waiting = asyncio.create_task(anext(stream))
            await until_async(begun.is_set)
            await stream.aclose()
            let.set()
            with pytest.raises(StopAsyncIteration):
                await waiting
            assert counted(scheduler.metrics()) == (0, 1, 0, 0)

    asyncio.run(main())


@pytest.mark.parametrize("how", ["task", "timeout", "aclose"])
def test_cancels_end_as_cancels_and_leave_nothing_behind(how):
    chosen = random.Random(how)

    async def main():
        async with Scheduler(Opened(2), 2, max_waiting=100) as scheduler:
            for i in range(12):
                stream, items = ask(scheduler, [chosen.randint(20, 60) for _ in range(9)], size=1), []
                if chosen.random() < 0.5:
                    items.append(await anext(stream))
                reading = asyncio.create_task(read(stream, items))
                for _ in range(chosen.randint(1, 5)):
                    await asyncio.sleep(0)
                if how == "timeout":
                    with pytest.raises(asyncio.TimeoutError):
                        await asyncio.wait_for(reading, 0)
                elif how == "task":
                    reading.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await reading
                else:
                    await stream.aclose()
                    reading.cancel()
                    await asyncio.wait([reading])
                with pytest.raises(StopAsyncIteration):
                    await anext(stream)
                assert counted(scheduler.metrics()) == (0, i + 1, 0, 0)
            await until_async(lambda: scheduler.metrics().busy == 0 and inside.turns_of(scheduler).requests == [])
            assert not inside.inboxes_of(scheduler) and asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert threads() == []


def test_a_timeout_around_an_item_ends_the_request():
    async def main():
        opened = Opened(1)
        async with Scheduler(opened, 1) as scheduler:
            opened.gate.let(0)
            stream = ask(scheduler, [30])
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(anext(stream), 0.01)
            opened.gate.let()
            assert [item async for item in ask(scheduler, [9], through=both)] == due([9])
            assert counted(scheduler.metrics()) == (1, 1, 0, 0)

    asyncio.run(main())
