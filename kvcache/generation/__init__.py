"""A model's `generate`: what it is asked for, the run on caches of ours, and the tokens that it says on the way."""

from kvcache.generation._call import GenerateCall
from kvcache.generation._prefixed import behind_prefix, check_no_pads, check_undrafted
from kvcache.generation._run import STEPWISE, Run, Wanted, asks, own_way, running, speaker
from kvcache.generation._tokens import Emitter

__all__ = [
    "STEPWISE",
    "Emitter",
    "GenerateCall",
    "Run",
    "Wanted",
    "asks",
    "behind_prefix",
    "check_no_pads",
    "check_undrafted",
    "own_way",
    "running",
    "speaker",
]
