"""Speech tokens as audio: chunks, joints, the watermark."""

from kvcache_chatterbox.audio._chunking import MOST, Chunking, Chunks, chunking_of
from kvcache_chatterbox.audio._segmented import CONTEXT, Joints, SegmentedAudio
from kvcache_chatterbox.audio._speaker import ENDING, Speaker, heard
from kvcache_chatterbox.audio._watermark import perth_or_none

__all__ = [
    "CONTEXT",
    "ENDING",
    "MOST",
    "Chunking",
    "Chunks",
    "Joints",
    "SegmentedAudio",
    "Speaker",
    "chunking_of",
    "heard",
    "perth_or_none",
]
