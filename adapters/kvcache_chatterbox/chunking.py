"""When the speech tokens that are there become audio: early enough for the listener, and as many at once as that allows.

A vocoder run costs much by itself and little by token, as it hears the voice's reference each time. So the first chunk is
small, and each further one as large as what the listener still has to hear pays for. Where that is too little for any, the
least silence is one: that of the smallest chunk which lasts as long as one of its size takes. Where there is none, as speech
takes longer than it lasts, a listener waits at each chunk, all silence is the time of all runs, and each chunk is `GROWTH`
times the one before.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from kvcache import InputError

TOKENS_PER_SECOND = 25
GROWTH = 4
_REMEMBERED = 16  # runs of the vocoder that tell what the next will cost
_CAUTION = 1.2  # what a run is taken to cost, of what it probably costs


@dataclass(frozen=True)
class Chunking:
    """How a text is cut into chunks of audio.

    Attributes:
        kind: ``"auto"`` as above; ``"fixed"``, each of `first` tokens.
        first: speech tokens of the first chunk; 25 are a second.
        most: speech tokens of a chunk at most.

    Raises:
        InputError: if a number is no whole one, or they do not go together.
    """

    kind: Literal["auto", "fixed"] = "auto"
    first: int = 25
    most: int = 250

    def __post_init__(self) -> None:
        if self.kind not in ("auto", "fixed"):
            raise InputError(f"chunking={self.kind!r} must be 'auto' or 'fixed'")
        for name in ("first", "most"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value:
                raise InputError(f"{name}_chunk={value!r} must be a whole number of speech tokens, at least 1")
        if self.first > self.most:
            raise InputError(f"first_chunk={self.first} is more than max_chunk={self.most}; give a smaller first chunk")


@dataclass
class Cost:
    """What runs of a vocoder took, by the tokens that they went over: a reference's, those before a chunk, the chunk's."""

    _runs: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))

    def took(self, tokens: int, seconds: float) -> None:
        self._runs.append((tokens, seconds))

    def of(self, tokens: int) -> float:
        """Seconds that a run over so many tokens probably takes; 0 if there was none."""
        if not self._runs:
            return 0.0
        count = len(self._runs)
        mean = sum(n for n, _ in self._runs) / count
        level = sum(took for _, took in self._runs) / count
        spread = sum((n - mean) ** 2 for n, _ in self._runs)
        if spread == 0:  # all of one size: others in proportion
            return level * tokens / mean
        slope = max(0.0, sum((n - mean) * (took - level) for n, took in self._runs) / spread)
        return max(0.0, level + slope * (tokens - mean))


class Listener:
    """Somebody who plays audio as it comes, from the first chunk on."""

    def __init__(self) -> None:
        self._ends: float | None = None  # when what was sent has been played
        self.silence = 0.0  # seconds, behind the first chunk

    def heard(self, now: float, seconds: float) -> None:
        """So much audio has come."""
        if self._ends is not None:
            self.silence += max(0.0, now - self._ends)
        self._ends = max(now, self._ends if self._ends is not None else now) + seconds

    def left(self, now: float) -> float:
        """Seconds until there is nothing to play; negative in a silence, and infinite before the first chunk."""
        return math.inf if self._ends is None else self._ends - now


class Pace:
    """Decides, for one stream, whether the tokens that wait are to be made into audio now.

    Args:
        chunking: the rule.
        cost: of the vocoder's runs, which streams share.
        before: tokens that each run goes over besides its chunk's: the voice's reference, and what comes before the chunk.
    """

    def __init__(self, chunking: Chunking, cost: Cost, before: int) -> None:
        self._chunking, self._cost, self._before = chunking, cost, before
        self._last = 0

    def due(self, waiting: int, left: float, step: int, step_seconds: float) -> bool:
        """Whether to run the vocoder now.

        Args:
            waiting: speech tokens that are there and no audio yet.
            left: seconds that the listener still has to hear.
            step: tokens that come next, if one waits.
            step_seconds: how long they will take.
        """
        rule = self._chunking
        if self._last == 0 or rule.kind == "fixed":
            return waiting >= rule.first
        if waiting + step > rule.most:
            return True
        if left < self._run(waiting):  # too late whatever is done now
            return waiting >= (self._lasting(step, step_seconds) or min(GROWTH * self._last, rule.most))
        return left < self._run(waiting + step) + step_seconds

    def _lasting(self, step: int, step_seconds: float) -> int | None:
        """The least tokens that last as long as it takes to make so many; None if there are none."""
        each = step_seconds / step
        sizes = range(step, self._chunking.most + 1, step)
        return next((n for n in sizes if n / TOKENS_PER_SECOND >= n * each + self._run(n)), None)

    def ran(self, tokens: int, seconds: float) -> None:
        """A run over so many new tokens has taken so long."""
        self._last = tokens
        self._cost.took(self._before + tokens, seconds)

    def _run(self, tokens: int) -> float:
        return _CAUTION * self._cost.of(self._before + tokens)
