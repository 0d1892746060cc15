"""The face: a loaded model that speaks, what it is made with, and what it is asked for."""

from kvcache_chatterbox.engine._engine import ChatterboxEngine
from kvcache_chatterbox.engine._options import EngineFields, EngineOptions
from kvcache_chatterbox.engine._request import RequestFields, Segmenting, SpeechRequest, TextFields

__all__ = [
    "ChatterboxEngine",
    "EngineFields",
    "EngineOptions",
    "RequestFields",
    "Segmenting",
    "SpeechRequest",
    "TextFields",
]
