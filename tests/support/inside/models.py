"""Inside of what is known of models: what is read and kept of each, and what a machine is asked."""

from typing import Any

from kvcache import KVCacheManager
from kvcache.cache._shape import LayerShape  # of a layer that no model here has
from kvcache.models._fingerprint import _known as fingerprinted  # models whose fingerprint is kept
from kvcache.models._fingerprint import tensor_digest
from kvcache.models._forwards import unwrapped  # what stands behind the wrappers of a forward
from kvcache.models._managed_layer import chosen  # rows, of any index
from kvcache.models._onednn import _ALL as ALL_ROWS  # where oneDNN multiplies whatever the number of rows
from kvcache.models._onednn import _FEW as FEW_ROWS  # where only a few
from kvcache.models._packed import _kernels as packed_kernels  # packed weights, which die with their module
from kvcache.models._stores import stored_by  # of code, by itself

__all__ = [
    "ALL_ROWS",
    "FEW_ROWS",
    "LayerShape",
    "chosen",
    "fingerprinted",
    "packed_kernels",
    "stored_by",
    "tensor_digest",
    "unwrapped",
]

HAS_HALF = "kvcache.models._precision.has_half"  # what this CPU has
NEW_CACHE = "kvcache.manager._caches.new_cache"  # what a manager asks for
ONEDNN_ROWS = "kvcache.models._onednn.onednn_rows"  # which CPU this is
REHEARSED = "kvcache.models._rehearsal._REHEARSED"  # tokens that are read again at once, and those before them
REHEARSED_LEAD = "kvcache.models._rehearsal._LEAD"
TENSOR_DIGEST = "kvcache.models._fingerprint.tensor_digest"
TRANSFORMERS_VERSION = "kvcache.models._fingerprint.transformers.__version__"


def exactly(manager: KVCacheManager) -> Any:
    """A block in which the manager's model sees exactly what is kept."""
    return manager.caches.exactly()
