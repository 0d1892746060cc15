"""Beginnings computed once: snapshots, what keeps them, and the stores behind that."""

from kvcache.prefixes._build import cache_for_prefix, extend_prefix
from kvcache.prefixes._cache import PrefixCache, PrefixStats, SpeakerCache, check_prefix_cache, default_store
from kvcache.prefixes._prompts import PrefixRegistry
from kvcache.prefixes._snapshot import Layout, PrefixKey, PrefixSnapshot

__all__ = [
    "Layout",
    "PrefixCache",
    "PrefixKey",
    "PrefixRegistry",
    "PrefixSnapshot",
    "PrefixStats",
    "SpeakerCache",
    "cache_for_prefix",
    "check_prefix_cache",
    "default_store",
    "extend_prefix",
]
