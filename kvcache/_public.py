"""What `kvcache` hands out, all of it; brought by the first name that is asked for."""

from kvcache.cache._geometry import CacheGeometry
from kvcache.cache._growing import KVLayer
from kvcache.cache._per_head import Adaptive, PerHead
from kvcache.cache._policies import KeepAll, MaxBytes, MaxTokens, Pinned, SizePolicy, SlidingWindow
from kvcache.cache._quantized import Quantization
from kvcache.cache._ranking import (
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
from kvcache.cache._report import CacheReport, LayerReport, estimate_bytes
from kvcache.cache._rope import KeyRotation
from kvcache.decoding._scheduler import Scheduler, SchedulerMetrics
from kvcache.decoding._tuning_profile import TuningProfile
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
from kvcache.manager import KVCacheManager
from kvcache.models._fingerprint import model_fingerprint
from kvcache.models._head_profile import HeadProfile, measure_heads
from kvcache.models._precision import with_precision
from kvcache.monitoring._occupancy import Occupancy, occupancy
from kvcache.monitoring._timeline import MemoryTimeline, Sample
from kvcache.prefixes._cache import SpeakerCache, SpeakerStats, default_store
from kvcache.prefixes._snapshot import PrefixKey, PrefixSnapshot
from kvcache.prefixes.stores import DiskStore, MemoryStore, RedisStore, RemoteStore, TieredStore

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
