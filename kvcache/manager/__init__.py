"""`KVCacheManager`: wrap a transformers model; get caches, generate, stream, trim, report."""

from kvcache.manager._manager import KVCacheManager
from kvcache.manager._options import DecodeArguments, DecodeOptions

__all__ = ["DecodeArguments", "DecodeOptions", "KVCacheManager"]
