"""Cancelling ends as cancelling: whatever runs, by whichever way, and nothing of the request is left behind."""

import asyncio
import contextlib
import functools
import gc
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.families import tiny, token_ids
from support.inside.decoding import AsyncItems, idle, maker_of
from support.inside.speech import pool_of
from support.searching import examples
from support.t3_models import tiny_t3
from support.waiting import until, until_async

from kvcache import KVCacheManager, MemoryStore, SpeakerCache
from kvcache.decoding import as_async, from_worker
from kvcache.testing import no_leaks
from kvcache_chatterbox import ChatterboxEngine, SpeechScheduler, byte_tokens, random_conditionals, stand_in

pytestmark = pytest.mark.one_release

TIMEOUTS = (asyncio.TimeoutError, TimeoutError)  # two classes up to Python 3.10


class Made:
    """An iterator of numbers, each of which is made when the test says so."""

    def __init__(self, fails=()):
        self.inside, self.may_go_on = threading.Event(), threading.Event()
        self.ended_by, self.fails = None, fails

    def items(self):
        try:
            for number in range(1000):
                self.inside.set()
                assert self.may_go_on.wait(30)
                if number in self.fails:
                    raise ValueError(f"{number} cannot be made")
                yield number
        except BaseException as error:
            self.ended_by = type(error)
            raise


@contextlib.contextmanager
def nothing_said():
    """That no error is told to nobody: raised where it cannot be, never retrieved, or of a task that was forgotten."""
    said, before = [], sys.unraisablehook
    sys.unraisablehook = lambda args: said.append(args.exc_value)
    try:
        yield lambda loop: loop.set_exception_handler(lambda _, context: said.append(context))
        gc.collect()
    finally:
        sys.unraisablehook = before
    assert said == []


def run(main):
    """`asyncio.run`, of a coroutine function, that says nothing and leaves no thread."""
    threads = set(threading.enumerate())
    with nothing_said() as listen:

        async def listened():
            listen(asyncio.get_running_loop())
            return await main()

        found = asyncio.run(listened())
    until(lambda: set(threading.enumerate()) <= threads)
    return found


STATES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast in another precision, without its cache": lambda: torch.autocast(
        "cpu", torch.float16, cache_enabled=False
    ),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "a default device": lambda: torch.device("meta"),
    "nothing": contextlib.nullcontext,
}


@pytest.mark.parametrize("kind", STATES)
def test_another_thread_has_the_state_of_torch_of_who_asks(kind):
    def state():
        cast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()
        made = torch.ones(1, requires_grad=True) * 2
        return *cast, made.is_inference(), made.requires_grad, made.device, torch.get_default_device()

    with STATES[kind]():
        expected = state()
        told = from_worker(lambda emit: emit(state()))
        items = as_async(iter(state, None))

    async def read():
        return await anext(items)

    assert (list(told), asyncio.run(read())) == ([expected], expected)
    with ThreadPoolExecutor(1) as pool:  # whose thread goes on to other work
        before = pool.submit(state).result()
        assert pool.submit(maker_of(items)).result() == (expected,)
        assert pool.submit(state).result() == before


async def inside(made):
    await until_async(made.inside.is_set)


async def closed_inside(made):
    """The items, who waits for the one that is being made, and who closes them meanwhile."""
    items = as_async(made.items())
    task = asyncio.create_task(anext(items))
    await inside(made)
    closing = asyncio.create_task(items.aclose())
    await asyncio.sleep(0)
    return items, task, closing


def test_cancelled_while_an_item_is_made_is_cancelled_once_that_has_ended():
    made = Made()

    async def main():
        items = as_async(made.items())
        task = asyncio.create_task(anext(items))
        await inside(made)
        for _ in range(3):  # however often
            task.cancel()
            await asyncio.sleep(0)
        assert not task.done()
        made.may_go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert made.ended_by is GeneratorExit
        with pytest.raises(StopAsyncIteration):
            await anext(items)

    run(main)


@pytest.mark.parametrize("way", ["wait_for", "timeout"])
def test_a_timeout_while_an_item_is_made_is_a_timeout(way):
    if way == "timeout" and sys.version_info < (3, 11):
        pytest.skip("asyncio.timeout came with Python 3.11")
    made = Made()

    async def limited(items):
        if way == "wait_for":
            return await asyncio.wait_for(anext(items), 0.01)
        async with asyncio.timeout(0.01):
            return await anext(items)

    async def main():
        asyncio.get_running_loop().call_later(0.05, made.may_go_on.set)
        with pytest.raises(TIMEOUTS):
            await limited(as_async(made.items()))
        assert made.ended_by is GeneratorExit

    run(main)


def test_closed_while_an_item_is_made_hands_it_out_and_ends():
    made = Made()

    async def main():
        items, task, closing = await closed_inside(made)
        made.may_go_on.set()
        assert await task == 0
        await closing
        assert made.ended_by is GeneratorExit
        assert [item async for item in items] == []
        await items.aclose()

    run(main)


def test_cancelled_while_it_is_closed_is_cancelled_once_it_is():
    made = Made()

    async def main():
        _, task, closing = await closed_inside(made)
        closing.cancel()
        await asyncio.sleep(0)
        made.may_go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert await task == 0
        assert made.ended_by is GeneratorExit

    run(main)


def test_an_item_that_fails_after_its_consumer_was_cancelled_is_dropped_with_it():
    made = Made(fails=[0])

    async def main():
        task = asyncio.create_task(anext(as_async(made.items())))
        await inside(made)
        task.cancel()
        await asyncio.sleep(0)
        made.may_go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert made.ended_by is ValueError

    run(main)


def test_an_item_that_fails_is_raised_and_ends_it():
    made = Made(fails=[1])
    made.may_go_on.set()

    async def main():
        items = as_async(made.items())
        assert await anext(items) == 0
        with pytest.raises(ValueError, match="1 cannot be made"):
            await anext(items)
        assert [item async for item in items] == []

    run(main)


def test_a_loop_that_ends_while_an_item_is_made_closes_it():
    made = Made()

    async def main():
        task = asyncio.create_task(anext(as_async(made.items())))
        await inside(made)
        asyncio.get_running_loop().call_soon(made.may_go_on.set)
        return task  # which the end of the loop cancels

    assert run(main).cancelled()
    assert made.ended_by is GeneratorExit


def test_closed_before_its_first_item_and_forgotten_between_two_it_leaves_nothing():
    def work(emit):
        for number in range(10**9):
            emit(number)

    async def main():
        await as_async(from_worker(work)).aclose()
        async for number in as_async(from_worker(work, ahead=2)):
            if number == 5:
                break

    run(main)


# ------------------------------------------------------------------ 200 at random


@functools.cache
def speech():
    model = stand_in(tiny_t3("english"))
    engine = ChatterboxEngine(
        model, prefix_cache=SpeakerCache(MemoryStore("64MiB"))
    )  # a disk's has a thread that writes
    text, voice = byte_tokens(model.t3, "hello there"), random_conditionals(model.t3)
    return engine, {"text_tokens": text, "t3_cond": voice, "max_new_tokens": 30, "seed": 0}


def ainference_stream(chance):
    engine, request = speech()
    return engine.ainference_stream(chunk_size=chance.choice([1, 5, 25]), **request)


@functools.cache
def manager(backend):
    return KVCacheManager(tiny("llama"), backend=backend)


def astream(chance, backend):
    given = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return manager(backend).astream(token_ids(), chunk_size=chance.choice([1, 4, 30]), **given)


SOURCES = {
    "ainference_stream": ainference_stream,
    "astream by generate": functools.partial(astream, backend="off"),
    "astream by the engine": functools.partial(astream, backend="eager"),
}


async def whole(stream):
    return [chunk async for chunk in stream]


async def cancelled(make, way, chance, seconds):
    """Cancel a stream in this way at a random moment; True if it was, False if it had ended before."""
    stream = make(chance)
    after = chance.uniform(0, seconds)
    loop = asyncio.get_running_loop()
    try:
        if way == "task":
            task = asyncio.create_task(whole(stream))
            loop.call_later(after, task.cancel)
            await task
        elif way == "twice":
            task = asyncio.create_task(whole(stream))
            loop.call_later(after, task.cancel)
            loop.call_later(after + 0.001, task.cancel)
            await task
        elif way == "wait_for":
            await asyncio.wait_for(whole(stream), after)
        elif way == "timeout":
            async with asyncio.timeout(after):
                await whole(stream)
        elif way == "aclose":
            taken = chance.randrange(3)
            while taken and await anext(stream, None) is not None:
                taken -= 1
            await stream.aclose()
            return await whole(stream) == []
        else:  # aclose, while another task waits for a chunk
            task = asyncio.create_task(whole(stream))
            closed = loop.create_future()
            loop.call_later(after, closed.set_result, None)
            await closed
            await stream.aclose()
            await asyncio.wait_for(task, 30)
            return True
    except asyncio.CancelledError:
        assert way in ("task", "twice")
        return True
    except TIMEOUTS:
        assert way in ("wait_for", "timeout")
        return True
    return False


WAYS = ["task", "twice", "wait_for", "aclose", "aclose elsewhere"] + ["timeout"] * (sys.version_info >= (3, 11))


@pytest.mark.search
def test_200_random_cancels_of_streams_leave_nothing_behind():
    chance = random.Random(1)
    expected = {}

    async def first():
        for name, make in SOURCES.items():
            expected[name] = torch.cat(await whole(make(chance)), 1)

    asyncio.run(first())
    ended = []

    async def main():
        loop = asyncio.get_running_loop()
        for i in range(examples(200)):
            name = chance.choice(list(SOURCES))
            ended.append(await cancelled(SOURCES[name], WAYS[i % len(WAYS)], chance, 0.06))
            if i % 20 == 19:  # what comes after is right
                begun = loop.time()
                assert torch.equal(torch.cat(await whole(SOURCES[name](chance)), 1), expected[name])
                assert loop.time() - begun < 30

    engine, _ = speech()
    with no_leaks(engine.t3, manager("off").model, allow=lambda held: isinstance(held, torch.Tensor)):
        run(main)
    assert sum(ended) > len(ended) / 4
    assert list(idle(pool_of(engine))) == [2]  # one place, which waits for the next request


@pytest.mark.search
def test_200_random_cancels_of_the_scheduler_leave_nothing_behind():
    chance = random.Random(2)
    engine, _ = speech()
    given = {"max_new_tokens": 20, "chunking": [10], "segment_characters": 20, "seed": 0}
    ended = []

    async def main():
        async with SpeechScheduler(engine, max_rows=3, slots=200) as scheduler:

            def make(chance):
                return scheduler.submit(chance.choice(["Hello.", "Hello there. How are you? Fine."]), **given)

            expected = torch.cat(await whole(scheduler.submit("Hello.", **given)), 1)
            for i in range(examples(200)):
                ended.append(await cancelled(make, WAYS[i % len(WAYS)], chance, 0.06))
                if i % 20 == 19:
                    again = torch.cat(await whole(scheduler.submit("Hello.", **given)), 1)
                    torch.testing.assert_close(again, expected, atol=1e-6, rtol=0)
            await until_async(lambda: scheduler.metrics().busy == 0)
            metrics = scheduler.metrics()
            assert metrics.failed == metrics.running == metrics.waiting == 0

    run(main)
    assert sum(ended) > len(ended) / 4


def test_it_is_an_async_iterator_that_can_be_closed():
    items = as_async(iter([1, 2]))
    assert isinstance(items, AsyncItems)
    assert aiter(items) is items

    async def main():
        async with contextlib.aclosing(items):
            return [item async for item in items]

    assert run(main) == [1, 2]
