"""Many requests on one `Batch`: who decodes next, and what is delivered in which order.

A request is one or more jobs, such as the segments of a long text, which decode together and are delivered one after the
other. Its first job decodes before its others enter, so that the first chunk does not wait for them.

Whose job enters a free place, see `Turns`, is bounded for everybody. Counted in jobs of others that enter while one waits:

* a request that has begun, and has no job that decodes, waits for at most ``n + n // places + 1``, where n others have begun
  and have jobs left. Those are fewer than ``begun`` of `Turns`, as long as no consumer falls behind;
* the q-th of the newcomers waits for at most ``q * (places + 1) - 1``, counted while it may begin. A request of one job always
  may; one of several, while fewer than ``begun`` such have begun and no such that came before it waits.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcache.decoding._batch import Batch, Job, JobOutput
from kvcache.errors import KVCacheError, check_whole

_FAILURES = 8  # turns in a row in which something failed and nothing worked, after which a batch is given up


@dataclass(frozen=True, eq=False)
class Chunk:
    """Tokens of one job of a request.

    Attributes:
        index: which job.
        tokens: ``[n]``, on the host.
        last: whether the job ends with them.
        cut_off: whether it ends because it came to its most tokens, and not with one that ends it.
        at: seconds that the batch had computed by then, for all its requests.
    """

    index: int
    tokens: Tensor
    last: bool
    cut_off: bool = False
    at: float = 0.0


class Request:
    """Jobs that are delivered in order.

    Args:
        jobs: how many.
        make: gives the job of an index, when there is a place for it. In sequence, it is also given the tokens of the
            job before, ``[n]``.
        size: tokens in a chunk; the last of a job may be shorter.
        alone: tokens of the first job that are delivered before the others begin.
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
        alone: int = 1,
        sequence: bool = False,
        deliver: Callable[[Chunk], None] = lambda chunk: None,
        blocked: Callable[[], bool] = lambda: False,
        watch: Callable[[int, int, bool], None] = lambda index, tokens, over: None,
    ) -> None:
        check_whole("jobs", jobs, 1)
        check_whole("size", size, 1)
        check_whole("alone", alone, 1)
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
        self._alone = alone

    @property
    def over(self) -> bool:
        """Whether all has been delivered, or it has failed."""
        return self._next == self.jobs or self.error is not None

    @property
    def contends(self) -> bool:
        """Whether it has begun, and wants further places that its consumer does not hold up."""
        return 0 < self.entered < self.jobs and not self.over and not self.blocked()

    @property
    def ready(self) -> bool:
        """Whether a further job may enter."""
        if self.entered == 0:
            return not self.over
        return self.contends and self._alone <= 0 and not (self._sequence and self.running)

    def begin(self) -> Job:
        """The next job, which is among `running` from now on, whether it can enter a place or not."""
        index = self.entered
        job = self._make(index, self._before)
        self.entered, self._before = index + 1, None
        self.running[job] = index
        return job

    def take(self, piece: JobOutput, at: float = 0.0) -> None:
        """Take what one of the jobs has said, and deliver what is due; raise what kept it from going on.

        Args:
            at: see `Chunk`.
        """
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
        self._due(at)

    def _due(self, at: float) -> None:
        while self._next in self._said:
            index, said, ended = self._next, self._said[self._next], self._next in self._ended
            while len(said) > self._size or (len(said) == self._size and not ended):
                self._hand(Chunk(index, said[: self._size], False, at=at))
                said = said[self._size :]
            self._said[index] = said
            if not ended:
                return
            self._hand(Chunk(index, said, True, index in self._cut_off, at))
            del self._said[index]
            self._next += 1

    def _hand(self, chunk: Chunk) -> None:
        self._alone = 0 if chunk.last else self._alone - len(chunk.tokens)
        self.deliver(chunk)


class Turns:
    """Requests that share a batch, one turn after the other. Not safe for threads: one drives it.

    A free place goes to

    1. a newcomer, if `places` jobs of requests that had begun have entered since the last one did;
    2. else, of the requests that have begun and have no job that decodes, to the one that has waited longest;
    3. else to a newcomer, the one that came first; of several jobs only while fewer than `begun` such have begun;
    4. else to a further job of the request that has fewest decoding, while more than `reserved` places are free.

    Args:
        batch: with nothing in it.
        prefills: how many jobs may enter in one turn, while those that decode wait.
        reserved: places that are kept for requests that have no job in one.
        begun: requests that may have begun and have jobs left, those not counted whose consumers are behind; by default twice
            the places. Each waits for the others, so this bounds the silences within a request.
    """

    def __init__(self, batch: Batch, prefills: int = 8, reserved: int = 0, begun: int | None = None) -> None:
        check_whole("prefills", prefills, 1)
        check_whole("reserved", reserved, 0)
        check_whole("begun", 1 if begun is None else begun, 1)
        self.batch = batch
        self.requests: list[Request] = []  # as they came
        self.tokens = 0
        self._prefills, self._reserved = prefills, reserved
        self._begun = 2 * batch.places if begun is None else begun
        self._waiting: dict[Request, None] = {}  # ready, with no job that decodes; who has waited longest is first
        self._resumed = 0  # jobs of requests that had begun, since the last newcomer
        self._failures = 0
        self._worked = False  # in the turn that is taken
        self._broke: Exception | None = None
        self._computed, self._began = 0.0, 0.0  # seconds of the turns so far, and when this one began

    def _at(self) -> float:
        return self._computed + time.perf_counter() - self._began

    @property
    def idle(self) -> bool:
        """Whether a turn would do nothing: all requests wait for their consumers."""
        return self.batch.busy == 0 and not any(request.ready for request in self.requests)

    @property
    def busy(self) -> int:
        """Jobs that decode, as any thread may ask."""
        return sum(len(request.running) for request in list(self.requests))

    def add(self, request: Request) -> None:
        """Let a request wait for its first place."""
        self.requests.append(request)

    def drop(self, request: Request) -> None:
        """End a request; its places are free."""
        if request in self.requests:
            self.requests.remove(request)
            self._waiting.pop(request, None)
            self._leave(request)

    def step(self) -> list[Request]:
        """Let jobs enter as places allow, then decode some steps. The requests that are over, failed ones among them.

        An error of one request ends that one, an error of a step all that decode.

        Raises:
            Exception: what the batch raises when a job is to leave it, or when nothing but errors came of eight turns in a
                row: it cannot be used any more.
        """
        self._worked, self._broke = False, None
        self._began = time.perf_counter()
        for _ in range(self._prefills):
            request = self._next()
            if request is None:
                break
            self._enter(request)
        self._look()
        self._step()
        self._computed = self._at()
        over = [request for request in self.requests if request.over]
        for request in over:
            self.drop(request)
        if self._worked or self._broke is not None:
            self._failures = 0 if self._worked else self._failures + 1
        if self._broke is not None and self._failures >= _FAILURES:
            raise self._broke
        return over

    def _step(self) -> None:
        try:
            pieces = self.batch.step()
        except Exception as error:  # no telling whose
            self._worked, self._broke = False, error
            for request in self.requests:
                if request.running:
                    self._fail(request, error)
            return
        owners = {job: request for request in self.requests for job in request.running}
        for piece in pieces:
            self.tokens += len(piece.tokens)
            if piece.error is None or isinstance(piece.error, KVCacheError):
                self._worked = True
            else:  # of a prefill that was under way
                self._broke = piece.error
            owner = owners[piece.job]
            if owner.error is None:
                self._take(owner, piece)

    def _look(self) -> None:
        """See who waits from now on, and who does no more."""
        for request in self.requests:
            if request.running or not request.ready:
                self._waiting.pop(request, None)
            else:
                self._waiting.setdefault(request)

    def _next(self) -> Request | None:
        """Whose job enters now; see the class."""
        self._look()
        free = self.batch.places - self.batch.busy
        if free <= 0:
            return None
        resumed = next((request for request in self._waiting if request.entered), None)
        if resumed is None or self._resumed >= self.batch.places:
            several = sum(request.contends for request in self.requests) < self._begun
            newcomers = (request for request in self._waiting if not request.entered)
            newcomer = next((request for request in newcomers if several or request.jobs == 1), None)
            resumed = newcomer or resumed
        if resumed is not None or free <= self._reserved:
            return resumed
        further = [request for request in self.requests if request.running and request.ready]
        return min(further, key=lambda request: len(request.running), default=None)  # the first of equals came first

    def _enter(self, request: Request) -> None:
        self._waiting.pop(request, None)
        self._resumed = 0 if request.entered == 0 else self._resumed + (not request.running)
        try:
            job = request.begin()
        except Exception as error:  # its own, and nobody else's
            self._fail(request, error)
            return
        try:
            piece = self.batch.add(job)
        except Exception as error:
            if not isinstance(error, KVCacheError):  # which is about what was asked for
                self._broke = error
            self._fail(request, error)
            return
        self.tokens += len(piece.tokens)
        self._worked |= piece.over or piece.tokens.numel() > 0
        self._take(request, piece)

    def _take(self, request: Request, piece: JobOutput) -> None:
        try:
            request.take(piece, self._at())
        except Exception as error:  # of whom it is delivered to
            self._fail(request, error)

    def _fail(self, request: Request, error: Exception) -> None:
        request.error = error
        try:
            self._leave(request)
        except Exception as again:
            if self._broke is error:  # which says why, where all that follows fails too
                raise error from again
            raise

    def _leave(self, request: Request) -> None:
        for job in list(request.running):
            self.batch.cancel(job)
            del request.running[job]
