"""An async front for many requests on one `Batch`, which a thread of its own decodes.

Whose turn it is, and how long anybody waits for it at most, is said in `kvcache.decoding.Turns`.
"""

import asyncio
import contextvars
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from torch import Tensor
from typing_extensions import Self

from kvcache.decoding._batch import Batch, Job
from kvcache.decoding._ledger import Ledger, SchedulerMetrics
from kvcache.decoding._request_stream import End, Inbox, Stream, described
from kvcache.decoding._turns import Chunk, Request, Turns
from kvcache.errors import BusyError, ClosedError, InputError, KVCacheError, check_whole
from kvcache.memory import release_threads

T = TypeVar("T")

log = logging.getLogger("kvcache.scheduler")


@dataclass(frozen=True, eq=False)
class Work(Generic[T]):
    """What a request consists of.

    Attributes:
        jobs, make, sequence: see `Request`.
        through: makes of a chunk what the consumer is given, in a thread of its own.
        close: called once nobody is given more, however the request ends, in any thread and maybe while `through` runs.
    """

    jobs: int
    make: Callable[[int, Tensor | None], Job]
    through: Callable[[Chunk], Iterable[T]]
    sequence: bool = False
    close: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        check_whole("jobs", self.jobs, 1)


class Scheduler:
    """An async front for many requests on one batch, which a thread of its own decodes.

    ``async with Scheduler(...) as scheduler`` starts and ends the thread. All methods are for the event loop it was
    entered in, but for `metrics`, `close` and the properties.

    Args:
        batch: opens the batch, in the thread.
        rows: its places.
        max_waiting: requests that may wait for their first place; one more is refused.
        max_running: requests of several jobs that may have begun, see ``begun`` of `Turns`; by default twice the rows. No more
            than ``max_waiting + max_running + rows`` requests are ever held.
        ahead: chunks that may lie undelivered before no further job of that request begins.
        prefills, reserved: see `Turns`; by default a place of several is reserved, so that a newcomer does not wait
            behind all the segments of a long text.
        within: gives what each turn of the batch runs in, such as the block of a lock.
    """

    def __init__(
        self,
        batch: Callable[[], AbstractContextManager[Batch]],
        rows: int,
        *,
        max_waiting: int = 64,
        max_running: int | None = None,
        ahead: int = 32,
        prefills: int = 8,
        reserved: int | None = None,
        within: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        check_whole("rows", rows, 1)
        max_running = 2 * rows if max_running is None else max_running
        limits = {"max_waiting": max_waiting, "max_running": max_running, "ahead": ahead, "prefills": prefills}
        for name, value in limits.items():
            check_whole(name, value, 1)
        reserved = min(1, rows - 1) if reserved is None else reserved
        check_whole("reserved", reserved, 0)
        if reserved >= rows:
            raise InputError(f"reserved={reserved} must be at least 0 and leave one of the {rows} rows")
        self._open_batch, self._within = batch, within
        self._rows, self._max_waiting, self._max_running, self._ahead = rows, max_waiting, max_running, ahead
        self._order = prefills, reserved, max_running
        # As many as streams: one may wait long in its thread, for a vocoder that all share, and the loop's own threads are few.
        self._makers = ThreadPoolExecutor(max_waiting + max_running + rows, "kvcache-consumer")
        self._changed = threading.Condition()
        self._unprepared: deque[tuple[Inbox, Callable[[], Work[Any]]]] = deque()
        self._added: list[Request] = []
        self._dropped: list[Request] = []
        self._inboxes: dict[Inbox, None] = {}  # of requests that are accepted and not over
        self._threads: list[threading.Thread] = []
        self._started: asyncio.Future[None] | None = None
        self._loop: weakref.ref[asyncio.AbstractEventLoop] | None = None  # the thread would keep it alive
        self._closing = False
        self._error: BaseException | None = None
        self._turns: Turns | None = None
        self._tokens = 0  # of batches that are closed
        self._ledger = Ledger()

    def __repr__(self) -> str:
        state = "closed" if self._closing else "not started" if not self._threads else "running"
        return f"{type(self).__name__}(rows={self._rows}, {state}, {len(self._inboxes)} requests)"

    async def __aenter__(self) -> Self:
        if self._threads:
            raise InputError("a scheduler starts once; make another")
        loop = asyncio.get_running_loop()
        self._loop = weakref.ref(loop)
        self._abandoned = weakref.finalize(loop, self._stop)  # by who never closes the scheduler
        self._abandoned.atexit = False
        started = self._started = loop.create_future()
        try:
            self._start(self._run, "kvcache-scheduler")
            self._start(self._prepare, "kvcache-prepare")
            release_threads()  # this thread has loaded the model, maybe, and decodes no more
            await started
        except BaseException:
            self._stop()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all requests, whose consumers are told, and the threads. Any event loop may do that."""
        self._stop()
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        self._makers.shutdown(wait=False)
        if self._loop is not None:
            self._abandoned.detach()

    def submit(
        self,
        jobs: int,
        make: Callable[[int, Tensor | None], Job],
        *,
        size: int,
        alone: int = 1,
        sequence: bool = False,
        through: Callable[[Chunk], Iterable[T]],
    ) -> "Stream[T]":
        """Begin a request; see `Request`.

        Args:
            make: gives the job of an index; in sequence, of the tokens ``[n]`` of the job before it.
            through: makes of a chunk what the consumer is given, in a thread of its own.

        Raises:
            BusyError: if there is no room for it; its ``retry_after`` says when there may be.
            ClosedError: if the scheduler is closed, or has not begun, or was entered in another event loop.
        """
        work = Work(jobs, make, through, sequence)
        inbox = self._accepted(size, alone)
        self._add(inbox, work)
        return Stream(self, inbox)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        loop, run = asyncio.get_running_loop(), contextvars.copy_context().run
        try:
            made = loop.run_in_executor(self._makers, run, work)
        except RuntimeError:  # closed: what came before that is given all the same
            made = loop.run_in_executor(None, run, work)
        return await made

    def submit_prepared(self, prepare: Callable[[], Work[T]], *, size: int, alone: int = 1) -> "Stream[T]":
        """`submit` what takes a while to prepare: `prepare` runs in a thread, once there is room, and one at a time.

        What it raises, the stream raises instead of its first item; then nothing of the request has run.
        """
        inbox = self._accepted(size, alone)
        with self._changed:
            self._unprepared.append((inbox, prepare))
            self._changed.notify_all()
        return Stream(self, inbox)

    @property
    def closed(self) -> bool:
        """Whether it takes no requests: not yet begun, closed, ended by an error, or its event loop is closed."""
        loop = None if self._loop is None else self._loop()
        return not self._threads or self._closing or loop is None or loop.is_closed()

    @property
    def error(self) -> BaseException | None:
        """What ended it, or came up when it was closed; None while all is well."""
        return self._error

    def metrics(self) -> SchedulerMetrics:
        """What it does and has done."""
        waiting, running = self._held()
        turns = self._turns
        return SchedulerMetrics(
            rows=self._rows,
            busy=0 if turns is None else turns.busy,
            waiting=waiting,
            running=len(running),
            tokens=self._tokens if turns is None else turns.tokens,
            ttfa=self._ledger.percentiles(),
            **self._ledger.counts,
        )

    # ------------------------------------------------------------------ in the event loop

    def _held(self) -> tuple[int, Sequence[Inbox]]:
        """How many requests wait for their first place, and those that have begun."""
        inboxes = list(self._inboxes)
        running = [inbox for inbox in inboxes if inbox.request is not None and inbox.request.entered]
        return len(inboxes) - len(running), running

    def _accepted(self, size: int, alone: int) -> Inbox:
        self._check_open()
        check_whole("size", size, 1)
        check_whole("alone", alone, 1)
        waiting, running = self._held()
        most = self._max_waiting + self._max_running + self._rows
        if waiting >= self._max_waiting or waiting + len(running) >= most:
            self._ledger.counts["refused"] += 1
            seconds = self._ledger.until_room(waiting, [inbox.began for inbox in running])
            full = f"{waiting} requests wait already, max_waiting is {self._max_waiting}"
            if waiting < self._max_waiting:
                full = f"{waiting + len(running)} requests are held already, which is the most"
            raise BusyError(f"{full}; come again in about {seconds:.0f} s", seconds)
        inbox = Inbox(size, alone)
        self._inboxes[inbox] = None
        return inbox

    def _check_open(self) -> None:
        if self._error is not None:
            raise ClosedError(
                f"the scheduler was ended by an error ({described(self._error)}); start another"
            ) from self._error
        self._check_loop()
        if self.closed:
            raise ClosedError("the scheduler is closed; use it within `async with`")

    def _is_here(self) -> bool:
        """Whether this runs in the event loop that the scheduler was entered in."""
        try:
            return self._loop is not None and asyncio.get_running_loop() is self._loop()
        except RuntimeError:  # in no event loop
            return False

    def _check_loop(self) -> None:
        """Raise `ClosedError` in another event loop than the one that the scheduler was entered in."""
        if self._loop is not None and not self._is_here():
            mine = self._loop()
            raise ClosedError(
                "the scheduler belongs to the event loop that it was entered in, "
                f"{'one that is gone' if mine is None else mine!r}, and is used outside of it; use it where it was entered"
            )

    def _count(self, inbox: Inbox, outcome: str) -> None:
        """How a request has ended, the first time that this is said."""
        if not inbox.counted:
            inbox.counted = True
            self._ledger.counts[outcome] += 1

    def _drop(self, inbox: Inbox, outcome: str = "cancelled") -> None:
        self._count(inbox, outcome)
        if inbox in self._inboxes:
            self._forget(inbox)
            with self._changed:
                inbox.dropped = True
                if inbox.request is not None:
                    self._dropped.append(inbox.request)
                # What was to be prepared goes at once, however long another's preparing takes.
                self._unprepared = deque(one for one in self._unprepared if one[0] is not inbox)
                self._changed.notify_all()
            inbox.queue.put_nowait(End(None))  # for who waits for the next chunk in another task

    def _over(self, inbox: Inbox, error: BaseException | None, outcome: str = "failed") -> None:
        if inbox in self._inboxes:
            self._forget(inbox)
            if error is not None:  # else its consumer has still to be given it
                self._count(inbox, outcome)
            inbox.queue.put_nowait(End(error))

    def _forget(self, inbox: Inbox) -> None:
        del self._inboxes[inbox]
        if inbox.request is not None and inbox.request.entered:
            self._ledger.over(inbox.began)

    # ------------------------------------------------------------------ in threads

    def _start(self, target: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()  # which may fail, where there are too many
        self._threads.append(thread)

    def _stop(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def _prepare(self) -> None:
        while True:
            with self._changed:
                while not (self._closing or self._unprepared):
                    self._changed.wait()
                if self._closing:
                    return
                inbox, prepare = self._unprepared.popleft()
            if inbox.dropped:
                continue
            try:
                self._add(inbox, prepare())
            except BaseException as error:  # handed to whoever waits for the first item
                self._call(self._over, inbox, error, "refused" if isinstance(error, KVCacheError) else "failed")
            del inbox, prepare
            release_threads()

    def _add(self, inbox: Inbox, work: Work[Any]) -> None:
        def make(index: int, before: Tensor | None) -> Job:
            if index == 0:
                inbox.began = self._ledger.now()
            return work.make(index, before)

        inbox.through, inbox.close = work.through, work.close
        request = Request(
            work.jobs,
            make,
            size=inbox.size,
            alone=inbox.alone,
            sequence=work.sequence,
            deliver=lambda chunk: self._tell(inbox, chunk),
            blocked=lambda: inbox.told - inbox.taken >= self._ahead,
        )
        with self._changed:
            if not inbox.dropped:
                inbox.request = request
                self._added.append(request)
                self._changed.notify_all()

    def _run(self) -> None:
        error: BaseException | None = None
        opened: AbstractContextManager[Batch] | None = None
        turns: Turns | None = None
        try:
            opening = self._open_batch()
            batch = opening.__enter__()
            opened = opening
            turns = self._turns = Turns(batch, *self._order)
            self._call(self._begin, None)
            while not self._closing:
                self._turn(turns)
        except BaseException as caught:
            error = caught
        # First those who wait are told: whatever cleaning up comes to, and however long it takes.
        self._error = error
        self._stop()
        self._call(self._end_all, error)
        self._clean(opened, turns, error)

    def _clean(
        self, opened: AbstractContextManager[Batch] | None, turns: Turns | None, error: BaseException | None
    ) -> None:
        """End what decodes, and the batch. What goes wrong in that is in the log, and in `error`."""
        ending: list[Callable[[], object]] = []
        if turns is not None:
            self._turns, self._tokens = None, turns.tokens
            ending += [partial(turns.drop, request) for request in list(turns.requests)]
        if opened is not None:
            said = (None, None, None) if error is None else (type(error), error, error.__traceback__)
            ending.append(partial(opened.__exit__, *said))
        for one in ending:
            try:
                one()
            except BaseException as again:
                if again is not error:
                    log.error("the scheduler could not clean up: %s", described(again), exc_info=again)
                    self._error = self._error or again

    def _turn(self, turns: Turns) -> None:
        with self._changed:
            while not (self._closing or self._added or self._dropped) and turns.idle:
                self._changed.wait()
            added, self._added = self._added, []
            dropped, self._dropped = self._dropped, []
        for request in added:
            turns.add(request)
        for request in dropped:
            turns.drop(request)
        with self._within():
            over = turns.step()
        for request in over:
            self._call(self._request_over, request)

    def _request_over(self, request: Request) -> None:
        inbox = next((inbox for inbox in self._inboxes if inbox.request is request), None)
        if inbox is not None:  # else it was dropped meanwhile
            self._over(inbox, request.error)

    def _end_all(self, error: BaseException | None) -> None:
        self._begin(error)
        for inbox in list(self._inboxes):
            own = inbox.request.error if inbox.request is not None else None
            self._over(
                inbox,
                own or error or ClosedError("the scheduler was closed before this request had ended; send it again"),
            )

    def _begin(self, error: BaseException | None) -> None:
        started, self._started = self._started, None
        if started is not None and not started.done():
            if error is None:
                started.set_result(None)
            else:
                started.set_exception(error)

    def _tell(self, inbox: Inbox, chunk: Chunk) -> None:
        inbox.told += 1
        self._call(inbox.queue.put_nowait, chunk)

    def _took(self, inbox: Inbox) -> None:
        """A consumer has taken a chunk; the next job of its request may begin."""
        with self._changed:
            inbox.taken += 1
            self._changed.notify_all()

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        loop = None if self._loop is None else self._loop()
        try:
            if loop is not None:
                loop.call_soon_threadsafe(function, *arguments)
                return
        except RuntimeError:  # it is closed
            log.debug("the event loop has ended without closing the scheduler")
        self._stop()  # nobody is left to be told
