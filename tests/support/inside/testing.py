"""Inside of `kvcache.testing`: the scenarios of the laws, for what has laws of its own."""

from kvcache.testing._checks import TRIED
from kvcache.testing._laws import (
    BUFFERS,
    HEADS,
    KEY_DIM,
    LAWS,
    VALUE_DIM,
    Pair,
    any_chunking,
    bytes_are_told,
    failed_call_changes_nothing,
    held_bytes,
    kept_is_named,
    layer_of,
    rows_commute,
    run,
    scenarios,
    state,
    tokens,
    truncate_then_append,
)

__all__ = [
    "BUFFERS",
    "HEADS",
    "KEY_DIM",
    "LAWS",
    "TRIED",
    "VALUE_DIM",
    "Pair",
    "any_chunking",
    "bytes_are_told",
    "failed_call_changes_nothing",
    "held_bytes",
    "kept_is_named",
    "layer_of",
    "rows_commute",
    "run",
    "scenarios",
    "state",
    "tokens",
    "truncate_then_append",
]

GRACE = "kvcache.testing._leaks._GRACE"  # seconds in which a thread may still end
MADE_BY = "kvcache.testing._checks.made_by"  # for a layer with a mistake
CHECKS = "kvcache.testing._checks"
NEED_HYPOTHESIS = (CHECKS, "kvcache.testing._laws")
