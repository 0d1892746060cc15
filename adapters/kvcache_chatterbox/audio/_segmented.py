"""Speech tokens to audio that comes in pieces: chunks that join without a click, segments with pauses between them."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcache import InputError
from kvcache_chatterbox.audio._chunking import Chunking, Cost, Listener, Pace
from kvcache_chatterbox.audio._watermark import LATER, StreamMarker
from kvcache_chatterbox.checks import check_pause
from kvcache_chatterbox.units import FRAMES_PER_TOKEN, SAMPLE_RATE, SPEECH_TOKENS, TOKENS_PER_SECOND
from kvcache_chatterbox.vocoder import LEAD, Noise, Run, SeededNoise, Vocoder
from kvcache_chatterbox.voices import Voice

CONTEXT = 25  # tokens before a chunk that are run again with it; S3Gen silences the first one of any run
_EDGE = (
    120  # samples, 5 ms: less than an `AudioStream` holds back, so the end of a segment is at hand when the next comes
)


class AudioStream:
    """Turns chunks of speech tokens into chunks of audio that join without a click.

    A vocoder needs to hear what came before: each chunk is made together with the tokens before it, and the joint is
    cross-faded over what was held back of the chunk before. Where the vocoder looks ahead, the last tokens of a chunk are said
    with the next one. All chunks together are as long as all tokens.

    Args:
        vocoder: what makes audio.
        voice: who speaks.
        noise: of the text.
        context: tokens before a chunk that are run again with it.
        fade: samples of cross-fade, at most `LEAD`.
        clock: seconds.

    Attributes:
        seconds: that the vocoder ran for at the last push, see `Waveform`; None: it did not.
    """

    def __init__(
        self,
        vocoder: Vocoder,
        voice: Voice,
        noise: Noise,
        context: int = CONTEXT,
        fade: int = LEAD,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._vocoder, self._voice, self._noise = vocoder, voice, noise
        self._context, self._fade, self._clock = context, fade, clock
        self._place = 0  # in the text, of the first of `_tokens`
        self._tokens = torch.zeros(0, dtype=torch.long)  # those said last, then those that were only looked ahead at
        self._known = 0  # how many of them were said
        self._turned: Tensor | None = None
        self._held = torch.zeros(0)
        self.seconds: float | None = None

    @property
    def known(self) -> int:
        """Tokens before the next ones that their run hears, too."""
        return self._known

    def push(self, tokens: Tensor, ended: bool = False, due: float = 0.0) -> Tensor:
        """The audio ``[samples]`` that `tokens` ``[n]`` complete.

        Args:
            ended: nothing comes behind them that they could look ahead at.
            due: see `Run`.
        """
        self.seconds = None
        tokens = torch.cat([self._tokens.to(tokens.device), tokens])
        said = tokens.numel() - self._known - (0 if ended else self._vocoder.lookahead)
        if said <= 0:
            self._tokens = tokens
            return torch.zeros(0)
        held = self._held.numel()
        run = Run(tokens, self._voice, self._noise, self._place, self._known, held, ended, self._turned, due)
        begin = self._clock()
        made = self._vocoder.waves([run])[0]
        self.seconds = self._clock() - begin if made.seconds is None else made.seconds
        rising = torch.linspace(0, 1, held + 2, dtype=made.audio.dtype)[1:-1]
        joint = self._held * (1 - rising) + made.audio[:held] * rising
        audio = torch.cat(
            [joint, made.audio[held:]]
        )  # a tensor that may be changed: what is made may be one of inference
        gone = max(0, self._known + said - self._context)  # tokens that the next run does not hear
        if gone and made.turned is not None:
            self._turned = made.turned[FRAMES_PER_TOKEN * gone - 1]
        self._place += gone
        self._tokens, self._known = tokens[gone:], self._known + said - gone
        keep = min(self._fade, audio.numel()) if self._context else 0
        self._held = audio[audio.numel() - keep :]
        return audio[: audio.numel() - keep]

    def flush(self, due: float = 0.0) -> Tensor:
        """What was held back; the next chunk is not faded into it, but still made together with the tokens before it."""
        rest = self.push(self._tokens[:0], ended=True, due=due)
        held, self._held = self._held, torch.zeros(0)
        return torch.cat([rest, held])


@dataclass(frozen=True, eq=False)
class Joints:
    """What is between the segments of a text.

    Attributes:
        pause: seconds of silence between two segments.
        joined: the segments continue one another: each is made together with the end of the one before. With ``pause=0``
            they are faded into one another, as chunks of one segment are.
        ending: tokens ``[n]`` behind each segment, or behind the last if they are joined; None: none.

    Raises:
        InputError: if `pause` is negative, not finite, or longer than ten minutes.
    """

    pause: float = 0.2
    joined: bool = False
    ending: Tensor | None = None

    def __post_init__(self) -> None:
        check_pause(self.pause)

    @property
    def silence(self) -> Tensor:
        """The pause ``[samples]``."""
        return torch.zeros(round(self.pause * SAMPLE_RATE))


class SegmentedAudio:
    """Turns the speech tokens of a text's segments, pushed in text order, into audio that joins without a click.

    Tokens wait until their chunk is due, see `Chunking`. Between two segments there is a pause, and where they meet their
    edges are faded over 5 ms. The first segment's start and the last one's end stay as the vocoder makes them. A segment
    without speech tokens is not heard at all: neither it nor a pause for it.

    Args:
        vocoder: what makes audio.
        voice: who speaks.
        noise: gives that of a segment, from its index and how many of its tokens were pushed; of joined segments the first
            one's is that of all.
        chunking: how the tokens are cut; None makes each segment in one run.
        cost: what runs of the vocoder take, which streams share.
        joints: what is between the segments.
        marker: marks all audio before it is handed out, pauses too, as one signal; this stream's own.
        clock: seconds.

    Attributes:
        listener: who plays the audio as it comes.
        chunks: speech tokens of the vocoder's runs so far.
        marked_seconds: that the marker took so far.
    """

    def __init__(
        self,
        vocoder: Vocoder,
        voice: Voice,
        noise: Callable[[int, int], Noise] | None = None,
        *,
        chunking: Chunking | None = None,
        cost: Cost | None = None,
        joints: Joints | None = None,
        marker: StreamMarker | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._vocoder, self._voice, self._chunking = vocoder, voice, chunking
        self._noise = _unknown() if noise is None else noise
        self._stream: AudioStream | None = None
        joints = Joints() if joints is None else joints
        self._ending, self._silence, self._joined = joints.ending, joints.silence, joints.joined
        self._marker, self._clock = marker, clock
        self._index: int | None = None  # of the segment last heard
        self._pushed: Counter[int] = Counter()  # tokens of each segment, those that are no speech too
        self._waiting = torch.zeros(0, dtype=torch.long)
        self._unsaid = 0  # of the tokens that the vocoder was given, those that wait for what they look ahead at
        self._rises = False  # the next audio begins a segment behind another
        self._behind = 0 if self._ending is None else self._ending.numel()
        self.listener = Listener(clock)
        self.chunks: list[int] = []
        self.marked_seconds = 0.0
        held = vocoder.lookahead / TOKENS_PER_SECOND + LEAD / SAMPLE_RATE + (0 if marker is None else LATER)
        self._reference = vocoder.before(voice)  # tokens of it
        rule = Chunking() if chunking is None else chunking
        self._pace = Pace(rule, Cost() if cost is None else cost, self._reference + CONTEXT, held)

    def push(self, index: int, tokens: Tensor, seconds: float = 0.0, last: bool = False) -> Tensor:
        """The audio ``[1, samples]`` that `tokens` of the segment `index` complete; it may have no samples.

        Args:
            index: of the segment; it never falls, and may skip.
            tokens: ``[n]`` or ``[1, n]``; those that are not speech are dropped.
            seconds: that they took to decode.
            last: the text ends with them, and `finish` comes next.

        Raises:
            InputError: if a later segment was heard already.
        """
        speech = speech_of(tokens)
        self._pushed[index] += tokens.numel()
        if speech.numel() == 0:
            return torch.zeros(1, 0)
        if self._index is not None and index < self._index:
            raise InputError(f"segment {index} comes after segment {self._index}: push segments in the text's order")
        parts = [] if self._index in (None, index) else self._between()
        self._index = index
        self._pace.came(speech.numel(), seconds)
        self._waiting = torch.cat([self._waiting.to(speech.device), speech])
        return self._out(*parts, *self._due(last))

    def finish(self) -> Tensor:
        """The audio ``[1, samples]`` that was held back for tokens that do not come."""
        if self._index is None:
            return torch.zeros(1, 0)
        try:
            end, self._index = self._ended(), None
            return self._out(end, last=True)
        finally:
            self.close()

    def close(self) -> None:
        """Nobody waits for what is still to be said: those who share its vocoder need not reckon with it."""
        self._pace.over()

    def _between(self) -> list[Tensor]:
        """The end of a segment that another follows, and the pause."""
        if self._joined and self._silence.numel() == 0:
            return []
        end = (self._flushed() if self._joined else self._ended()).clone()
        end[-_EDGE:] *= _rising().flip(0)[-end.numel() :]
        self._rises = True
        return [end, self._silence]

    def _due(self, last: bool) -> Iterator[Tensor]:
        """Audio of the chunks that are due."""
        while self._chunking is not None and self._waiting.numel():
            waiting = self._waiting
            size = self._pace.due(waiting.numel(), self.listener.left, self._behind if last else None)
            if size == 0:
                return
            self._waiting = waiting[size:]
            yield self._said(waiting[:size])

    def _said(self, tokens: Tensor, ended: bool = False) -> Tensor:
        if self._stream is None:
            self._stream = AudioStream(
                self._vocoder,
                self._voice,
                self._noise(self._index or 0, self._pushed[self._index or 0]),
                clock=self._clock,
            )
        known, self._unsaid = self._stream.known, self._unsaid + tokens.numel()
        audio = self._stream.push(tokens, ended, self.listener.due)
        if self._stream.seconds is not None:
            self._pace.ran(self._unsaid, self._stream.seconds, self._reference + known)
            self.chunks.append(self._unsaid)
            self._unsaid = 0
        return self._risen(audio)

    def _risen(self, audio: Tensor) -> Tensor:
        if self._rises and audio.numel():
            self._rises, audio = False, audio.clone()
            audio[:_EDGE] *= _rising()[: audio.numel()]
        return audio

    def _ended(self) -> Tensor:
        """The end of a segment, behind which another starts anew."""
        if self._ending is not None:
            self._waiting = torch.cat([self._waiting, self._ending.to(self._waiting)])
        rest, self._stream = self._flushed(), None
        return rest

    def _flushed(self) -> Tensor:
        tokens, self._waiting = self._waiting, self._waiting[:0]
        said = self._said(tokens, ended=True) if tokens.numel() else torch.zeros(0)
        return said if self._stream is None else torch.cat([said, self._risen(self._stream.flush(self.listener.due))])

    def _out(self, *parts: Tensor, last: bool = False) -> Tensor:
        audio = torch.cat([torch.zeros(0), *parts])
        if self._marker is not None:
            begin = self._clock()
            audio = self._marker.push(audio, last)
            self.marked_seconds += self._clock() - begin
        if audio.numel():
            self.listener.heard(audio.numel() / SAMPLE_RATE)
        return audio[None]


def speech_of(tokens: Tensor) -> Tensor:
    """Those of the tokens that are speech ``[n]``."""
    return tokens[tokens < SPEECH_TOKENS]


def _unknown() -> Callable[[int, int], Noise]:
    noise = SeededNoise(torch.Generator().seed())
    return lambda index, tokens: noise


def _rising() -> Tensor:
    return torch.linspace(0, 1, _EDGE + 2)[1:-1]
