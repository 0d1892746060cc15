"""Many requests on one `Batch`: who decodes next, what is delivered in which order, and an async front.

A request is one or more jobs, such as the segments of a long text, which decode together and are delivered one after the
other. Its first job decodes before its others enter, so that the first chunk does not wait for them. A free place goes to
the request that has fewest jobs decoding, and among equals to the one that came first: no request waits for another's end
while there are places, and none is passed over for ever.
"""

import asyncio
import statistics
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from kvcache.decoding.batch import Batch, Job, Piece
from kvcache.errors import BusyError, ClosedError, InputError

T = TypeVar("T")

_LATEST = 1000  # requests that percentiles are over


@dataclass(frozen=True, eq=False)
class Chunk:
    """Tokens of one job of a request.

    Attributes:
        index: which job.
        tokens: ``[n]``, on the host.
        last: whether the job ends with them.
        cut_off: whether it ends because it came to its most tokens, and not with one that ends it.
    """

    index: int
    tokens: Tensor
    last: bool
    cut_off: bool = False


class Request:
    """Jobs that are delivered in order.

    Args:
        jobs: how many.
        make: gives the job of an index, when there is a place for it. In sequence, it is also given the tokens of the
            job before, ``[n]``.
        size: tokens in a chunk; the last of a job may be shorter.
        sequence: a job begins when the one before has ended.
        deliver: takes the chunks.
        blocked: says that the consumer is behind, and no further job should begin; those that have begun go on.
        watch: is told what is decoded as it is, whatever its turn in the order: which job, how many new tokens, whether it
            has ended.
    """

    def __init__(
        self,
        jobs: int,
        make: Callable[[int, Tensor | None], Job],
        *,
        size: int,
        sequence: bool = False,
        deliver: Callable[[Chunk], None] = lambda chunk: None,
        blocked: Callable[[], bool] = lambda: False,
        watch: Callable[[int, int, bool], None] = lambda index, tokens, over: None,
    ) -> None:
        if jobs < 1 or size < 1:
            raise InputError(f"a request of {jobs} jobs in chunks of {size} tokens: give at least 1 of each")
        self.jobs, self.deliver, self.blocked, self._watch = jobs, deliver, blocked, watch
        self._make, self._size, self._sequence = make, size, sequence
        self.running: dict[Job, int] = {}
        self.entered = 0
        self.error: BaseException | None = None
        self._said: dict[int, Tensor] = {}  # of each job that has begun and is not all delivered
        self._ended: set[int] = set()
        self._cut_off: set[int] = set()
        self._next = 0  # whose tokens are delivered
        self._before: Tensor | None = None
        self._spoken = False

    @property
    def over(self) -> bool:
        """Whether all has been delivered, or it has failed."""
        return self._next == self.jobs or self.error is not None

    @property
    def ready(self) -> bool:
        """Whether a further job may enter."""
        if self.over or self.entered == self.jobs:
            return False
        if self.entered == 0:
            return True
        return self._spoken and not (self._sequence and self.running) and not self.blocked()

    def enter(self, batch: Batch) -> None:
        """Bring the next job into a free place."""
        index = self.entered
        job = self._make(index, self._before)
        self.entered, self._before = index + 1, None
        self.running[job] = index
        try:
            self.take(batch.enter(job))
        except BaseException:
            self.running.pop(job, None)
            batch.leave(job)
            raise

    def take(self, piece: Piece) -> None:
        """Take what one of the jobs has said, and deliver what is due; raise what kept it from going on."""
        if piece.error is not None:
            raise piece.error
        index = self.running[piece.job]
        held = self._said.get(index)
        self._said[index] = piece.tokens if held is None else torch.cat([held, piece.tokens])
        if self._sequence:
            self._before = piece.tokens if self._before is None else torch.cat([self._before, piece.tokens])
        if piece.over:
            del self.running[piece.job]
            self._ended.add(index)
            if piece.cut_off:
                self._cut_off.add(index)
        self._watch(index, len(piece.tokens), piece.over)
        self._due()

    def _due(self) -> None:
        while self._next in self._said:
            index, said, ended = self._next, self._said[self._next], self._next in self._ended
            while len(said) > self._size or (len(said) == self._size and not ended):
                self._hand(Chunk(index, said[: self._size], False))
                said = said[self._size :]
            self._said[index] = said
            if not ended:
                return
            self._hand(Chunk(index, said, True, index in self._cut_off))
            del self._said[index]
            self._next += 1

    def _hand(self, chunk: Chunk) -> None:
        self._spoken = True
        self.deliver(chunk)


class Turns:
    """Requests that share a batch, one turn after the other. Not safe for threads: one drives it.

    Args:
        batch: with nothing in it.
        prefills: how many jobs may enter in one turn, while those that decode wait.
        reserved: places that are kept for the first jobs of requests.
    """

    def __init__(self, batch: Batch, prefills: int = 8, reserved: int = 0) -> None:
        self.batch = batch
        self.requests: list[Request] = []
        self.tokens = 0
        self._prefills, self._reserved = prefills, reserved

    def add(self, request: Request) -> None:
        """Let a request wait for its first place."""
        self.requests.append(request)

    def drop(self, request: Request) -> None:
        """End a request; its places are free."""
        if request in self.requests:
            self.requests.remove(request)
            for job in request.running:
                self.batch.leave(job)
            request.running.clear()

    def turn(self) -> list[Request]:
        """Let jobs enter as places allow, then decode some steps. The requests that are over, failed ones among them."""
        for _ in range(self._prefills):
            free = self.batch.places - self.batch.busy
            ready = [r for r in self.requests if r.ready and free > (self._reserved if r.entered else 0)]
            if not ready:
                break
            request = min(ready, key=lambda request: len(request.running))  # the first of equals came first
            try:
                request.enter(self.batch)
                self.tokens += 1
            except Exception as error:  # its own, and nobody else's
                self._fail(request, error)
        try:
            pieces = self.batch.turn()
        except Exception as error:  # no telling whose
            for request in self.requests:
                if request.running:
                    self._fail(request, error)
            pieces = []
        owners = {job: request for request in self.requests for job in request.running}
        for piece in pieces:
            self.tokens += len(piece.tokens)
            owner = owners[piece.job]
            try:
                if owner.error is None:
                    owner.take(piece)
            except Exception as error:  # of whom it is delivered to
                self._fail(owner, error)
        over = [request for request in self.requests if request.over]
        for request in over:
            self.drop(request)
        return over

    def _fail(self, request: Request, error: BaseException) -> None:
        request.error = error
        for job in request.running:
            self.batch.leave(job)
        request.running.clear()


@dataclass(frozen=True)
class SchedulerMetrics:
    """What a scheduler does and has done.

    Attributes:
        rows: jobs that can decode together.
        busy: jobs that do.
        waiting: requests none of whose jobs has begun.
        running: requests that have begun.
        finished, cancelled, failed, refused: requests since the start, by how they ended.
        tokens: decoded since the start.
        ttfa: seconds from `submit` to the first item at the consumer, of the last 1000 requests: ``p50``, ``p90``,
            ``p99``; nothing before there are any.
    """

    rows: int
    busy: int
    waiting: int
    running: int
    finished: int
    cancelled: int
    failed: int
    refused: int
    tokens: int
    ttfa: dict[str, float] = field(default_factory=dict)


class Scheduler:
    """An async front for many requests on one batch, which a thread of its own decodes.

    ``async with Scheduler(...) as scheduler`` starts and ends the thread. All methods are for the event loop it was
    entered in.

    Args:
        batch: opens the batch, in the thread.
        rows: its places.
        max_waiting: requests that may wait for their first place; one more is refused.
        ahead: chunks that may lie undelivered before no further job of that request begins.
        prefills, reserved: see `Turns`; by default a place of several is reserved, so that a newcomer does not wait
            behind all the segments of a long text.
    """

    def __init__(
        self,
        batch: Callable[[], AbstractContextManager[Batch]],
        rows: int,
        *,
        max_waiting: int = 64,
        ahead: int = 32,
        prefills: int = 8,
        reserved: int | None = None,
    ) -> None:
        for name, value in (("rows", rows), ("max_waiting", max_waiting), ("ahead", ahead), ("prefills", prefills)):
            if value < 1:
                raise InputError(f"{name}={value} must be at least 1")
        reserved = min(1, rows - 1) if reserved is None else reserved
        if not 0 <= reserved < rows:
            raise InputError(f"reserved={reserved} must be at least 0 and leave one of the {rows} rows")
        self._open_batch = batch
        self._rows, self._max_waiting, self._ahead = rows, max_waiting, ahead
        self._order = prefills, reserved
        self._changed = threading.Condition()
        self._added: list[Request] = []
        self._dropped: list[Request] = []
        self._inboxes: dict[Request, _Inbox] = {}
        self._thread: threading.Thread | None = None
        self._closing = False
        self._turns: Turns | None = None
        self._tokens = 0  # of batches that are closed
        self._counts = dict.fromkeys(("finished", "cancelled", "failed", "refused"), 0)
        self._firsts: deque[float] = deque(maxlen=_LATEST)

    def __repr__(self) -> str:
        state = "closed" if self._closing else "not started" if self._thread is None else "running"
        return f"{type(self).__name__}(rows={self._rows}, {state}, {len(self._inboxes)} requests)"

    async def __aenter__(self) -> Self:
        if self._thread is not None:
            raise InputError("a scheduler starts once; make another")
        self._loop = asyncio.get_running_loop()
        started: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="kvcache-scheduler", daemon=True)
        self._thread.start()
        try:
            await started
        except BaseException:
            with self._changed:
                self._closing = True
                self._changed.notify()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all requests, whose consumers are told, and the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def submit(
        self,
        jobs: int,
        make: Callable[[int, Tensor | None], Job],
        *,
        size: int,
        sequence: bool = False,
        through: Callable[[Chunk], Iterable[T]],
    ) -> "Stream[T]":
        """Begin a request; see `Request`.

        Args:
            through: makes of a chunk what the consumer is given, in a thread of its own.

        Raises:
            BusyError: if too many wait.
            ClosedError: if the scheduler is closed, or has not begun.
        """
        if self.closed:
            raise ClosedError("the scheduler is closed; use it within `async with`")
        if (waiting := self.metrics().waiting) >= self._max_waiting:
            self._counts["refused"] += 1
            raise BusyError(f"{waiting} requests wait already, max_waiting is {self._max_waiting}; come again later")
        inbox = _Inbox()
        request = Request(
            jobs,
            make,
            size=size,
            sequence=sequence,
            deliver=lambda chunk: self._tell(inbox, chunk),
            blocked=lambda: inbox.told - inbox.taken >= self._ahead,
        )
        self._inboxes[request] = inbox
        with self._changed:
            self._added.append(request)
            self._changed.notify()
        return Stream(self, request, inbox, through)

    @property
    def closed(self) -> bool:
        """Whether it takes no requests: not yet begun, closed, or ended by an error."""
        return self._thread is None or self._closing

    def metrics(self) -> SchedulerMetrics:
        """What it does and has done."""
        requests = list(self._inboxes)
        waiting = sum(request.entered == 0 for request in requests)
        turns = self._turns
        firsts = list(self._firsts)
        cuts = (
            statistics.quantiles(firsts * 2 if len(firsts) == 1 else firsts, n=100, method="inclusive")
            if firsts
            else []
        )
        return SchedulerMetrics(
            rows=self._rows,
            busy=0 if turns is None else turns.batch.busy,
            waiting=waiting,
            running=len(requests) - waiting,
            tokens=self._tokens if turns is None else turns.tokens,
            ttfa={f"p{p}": cuts[p - 1] for p in (50, 90, 99)} if cuts else {},
            **self._counts,
        )

    # ------------------------------------------------------------------ in the event loop

    def _first(self, seconds: float) -> None:
        self._firsts.append(seconds)

    def _drop(self, request: Request, counts: str = "cancelled") -> None:
        if self._inboxes.pop(request, None) is not None:
            self._counts[counts] += 1
            with self._changed:
                self._dropped.append(request)
                self._changed.notify()

    def _over(self, request: Request) -> None:
        inbox = self._inboxes.pop(request, None)
        if inbox is not None:
            self._counts["finished" if request.error is None else "failed"] += 1
            inbox.queue.put_nowait(_End(request.error))

    # ------------------------------------------------------------------ in the thread

    def _run(self, started: "asyncio.Future[None]") -> None:
        try:
            opened = self._open_batch()
            batch = opened.__enter__()
        except BaseException as error:  # handed to whoever started it
            self._call(_refuse, started, error)
            return
        try:
            turns = self._turns = Turns(batch, *self._order)
            self._call(_begin, started)
            while not self._closing:
                self._turn(turns)
        finally:
            self._closing = True
            self._turns, self._tokens = None, turns.tokens
            for request in list(turns.requests):
                turns.drop(request)
            opened.__exit__(None, None, None)
            self._call(self._end_all)

    def _turn(self, turns: Turns) -> None:
        with self._changed:
            while not (self._closing or self._added or self._dropped or turns.requests):
                self._changed.wait()
            added, self._added = self._added, []
            dropped, self._dropped = self._dropped, []
        for request in added:
            turns.add(request)
        for request in dropped:
            turns.drop(request)
        over = turns.turn()
        for request in over:
            self._call(self._over, request)
        if not over and turns.requests and turns.batch.busy == 0:  # all that is left waits for its consumer
            with self._changed:
                self._changed.wait(0.02)

    def _end_all(self) -> None:
        for request in list(self._inboxes):
            request.error = ClosedError("the scheduler was closed before this request had ended; send it again")
            self._over(request)

    def _tell(self, inbox: "_Inbox", chunk: Chunk) -> None:
        inbox.told += 1
        self._call(inbox.queue.put_nowait, chunk)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop has ended without closing the scheduler: nobody is left to be told
            self._closing = True


def _begin(started: "asyncio.Future[None]") -> None:
    if not started.done():
        started.set_result(None)


def _refuse(started: "asyncio.Future[None]", error: BaseException) -> None:
    if not started.done():
        started.set_exception(error)


@dataclass(frozen=True)
class _End:
    error: BaseException | None


class _Inbox:
    """What has been decoded for a consumer, who may have forgotten it."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Chunk | _End] = asyncio.Queue()
        self.told = self.taken = 0  # chunks; one thread writes the one, another the other


class Stream(AsyncIterator[T], Generic[T]):
    """What one request gives. Closing it, cancelling who waits for it or forgetting it ends the request.

    Attributes:
        cut_off: which of the request's jobs, of those given so far, came to their most tokens without an end.
    """

    def __init__(
        self, scheduler: Scheduler, request: Request, inbox: _Inbox, through: Callable[[Chunk], Iterable[T]]
    ) -> None:
        self._scheduler, self._request, self._inbox, self._through = scheduler, request, inbox, through
        self._items: deque[T] = deque()
        self._since = time.perf_counter()
        self._given = self._ended = False
        self.cut_off: list[int] = []

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        try:
            while not self._items:
                if self._ended:
                    raise StopAsyncIteration
                item = await self._inbox.queue.get()
                if isinstance(item, _End):
                    self._ended = True
                    if item.error is not None:
                        raise item.error
                else:
                    self._inbox.taken += 1
                    if item.cut_off:
                        self.cut_off.append(item.index)
                    self._items.extend(await asyncio.to_thread(self._made, item))
        except StopAsyncIteration:
            raise
        except BaseException as error:  # cancelled, or it cannot be made into what was wanted
            self._end("failed" if isinstance(error, Exception) else "cancelled")
            raise
        if not self._given:
            self._given = True
            self._scheduler._first(time.perf_counter() - self._since)
        return self._items.popleft()

    def _made(self, chunk: Chunk) -> list[T]:
        return list(self._through(chunk))

    async def aclose(self) -> None:
        """End the request. Nothing happens if it has ended."""
        self._end("cancelled")

    def _end(self, counts: str) -> None:
        self._ended = True
        self._items.clear()
        self._scheduler._drop(self._request, counts)

    def __del__(self) -> None:
        if not self._ended:
            self._scheduler._call(self._scheduler._drop, self._request)
