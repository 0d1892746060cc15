"""Requests that decode together and come and go one by one.

Each has a place in a `Decoding`: its rows of the cache, its settings, its random numbers. A request enters a free place
while others are under way and leaves when it has ended. Those that are left move together, so that a step runs no more
places than it must. What a request says does not depend on who decodes beside it, but for the last bits of its logits:
matrix products of more rows add up in another order.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcache.cache import CacheReport, LayerCache
from kvcache.decoding._chunks import check_drawn
from kvcache.decoding._ends import FAILED, Criteria, Said, TextEnd
from kvcache.decoding._engine import Decoding
from kvcache.decoding._sampler import Sampling
from kvcache.errors import CapacityError, ClosedError, GeometryError, InputError, check_whole
from kvcache.models import check_positions, without_autocast

QUANTUM = 8
"""Steps between two looks at who has ended."""

PREFILL_CHUNK = 256
"""Tokens of prompts that are run between two chunks, while others decode."""


def rows_within(max_rows: int, budget: int | None, slots: int, row_bytes: int, lower: str) -> int:
    """How many rows of so many slots and bytes a budget in bytes holds, `max_rows` at most; None: no budget.

    Raises:
        CapacityError: if it does not hold one; says which setting to lower.
    """
    if budget is None:
        return max_rows
    if budget < row_bytes:
        raise CapacityError(
            f"one row of {slots} tokens takes {row_bytes / 2**20:.1f} MiB of KV cache, memory_budget is "
            f"{budget / 2**20:.1f} MiB; raise it, or lower {lower}"
        )
    return min(max_rows, budget // row_bytes)


class Prefilled(NamedTuple):
    """What a request begins with.

    Attributes:
        logits: of the last position, ``[rows, vocabulary]``.
        layers: that were filled.
        notes: what the sampler's rules have to know of it, see `Sampler.begin`.
    """

    logits: Tensor
    layers: Sequence[LayerCache]
    notes: Mapping[str, Any] = MappingProxyType({})


class Piece(NamedTuple):
    """A part of a prefill.

    Attributes:
        tokens: that it runs.
        run: runs them.
    """

    tokens: int
    run: Callable[[], None]


@dataclass(eq=False)
class Job:
    """One request.

    Attributes:
        prefill: runs when a place is free. Called once.
        sampling: how tokens are drawn.
        generator: of its draws; its own, or one request's draws would depend on another.
        total: the most tokens.
        ends: the tokens that end it.
        seen: the token ids that the repetition penalty is about from the start.
        first_may_end: whether it may end with its first token.
        reset_penalty_after_first: from the second token on, the penalty is only about what was drawn.
        include_stop_token: whether the token that ends it is part of what it says.
        pieces: what is run before `prefill`, while others decode; None: `prefill` runs as soon as the job is added.
        rest: tokens that `prefill` runs, behind pieces.
        close: lets go of what pieces have made, where no `prefill` follows.
        slots: that it needs, where that is known before its prefill; else 0.
        criteria: what else ends it.
    """

    prefill: Callable[[], Prefilled]
    sampling: Sampling
    generator: torch.Generator
    total: int
    ends: Sequence[int]
    seen: Tensor
    first_may_end: bool = True
    reset_penalty_after_first: bool = False
    include_stop_token: bool = True
    pieces: Sequence[Piece] | None = None
    rest: int = 1
    close: Callable[[], None] = lambda: None
    slots: int = 0
    criteria: Criteria | None = None

    def __post_init__(self) -> None:
        check_whole("total", self.total, 1)

    @property
    def end(self) -> TextEnd:
        """Where it ends."""
        return TextEnd(self.ends, self.total, self.first_may_end, self.include_stop_token)


@dataclass(frozen=True, eq=False)
class JobOutput:
    """What a job has said since it was last looked at.

    Attributes:
        job: whose.
        tokens: ``[n]``, on the host; none where all that came was an end that is not said, or a piece of the prefill.
        over: whether it has ended.
        error: why it could not go on; what it said before is in `tokens`.
        cut_off: whether it has ended at its most tokens, and not with one that ends it.
    """

    job: Job
    tokens: Tensor
    over: bool
    error: Exception | None = None
    cut_off: bool = False


class Batch:
    """Jobs in the places of a `Decoding`.

    Not safe for threads: one drives it.

    Args:
        decoding: with nothing in it.
        sizes: how many places a step may run; by default any number, or where steps are captured or compiled those that
            are worth their memory and time: powers of two for graphs, one and all for compiled steps.
        compact: move jobs together when others have left, and run no more places than needed; False always runs all.
        quantum: steps between two looks at who has ended.
        prefill_chunk: tokens of prefills in pieces that are run between two chunks, or one piece of more.
        check: is called before a job is taken: raises where it cannot be.
    """

    def __init__(
        self,
        decoding: Decoding,
        sizes: Sequence[int] | None = None,
        compact: bool = True,
        quantum: int = QUANTUM,
        *,
        prefill_chunk: int = PREFILL_CHUNK,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._prefill_chunk, self._check = prefill_chunk, check
        self._device = decoding.kv.length.device.type
        places = len(decoding.token)
        self._decoding = decoding
        self._jobs: list[Job | None] = [None] * places
        self._begun: dict[Job, list[Piece]] = {}  # what is left of prefills, first of those that came first
        self._made = [0] * places
        self._compact = compact
        self._quantum = max(1, min(quantum, decoding.ahead))
        if sizes is None:
            powers = {2**i for i in range(places.bit_length())}
            sizes = {"eager": range(1, places + 1), "graph": sorted(powers)}.get(decoding.backend, [1])
        if any(not 1 <= size <= places for size in sizes):
            raise GeometryError(f"sizes={list(sizes)}: a step can run 1 to {places} places")
        self._sizes = sorted({*sizes, places})
        self._closed = False

    @property
    def places(self) -> int:
        """How many jobs can decode together."""
        return len(self._jobs)

    @property
    def sizes(self) -> list[int]:
        """How many places a step may run."""
        return list(self._sizes)

    @property
    def busy(self) -> int:
        """How many do, those among them whose prefill is under way."""
        return sum(job is not None for job in self._jobs) + len(self._begun)

    def report(self) -> CacheReport:
        """The account of the cache, and of what runs the steps."""
        return self._decoding.report()

    def add(self, job: Job) -> JobOutput:
        """Prefill a job, give it a place, and draw its first token. Of a job in pieces that is done by the steps that follow.

        Raises:
            CapacityError: if there is no place, or not enough room in one. What the prefill raises comes through. Nothing
                has changed then.
            InputError: if its first token cannot be drawn, as its logits are no numbers. It has left then.
            ClosedError: after `close`.
        """
        self._check_open()
        if job in self._jobs or job in self._begun:
            raise InputError("this job is in the batch already; make one for each time that a prompt is to be said")
        if self.busy == self.places:
            raise CapacityError(f"all {self.places} places are taken; wait until one of the jobs has left")
        self._check_room(job.slots)
        self._check()
        if job.pieces is None:
            with without_autocast([self._device]):
                return self._enter(job)
        self._begun[job] = list(job.pieces)
        return JobOutput(job, torch.zeros(0, dtype=torch.long), False)

    def close(self) -> None:
        """End all jobs. The decoding is another's from then on."""
        for job in [*self._begun, *(job for job in self._jobs if job is not None)]:
            self.cancel(job)
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this batch is closed, and another may have its memory; open one more")

    def _check_room(self, needed: int) -> None:
        if needed > (slots := self._decoding.kv.slots):
            raise CapacityError(
                f"the job needs {needed} slots, there are {slots}; ask for fewer tokens, or make a batch with more slots"
            )

    def _enter(self, job: Job) -> JobOutput:
        """Give a job a place, and draw its first token."""
        place = self._jobs.index(None)
        decoding, rows = self._decoding, self._decoding.rows
        logits, layers, notes = job.prefill()
        if layers[0].policy.limit is None:
            self._check_room(layers[0].stored + job.total - 1)
        check_positions(decoding.kv.positions, layers[0].seen, job.total - 1)
        decoding.load(place * rows, layers)
        try:
            first = decoding.start(place, logits, [job.sampling], [job.generator], [job.seen], [notes])
        except BaseException:
            decoding.free(place, 1)
            raise
        if job.reset_penalty_after_first:
            decoding.sampler.penalize(place, first)
        self._jobs[place], self._made[place] = job, 0
        piece = self._piece(place, job, first.cpu())
        if piece.over:
            self.cancel(job)
        if piece.error is not None:
            raise piece.error
        return piece

    def cancel(self, job: Job) -> None:
        """End a job. Nothing happens if it is not here."""
        if self._begun.pop(job, None) is not None:
            job.close()
        if job in self._jobs:
            place = self._jobs.index(job)
            self._jobs[place] = None
            self._decoding.free(place, 1)

    def step(self) -> list[JobOutput]:
        """Decode some steps, and say what came of them: one piece for each job, the places of those that ended are free.

        Before them some of the prefills in pieces is run: whose is the last draws its first token here.

        Raises:
            ClosedError: after `close`.
        """
        self._check_open()
        with without_autocast([self._device]):
            return self._step()

    def _step(self) -> list[JobOutput]:
        running = [job for job in self._jobs if job is not None]
        pieces = self._prefilled()
        if not running:
            return pieces
        front = self._decoding.first_rows(self._gather() if self._compact else self.places)
        at = [(place, job) for place, job in enumerate(self._jobs) if job is not None]
        steps = min(self._quantum, *(job.total - self._made[place] for place, job in at))
        tokens = front.chunk(steps).cpu()  # the one look at the device
        said = {job: self._piece(place, job, tokens[place]) for place, job in at}
        for piece in pieces:  # whose first token has come, and some behind it
            if (more := said.pop(piece.job, None)) is not None:
                said[piece.job] = replace(more, tokens=torch.cat([piece.tokens, more.tokens]))
            else:
                said[piece.job] = piece
        for piece in said.values():
            if piece.over:
                self.cancel(piece.job)
        return list(said.values())

    def _prefilled(self) -> list[JobOutput]:
        """Run pieces of the prefills that were begun first; what those have said whose last it was."""
        said, ran = [], 0
        while self._begun:
            job, left = next(iter(self._begun.items()))
            size = left[0].tokens if left else job.rest
            if ran and ran + size > self._prefill_chunk:
                break
            ran += size
            try:
                if left:
                    left.pop(0).run()
                else:
                    said.append(self._enter(job))
                    self._begun.pop(job, None)
            except Exception as error:  # its own, and nobody else's
                self.cancel(job)
                said.append(JobOutput(job, torch.zeros(0, dtype=torch.long), True, error))
        return said

    def _piece(self, place: int, job: Job, tokens: Tensor) -> JobOutput:
        """What these tokens are of a job: up to its end, if that is among them. What was drawn behind it is nothing."""
        said, made = job.end.of(tokens.tolist(), self._made[place]), len(tokens)
        self._made[place] += made
        try:
            said = _ended(job, tokens, said)
        except Exception as error:  # a criterion's own, and nobody else's
            return JobOutput(job, tokens[:0], True, error)
        tokens = tokens[: said.tokens]
        try:
            check_drawn(tokens[None])
        except InputError as error:
            return JobOutput(job, tokens[tokens != FAILED], True, error)
        return JobOutput(job, tokens, said.over, cut_off=said.cut_off)

    def _gather(self) -> int:
        """Move jobs to lower places as far as steps get cheaper by it. How many places the next step runs."""
        decoding = sum(job is not None for job in self._jobs)
        wanted = next(size for size in self._sizes if size >= decoding)
        for place in range(wanted, self.places):
            job = self._jobs[place]
            if job is not None:
                to = self._jobs.index(None)
                self._decoding.move(place, to)
                self._jobs[to], self._made[to] = job, self._made[place]
                self._jobs[place] = None
        return wanted


def _ended(job: Job, tokens: Tensor, said: Said) -> Said:
    """What these tokens ``[n]`` are of a job, where its criteria are asked as well."""
    if job.criteria is None:
        return said
    [(here, over)] = job.criteria.cut(tokens[None], [said.tokens], [said.over])
    return Said(here, over, said.cut_off and here == said.tokens)
