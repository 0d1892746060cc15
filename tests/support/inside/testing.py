"""Inside of `kvcache.testing`: the scenarios of the laws, for what has laws of its own."""

from kvcache.testing._checks import TRIED
from kvcache.testing._laws import BUFFERS, Pair, tokens

__all__ = ["BUFFERS", "TRIED", "Pair", "tokens"]

GRACE = "kvcache.testing._leaks._GRACE"  # seconds in which a thread may still end
LAYER_FOR = "kvcache.testing._checks.layer_for"  # for a layer with a mistake
CHECKS = "kvcache.testing._checks"
NEED_HYPOTHESIS = (CHECKS, "kvcache.testing._laws")
