"""Which tokens stay, and how their keys and values are held. Nothing here knows of transformers' models."""

from kvcache.cache._archive import Beginning, beginning, beginning_length, check_finite, longest_beginning, pack, unpack
from kvcache.cache._attended import Attended, Span, attend, place
from kvcache.cache._bits import KVQuantization, check_storage
from kvcache.cache._budget import Token, Whole, bytes_of
from kvcache.cache._geometry import WHY_NO_EVICTION, CacheGeometry, Positions, positions_of
from kvcache.cache._groups import GroupedLayer
from kvcache.cache._layer import Expected, LayerCache
from kvcache.cache._policies import (
    KeepAll,
    MaxBytes,
    MaxTokens,
    Pinned,
    SizePolicy,
    SlidingWindow,
    budgeted,
    check_policy,
    schedule,
)
from kvcache.cache._policies_by_head import AdaKV, PerHead, chosen_by_head, turns
from kvcache.cache._ranked import RankedLayer
from kvcache.cache._ranking import (
    H2O,
    TOVA,
    ExpectedAttention,
    KeyDiff,
    KeyNorm,
    KVzip,
    LongRangeAttention,
    RankingPolicy,
    ScoringContext,
    SnapKV,
    pyramid_kv,
)
from kvcache.cache._report import CacheReport, LayerReport, account
from kvcache.cache._rope import KeyRotation
from kvcache.cache._saved import check_states, read_saved, restore_layers, save_layers
from kvcache.cache._shape import CacheShape, LayerShape, layer_bytes, tensors_of
from kvcache.cache._slots import ring_sees, ring_slot, short_ladder, slots_for, staying_of
from kvcache.cache._slotted import KVLayer
from kvcache.cache._spec import CacheSpec, PositionMode, spec_of
from kvcache.cache._split import SplitLayer, compress
from kvcache.cache._storage import Plain, Side, Storage, held_bytes

__all__ = [
    "H2O",
    "TOVA",
    "WHY_NO_EVICTION",
    "AdaKV",
    "Attended",
    "Beginning",
    "CacheGeometry",
    "CacheReport",
    "CacheShape",
    "CacheSpec",
    "Expected",
    "ExpectedAttention",
    "GroupedLayer",
    "KVLayer",
    "KVQuantization",
    "KVzip",
    "KeepAll",
    "KeyDiff",
    "KeyNorm",
    "KeyRotation",
    "LayerCache",
    "LayerReport",
    "LayerShape",
    "LongRangeAttention",
    "MaxBytes",
    "MaxTokens",
    "PerHead",
    "Pinned",
    "Plain",
    "PositionMode",
    "Positions",
    "RankedLayer",
    "RankingPolicy",
    "ScoringContext",
    "Side",
    "SizePolicy",
    "SlidingWindow",
    "SnapKV",
    "Span",
    "SplitLayer",
    "Storage",
    "Token",
    "Whole",
    "account",
    "attend",
    "beginning",
    "beginning_length",
    "budgeted",
    "bytes_of",
    "check_finite",
    "check_policy",
    "check_states",
    "check_storage",
    "chosen_by_head",
    "compress",
    "held_bytes",
    "layer_bytes",
    "longest_beginning",
    "pack",
    "place",
    "positions_of",
    "pyramid_kv",
    "read_saved",
    "restore_layers",
    "ring_sees",
    "ring_slot",
    "save_layers",
    "schedule",
    "short_ladder",
    "slots_for",
    "spec_of",
    "staying_of",
    "tensors_of",
    "turns",
    "unpack",
]
