"""A text before it is spoken: how long it takes, where it is cut, what speaking it takes."""

from kvcache_chatterbox.text._pace import CHARACTERS_PER_SECOND
from kvcache_chatterbox.text._plan import LongTextPlan, RowLayout, VocoderBytes, check_plan, make_plan
from kvcache_chatterbox.text._segments import Segment, primary_language, split

__all__ = [
    "CHARACTERS_PER_SECOND",
    "LongTextPlan",
    "RowLayout",
    "Segment",
    "VocoderBytes",
    "check_plan",
    "make_plan",
    "primary_language",
    "split",
]
