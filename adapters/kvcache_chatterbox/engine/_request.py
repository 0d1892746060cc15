"""`SpeechRequest`: what is asked of an engine or a scheduler, as one checked value; keywords are made into it here alone."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from typing_extensions import Unpack

from kvcache import InputError
from kvcache_chatterbox.audio import Chunking, Chunks, chunking_of
from kvcache_chatterbox.checks import check_flag, check_language, check_names, check_path, check_pause
from kvcache_chatterbox.speech import UTTERANCE_FIELDS, Carry, UtteranceFields, UtteranceOptions, check_carry
from kvcache_chatterbox.text import RowLimits, check_target, check_text
from kvcache_chatterbox.voices import Voice, check_voice


class RequestFields(UtteranceFields, total=False):
    """All of `SpeechRequest` but its text as keywords, the fields of its parts among them; see there, and `chunking_of`."""

    voice: str | Voice | None
    audio_prompt_path: str | os.PathLike[str] | None
    language_id: str | None
    chunking: Chunks
    first_chunk: int | None
    max_chunk: int | None
    segment_characters: int | None
    pause: float
    carry: Carry | None
    watermark: bool


class TextFields(RequestFields, total=False):
    """And how many segments may decode together, see `kvcache_chatterbox.text.RowLimits`."""

    max_rows: int
    memory_budget: int | str | None


@dataclass(frozen=True)
class Segmenting:
    """How a long text is divided, and how its segments follow one another.

    Attributes:
        segment_characters: of a segment at most, at least 20: a longer text is divided between sentences, see
            `kvcache_chatterbox.split`. None never divides.
        pause: seconds of silence between two segments.
        carry: ``"tail"`` decodes one segment after another, each from the end of the one before; None decodes them together,
            each by itself.

    Raises:
        InputError: for a value that cannot be.
    """

    segment_characters: int | None = 200
    pause: float = 0.2
    carry: Carry | None = None

    def __post_init__(self) -> None:
        check_target("segment_characters", self.segment_characters)
        object.__setattr__(self, "pause", check_pause(self.pause))
        check_carry(self.carry)


@dataclass(frozen=True)
class SpeechRequest:
    """A text to be spoken: by whom and how.

    Give it in place of a text, or give text and keywords (`RequestFields`), of which one is made. What depends on the model
    (whether it has the voice, speaks the language, knows guidance) is checked where it is asked.

    Attributes:
        text: what to say, of any length.
        voice: who speaks, by the name it was added under, or as a `Voice`; None: the voice that the model was loaded with.
        audio_prompt_path: or a clip of who speaks.
        language_id: such as ``"fr"``: what the multilingual model speaks, and by whose rules sentences are told.
        utterance: how the speech tokens are made: how many, in which mood, from which seed, drawn how. The seed is the
            vocoder's too; where chunks have given sizes, it always gives the same samples.
        chunking: how much audio comes at once: by default a small chunk first, and each next one as large as what there is to
            play allows.
        segmenting: how a long text is divided.
        watermark: mark the audio with the model's watermarker, if it has one: one continuous mark, which makes each chunk
            0.18 s later.

    Raises:
        InputError: for a value that cannot be; nothing has run then.
    """

    text: str
    voice: str | Voice | None = None
    audio_prompt_path: str | os.PathLike[str] | None = None
    language_id: str | None = None
    utterance: UtteranceOptions = field(default_factory=UtteranceOptions)
    chunking: Chunking = field(default_factory=Chunking)
    segmenting: Segmenting = field(default_factory=Segmenting)
    watermark: bool = True

    def __post_init__(self) -> None:
        check_text(self.text)
        check_who(self.voice, self.audio_prompt_path)
        check_language(self.language_id)
        for name, kind in _PARTS.items():
            if not isinstance(getattr(self, name), kind):
                raise InputError(f"{name}={getattr(self, name)!r:.80} must be a {kind.__name__}")
        check_flag("watermark", self.watermark)

    @staticmethod
    def of(text: "str | SpeechRequest", **fields: Unpack[RequestFields]) -> "SpeechRequest":
        """The request that a text and keywords stand for, or the one that is given.

        Raises:
            InputError: for an unknown keyword, a value that cannot be, or keywords beside a request.
        """
        return _made(text, fields, REQUEST_FIELDS)


REQUEST_FIELDS = frozenset(RequestFields.__optional_keys__)
_PARTS = {"utterance": UtteranceOptions, "chunking": Chunking, "segmenting": Segmenting}
_LIMITS = frozenset(TextFields.__optional_keys__) - REQUEST_FIELDS
_CHUNKS = frozenset({"chunking", "first_chunk", "max_chunk"})
_SEGMENTS = frozenset(Segmenting.__dataclass_fields__)
_OWN = REQUEST_FIELDS - UTTERANCE_FIELDS - _CHUNKS - _SEGMENTS


def _made(text: str | SpeechRequest, fields: Mapping[str, Any], known: Collection[str]) -> SpeechRequest:
    """The request that a text and keywords stand for; `known` are those that there are."""
    check_names(fields, known, "a request for speech")
    if isinstance(text, SpeechRequest):
        if fields:
            raise InputError(
                f"a SpeechRequest and {', '.join(fields)} are given; put them into it with dataclasses.replace(), or give "
                "a text and keywords"
            )
        return text

    def given(names: Collection[str]) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if name in names}

    return SpeechRequest(
        text,
        **given(_OWN),
        utterance=UtteranceOptions.of(cast(UtteranceFields, given(UTTERANCE_FIELDS))),
        chunking=chunking_of(**given(_CHUNKS)),
        segmenting=Segmenting(**given(_SEGMENTS)),
    )


def asked(text: str | SpeechRequest, fields: TextFields, *beside: str) -> tuple[SpeechRequest, RowLimits]:
    """What a call is asked for: the request, and how many of its segments may decode together.

    Args:
        text: or a whole request.
        fields: the call's keywords.
        beside: names of what else the call takes, for the error of an unknown one.

    Raises:
        InputError: as `SpeechRequest.of`, or for limits that cannot be.
    """
    limits = {name: value for name, value in fields.items() if name in _LIMITS}
    others = {name: value for name, value in fields.items() if name not in _LIMITS}
    request = _made(text, others, {*REQUEST_FIELDS, *_LIMITS, *beside})
    return request, RowLimits(**cast(Any, limits))


def check_who(voice: Any, audio_prompt_path: Any) -> None:
    """Raise `InputError` for what names no voice and no clip, or both."""
    if voice is not None and audio_prompt_path is not None:
        raise InputError(f"give voice={voice!r:.80} or audio_prompt_path={audio_prompt_path!r}, not both")
    if voice is not None:
        check_voice(voice)
    if audio_prompt_path is not None:
        check_path("audio_prompt_path", audio_prompt_path)
