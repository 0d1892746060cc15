"""A text before it is spoken: how long it takes, where it is cut, what speaking it takes."""

from kvcache_chatterbox.text._pace import CHARACTERS_PER_SECOND
from kvcache_chatterbox.text._plan import LongTextPlan, RowLayout, RowLimits, TokenRoom, VocoderBytes, make_plan
from kvcache_chatterbox.text._segments import Segment, check_target, check_text, primary_language, split

__all__ = [
    "CHARACTERS_PER_SECOND",
    "LongTextPlan",
    "RowLayout",
    "RowLimits",
    "Segment",
    "TokenRoom",
    "VocoderBytes",
    "check_target",
    "check_text",
    "make_plan",
    "primary_language",
    "split",
]
