"""A model that stands in for one whose parts are not there."""

from kvcache_chatterbox.testing._stand_in import stand_in

__all__ = [
    "stand_in",
]
