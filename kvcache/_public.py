"""What `kvcache` hands out, all of it; brought by the first name that is asked for."""

from kvcache.errors import (
    BusyError,
    CapacityError,
    ClosedError,
    CorruptError,
    GeometryError,
    InputError,
    KVCacheError,
    MissingDependencyError,
    PolicyError,
    PositionsError,
    RollbackError,
)
from kvcache.events import Event, subscribe
from kvcache.fingerprint import model_fingerprint
from kvcache.geometry import CacheGeometry
from kvcache.head_profile import HeadProfile, measure_heads
from kvcache.heads import Adaptive, PerHead
from kvcache.layers import KVLayer
from kvcache.manager import KVCacheManager
from kvcache.occupancy_map import Occupancy, occupancy
from kvcache.policies import KeepAll, MaxBytes, MaxTokens, Pinned, SizePolicy, SlidingWindow
from kvcache.precision import with_precision
from kvcache.prefix import PrefixKey, PrefixSnapshot
from kvcache.quantized import Quantization
from kvcache.report import CacheReport, LayerReport, estimate_bytes
from kvcache.rope import KeyRotation
from kvcache.scheduler import Scheduler, SchedulerMetrics
from kvcache.scoring import (
    TOVA,
    ExpectedAttention,
    FarLooks,
    HeavyHitters,
    KeyDiff,
    KeyNorm,
    RankingPolicy,
    Rehearsed,
    SnapKV,
    pyramid,
)
from kvcache.speakers import SpeakerCache, SpeakerStats, default_store
from kvcache.stores import DiskStore, MemoryStore, RedisStore, RemoteStore, TieredStore
from kvcache.timeline import MemoryTimeline, Sample
from kvcache.tuning_profile import TuningProfile

__all__ = [
    "TOVA",
    "Adaptive",
    "BusyError",
    "CacheGeometry",
    "CacheReport",
    "CapacityError",
    "ClosedError",
    "CorruptError",
    "DiskStore",
    "Event",
    "ExpectedAttention",
    "FarLooks",
    "GeometryError",
    "HeadProfile",
    "HeavyHitters",
    "InputError",
    "KVCacheError",
    "KVCacheManager",
    "KVLayer",
    "KeepAll",
    "KeyDiff",
    "KeyNorm",
    "KeyRotation",
    "LayerReport",
    "MaxBytes",
    "MaxTokens",
    "MemoryStore",
    "MemoryTimeline",
    "MissingDependencyError",
    "Occupancy",
    "PerHead",
    "Pinned",
    "PolicyError",
    "PositionsError",
    "PrefixKey",
    "PrefixSnapshot",
    "Quantization",
    "RankingPolicy",
    "RedisStore",
    "Rehearsed",
    "RemoteStore",
    "RollbackError",
    "Sample",
    "Scheduler",
    "SchedulerMetrics",
    "SizePolicy",
    "SlidingWindow",
    "SnapKV",
    "SpeakerCache",
    "SpeakerStats",
    "TieredStore",
    "TuningProfile",
    "default_store",
    "estimate_bytes",
    "measure_heads",
    "model_fingerprint",
    "occupancy",
    "pyramid",
    "subscribe",
    "with_precision",
]
