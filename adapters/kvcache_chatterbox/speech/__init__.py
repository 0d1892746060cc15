"""T3: a text's speech tokens, step by step."""

from kvcache_chatterbox.speech._alignment import ALIGNMENT, AlignmentRule, aligned_heads, is_checked
from kvcache_chatterbox.speech._cache_needs import CacheNeeds
from kvcache_chatterbox.speech._decoder import UtteranceDecoder
from kvcache_chatterbox.speech._defaults import generate_defaults, most_tokens
from kvcache_chatterbox.speech._ending import speech_end, tell_cut_off
from kvcache_chatterbox.speech._long_text import Carry, LongText, Watch, check_carry, seeds, unwatched
from kvcache_chatterbox.speech._options import DecoderOptions
from kvcache_chatterbox.speech._sampling import OPTIONS, SamplingOptions, draw, order, processors, sampling_of
from kvcache_chatterbox.speech._step_engine import T3Step, at_precision
from kvcache_chatterbox.speech._token_loop import Decoder
from kvcache_chatterbox.speech._utterance import (
    UTTERANCE_FIELDS,
    Utterance,
    UtteranceFields,
    UtteranceOptions,
    rows_alone,
)

__all__ = [
    "ALIGNMENT",
    "OPTIONS",
    "UTTERANCE_FIELDS",
    "AlignmentRule",
    "CacheNeeds",
    "Carry",
    "Decoder",
    "DecoderOptions",
    "LongText",
    "SamplingOptions",
    "T3Step",
    "Utterance",
    "UtteranceDecoder",
    "UtteranceFields",
    "UtteranceOptions",
    "Watch",
    "aligned_heads",
    "at_precision",
    "check_carry",
    "draw",
    "generate_defaults",
    "is_checked",
    "most_tokens",
    "order",
    "processors",
    "rows_alone",
    "sampling_of",
    "seeds",
    "speech_end",
    "tell_cut_off",
    "unwatched",
]
