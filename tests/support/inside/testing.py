"""Inside of `kvcache.testing`: the scenarios of the laws, for what has laws of its own."""

from kvcache.testing._checks import TRIED
from kvcache.testing._laws import BUFFERS, Pair, held_bytes, state, tokens

__all__ = ["BUFFERS", "TRIED", "Pair", "held_bytes", "state", "tokens"]

GRACE = "kvcache.testing._leaks._GRACE"  # seconds in which a thread may still end
MADE_BY = "kvcache.testing._checks.made_by"  # for a layer with a mistake
CHECKS = "kvcache.testing._checks"
NEED_HYPOTHESIS = (CHECKS, "kvcache.testing._laws")
