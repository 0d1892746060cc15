"""From speech tokens to audio: the voice, the tokenizer and the vocoder of a loaded Chatterbox model."""

import copy
import hashlib
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import RLock
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from kvcache import InputError
from kvcache_chatterbox.requests import check_language, check_path, without_autocast
from kvcache_chatterbox.upstream import beside, needed_beside
from kvcache_chatterbox.voices import Voice
from kvcache_chatterbox.watermark import StreamMarker, Watermarker, check_watermarker, marked

SPEECH_TOKENS = 6561  # tokens from here on are start and stop, not speech
SAMPLE_RATE = 24_000
SAMPLES_PER_TOKEN = 960  # 25 tokens a second
_EDGE = (
    120  # samples, 5 ms: less than an `AudioStream` holds back, so the end of a segment is at hand when the next comes
)
_CLIPS = 32


class AudioStream:
    """Turns chunks of speech tokens into chunks of audio that join without a click.

    A vocoder needs to hear what came before: each chunk is made together with the tokens before it, and the joint is
    cross-faded over what was held back of the chunk before. All chunks together are as long as all tokens.

    Args:
        vocode: tokens ``[n]`` to audio ``[n * 960]``.
        context: tokens before a chunk that are run again with it; S3Gen silences the first one of any run.
        fade: samples of cross-fade.
    """

    def __init__(self, vocode: Callable[[Tensor], Tensor], context: int = 25, fade: int = 480) -> None:
        self._vocode = vocode
        self._context = context
        self._fade = fade
        self._tokens: Tensor | None = None  # those before the next chunk, at most `context`
        self._held: Tensor | None = None

    def push(self, tokens: Tensor) -> Tensor:
        """The audio ``[samples]`` that `tokens` ``[n]`` complete."""
        if tokens.numel() == 0:
            return torch.zeros(0)
        known = tokens if self._tokens is None else torch.cat([self._tokens, tokens])
        audio = self._vocode(known)
        held = 0 if self._held is None else self._held.numel()
        audio = audio[audio.numel() - tokens.numel() * SAMPLES_PER_TOKEN - held :].clone()
        if self._held is not None:
            rising = torch.linspace(0, 1, held + 2, dtype=audio.dtype, device=audio.device)[1:-1]
            audio[:held] = self._held * (1 - rising) + audio[:held] * rising
        self._tokens = known[-self._context :] if self._context else None
        keep = min(self._fade, audio.numel()) if self._tokens is not None else 0
        self._held = audio[audio.numel() - keep :]
        return audio[: audio.numel() - keep]

    def flush(self) -> Tensor:
        """What was held back; the next chunk is not faded into it, but still made together with the tokens before it."""
        held, self._held = self._held, None
        return torch.zeros(0) if held is None else held

    def finish(self) -> Tensor:
        """What was held back for a chunk that does not come; the next chunk starts anew."""
        self._tokens = None
        return self.flush()


class SegmentedAudio:
    """Turns the speech tokens of a text's segments, pushed in text order, into audio that joins without a click.

    Between two segments there is a pause, and where they meet their edges are faded over 5 ms. The first segment's start
    and the last one's end stay as the vocoder makes them. A segment without speech tokens is not heard at all: neither it
    nor a pause for it.

    Args:
        vocode: tokens ``[n]`` to audio ``[n * 960]``.
        ending: tokens ``[n]`` behind each segment, or behind the last if they are joined; by default none.
        pause: seconds of silence between two segments.
        joined: the segments continue one another: each is made together with the end of the one before. With ``pause=0``
            they are faded into one another, as chunks of one segment are.
        marker: marks all audio before it is handed out, pauses too, as one signal; this stream's own.

    Raises:
        InputError: if `pause` is negative or not finite.
    """

    def __init__(
        self,
        vocode: Callable[[Tensor], Tensor],
        *,
        ending: Tensor | None = None,
        pause: float = 0.2,
        joined: bool = False,
        marker: StreamMarker | None = None,
    ) -> None:
        if not 0 <= pause < math.inf:
            raise InputError(f"pause={pause} must be a number of seconds, 0 or more")
        self._stream = AudioStream(vocode)
        self._ending = ending
        self._silence = torch.zeros(round(pause * SAMPLE_RATE))
        self._joined = joined
        self._marker = marker
        self._index: int | None = None  # of the segment last heard

    def push(self, index: int, tokens: Tensor) -> Tensor:
        """The audio ``[1, samples]`` that `tokens` of the segment `index` complete; it may have no samples.

        Args:
            index: of the segment; it never falls, and may skip.
            tokens: ``[n]`` or ``[1, n]``; those that are not speech are dropped.

        Raises:
            InputError: if a later segment was heard already.
        """
        speech = _speech(tokens)
        if speech.numel() == 0:
            return torch.zeros(1, 0)
        if self._index is not None and index < self._index:
            raise InputError(f"segment {index} comes after segment {self._index}: push segments in the text's order")
        before, self._index = self._index, index
        if before is None or index == before or (self._joined and self._silence.numel() == 0):
            return self._out(self._stream.push(speech))
        end = self._stream.flush() if self._joined else self._end()
        start = self._stream.push(speech)
        rising = torch.linspace(0, 1, _EDGE + 2)[1:-1]
        end, start = end.clone(), start.clone()
        end[-_EDGE:] *= rising.flip(0)
        start[:_EDGE] *= rising
        return self._out(end, self._silence, start)

    def finish(self) -> Tensor:
        """The audio ``[1, samples]`` that was held back for tokens that do not come."""
        heard, self._index = self._index is not None, None
        return self._out(self._end(), last=True) if heard else torch.zeros(1, 0)

    def _end(self) -> Tensor:
        ending = torch.zeros(0) if self._ending is None else self._stream.push(self._ending)
        return torch.cat([ending, self._stream.finish()])

    def _out(self, *parts: Tensor, last: bool = False) -> Tensor:
        audio = torch.cat(parts)
        return (audio if self._marker is None else self._marker.push(audio, last))[None]


class Speaker:
    """The parts of a loaded Chatterbox model around its T3.

    Args:
        tts: a `ChatterboxTTS`, `ChatterboxMultilingualTTS` or `ChatterboxTurboTTS`.
    """

    def __init__(self, tts: Any) -> None:
        self._tts = tts
        self._clips: OrderedDict[bytes, Voice] = OrderedDict()
        self._encoding = RLock()

    @property
    def vocoder(self) -> Any:
        """What turns speech tokens into audio."""
        return self._tts.s3gen

    @property
    def conds(self) -> Any:
        """The conditionals that the model has now.

        Raises:
            InputError: if there are none.
        """
        conds = self._tts.conds
        if conds is None:
            raise InputError("there is no voice: give voice or audio_prompt_path, or load the model with its conds.pt")
        return conds

    def builtin(self) -> Voice:
        """The voice that the model has now. Errors are those of `conds`."""
        return Voice.of(self._tts.t3, self.conds)

    def encode(self, audio_prompt_path: str | os.PathLike[str]) -> Voice:
        """The voice of a clip. It takes seconds, so each clip is encoded once; the last few are remembered by content."""
        check_path("audio_prompt_path", audio_prompt_path)
        try:
            clip = hashlib.sha256(Path(audio_prompt_path).read_bytes()).digest()
        except OSError:
            clip = None
        with self._encoding:
            if clip is None:
                return self._encode(audio_prompt_path)  # upstream says what is wrong with it
            if clip not in self._clips:
                self._clips[clip] = self._encode(audio_prompt_path)
                if len(self._clips) > _CLIPS:
                    self._clips.popitem(last=False)
            self._clips.move_to_end(clip)
            return self._clips[clip]

    def _encode(self, audio_prompt_path: str | os.PathLike[str]) -> Voice:
        """Upstream writes the voice into the model: here into a copy, as others may be speaking with the model's own."""
        tts = copy.copy(self._tts)
        tts.conds = None
        prepare = vars(tts).get("prepare_conditionals")
        if prepare is not None:
            if getattr(prepare, "__self__", None) is not self._tts:
                raise InputError(
                    "the model's prepare_conditionals was replaced by a function that writes into the model, whose own voice "
                    "others may be speaking with; set it on the model's class, or as types.MethodType(function, model)"
                )
            tts.prepare_conditionals = MethodType(prepare.__func__, tts)
        with without_autocast(tts.t3):
            tts.prepare_conditionals(os.fspath(audio_prompt_path))
        return replace(Voice.of(tts.t3, tts.conds), kept=False)

    def tokenize(self, text: str, language_id: str | None) -> Tensor:
        """The text, its punctuation normalized as upstream does it, as T3's text tokens ``[1, n]``."""
        self.check_language(language_id)
        text = needed_beside(self._tts, "punc_norm")(text)
        tokenizer, hp = self._tts.tokenizer, self._tts.t3.hp
        if self._tts.t3.is_gpt:
            return torch.as_tensor(tokenizer(text, return_tensors="pt", padding=True, truncation=True).input_ids)
        if hp.is_multilingual:
            tokens = tokenizer.text_to_tokens(text, language_id=str(language_id).lower())
        else:
            tokens = tokenizer.text_to_tokens(text)
        return torch.nn.functional.pad(
            torch.nn.functional.pad(tokens, (1, 0), value=hp.start_text_token), (0, 1), value=hp.stop_text_token
        )

    def segmented(self, voice: Voice, watermark: bool, *, pause: float = 0.2, joined: bool = False) -> SegmentedAudio:
        """What turns the speech tokens of segments into the voice's audio as they are pushed; one request's own.

        Args:
            voice: who speaks.
            watermark: mark the audio, as one signal, with the model's watermarker if it has one; see `StreamMarker`.
            pause: seconds of silence between two segments.
            joined: the segments continue one another, see `SegmentedAudio`.

        Raises:
            InputError: if `pause` is negative or not finite, the vocoder knows nothing of the voice, or the model's watermarker
                is none.
        """
        _check_heard(voice)
        watermarker = self._watermarker(watermark)
        return SegmentedAudio(
            lambda tokens: self._vocode(tokens, voice),
            ending=self._ending(),
            pause=pause,
            joined=joined,
            marker=None if watermarker is None else StreamMarker(watermarker, self._tts.sr),
        )

    def speak(
        self,
        pieces: Iterable[tuple[int, Tensor]],
        voice: Voice,
        watermark: bool,
        *,
        pause: float = 0.2,
        joined: bool = False,
    ) -> Iterator[Tensor]:
        """Audio chunks ``[1, samples]`` of segments, as their speech tokens come.

        Args:
            pieces: a segment's index and speech tokens of it ``[1, n]``, in the text's order.
            voice, watermark, pause, joined: see `segmented`.
        """
        return heard(self.segmented(voice, watermark, pause=pause, joined=joined), pieces)

    def say(
        self,
        pieces: Iterable[tuple[int, Tensor]],
        voice: Voice,
        watermark: bool,
        *,
        pause: float = 0.2,
        joined: bool = False,
    ) -> Tensor:
        """The audio ``[1, samples]`` of segments, one vocoder pass each and marked as a whole; as long as it is streamed.

        Args:
            pieces: as for `speak`; of whole segments, ``enumerate(segments)``.
            voice, watermark, pause, joined: see `segmented`.
        """
        _check_heard(voice)
        watermarker = self._watermarker(watermark)
        audio = SegmentedAudio(lambda tokens: self._vocode(tokens, voice), pause=pause, joined=joined)
        segments: dict[int, list[Tensor]] = {}
        for index, tokens in pieces:
            if (speech := _speech(tokens)).numel():
                segments.setdefault(index, []).append(speech)
        for index in list(segments)[-1:] if joined else segments:
            segments[index].append(self._ending())  # in the segment's own pass, as upstream has it
        parts = [audio.push(index, torch.cat(speech)) for index, speech in segments.items()]
        whole = torch.cat([*parts, audio.finish()], 1)
        if watermarker is None or whole.numel() == 0:
            return whole
        return marked(watermarker, whole[0], self._tts.sr)[None]

    def check_language(self, language_id: str | None) -> None:
        """Raise `InputError` if the multilingual model does not speak this language; others are not asked."""
        check_language(language_id)
        languages = beside(self._tts, "SUPPORTED_LANGUAGES", {})
        if self._tts.t3.hp.is_multilingual and (language_id is None or language_id.lower() not in languages):
            raise InputError(
                f"language_id={language_id!r} is not one of {', '.join(languages)}; name the text's language"
            )

    def _ending(self) -> Tensor:
        """What upstream puts behind the tokens: Turbo's three of silence."""
        silence = beside(self._tts, "S3GEN_SIL") if self._tts.t3.is_gpt else None
        return torch.full((0 if silence is None else 3,), silence or 0, device=self._tts.t3.device)

    def _vocode(self, tokens: Tensor, voice: Voice) -> Tensor:
        steps = {"n_cfm_timesteps": 2} if getattr(self._tts.s3gen, "meanflow", False) else {}
        reference = dict(voice.gen)  # it writes into it
        with without_autocast(self._tts.t3):
            audio, _ = self._tts.s3gen.inference(speech_tokens=tokens, ref_dict=reference, **steps)
        return torch.as_tensor(audio).squeeze(0).detach().cpu()

    def _watermarker(self, wanted: bool) -> Watermarker | None:
        """What marks the audio, if that is wanted and the model has something that does."""
        watermarker = getattr(self._tts, "watermarker", None) if wanted else None
        if watermarker is not None:
            check_watermarker(watermarker)
        return watermarker


def heard(audio: SegmentedAudio, pieces: Iterable[tuple[int, Tensor]]) -> Iterator[Tensor]:
    for index, tokens in pieces:
        if (chunk := audio.push(index, tokens)).numel():
            yield chunk
    if (chunk := audio.finish()).numel():
        yield chunk


def _check_heard(voice: Voice) -> None:
    if not voice.gen:
        raise InputError(
            "the voice has no reference for the vocoder, only T3's conditionals; add it from a clip, from upstream's "
            "whole Conditionals, or use inference_stream() for tokens"
        )


def _speech(tokens: Tensor) -> Tensor:
    return tokens[tokens < SPEECH_TOKENS]
