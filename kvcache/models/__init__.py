"""A transformers model: what is known of it, found by asking the model itself, and what is made from it."""

from kvcache.models._facts import LayerShape, ModelFacts, Seat, alike, facts_of, rope_by_length, run_prefix
from kvcache.models._forwards import looks_on, unwrapped
from kvcache.models._probe import embedding_table, parameters, untouched
from kvcache.models._signature import Following, Signature, Watch, signature_of, trains, watch_of
from kvcache.models._windows import Windows, announced, hides_more, shows_later, unattended

__all__ = [
    "Following",
    "LayerShape",
    "ModelFacts",
    "Seat",
    "Signature",
    "Watch",
    "Windows",
    "alike",
    "announced",
    "embedding_table",
    "facts_of",
    "hides_more",
    "looks_on",
    "parameters",
    "rope_by_length",
    "run_prefix",
    "shows_later",
    "signature_of",
    "trains",
    "unattended",
    "untouched",
    "unwrapped",
    "watch_of",
]
