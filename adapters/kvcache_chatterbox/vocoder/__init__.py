"""The vocoder: speech tokens to a waveform, 78 to 97 % of what a listener waits for where nothing is done about it."""

from kvcache_chatterbox.vocoder._choice import vocoder_of
from kvcache_chatterbox.vocoder._flow import LEAST_REFERENCE, Flow
from kvcache_chatterbox.vocoder._hift import Hift
from kvcache_chatterbox.vocoder._noise import Noise, SeededNoise, UpstreamNoise
from kvcache_chatterbox.vocoder._options import VocoderOptions
from kvcache_chatterbox.vocoder._plain import PlainVocoder
from kvcache_chatterbox.vocoder._planned import (
    LONGEST_HEARD,
    PlannedRuns,
    blank_s3gen,
    emptied,
    heard_tokens,
    options_of,
    planned_vocoder,
)
from kvcache_chatterbox.vocoder._run import LEAD, Run, Vocoder
from kvcache_chatterbox.vocoder._s3gen import S3GenVocoder, why_plain
from kvcache_chatterbox.vocoder._together import OneAtATime, Together, most_together
from kvcache_chatterbox.vocoder._weights import made_up_reference, random_s3gen, s3gen_module, s3gen_of

__all__ = [
    "LEAD",
    "LEAST_REFERENCE",
    "LONGEST_HEARD",
    "Flow",
    "Hift",
    "Noise",
    "OneAtATime",
    "PlainVocoder",
    "PlannedRuns",
    "Run",
    "S3GenVocoder",
    "SeededNoise",
    "Together",
    "UpstreamNoise",
    "Vocoder",
    "VocoderOptions",
    "blank_s3gen",
    "emptied",
    "heard_tokens",
    "made_up_reference",
    "most_together",
    "options_of",
    "planned_vocoder",
    "random_s3gen",
    "s3gen_module",
    "s3gen_of",
    "vocoder_of",
    "why_plain",
]
