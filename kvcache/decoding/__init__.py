"""The decode engine: static caches, a sampler and whole steps on the device, run eagerly, compiled or as a graph."""

from kvcache.decoding._backends import BUCKET, BackendName, backend_on, check_backend, check_bucket
from kvcache.decoding._batch import Batch, Job, Piece
from kvcache.decoding._engine import Decoding
from kvcache.decoding._pool import Pool
from kvcache.decoding._sampler import Sampler, Sampling
from kvcache.decoding._static_cache import StaticKV
from kvcache.decoding._wiring import decoder_copy, why_not

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
