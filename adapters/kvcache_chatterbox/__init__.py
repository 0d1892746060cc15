"""Chatterbox TTS on managed KV caches: the T3 backend's streaming loop, for the English, Multilingual, Turbo and Nano models."""

from kvcache_chatterbox.engine import ChatterboxEngine
from kvcache_chatterbox.loading import byte_tokens, load_t3, random_conditionals
from kvcache_chatterbox.sampling import Sampling, SamplingOptions

__all__ = ["ChatterboxEngine", "Sampling", "SamplingOptions", "byte_tokens", "load_t3", "random_conditionals"]
