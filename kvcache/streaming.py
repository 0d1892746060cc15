"""Handing tokens out while they are made: chunks, a worker thread with back-pressure, and an async twin."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from kvcache.errors import KVCacheError

T = TypeVar("T")


class _Stopped(Exception):
    """Raised inside the worker when nobody listens any more."""


def from_worker(work: Callable[[Callable[[T], None]], None], ahead: int = 64) -> Iterator[T]:
    """What `work` emits, as it emits it. `work` runs in a thread of its own and is called with ``emit``.

    The thread waits when the consumer is more than `ahead` items behind. Closing the iterator ends the thread at its
    next ``emit``; an error in the thread is raised here.
    """
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


async def as_async(items: Iterator[T]) -> AsyncIterator[T]:
    """The same items without blocking the event loop. Cancelling closes `items`."""
    end = object()
    try:
        while (item := await asyncio.to_thread(next, items, end)) is not end:
            yield item  # type: ignore[misc]
    finally:
        close = getattr(items, "close", None)
        if close is not None:
            await asyncio.shield(asyncio.to_thread(close))
