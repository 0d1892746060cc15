"""A transformers model: what is known of it, found by asking the model itself."""

from kvcache.models._facts import LayerShape, ModelFacts, Seat, facts_of, rope_by_length, run_prefix
from kvcache.models._probe import parameters
from kvcache.models._windows import Windows, announced

__all__ = [
    "LayerShape",
    "ModelFacts",
    "Seat",
    "Windows",
    "announced",
    "facts_of",
    "parameters",
    "rope_by_length",
    "run_prefix",
]
