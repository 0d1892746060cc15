"""Inside of the ground floor: who listens, what the system says of memory, how a broken torchaudio is found."""

from kvcache.installed import _set_aside as set_aside  # what happens where transformers is looked for
from kvcache.installed import _Watch as Watch

__all__ = ["Watch", "set_aside"]

FAULT = "kvcache.installed._fault"  # what is known of torchaudio in this process
LISTENERS = "kvcache.events._listeners"
SET_ASIDE = "kvcache.installed._set_aside"
STATM = "kvcache.memory._STATM"
TELL_EVICTIONS = "kvcache.events.Evictions._tell"
TORCHAUDIO = "kvcache.installed._torchaudio"
