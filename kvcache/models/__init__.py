"""A transformers model: what is known of it, found by asking the model itself, and what is made from it."""

from kvcache.models._arguments import (
    BESIDE_TEXT,
    check_generate_arguments,
    check_generates,
    check_kv_dtype,
    check_model,
)
from kvcache.models._attention import observed_copy, own_attention, told_more
from kvcache.models._autocast import autocasts, each_without_autocast, without_autocast
from kvcache.models._beginnings import run_prefix
from kvcache.models._cache import (
    TESTED,
    decoding_arguments,
    exact_windows,
    is_attention,
    key_rotation,
    new_cache,
    shape_of,
)
from kvcache.models._code import class_code, function_code
from kvcache.models._compat import MADE_AS, cache_kwarg, get_cache, output_cache, pop_cache, takes
from kvcache.models._copies import attending_copy, structural_copy
from kvcache.models._facts import LayerShape, ModelFacts, facts_of, geometry_of
from kvcache.models._fingerprint import (
    check_named,
    forget,
    model_fingerprint,
    model_outline,
    model_program,
    tensor_bytes,
)
from kvcache.models._forwards import looks_on
from kvcache.models._head_profile import RetrievalHeadProfile, profile_retrieval_heads
from kvcache.models._managed import MadeFor, ManagedCache
from kvcache.models._managed_layer import ManagedLayer, check_positions
from kvcache.models._meta import Watch, meta_without_autocast, without_numbers
from kvcache.models._onednn import has_onednn, onednn_linear, onednn_rows
from kvcache.models._operations import (
    cache_layers,
    check_continues,
    check_ours,
    emit_evictions,
    kv_layers,
    left_padding,
    note_read,
    report_of,
    reset_eviction_count,
    truncate,
)
from kvcache.models._packed import LINEAR, PackedLinear, has_half, reads_half_caches
from kvcache.models._precision import (
    Precision,
    cast,
    check_precision,
    find_sensitive_layers,
    is_plain,
    planned,
    quantize_linear,
)
from kvcache.models._probe import alike, closeness, untouched
from kvcache.models._rehearsal import check_ranking, rehearse
from kvcache.models._rotations import rope_by_length
from kvcache.models._seats import Seat
from kvcache.models._shapes import encoder_input, reads_text, run_blank
from kvcache.models._signature import Following, Signature, signature_of, trains, watch_of
from kvcache.models._windows import unattended

__all__ = [
    "BESIDE_TEXT",
    "LINEAR",
    "MADE_AS",
    "TESTED",
    "Following",
    "LayerShape",
    "MadeFor",
    "ManagedCache",
    "ManagedLayer",
    "ModelFacts",
    "PackedLinear",
    "Precision",
    "RetrievalHeadProfile",
    "Seat",
    "Signature",
    "Watch",
    "alike",
    "attending_copy",
    "autocasts",
    "cache_kwarg",
    "cache_layers",
    "cast",
    "check_continues",
    "check_generate_arguments",
    "check_generates",
    "check_kv_dtype",
    "check_model",
    "check_named",
    "check_ours",
    "check_positions",
    "check_precision",
    "check_ranking",
    "class_code",
    "closeness",
    "decoding_arguments",
    "each_without_autocast",
    "emit_evictions",
    "encoder_input",
    "exact_windows",
    "facts_of",
    "find_sensitive_layers",
    "forget",
    "function_code",
    "geometry_of",
    "get_cache",
    "has_half",
    "has_onednn",
    "is_attention",
    "is_plain",
    "key_rotation",
    "kv_layers",
    "left_padding",
    "looks_on",
    "meta_without_autocast",
    "model_fingerprint",
    "model_outline",
    "model_program",
    "new_cache",
    "note_read",
    "observed_copy",
    "onednn_linear",
    "onednn_rows",
    "output_cache",
    "own_attention",
    "planned",
    "pop_cache",
    "profile_retrieval_heads",
    "quantize_linear",
    "reads_half_caches",
    "reads_text",
    "rehearse",
    "report_of",
    "reset_eviction_count",
    "rope_by_length",
    "run_blank",
    "run_prefix",
    "shape_of",
    "signature_of",
    "structural_copy",
    "takes",
    "tensor_bytes",
    "told_more",
    "trains",
    "truncate",
    "unattended",
    "untouched",
    "watch_of",
    "without_autocast",
    "without_numbers",
]
