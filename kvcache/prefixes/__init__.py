"""Beginnings computed once: snapshots, what keeps them, and the stores behind that."""

from kvcache.prefixes._build import extend_prefix, prefix_cache
from kvcache.prefixes._cache import SpeakerCache, SpeakerStats, check_prefix_cache, default_store
from kvcache.prefixes._prompts import PrefixRegistry
from kvcache.prefixes._snapshot import Layout, PrefixKey, PrefixSnapshot

__all__ = [
    "Layout",
    "PrefixKey",
    "PrefixRegistry",
    "PrefixSnapshot",
    "SpeakerCache",
    "SpeakerStats",
    "check_prefix_cache",
    "default_store",
    "extend_prefix",
    "prefix_cache",
]
