"""What a vocoder is asked for, and gives: audio of speech tokens, of several texts in one run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kvcache_chatterbox.vocoder._noise import Noise
from kvcache_chatterbox.voices import Voice

LEAD = 480  # samples at most that may be wanted of the tokens before: half a token


@dataclass(frozen=True, eq=False)
class Run:
    """Consecutive speech tokens of one text, of which the first ones were said already.

    Attributes:
        tokens: ``[n]``, on any device.
        voice: who says them.
        noise: of the text.
        place: of the first of them in the text.
        known: how many were said: they are only heard by the others.
        lead: samples of them that are wanted all the same, at most `LEAD`.
        ended: whether the text ends here. Otherwise the last ones are only looked ahead at, see `Vocoder.lookahead`.
        turned: how far the voice's fundamental had turned by `place`, in periods; None at a start.
        due: when its listener has nothing more to hear, by a clock that all runs share.
    """

    tokens: Tensor
    voice: Voice
    noise: Noise
    place: int = 0
    known: int = 0
    lead: int = 0
    ended: bool = True
    turned: Tensor | None = None
    due: float = 0.0


@dataclass(frozen=True, eq=False)
class Waveform:
    """What came of a run.

    Attributes:
        audio: ``[lead + 960 m]``, fp32 on the CPU, of the m tokens that were not known, nor only looked ahead at.
        turned: how far the fundamental had turned by the end of each frame of the run ``[2 (known + m)]``; None if there is
            no such thing.
        seconds: that it took, of a run of several its part; None if nobody has measured that.
    """

    audio: Tensor
    turned: Tensor | None = None
    seconds: float | None = None


class Vocoder(Protocol):
    """Makes audio of speech tokens, 960 samples of each."""

    @property
    def lookahead(self) -> int:
        """Tokens at the end of a run that has not ended of which it makes no audio yet."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of what it keeps of voices."""
        ...

    def check(self, voice: Voice) -> None:
        """Raise `InputError` for a voice that it cannot speak with."""
        ...

    def before(self, voice: Voice) -> int:
        """Tokens that each run goes over besides its own: those of the voice's reference."""
        ...

    def waves(self, runs: Sequence[Run]) -> list[Waveform]:
        """The audio of some runs, in one go where that can be."""
        ...
