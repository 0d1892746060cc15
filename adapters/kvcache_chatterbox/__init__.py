"""Chatterbox TTS on managed KV caches: the T3 backend's streaming loop, for the English, Multilingual, Turbo and Nano models."""

from kvcache.decoding import Sampling
from kvcache_chatterbox.audio import Chunking
from kvcache_chatterbox.engine import ChatterboxEngine
from kvcache_chatterbox.loading import byte_tokens, load_t3, random_conditionals
from kvcache_chatterbox.scheduler import SpeechScheduler
from kvcache_chatterbox.speech import SamplingOptions, Utterance
from kvcache_chatterbox.testing import stand_in
from kvcache_chatterbox.text import LongTextPlan, Segment, split
from kvcache_chatterbox.vocoder import VocoderOptions
from kvcache_chatterbox.voices import Voice, Voices

__all__ = [
    "ChatterboxEngine",
    "Chunking",
    "LongTextPlan",
    "Sampling",
    "SamplingOptions",
    "Segment",
    "SpeechScheduler",
    "Utterance",
    "VocoderOptions",
    "Voice",
    "Voices",
    "byte_tokens",
    "load_t3",
    "random_conditionals",
    "split",
    "stand_in",
]
