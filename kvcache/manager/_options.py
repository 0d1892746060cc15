"""How a manager's streams decode, as keywords and as one value."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal

import torch
from typing_extensions import TypedDict

from kvcache.cache import CacheSpec
from kvcache.decoding import BUCKET, BackendName, check_bucket
from kvcache.errors import InputError
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


def decode_options(given: Mapping[str, Any]) -> DecodeOptions:
    """The options that these keywords of `KVCacheManager` are.

    Raises:
        InputError: for one that it has not, with the closest that it has.
    """
    own = ("policy", "max_cache_length", "positions", "static", "prefix_cache", "storage")
    for name in given:
        if name not in DecodeArguments.__annotations__:
            near = get_close_matches(name, [*own, *DecodeArguments.__annotations__], 1)
            meant = f"did you mean {near[0]}?" if near else "see KVCacheManager for those that there are"
            raise InputError(f"KVCacheManager has no setting {name!r}; {meant}")
    return DecodeOptions(**given)


def whole_spec(given: CacheSpec, beside: CacheSpec) -> CacheSpec:
    """A spec that was given whole.

    Raises:
        InputError: if parts of one were given beside it.
    """
    if beside != replace(CacheSpec(), policy=given.policy):
        raise InputError(
            "a CacheSpec says all of a cache: give max_length, positions, static and storage in it, and not beside it"
        )
    return given
