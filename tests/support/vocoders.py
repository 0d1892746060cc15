"""Vocoders that a test writes down as a function."""

from collections.abc import Callable, Sequence

from torch import Tensor

from kvcache_chatterbox.units import SAMPLES_PER_TOKEN
from kvcache_chatterbox.vocoder import Run
from kvcache_chatterbox.voices import Voice
from support.inside.speech import Waveform

NOBODY = Voice(None, {})


class Told:
    """A vocoder that a function of the tokens stands for.

    Args:
        audio_of: tokens ``[n]`` to audio ``[n * 960]``, called once a run.
        lookahead: tokens at the end of a run that has not ended of which no audio is wanted.

    Attributes:
        runs: what it was asked for so far.
    """

    nbytes = 0

    def __init__(self, audio_of: Callable[[Tensor], Tensor], lookahead: int = 0) -> None:
        self._audio_of, self.lookahead = audio_of, lookahead
        self.runs: list[Run] = []

    def check(self, voice: Voice) -> None:
        """It speaks with anybody."""

    def before(self, voice: Voice) -> int:
        return 0

    def waves(self, runs: Sequence[Run]) -> list[Waveform]:
        self.runs += runs
        return [Waveform(self._wave(run)) for run in runs]

    def _wave(self, run: Run) -> Tensor:
        said = run.tokens.numel() - (0 if run.ended else self.lookahead)
        begin = run.known * SAMPLES_PER_TOKEN - run.lead
        assert 0 <= begin <= said * SAMPLES_PER_TOKEN, f"nothing can be made of {run}"
        return self._audio_of(run.tokens)[begin : said * SAMPLES_PER_TOKEN].clone()
