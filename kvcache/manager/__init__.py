"""`KVCacheManager`: wrap a transformers model; get caches, generate, stream, decode in batches, trim, report."""

from kvcache.manager._batches import BatchRoom, BatchRoomFields, PromptBatch
from kvcache.manager._explaining import Explanation
from kvcache.manager._manager import KVCacheManager
from kvcache.manager._options import DecodeArguments, DecodeOptions
from kvcache.manager._text_scheduler import TextScheduler, TextSchedulerFields, TextSchedulerOptions

__all__ = [
    "BatchRoom",
    "BatchRoomFields",
    "DecodeArguments",
    "DecodeOptions",
    "Explanation",
    "KVCacheManager",
    "PromptBatch",
    "TextScheduler",
    "TextSchedulerFields",
    "TextSchedulerOptions",
]
