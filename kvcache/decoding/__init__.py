"""The decode engine: static caches, a sampler and whole steps on the device, run eagerly, compiled or as a graph."""

from kvcache.decoding.backends import BUCKET, BackendName, backend_on, check_backend, check_bucket
from kvcache.decoding.batch import Batch, Job, Piece
from kvcache.decoding.cache import StaticKV
from kvcache.decoding.loop import Decoding
from kvcache.decoding.pool import Pool
from kvcache.decoding.sampler import Sampler, Sampling
from kvcache.decoding.wiring import decoder_copy, why_not

__all__ = [
    "BUCKET",
    "BackendName",
    "Batch",
    "Decoding",
    "Job",
    "Piece",
    "Pool",
    "Sampler",
    "Sampling",
    "StaticKV",
    "backend_on",
    "check_backend",
    "check_bucket",
    "decoder_copy",
    "why_not",
]
