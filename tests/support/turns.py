"""Whose turn it is, and what is delivered, in plain Python."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, cast

import torch

from kvcache.decoding import Batch, Chunk, JobOutput, Request, Turns
from support.tables import Breaks

Told: TypeAlias = tuple[int, list[int], bool]  # of a chunk: which job, its tokens, whether it ends with them


class Said:
    """A job that says these tokens."""

    def __init__(self, asked: Any, index: int) -> None:
        self.asked, self.made = asked, 0
        self.tokens: list[int] = asked.tokens[index]


class Places:
    """A batch that decodes `quantum` tokens of each job a turn, and tells `watch` before it does."""

    def __init__(self, places: int, quantum: int, watch: Callable[[], None], fails: Iterable[int] = ()) -> None:
        self.places, self.quantum = places, quantum
        self.jobs: list[Any] = []
        self.watch, self.fails, self.turns = watch, set(fails), 0

    @property
    def busy(self) -> int:
        return len(self.jobs)

    def add(self, job: Any) -> JobOutput:
        assert self.busy < self.places
        if job.asked.fails == ("enter", job.asked.entered - 1):
            raise Breaks("prefill")
        self.jobs.append(job)
        return self._piece(job, 1)

    def cancel(self, job: Any) -> None:
        if job in self.jobs:
            self.jobs.remove(job)

    def step(self) -> list[JobOutput]:
        self.watch()
        self.turns += 1
        if self.jobs and self.turns in self.fails:
            raise Breaks("step")
        return [self._piece(job, self.quantum) for job in list(self.jobs)]

    def _piece(self, job: Any, steps: int) -> JobOutput:
        tokens = job.tokens[job.made : job.made + steps]
        job.made += steps
        over = job.made >= len(job.tokens)
        if over:
            self.cancel(job)
        return JobOutput(job, torch.tensor(tokens, dtype=torch.long), over)


class Asked:
    """A request, and what a plain account of it says about whether it may go on."""

    def __init__(
        self,
        number: int,
        world: "World",
        lengths: Sequence[int],
        size: int,
        alone: int,
        sequence: bool,
        fails: tuple[str, int] | None,
        blocked: bool,
    ) -> None:
        self.world, self.size, self.sequence, self.fails, self.blocked = world, size, sequence, fails, blocked
        self.alone = alone
        self.tokens = [[100 * number + 10 * i + t for t in range(n)] for i, n in enumerate(lengths)]
        self.chunks: list[Told] = []
        self.entered, self.failed = 0, False
        self.passed, self.bound = 0, 0  # jobs of others that entered while it waits, and how many those may be
        self.request = Request(
            len(lengths),
            self.make,
            size=size,
            alone=alone,
            sequence=sequence,
            deliver=self.deliver,
            blocked=lambda: self.blocked and not self.world.unblocked,
        )

    @property
    def running(self) -> int:
        return sum(job.asked is self for job in self.world.batch.jobs)

    @property
    def ready(self) -> bool:
        if self.failed or self.entered == len(self.tokens):
            return False
        if self.entered == 0:
            return True
        opened = any(last for _, _, last in self.chunks) or sum(len(said) for _, said, _ in self.chunks) >= self.alone
        return self.contends and opened and not (self.sequence and self.running)

    @property
    def contends(self) -> bool:
        behind = self.blocked and not self.world.unblocked
        return 0 < self.entered < len(self.tokens) and not self.failed and not behind

    @property
    def may(self) -> bool:
        """Whether its next job may enter, as far as it is about how many have begun."""
        several = sum(one.contends for one in self.world.there) < self.world.begun
        return self.entered > 0 or len(self.tokens) == 1 or several

    def make(self, index: int, before: torch.Tensor | None) -> Any:
        self.world.entering(self)
        said = self.tokens[index - 1] if self.sequence and index else None
        self.world.rule("before", (None if before is None else before.tolist()) == said)
        self.world.rule("index", index == self.entered)
        self.entered += 1
        if self.fails == ("make", index):
            self.failed = True
            raise Breaks("make")
        self.failed = self.fails == ("enter", index)
        return Said(self, index)

    def deliver(self, chunk: Chunk) -> None:
        self.world.rule("deliver", not self.failed and self in self.world.there)
        if self.fails == ("deliver", len(self.chunks)):
            self.failed = True
            raise Breaks("deliver")
        self.chunks.append((chunk.index, chunk.tokens.tolist(), chunk.last))

    def expected(self) -> list[Told]:
        """All chunks of it, if nothing happens."""
        chunks: list[Told] = []
        for index, tokens in enumerate(self.tokens):
            cuts = range(0, max(len(tokens), 1), self.size)
            chunks += [(index, tokens[at : at + self.size], at == cuts[-1]) for at in cuts]
        return chunks


class World:
    """Requests that come and are dropped while turns are taken, each checked against the rules."""

    def __init__(
        self, places: int, quantum: int, prefills: int, reserved: int, fails: Iterable[int], begun: int | None = None
    ) -> None:
        self.batch = Places(places, quantum, self.decoding, fails)
        self.turns = Turns(cast(Batch, self.batch), prefills, reserved, begun)
        self.prefills, self.reserved, self.begun = prefills, reserved, begun or 2 * places
        self.unblocked, self.tried = False, 0
        self.there: list[Asked] = []
        self.broken: list[str] = []
        self.line: list[Asked] = []  # who waits and has no job that decodes, since when

    def rule(self, name: str, holds: bool) -> None:
        """Not an assertion where it is found: what a request raises is its own failure."""
        if not holds:
            self.broken.append(name)

    def eligible(self) -> list[Asked]:
        free = self.batch.places - self.batch.busy
        ready = [a for a in self.there if a.ready and a.may]
        return [a for a in ready if free > (self.reserved if a.running else 0)]

    def look(self) -> None:
        """See who waits from now on, and for how many jobs of others at most."""
        places = self.batch.places
        self.line = [one for one in self.line if one in self.there and one.ready and not one.running]
        for one in self.there:
            if one.ready and not one.running and one not in self.line:
                self.line.append(one)
                others = sum(other.contends for other in self.there if other is not one)
                newcomers = sum(not other.entered for other in self.line)
                one.passed = 0
                one.bound = others + others // places + 1 if one.entered else newcomers * (places + 1) - 1

    def entering(self, asked: Asked) -> None:
        self.look()
        eligible, waiting = self.eligible(), [one for one in self.line if one.may]
        if asked.running:
            fewest = min((one.running for one in eligible), default=None)
            self.rule("further", not waiting and asked is next((a for a in eligible if a.running == fewest), None))
        else:
            alike = [one for one in waiting if bool(one.entered) == bool(asked.entered)]
            self.rule("first come", asked is next(iter(alike), None) and asked in eligible)
        for one in waiting:
            one.passed += one is not asked
            self.rule("bound", one.passed <= one.bound)
        self.line = [one for one in self.line if one is not asked]  # it may end as it enters, and wait again
        self.tried += 1
        self.rule("prefills", self.tried <= self.prefills)

    def decoding(self) -> None:
        # No place is left empty that somebody could have.
        self.look()
        self.rule("empty", self.tried == self.prefills or not self.eligible())

    def step(self) -> None:
        self.tried = 0
        step_fails = self.batch.turns + 1 in self.batch.fails
        before = {id(asked): asked.entered for asked in self.there}
        over = self.turns.step()
        assert self.broken == []
        if step_fails and any(isinstance(one.request.error, Breaks) for one in self.there):
            for asked in self.there:
                asked.failed = asked.failed or str(asked.request.error) == "step"
        for asked in list(self.there):
            expected = asked.expected()
            assert asked.chunks == expected[: len(asked.chunks)]  # in order, whole and with nothing between
            done = asked.failed or asked.chunks == expected
            assert (asked.request in over) == asked.request.over == done
            assert (asked.request.error is not None) == asked.failed
            assert asked.entered - before[id(asked)] <= self.prefills
            if done:
                assert asked.running == 0 and asked.request.running == {}
                self.there.remove(asked)
        assert [asked.request for asked in self.there] == self.turns.requests
        assert all(job.asked in self.there for job in self.batch.jobs)
