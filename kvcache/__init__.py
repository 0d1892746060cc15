"""KV-cache management for autoregressive models that you run yourself, straight from PyTorch and transformers."""

from kvcache.errors import (
    CapacityError,
    GeometryError,
    InputError,
    KVCacheError,
    PolicyError,
    PositionsError,
    RollbackError,
)
from kvcache.geometry import CacheGeometry
from kvcache.layers import KVLayer
from kvcache.manager import KVCacheManager
from kvcache.memory import CacheReport, LayerReport, estimate_bytes
from kvcache.policies import KeepAll, MaxBytes, MaxTokens, Pinned, SizePolicy, SlidingWindow
from kvcache.rope import KeyRotation

__version__ = "0.1.0"

__all__ = [
    "CacheGeometry",
    "CacheReport",
    "CapacityError",
    "GeometryError",
    "InputError",
    "KVCacheError",
    "KVCacheManager",
    "KVLayer",
    "KeepAll",
    "KeyRotation",
    "LayerReport",
    "MaxBytes",
    "MaxTokens",
    "Pinned",
    "PolicyError",
    "PositionsError",
    "RollbackError",
    "SizePolicy",
    "SlidingWindow",
    "estimate_bytes",
]
