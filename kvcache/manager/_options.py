"""How a manager's streams decode, as keywords and as one value."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, cast

import torch
from typing_extensions import TypedDict

from kvcache.cache import CacheSpec
from kvcache.decoding import BUCKET, BackendName, check_bucket
from kvcache.errors import InputError
from kvcache.models import check_kv_dtype

Backends = BackendName | Literal["auto", "off"]
_V = TypeVar("_V")


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


def value_of(kind: type[_V], given: _V | None, fields_given: Mapping[str, Any], whose: str) -> _V:
    """The value that an argument, or the fields of it as keywords, stand for.

    Args:
        kind: a dataclass.
        given: the value, if that was given.
        fields_given: the keywords.
        whose: settings they are, in words.

    Raises:
        InputError: for an unknown keyword, or keywords beside a value.
    """
    names = [field.name for field in fields(cast(Any, kind))]
    if unknown := sorted(set(fields_given) - set(names)):
        raise InputError(f"{unknown[0]} is no setting of {whose}; those are {', '.join(names)}")
    if given is not None and fields_given:
        raise InputError(
            f"{kind.__name__} and {', '.join(fields_given)} are given; put them into the options with dataclasses.replace()"
        )
    return kind(**fields_given) if given is None else given
