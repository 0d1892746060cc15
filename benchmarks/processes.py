"""Sides of a benchmark that live in a process each, as they would in use, and take turns within a memory budget.

What one side allocates and frees does not decide where another's memory comes from. A side is a function and its arguments; it
is called with a `Gate` before them, and calls it before each turn.

Where all sides fit into the budget they form one group: they are prepared one after the other, live together, and every
round visits each of them. Where they do not fit, they form several groups, one after the other. Every group runs all phases
from their warm-up on, and the reference, to which the others are compared, is prepared anew and takes its turns in every
group. A ratio is so taken of turns in the same rounds; of two sides that never met, both are compared with the reference of
their own group. A reference that does not fit beside a side that needs nearly everything is the one exception: that side is
measured alone, and its ratios are taken across groups.

What a side needs is measured, with all processes that it starts: a side that was never prepared is taken to need as much as the
largest before it. When the sum goes over the budget, the side that was prepared last is ended and put off to the next group.

Nothing here imports torch: a side's own module does.
"""
# Not by `make bench`: what benchmarks share.

import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tqdm import tqdm

TICK = 0.2  # seconds between two looks at the memory while a side works; a look takes some tenths of a millisecond
LAST_LINES = 8
PR_SET_PDEATHSIG = 1  # of prctl(2)

Compare = Callable[[Sequence[float], Sequence[float]], float]  # how many times longer the first took

# ---------------------------------------------------------------------- in a side's process


class Gate:
    """Called by a side before each of its turns: reports how long the last one took, and waits for the next.

    Attributes:
        told: what the side does when it is told something between two turns, outside their time.
        notes: what the side has to say, as of its last turn.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._start = time.perf_counter()
        self.told: Callable[[Any], None] = lambda word: None
        self.notes: dict[str, Any] = {}

    def __call__(self) -> None:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._answer(time.perf_counter() - self._start)
        while (order := self._connection.recv())[0] == "tell":
            self.told(order[1])
            self._answer(0.0)
        if order[0] == "end":
            raise SystemExit
        self._start = time.perf_counter()

    def _answer(self, seconds: float) -> None:
        self._connection.send((seconds, self.notes | memory()))


def memory() -> dict[str, float]:
    """MiB of this process now and at most, and at most on the GPU, if it used one."""
    sizes = {"MiB": _status("self", "VmRSS"), "MiB, peak": _status("self", "VmHWM")}
    found = {name: size / 2**20 for name, size in sizes.items() if size}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        found["GPU MiB, peak"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def peak_from_here() -> None:
    """Count this process's peak memory anew, where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _serve(connection: Connection, log: str, threads: int, side: Callable[..., None], given: tuple[Any, ...]) -> None:
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 2)
    if sys.platform != "win32":
        os.setpgrp()  # what it starts can be ended with it, and Ctrl-C reaches the parent alone
    if sys.platform == "linux":  # a parent that is killed cannot end it, and preparing may take minutes
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    torch = sys.modules.get("torch")  # there if the side's module, which is imported by now, uses it
    if torch is not None:
        torch.set_num_threads(threads)
    side(Gate(connection), *given)


# ---------------------------------------------------------------------- memory


def available() -> int | None:
    """Bytes that the machine can still give, with those that this process has; None where the system does not tell."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    return None if free is None else free + resident(os.getpid())


def allowed(most: int | None = None) -> int | None:
    """The budget where none is given: what is available but for a tenth and at least 1 GiB, and no more than `most`."""
    free = available()
    if free is None:
        return None
    budget = max(free - max(2**30, free // 10), 0)
    return budget if most is None else min(budget, most)


def resident(pid: int) -> int:
    """Resident bytes of a process and all that it has started; pages that they share count in each. 0 if it is gone."""
    found, total = [pid], 0
    for one in found:
        total += _status(one, "VmRSS")
        try:
            tasks = list(Path(f"/proc/{one}/task").iterdir())
            found += [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except OSError:  # it has ended meanwhile, or this system does not tell
            continue
    return total


def _status(pid: int | str, name: str) -> int:
    """Bytes from a process' status; 0 if it has ended, or this system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


# ---------------------------------------------------------------------- a side, from outside


@dataclass(frozen=True)
class Failure:
    """How a side ended that was not told to, and the last lines that it wrote to stderr."""

    how: str
    said: tuple[str, ...]


def _how(code: int | None) -> str:
    if code is None:
        return "stopped answering"
    if code < 0:
        name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"ended with exit code {code}" + (" before it was told to" if code == 0 else "")


class _Side:
    """The parent's end of a side: starts its process, asks it, and ends it with all that it has started."""

    def __init__(self, log: Path, threads: int, side: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        self.notes: dict[str, Any] = {}
        self._log = log
        self._connection, end = context.Pipe()
        function, *given = side
        self._process = context.Process(
            target=_serve, args=(end, str(log), threads, function, tuple(given)), daemon=True
        )
        self._process.start()
        end.close()

    @property
    def resident(self) -> int:
        return resident(int(self._process.pid or 0)) if self._process.is_alive() else 0

    def tell(self, *order: Any) -> bool:
        """Whether it could be told."""
        try:
            self._connection.send(order)
        except OSError:
            return False
        return True

    def answer(self, meanwhile: Callable[[], None]) -> float | None:
        """The seconds that it names; None if it has ended instead."""
        try:
            while not self._connection.poll(TICK):
                meanwhile()
                # A process that it has started may hold its end of the pipe open.
                if not self._process.is_alive() and not self._connection.poll():
                    return None
            seconds, self.notes = self._connection.recv()
        except (EOFError, OSError):
            return None
        return float(seconds)

    def failure(self) -> Failure:
        """How it ended by itself; what it has started ends too."""
        self._process.join(10)
        code = self._process.exitcode
        self.kill()
        lines = [line for line in self._written().splitlines() if line.strip()]
        return Failure(_how(code), tuple(lines[-LAST_LINES:]))

    def end(self) -> None:
        """Let it end."""
        if self.tell("end"):
            self._process.join(60)
        self.kill()

    def kill(self) -> None:
        """End it and what it has started, and pass on what it has written."""
        if sys.platform != "win32":
            try:
                os.killpg(int(self._process.pid or 0), signal.SIGKILL)
            except ProcessLookupError:  # nothing of it is left, or it has just begun
                self._process.kill()
        else:
            self._process.kill()
        self._process.join()
        self._connection.close()
        if written := self._written():
            tqdm.write(written.rstrip("\n"), file=sys.stderr)

    def _written(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""


# ---------------------------------------------------------------------- all of them


@dataclass(frozen=True)
class Phase:
    """Some rounds, in each of which every side takes a turn.

    Attributes:
        rounds: that are timed.
        warmup: rounds before them that are not.
        word: what the sides are told before; None tells them nothing.
    """

    rounds: int
    warmup: int = 3
    word: Any = None


@dataclass(frozen=True)
class Group:
    """Sides that took turns with each other, and for each phase the seconds of those that went through it."""

    sides: tuple[str, ...]
    seconds: tuple[dict[str, list[float]], ...]


@dataclass
class Measured:
    """What came of the sides.

    Attributes:
        reference: the side that is in every group.
        groups: see there.
        notes: of each side, as of its last turn.
        failed: the sides that ended by themselves. What they went through before is in their groups.
        budget: bytes that were allowed; None for no limit.
        at_most: the most resident bytes of this process and all sides together; 0 if the system does not tell.
    """

    reference: str
    budget: int | None
    groups: list[Group] = field(default_factory=list)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, Failure] = field(default_factory=dict)
    at_most: int = 0

    def seconds(self, name: str, phase: int = 0) -> list[float]:
        """Of each round; of the reference, the rounds of all groups."""
        return [value for group in self.groups for value in group.seconds[phase].get(name, ())]

    def ratio(self, slow: str, fast: str, of: Compare, phase: int = 0) -> float | None:
        """What `of` makes of the seconds of two sides; None if one of them has none."""
        met = self._met(slow, fast, phase, of)
        if met is not None:
            return met
        first, second = self._met(slow, self.reference, phase, of), self._met(self.reference, fast, phase, of)
        if first is not None and second is not None:
            return first * second
        ours, theirs = self.seconds(slow, phase), self.seconds(fast, phase)
        rounds = min(len(ours), len(theirs))
        return of(ours[-rounds:], theirs[-rounds:]) if rounds else None

    def _met(self, slow: str, fast: str, phase: int, of: Compare) -> float | None:
        both = [group.seconds[phase] for group in self.groups if {slow, fast} <= group.seconds[phase].keys()]
        if not both:
            return None
        return of([s for group in both for s in group[slow]], [s for group in both for s in group[fast]])

    def mark(self, name: str) -> dict[str, str | None]:
        """What a side's row says of its end; nothing if no side has failed."""
        if not self.failed:
            return {}
        return {"failed": self.failed[name].how if name in self.failed else None}

    def facts(self) -> dict[str, Any]:
        """For the file of results."""
        return {
            "memory, MiB at most": self.at_most / 2**20 if self.at_most else None,
            "memory, MiB allowed": None if self.budget is None else self.budget / 2**20,
            "groups": [list(group.sides) for group in self.groups],
        }


class Processes:
    """Runs sides through phases, in groups that fit into a budget; see the module."""

    def __init__(
        self,
        sides: Mapping[str, tuple[Any, ...]],
        threads: int,
        *,
        memory: int | None = None,
        reference: str | None = None,
        together: bool = False,
    ) -> None:
        """
        Args:
            sides: by name, each a function that takes a `Gate`, and what else it takes.
            threads: of torch, in each side.
            memory: bytes that this process and all sides together may have; None for no limit.
            reference: the side in every group; by default the first.
            together: prepare all sides at once, where there are cores and memory for that; the budget is looked at then.
        """
        self._sides, self._threads, self._together = dict(sides), threads, together
        self._measured = Measured(next(iter(sides)) if reference is None else reference, memory)
        self._live: dict[str, _Side] = {}
        self._peaks: dict[str, int] = {}
        self._late: list[str] = []

    def run(self, phases: Sequence[Phase]) -> Measured:
        """Measure all sides; nothing of them is left behind, whatever happens."""
        measured = self._measured
        waiting = list(self._sides)
        with tempfile.TemporaryDirectory() as folder:
            try:
                while waiting:
                    self._late = []
                    measured.groups.append(self._group(waiting, phases, Path(folder)))
                    done = {name for group in measured.groups for name in group.sides} | measured.failed.keys()
                    waiting = [name for name in self._late if name not in done]
            finally:
                while self._live:
                    self._live.popitem()[1].kill()
        return measured

    def _group(self, waiting: list[str], phases: Sequence[Phase], folder: Path) -> Group:
        """Prepare those that fit, and let them go through all phases."""
        measured, reference = self._measured, self._measured.reference
        names = [name for name in waiting if name != reference]
        if reference not in measured.failed:
            names.insert(0, reference)
        failed = set(measured.failed)
        for name in tqdm(names, desc="preparing", leave=False):
            if self._fits(name):
                log = folder / f"{len(measured.groups)}-{names.index(name)}"
                self._live[name] = _Side(log, self._threads, self._sides[name])
                if not self._together:
                    self._hear(name)
            else:
                self._late.append(name)
        for name in list(self._live) if self._together else ():  # nobody prepares while another is timed
            if name in self._live:
                self._hear(name)
        seconds = [self._phase(phase) for phase in phases]
        whole = [*self._live, *(name for name in measured.failed if name not in failed)]
        for name in list(self._live):
            self._live.pop(name).end()
        kept = tuple({name: values for name, values in part.items() if name in whole} for part in seconds)
        return Group(tuple(name for name in names if name in whole), kept)

    def _phase(self, phase: Phase) -> dict[str, list[float]]:
        """The seconds of the sides that go through all of its rounds."""
        if phase.word is not None:
            for name in list(self._live):
                self._ask(name, "tell", phase.word)
        seconds: dict[str, list[float]] = {name: [] for name in self._live}
        for i in tqdm(range(phase.warmup + phase.rounds), desc="rounds", leave=False):
            for name in list(self._live):
                took = self._ask(name, "turn")
                if took is not None and i >= phase.warmup:
                    seconds[name].append(took)
        return {name: values for name, values in seconds.items() if len(values) == phase.rounds}

    def _ask(self, name: str, *order: Any) -> float | None:
        """The seconds that a side names; None if it is no longer there."""
        if name not in self._live:
            return None
        self._live[name].tell(*order)  # one that cannot be told does not answer
        return self._hear(name)

    def _hear(self, name: str) -> float | None:
        side = self._live[name]
        took = side.answer(self._look)
        if side.notes:
            self._measured.notes[name] = side.notes
        if name not in self._live:
            return None  # it was put off
        if took is None:
            del self._live[name]
            self._measured.failed[name] = side.failure()
        self._look()
        return took

    def _fits(self, name: str) -> bool:
        """Whether a side may be prepared beside those that live: the reference and one other always may."""
        others = self._live.keys() - {self._measured.reference}
        if self._measured.budget is None or not others or not self._peaks:
            return True
        needs = self._peaks.get(name, max(self._peaks.values()))
        here = resident(os.getpid()) - sum(side.resident for side in self._live.values())
        return here + sum(self._peaks[other] for other in self._live) + needs <= self._measured.budget

    def _look(self) -> None:
        """See what memory all have, and put sides off until they fit."""
        sizes = {name: side.resident for name, side in self._live.items()}
        for name, size in sizes.items():
            peak = int(self._measured.notes.get(name, {}).get("MiB, peak", 0) * 2**20)
            self._peaks[name] = max(self._peaks.get(name, 0), size, peak)
        total = resident(os.getpid())
        self._measured.at_most = max(self._measured.at_most, total)
        while self._measured.budget is not None and total > self._measured.budget:
            name = self._too_many()
            if name is None:
                return
            total -= sizes[name]
            self._late.append(name)
            self._live.pop(name).kill()

    def _too_many(self) -> str | None:
        """The side that goes first: the last, or, beside a single one, the reference; None if there is but one."""
        others = [name for name in self._live if name != self._measured.reference]
        if len(others) > 1:
            return others[-1]
        return self._measured.reference if others and self._measured.reference in self._live else None
