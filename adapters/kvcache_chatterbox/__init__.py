"""Chatterbox TTS on managed KV caches: the T3 backend's streaming loop, for the English, Multilingual, Turbo and Nano models."""

from kvcache.decoding import Sampling
from kvcache_chatterbox.audio import Chunking
from kvcache_chatterbox.engine import ChatterboxEngine, EngineOptions, Segmenting, SpeechRequest
from kvcache_chatterbox.loading import byte_tokens, load_t3, random_conditionals
from kvcache_chatterbox.scheduler import SchedulerOptions, SpeechScheduler
from kvcache_chatterbox.speech import SamplingOptions, Utterance, UtteranceOptions
from kvcache_chatterbox.testing import stand_in
from kvcache_chatterbox.text import LongTextPlan, RowLimits, Segment, split
from kvcache_chatterbox.vocoder import VocoderOptions
from kvcache_chatterbox.voices import Voice, Voices

__all__ = [
    "ChatterboxEngine",
    "Chunking",
    "EngineOptions",
    "LongTextPlan",
    "RowLimits",
    "Sampling",
    "SamplingOptions",
    "SchedulerOptions",
    "Segment",
    "Segmenting",
    "SpeechRequest",
    "SpeechScheduler",
    "Utterance",
    "UtteranceOptions",
    "VocoderOptions",
    "Voice",
    "Voices",
    "byte_tokens",
    "load_t3",
    "random_conditionals",
    "split",
    "stand_in",
]
