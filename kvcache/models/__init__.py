"""A transformers model: what is known of it, and what is made from it."""

from kvcache.models._forwards import looks_on, unwrapped
from kvcache.models._signature import Following, Signature, Watch, signature_of, watch_of

__all__ = ["Following", "Signature", "Watch", "looks_on", "signature_of", "unwrapped", "watch_of"]
