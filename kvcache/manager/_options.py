"""How a manager's streams decode, as keywords and as one value."""

from dataclasses import dataclass
from typing import Literal

import torch
from typing_extensions import TypedDict

from kvcache.decoding import BUCKET, BackendName, check_bucket
from kvcache.models import check_kv_dtype

Backends = BackendName | Literal["auto", "off"]


class DecodeArguments(TypedDict, total=False):
    """The fields of `DecodeOptions`, as keyword arguments."""

    kv_dtype: torch.dtype | None
    backend: Backends
    bucket: int


@dataclass(frozen=True)
class DecodeOptions:
    """How the streams of a `KVCacheManager` decode.

    Attributes:
        kv_dtype: of the cache that ``stream(backend=…)`` decodes on; by default the model's.
        backend: what `stream` decodes with where it is given none.
        bucket: slots that a captured graph reads, or a multiple of so many, see `kvcache.decoding.StepOptions`.

    Raises:
        InputError: for what is no dtype of floating-point numbers, or no number of slots.
    """

    kv_dtype: torch.dtype | None = None
    backend: Backends = "off"
    bucket: int = BUCKET

    def __post_init__(self) -> None:
        check_kv_dtype(self.kv_dtype)
        check_bucket(self.bucket)
