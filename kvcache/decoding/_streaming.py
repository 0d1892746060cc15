"""Handing tokens out while they are made: chunks, a worker thread with back-pressure, and an async twin.

What torch keeps for each thread, such as autocast, is in another thread what it was where the stream was asked for.
"""

import asyncio
import contextvars
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from kvcache.errors import KVCacheError
from kvcache.models import autocasts

T = TypeVar("T")
R = TypeVar("R")


class _Stopped(Exception):
    """Raised inside the worker when nobody listens any more."""


class ThreadState:
    """What torch keeps for the thread that makes this, and not for all.

    That is autocast, whether gradients are kept, the default device, and the stream of a GPU. Deterministic algorithms,
    precisions and the default dtype are one for all threads.
    """

    def __init__(self) -> None:
        accelerator = torch.accelerator.current_accelerator()
        kinds = ("cpu",) if accelerator is None else ("cpu", accelerator.type)
        self._autocast = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds if autocasts(kind)]
        self._cached = torch.is_autocast_cache_enabled()
        self._inference, self._grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        self._device = torch.get_default_device()
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """A block in which another thread has the same."""
        with ExitStack() as block:
            if self._stream is not None:
                block.enter_context(torch.cuda.stream(self._stream))
            for kind, dtype in self._autocast:
                block.enter_context(torch.autocast(kind, dtype, cache_enabled=self._cached))
            if self._device != torch.get_default_device():  # a block makes every call of torch slower
                block.enter_context(self._device)
            block.enter_context(torch.inference_mode(self._inference))
            block.enter_context(torch.set_grad_enabled(self._grad))
            yield


def from_worker(work: Callable[[Callable[[T], None]], None], ahead: int = 64) -> Iterator[T]:
    """What `work` emits, as it emits it. `work` runs in a thread of its own and is called with ``emit``.

    The thread waits when the consumer is more than `ahead` items behind. Closing the iterator ends the thread at its
    next ``emit``; an error in the thread is raised here. It has the `ThreadState` of who calls this.
    """
    return _from_worker(work, ahead, ThreadState())


def _from_worker(work: Callable[[Callable[[T], None]], None], ahead: int, state: ThreadState) -> Iterator[T]:
    items: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(maxsize=ahead)
    stopped = threading.Event()

    def put(kind: str, item: T | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                items.put((kind, item), timeout=0.1)
                return
            except queue.Full:
                continue
        raise _Stopped

    def run() -> None:
        try:
            with state.entered():
                work(lambda item: put("item", item))
            put("end", None)
        except _Stopped:
            return
        except BaseException as error:  # handed to the consumer
            try:
                put("error", error)
            except _Stopped:
                return

    thread = threading.Thread(target=run, name="kvcache-stream", daemon=True)
    thread.start()
    try:
        while True:
            kind, item = items.get()
            if kind == "end":
                return
            if kind == "error":
                assert isinstance(item, BaseException)
                raise item
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join()


def in_thread(items: Iterator[T], ahead: int = 64) -> Iterator[T]:
    """The same items, made in a thread of their own; see `from_worker`."""

    def work(emit: Callable[[T], None]) -> None:
        try:
            for item in items:
                emit(item)
        finally:
            if isinstance(items, Generator):
                items.close()

    return from_worker(work, ahead)


def chunked(tokens: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """Tokens ``[batch]`` gathered into chunks ``[batch, size]``; the last may be shorter, before an error too."""
    held: list[Tensor] = []
    try:
        for token in tokens:
            held.append(token)
            if len(held) == size:
                yield torch.stack(held, 1)
                held = []
    except KVCacheError:  # the tokens before it are good
        if held:
            yield torch.stack(held, 1)
        raise
    if held:
        yield torch.stack(held, 1)


def as_async(items: Iterator[T]) -> "AsyncItems[T]":
    """The same items without blocking the event loop; see `AsyncItems`."""
    return AsyncItems(items)


class AsyncItems(AsyncIterator[T]):
    """The items of an iterator, each made in a thread, so that the event loop goes on meanwhile.

    Cancelling who waits for an item, by `Task.cancel`, `asyncio.wait_for` or `asyncio.timeout`, ends the iterator. An item
    that is being made cannot be interrupted: it is waited for and dropped, the iterator is closed, and the cancellation is
    raised then. So nothing of the request is left when that is heard.
    """

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._state = ThreadState()
        self._turn = threading.Lock()  # held by the thread that is in `items`
        self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        if self._ended:
            raise StopAsyncIteration
        making = _in_executor(self._make)
        making.add_done_callback(
            asyncio.Future.exception
        )  # looked at, so that nothing is said of one that nobody waits for
        try:
            made = await asyncio.shield(making)
        except BaseException:  # cancelled, or no item can be made
            await self.aclose()
            raise
        if not made:
            self._ended = True
            raise StopAsyncIteration
        return made[0]

    async def aclose(self) -> None:
        """End the iterator, after the item that is being made: who waits for that is given it. The second time is nothing."""
        self._ended = True
        await _outlasting(_in_executor(self._close))

    def _make(self) -> tuple[T, ...]:
        """The next item, or nothing."""
        with self._turn, self._state.entered():
            return () if self._ended else tuple(itertools.islice(self._items, 1))

    def _close(self) -> None:
        with self._turn, self._state.entered():
            if isinstance(self._items, Generator):
                self._items.close()


def _in_executor(work: Callable[[], R]) -> "asyncio.Future[R]":
    """Run it in a thread. Unlike a task, as `asyncio.to_thread` is, it is not cancelled with all tasks of a loop that ends."""
    return asyncio.get_running_loop().run_in_executor(None, contextvars.copy_context().run, work)


async def _outlasting(done: "asyncio.Future[R]") -> R:
    """What a thread gives, waited for even when cancelled; that is raised afterwards."""
    cancelled: asyncio.CancelledError | None = None
    while not done.done():
        try:
            await asyncio.wait([done])
        except asyncio.CancelledError as error:
            cancelled = error
    given = done.result()
    if cancelled is not None:
        raise cancelled
    return given
