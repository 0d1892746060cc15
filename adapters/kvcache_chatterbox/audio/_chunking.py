"""When the speech tokens that are there become audio: early enough for the listener, and as many at once as that allows.

A vocoder run costs much by itself and little by token, as each hears the voice's reference again. So the first chunk is small,
and each further one as large as what the listener still has to hear pays for. Where that is too little for any, the least
silence is one: that before the smallest chunk which lasts as long as one of its size takes to make. One that lasts a little
longer is waited for up to the last moment, as the next ones grow by that. Where there is none, as speech takes longer to make
than it lasts, a listener waits at each chunk: for all runs, of which large chunks have few, and for the last chunk, which nothing
plays before. Both together are least where a chunk lasts as long as the square root of the text's length times what a run takes
by itself; chunks grow to that, each `GROWTH` times the one before.

Listeners who share a vocoder wait for one another's runs, too: a chunk of each takes as many runs to make. So what a run takes
counts once for each of them, and the more there are, the larger their chunks.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Literal, cast
from weakref import WeakSet

from kvcache import InputError
from kvcache_chatterbox.units import TOKENS_PER_SECOND

GROWTH = 4
STEP = 5  # speech tokens at most between two looks at the clock
SECOND = 25  # tokens of a fixed chunk, and of a first one at most where a smaller one would not last until the next
_FIRST = 10
MOST = 250
_REMEMBERED = 16  # runs of the vocoder that tell what the next will take
_NEAREST = 5  # of these, those that are nearest in size
_SLACK = 0.1  # seconds that a chunk comes before there is nothing to play
_TEXT = 500  # speech tokens of a text, where chunks are weighed against it: 20 seconds
_LONGER = 1.15  # times as long as it takes to make is what a chunk plays from which the next can grow
_CAUTION = 1.2  # times as long as it probably takes is what something is reckoned to take


def _check_size(name: str, tokens: int) -> None:
    if type(tokens) is not int or tokens < 1:
        raise InputError(f"{name}={tokens!r} must be a whole number of speech tokens, at least 1")


@dataclass(frozen=True)
class Chunking:
    """How speech tokens are cut into chunks of audio.

    Attributes:
        sizes: tokens of the chunks, the last one again and again; None as the listener's buffer allows, see the module.
        first: then, tokens of the first chunk that are heard at least: those that are looked ahead at, faded or waited for by
            a watermark come on top. Where that is known not to last until the next, up to 25 in all.
        most: then, tokens of a chunk at most.

    Raises:
        InputError: if a number is no whole one of at least 1, or they do not go together.
    """

    sizes: tuple[int, ...] | None = None
    first: int = _FIRST
    most: int = MOST

    def __post_init__(self) -> None:
        given = {"first_chunk": self.first, "max_chunk": self.most}
        given |= {f"chunking[{i}]": size for i, size in enumerate(self.sizes or ())}
        for name, value in given.items():
            _check_size(name, value)
        if self.sizes == ():
            raise InputError("chunking=() has no size; give some, or 'auto'")
        if self.first > self.most:
            raise InputError(f"first_chunk={self.first} is more than max_chunk={self.most}; give a smaller first chunk")

    @property
    def largest(self) -> int:
        """Tokens of a chunk at most."""
        return max(self.sizes) if self.sizes else self.most

    @property
    def step(self) -> int:
        """Tokens to decode between two looks at what is due."""
        return math.gcd(*self.sizes) if self.sizes else min(self.first, STEP)

    @property
    def opening(self) -> int:
        """Tokens of the first chunk at most."""
        return self.sizes[0] if self.sizes else min(max(self.first, SECOND), self.most)


FIXED = Chunking((SECOND,))
Chunks = Chunking | Literal["auto", "fixed"] | Sequence[int]


def chunking_of(chunking: Chunks = "auto", first_chunk: int | None = None, max_chunk: int | None = None) -> Chunking:
    """The value that a request's arguments stand for.

    Args:
        chunking: ``"auto"``, as large as the listener's buffer allows; ``"fixed"``, all of `first_chunk` tokens, 25 by
            default; or sizes, the last one again and again: with those, and with fixed ones, a seed always gives the same
            samples.
        first_chunk: tokens of the first chunk, 25 are a second; with ``"auto"`` of what is heard of it, 10 by default, and more
            where that would not last until the next.
        max_chunk: tokens of a chunk at most, with ``"auto"``; by default 250, or as many as the first has.

    Raises:
        InputError: if they cannot be.
    """
    named = chunking in ("auto", "fixed") if isinstance(chunking, str) else not isinstance(chunking, bytes | bytearray)
    if not named or not isinstance(chunking, Chunking | Sequence):
        raise InputError(f"chunking={chunking!r:.80} must be 'auto', 'fixed' or a list of sizes such as [25, 50, 100]")
    if first_chunk is not None:
        _check_size("first_chunk", first_chunk)
    if chunking == "fixed" and max_chunk is None:
        return Chunking((SECOND if first_chunk is None else first_chunk,))
    if chunking == "auto":
        first = _FIRST if first_chunk is None else first_chunk
        return Chunking(None, first, max(first, MOST) if max_chunk is None else max_chunk)
    if first_chunk is not None or max_chunk is not None:
        raise InputError(
            f"first_chunk={first_chunk!r} and max_chunk={max_chunk!r} with chunking={chunking!r:.80}: both go with 'auto', and "
            "first_chunk with 'fixed', whose chunks all have so many tokens; leave them out"
        )
    return chunking if isinstance(chunking, Chunking) else Chunking(tuple(cast(Sequence[int], chunking)))


class Cost:
    """What runs of a vocoder took, by the tokens that they went over.

    A run probably takes what the straight line of the median slope says (Theil-Sen), and as much more or less as those that were
    nearest to it in size: attention makes long ones longer than in proportion. One run in eight may have taken any time: a first
    one sets libraries up or compiles, and tells nothing of those behind it. Where runs are too much alike to tell what a token
    takes, it is taken in proportion.

    Attributes:
        listeners: those who wait for runs of the vocoder, until they are over or forgotten.
    """

    def __init__(self) -> None:
        self.listeners: WeakSet[Pace] = WeakSet()
        self._runs: deque[tuple[int, float]] = deque(maxlen=_REMEMBERED)
        self._line = 0.0, 0.0  # seconds of each token, and of a run by itself
        self._known: dict[int, float] = {}

    def took(self, tokens: int, seconds: float) -> None:
        """Remember a run: the tokens that it went over, at least one, those of the reference included, and its seconds.

        Of a run for several listeners, each one's tokens and part of the seconds.
        """
        self._runs.append((tokens, seconds))
        self._known.clear()
        runs = list(self._runs)
        slopes = [(b - a) / (m - n) for (n, a), (m, b) in combinations(runs, 2) if m != n]
        each = max(0.0, median(slopes)) if slopes else math.inf
        level = median(took - each * n for n, took in runs)
        self._line = (each, level) if level >= 0 else (median(took / n for n, took in runs), 0.0)

    def of(self, tokens: int) -> float:
        """An estimate of the seconds that a run over this many tokens takes; 0 before the first run."""
        known = self._known.get(tokens)  # another thread may forget it meanwhile
        if known is None:
            each, level = self._line
            nearest = sorted(self._runs, key=lambda run: abs(run[0] - tokens))[:_NEAREST]
            beside = median(took - level - each * n for n, took in nearest) if nearest else 0.0
            known = self._known[tokens] = max(0.0, level + each * tokens + beside)
        return known

    def round(self, tokens: int) -> float:
        """An estimate of the seconds that a run over this many tokens for each of the listeners takes.

        Of several with caution: they come when they come, and who is last waits for all.
        """
        several = len(self.listeners)
        return self.of(tokens) if several < 2 else _CAUTION * several * self.of(tokens)


class Listener:
    """Somebody who plays audio as it comes, from the first chunk on.

    Args:
        clock: seconds.

    Attributes:
        silence: seconds without audio, behind the first chunk.
        underruns: how often that began.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._ends: float | None = None  # when what was sent has been played
        self.silence, self.underruns = 0.0, 0

    def heard(self, seconds: float) -> None:
        """So much audio has come."""
        now = self.clock()
        if self._ends is not None and now > self._ends:
            self.silence += now - self._ends
            self.underruns += 1
        self._ends = max(now, self._ends if self._ends is not None else now) + seconds

    @property
    def left(self) -> float:
        """Seconds until there is nothing to play; negative in a silence, and infinite before the first chunk."""
        return math.inf if self._ends is None else self._ends - self.clock()

    @property
    def due(self) -> float:
        """When there is nothing to play, by the clock; now, where nothing has come yet."""
        return self.clock() if self._ends is None else self._ends


class Pace:
    """Decides, for one stream, whether the tokens that wait are to be made into audio now.

    Args:
        chunking: the rule.
        cost: of the vocoder's runs, which streams share.
        before: tokens that each run goes over besides its chunk's: the voice's reference, and what comes before the chunk.
        held: seconds of audio that are there and wait for what comes next.
    """

    def __init__(self, chunking: Chunking, cost: Cost, before: int, held: float = 0.0) -> None:
        self._rule, self._cost, self._before, self._held = chunking, cost, before, held
        self._last = 0
        self._ran = 0
        self._step_seconds = 0.0
        self._over = False

    def came(self, tokens: int, seconds: float) -> None:
        """So many tokens have come, which took so long to decode."""
        if not self._over:
            self._cost.listeners.add(self)
        took = seconds * self._rule.step / tokens
        self._step_seconds = took if self._step_seconds == 0 else 0.5 * (self._step_seconds + took)

    def due(self, waiting: int, left: float, ending: int | None = None) -> int:
        """How many of the tokens that wait are to be made into audio now; 0: none yet.

        Args:
            waiting: speech tokens that are there and no audio yet.
            left: seconds that the listener still has to hear.
            ending: the text is over, and ends with so many more tokens. If all fit into one chunk, they are made together at
                the end. None: it is not known whether more tokens come.
        """
        sizes = self._rule.sizes
        if sizes is not None:
            size = sizes[min(self._ran, len(sizes) - 1)]
            return size if waiting >= size else 0
        if ending is not None:
            return 0 if waiting + ending <= self._rule.most else min(waiting, self._rule.most)
        return min(waiting, self._rule.most) if self._now(waiting, left) else 0

    def _now(self, waiting: int, left: float) -> bool:
        rule = self._rule
        if self._last == 0:
            # What is held back is not heard yet, and a first chunk is there to be heard.
            least = min(rule.first + int(self._held * TOKENS_PER_SECOND), rule.opening)
            return waiting >= least and (waiting + rule.step > rule.opening or self._lasts(waiting))
        if waiting + rule.step > rule.most:
            return True
        lasting = self._lasting()
        least = min(GROWTH * self._last, self._largest()) if lasting is None else lasting
        if waiting < least:
            # A smaller one would be heard in time, and leave less time for the next: a silence all the same, and a run more.
            return False
        growing = self._lasting(_LONGER)
        if growing is not None and waiting < growing:  # no time to spare: it is what the next ones grow by
            return left < self._cost.round(self._before + waiting + rule.step) + self._step_seconds
        return left < self._run(waiting + rule.step) + self._step_seconds + _SLACK

    def over(self) -> None:
        """No tokens come any more, or nobody waits for them: others need not wait for its runs."""
        self._over = True
        self._cost.listeners.discard(self)

    def ran(self, tokens: int, seconds: float, before: int | None = None) -> None:
        """The vocoder ran over so many new tokens for so many seconds. Of a run for several listeners: this one's part of it.

        Args:
            before: tokens that it ran over besides; None: those of every run.
        """
        self._last = tokens
        self._ran += 1
        self._cost.took(tokens + (self._before if before is None else before), seconds)

    def _lasts(self, tokens: int) -> bool:
        """Whether a first chunk lasts until the smallest that goes on without a silence could be there, if any does."""
        size = self._lasting()
        if size is None:
            return True
        took = _CAUTION * size / self._rule.step * self._step_seconds + self._run(size)
        return tokens / TOKENS_PER_SECOND - self._held >= took

    def _largest(self) -> int:
        """Tokens of a chunk with which a listener waits least, where it waits at each."""
        best = math.sqrt(TOKENS_PER_SECOND * _TEXT * self._run(0))
        return min(max(round(best), SECOND), self._rule.most)

    def _lasting(self, times: float = 1.0) -> int | None:
        """The smallest chunk that plays at least `times` as long as it takes to make; None if none is worth the wait."""
        step = self._rule.step
        each = self._step_seconds / step
        sizes = range(step, self._largest() + 1, step)
        took = ((n, n * each + self._cost.round(self._before + n)) for n in sizes)
        return next((n for n, seconds in took if n / TOKENS_PER_SECOND >= times * seconds), None)

    def _run(self, tokens: int) -> float:
        return _CAUTION * self._cost.round(self._before + tokens)
