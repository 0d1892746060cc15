"""Inside of the Chatterbox adapter: parts of a request that a test runs by themselves, breaks, or must see left empty."""

from collections.abc import Callable
from typing import Any

from kvcache.decoding import Pool
from kvcache_chatterbox import ChatterboxEngine
from kvcache_chatterbox.audio import Speaker
from kvcache_chatterbox.audio._chunking import GROWTH, SECOND, Cost, Listener, Pace  # chunks, on a clock of the test's
from kvcache_chatterbox.audio._segmented import AudioStream  # the joints of one segment, of any tokens
from kvcache_chatterbox.audio._watermark import StreamMarker, WatermarkError, marked  # of any audio
from kvcache_chatterbox.speech._alignment import (
    ALIGNMENT,
    AlignmentNote,
    AlignmentRule,
    HeadReader,
    aligned_heads,
    is_checked,
)  # beside upstream's analyzer
from kvcache_chatterbox.speech._defaults import _of_file as defaults_of_file  # read without an import
from kvcache_chatterbox.speech._ending import Ending  # where a text ends, by itself
from kvcache_chatterbox.speech._step_engine import Stepper  # whose logits a test compares
from kvcache_chatterbox.testing._stand_in import (  # what stands in for upstream's, beside upstream's own
    S3GEN_SIL,
    SUPPORTED_LANGUAGES,
    StandIn,
    ToneVocoder,
    punc_norm,
)
from kvcache_chatterbox.text import _pace as pace  # the table of what a character takes, beside a reference
from kvcache_chatterbox.text import _segments as segments  # whose steps are counted
from kvcache_chatterbox.text._plan import predicted_tokens  # as close to speech as they are said to be
from kvcache_chatterbox.tools._targets import ChatterboxTarget  # of a tiny model that has no name
from kvcache_chatterbox.vocoder import OneAtATime, S3GenVocoder, Together
from kvcache_chatterbox.vocoder._flow import check_reference  # of a vocoder that a test writes down
from kvcache_chatterbox.vocoder._noise import HARMONICS
from kvcache_chatterbox.vocoder._run import Waveform  # what such a vocoder gives
from kvcache_chatterbox.vocoder._weights import FILE, distilled  # weights that are not there, or none

__all__ = [
    "ALIGNMENT",
    "FILE",
    "GROWTH",
    "HARMONICS",
    "S3GEN_SIL",
    "SECOND",
    "SUPPORTED_LANGUAGES",
    "AlignmentNote",
    "AlignmentRule",
    "AudioStream",
    "ChatterboxTarget",
    "Cost",
    "Ending",
    "HeadReader",
    "Listener",
    "Pace",
    "StandIn",
    "Stepper",
    "StreamMarker",
    "ToneVocoder",
    "WatermarkError",
    "Waveform",
    "aligned_heads",
    "check_reference",
    "defaults_of_file",
    "distilled",
    "is_checked",
    "marked",
    "pace",
    "predicted_tokens",
    "punc_norm",
    "segments",
]

PACKED = "kvcache_chatterbox.text._segments._packed"
TEXTS_SPLIT = "kvcache_chatterbox.engine._texts.split"  # that takes its time
READS_HALF_CACHES = "kvcache_chatterbox.speech._decoder.reads_half_caches"
TOGETHER_CLOCK = "kvcache_chatterbox.vocoder._together.time"
STATIC_CACHE = "kvcache_chatterbox.speech._step_engine.StaticKV"  # one that is counted as long as it lives
VOCODER_OF = "kvcache_chatterbox.audio._speaker.vocoder_of"  # for a vocoder that may not run


def stepper_of(engine: ChatterboxEngine) -> Any:
    """Makes and keeps the decodings; None where the model decodes on the host."""
    return engine._stepper


def pool_of(engine: ChatterboxEngine) -> Pool:
    return engine._stepper._pool  # type: ignore[union-attr]


def tokens_of(engine: ChatterboxEngine, utterance: Any, size: int) -> Any:
    """The tokens of one utterance, in chunks."""
    return engine._tokens(utterance, size)


def new_cache(engine: ChatterboxEngine, *given: Any) -> Any:
    """The cache of one request, as it is before the prefill."""
    return engine._new_cache(*given)


def remember_caches(engine: ChatterboxEngine, told: Callable[[Any], None]) -> None:
    """From now on, tell of each cache that is made."""
    make = engine._new_cache

    def remembered(*given: Any) -> Any:
        cache = make(*given)
        told(cache)
        return cache

    engine._new_cache = remembered  # type: ignore[assignment,method-assign]


def decoder_of(engine: ChatterboxEngine) -> Any:
    """What decodes one utterance of several."""
    return engine._decoder


def decode_by(engine: ChatterboxEngine, decoder: Any) -> None:
    engine._decoder = decoder  # type: ignore[method-assign]


def speak_by(engine: ChatterboxEngine, run: Any) -> None:
    """Let a function of the test's have all utterances."""
    engine._in_order = run  # type: ignore[method-assign]


def speaker_of(engine: ChatterboxEngine) -> Any:
    """What reads clips and texts and makes audio; None of a bare T3."""
    return engine._speaker


def model_of(speaker: Speaker) -> Any:
    return speaker._tts


def options_of(speaker: Speaker) -> Any:
    """What is asked of the vocoder, which is not made yet."""
    return speaker._options


def reuse_of(engine: ChatterboxEngine) -> Any:
    """What is kept of voices, and looked up."""
    return engine._reuse


def passing(engine: ChatterboxEngine) -> Any:
    """What is kept of voices that requests bring, and is not stored."""
    return engine._reuse._passing  # type: ignore[union-attr]


def reseed(model: StandIn, seed: int) -> None:
    """Change a setting of a model that no module of it holds."""
    model._seed = seed


def waiting(together: Together) -> Any:
    """Runs that wait to be made with others."""
    return together._waiting


def audio_waiting(turns: OneAtATime) -> int:
    """How many wait to make audio."""
    return turns._audio


def parts_of(vocoder: S3GenVocoder) -> Any:
    """The vocoder's parts, made if they are not."""
    return vocoder._made.now()


def source(hift: Any, *given: Any) -> Any:
    """The harmonics of a pitch, and the phases at each frame."""
    return hift._source(*given)
