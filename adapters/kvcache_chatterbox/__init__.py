"""Chatterbox TTS on managed KV caches: the T3 backend's streaming loop, for the English, Multilingual, Turbo and Nano models."""

from kvcache.decoding import Sampling
from kvcache_chatterbox.engine import ChatterboxEngine
from kvcache_chatterbox.loading import byte_tokens, load_t3, random_conditionals
from kvcache_chatterbox.sampling import SamplingOptions
from kvcache_chatterbox.voices import Voice, Voices

__all__ = [
    "ChatterboxEngine",
    "Sampling",
    "SamplingOptions",
    "Voice",
    "Voices",
    "byte_tokens",
    "load_t3",
    "random_conditionals",
]
