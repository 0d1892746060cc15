"""What one request of a `Scheduler` gives, item by item, to whoever waits for it in the event loop."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from typing_extensions import Self

from kvcache.decoding._turns import Chunk, Request
from kvcache.memory import release_threads

if TYPE_CHECKING:
    from kvcache.decoding._scheduler import Scheduler

T = TypeVar("T")


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _handed_on(error: BaseException) -> Exception:
    """An error as the task is told that waits: what would end an iteration or the event loop there is told as an error."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration | StopAsyncIteration):
        return error
    told = RuntimeError(f"the request was ended by {described(error)}")
    told.__cause__ = error
    return told


@dataclass(frozen=True)
class End:
    error: BaseException | None


class Inbox:
    """A request that was accepted: what has been decoded for its consumer, who may have forgotten it."""

    def __init__(self, size: int, alone: int) -> None:
        self.size, self.alone = size, alone
        self.queue: asyncio.Queue[Chunk | End] = asyncio.Queue()
        self.told = self.taken = 0  # chunks; one thread writes the one, another the other
        self.request: Request | None = None  # until it is prepared
        self.through: Callable[[Chunk], Iterable[Any]]
        self.close: Callable[[], None] = lambda: None
        self.began = 0.0  # when its first job did
        self.dropped = self.counted = False


class Stream(AsyncIterator[T], Generic[T]):
    """What one request gives. Closing it, cancelling who waits for it or forgetting it ends the request.

    Attributes:
        cut_off: which of the request's jobs, of those given so far, came to their most tokens without an end.
    """

    def __init__(self, scheduler: "Scheduler", inbox: Inbox) -> None:
        self._scheduler, self._inbox = scheduler, inbox
        self._items: deque[T] = deque()
        self._since = scheduler._ledger.now()
        self._given = self._ended = False
        self.cut_off: list[int] = []

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        if not self._ended:
            self._scheduler._check_loop()
        try:
            while not self._items:
                if self._ended:
                    raise StopAsyncIteration
                item = await self._inbox.queue.get()
                if isinstance(item, End):
                    self._close()
                    if item.error is not None:
                        raise _handed_on(item.error)
                    self._scheduler._count(self._inbox, "finished")
                else:
                    self._scheduler._took(self._inbox)
                    if item.cut_off:
                        self.cut_off.append(item.index)
                    made = await self._scheduler._in_thread(partial(self._made, item))
                    if not self._ended:  # closed by another task meanwhile
                        self._items.extend(made)
        except StopAsyncIteration:
            raise
        except BaseException as error:  # cancelled, or it cannot be made into what was wanted
            self._end("failed" if isinstance(error, Exception) else "cancelled")
            raise
        if not self._given:
            self._given = True
            self._scheduler._ledger.first(self._since)
        return self._items.popleft()

    def _made(self, chunk: Chunk) -> list[T]:
        try:
            return list(self._inbox.through(chunk))
        except BaseException as error:
            told = _handed_on(error)
            raise told from told.__cause__
        finally:
            release_threads()

    async def aclose(self) -> None:
        """End the request. Nothing happens if it has ended."""
        if not self._ended:
            self._end("cancelled")

    def _close(self) -> None:
        """Nothing is given any more."""
        if not self._ended:
            self._ended = True
            self._inbox.close()

    def _end(self, outcome: str) -> None:
        self._close()
        self._items.clear()
        if self._scheduler._is_here():
            self._scheduler._drop(self._inbox, outcome)
        else:
            self._scheduler._call(self._scheduler._drop, self._inbox, outcome)

    def __del__(self) -> None:
        if not self._ended:
            self._close()
            self._scheduler._call(self._scheduler._drop, self._inbox)
