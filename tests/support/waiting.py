"""Waiting for what another thread, process or server does: no test sleeps and hopes."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any

_PAUSE = 0.002  # seconds between two looks


def until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """Wait until `condition()` is true, and give what it gave.

    Args:
        condition: looked at again and again, in this thread.
        seconds: that only a broken test waits.

    Raises:
        AssertionError: with the condition's source, when the time is over.
    """
    last = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < last, _told(condition, seconds)
        time.sleep(_PAUSE)
    return found


async def until_async(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """`until` for an event loop, which goes on meanwhile; `condition` may be a coroutine function."""
    last = time.monotonic() + seconds
    while True:
        found = condition()
        if isinstance(found, Awaitable):
            found = await found
        if found:
            return found
        assert time.monotonic() < last, _told(condition, seconds)
        await asyncio.sleep(_PAUSE)


def _told(condition: Callable[[], Any], seconds: float) -> str:
    try:
        awaited = inspect.getsource(condition).strip()
    except (OSError, TypeError):  # no function with a source, such as a method of C
        awaited = repr(condition)
    return f"{seconds:g} s are over, and it never came to that: {awaited}"
