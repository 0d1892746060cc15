"""Which tokens stay, and how their keys and values are held. Nothing here knows of transformers' models."""

from kvcache.cache._archive import Beginning, beginning, beginning_length, check_finite, longest_beginning, pack, unpack
from kvcache.cache._budget import Token, bytes_of
from kvcache.cache._geometry import WHY_NO_EVICTION, CacheGeometry, Positions, positions_of
from kvcache.cache._growing import KVLayer
from kvcache.cache._per_head import AdaKV, AdaKVLayer, PerHead, SplitLayer, chosen_by_head, layer_for, share, turns
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
from kvcache.cache._quantized import Quantization, QuantizedLayer, check_quantization, quantized_bytes
from kvcache.cache._ranked import Piece, RankedLayer, place
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
from kvcache.cache._report import CacheReport, LayerReport, account, estimate_bytes, estimate_cache
from kvcache.cache._rope import KeyRotation
from kvcache.cache._saved import check_states, read_saved, restore_layers, save_layers
from kvcache.cache._shape import CacheShape, LayerShape, layer_bytes, tensors_of
from kvcache.cache._slots import ring_sees, ring_slot, short_ladder, slots_for, staying_of

__all__ = [
    "H2O",
    "TOVA",
    "WHY_NO_EVICTION",
    "AdaKV",
    "AdaKVLayer",
    "Beginning",
    "CacheGeometry",
    "CacheReport",
    "CacheShape",
    "ExpectedAttention",
    "KVLayer",
    "KVzip",
    "KeepAll",
    "KeyDiff",
    "KeyNorm",
    "KeyRotation",
    "LayerReport",
    "LayerShape",
    "LongRangeAttention",
    "MaxBytes",
    "MaxTokens",
    "PerHead",
    "Piece",
    "Pinned",
    "Positions",
    "Quantization",
    "QuantizedLayer",
    "RankedLayer",
    "RankingPolicy",
    "ScoringContext",
    "SizePolicy",
    "SlidingWindow",
    "SnapKV",
    "SplitLayer",
    "Token",
    "account",
    "beginning",
    "beginning_length",
    "budgeted",
    "bytes_of",
    "check_finite",
    "check_policy",
    "check_quantization",
    "check_states",
    "chosen_by_head",
    "estimate_bytes",
    "estimate_cache",
    "layer_bytes",
    "layer_for",
    "longest_beginning",
    "pack",
    "place",
    "positions_of",
    "pyramid_kv",
    "quantized_bytes",
    "read_saved",
    "restore_layers",
    "ring_sees",
    "ring_slot",
    "save_layers",
    "schedule",
    "share",
    "short_ladder",
    "slots_for",
    "staying_of",
    "tensors_of",
    "turns",
    "unpack",
]
