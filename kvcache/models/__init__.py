"""A transformers model: what is known of it, found by asking the model itself."""

from kvcache.models._facts import ModelFacts, facts_of

__all__ = ["ModelFacts", "facts_of"]
