"""Chatterbox TTS on managed KV caches: the T3 backend's streaming loop, for the English, Multilingual, Turbo and Nano models."""

from kvcache.decoding import Sampling
from kvcache_chatterbox.chunking import Chunking
from kvcache_chatterbox.engine import ChatterboxEngine
from kvcache_chatterbox.loading import byte_tokens, load_t3, random_conditionals
from kvcache_chatterbox.plan import LongTextPlan
from kvcache_chatterbox.sampling import SamplingOptions
from kvcache_chatterbox.scheduling import SpeechScheduler
from kvcache_chatterbox.segments import Segment, split
from kvcache_chatterbox.standin import stand_in
from kvcache_chatterbox.utterance import Utterance
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
