"""What requests are given, looked at before anything runs; and autocast, which is kept out."""

import dataclasses
import difflib
import os
from collections.abc import Collection, Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from numbers import Real
from typing import Any, TypeVar

from kvcache import InputError, models
from kvcache.errors import check_whole

_T = TypeVar("_T")
_LONGEST_PAUSE = 600  # seconds: the silence is made as samples
_LARGEST = 3e38  # about the largest number of fp32


def check_names(given: Iterable[str], known: Collection[str], where: str) -> None:
    """Raise `InputError` for a keyword that is not known, with the one that is closest to it.

    Args:
        given: the keywords of a call.
        known: those that there are.
        where: what was called.
    """
    for name in given:
        if name not in known:
            [closest] = difflib.get_close_matches(name, sorted(known), 1, cutoff=0.0)
            raise InputError(
                f"{where} has no argument {name!r}; the closest is {closest!r}, all are {', '.join(sorted(known))}"
            )


def check_flag(name: str, value: Any) -> None:
    """Raise `InputError` for what is no truth value."""
    if not isinstance(value, bool):
        raise InputError(f"{name}={value!r:.80} must be True or False")


def check_count(name: str, value: Any) -> None:
    """Raise `InputError` if `value` counts nothing."""
    check_whole(name, value, 1)


def check_number(name: str, value: Any, least: float = -_LARGEST, most: float = _LARGEST, unit: str = "") -> float:
    """The number, where it is a finite one from `least` to `most`: a fraction or NumPy's, too, but no truth value.

    Raises:
        InputError: for anything else.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if number and least <= value <= most:
        return float(value)
    bounds = (
        "" if least == -_LARGEST else f" of at least {least:g}" if most == _LARGEST else f" from {least:g} to {most:g}"
    )
    raise InputError(f"{name}={value!r} must be a finite number{unit}{bounds}")


def check_pause(pause: Any) -> float:
    """The seconds of silence between two segments.

    Raises:
        InputError: if they cannot be.
    """
    return check_number("pause", pause, 0, _LONGEST_PAUSE, " of seconds")


def check_path(name: str, value: Any) -> None:
    """Raise `InputError` for what names no file."""
    if not isinstance(value, str | os.PathLike):
        raise InputError(f"{name}={value!r:.80} must be the path of a file, a string or a Path")


def check_language(language_id: Any) -> None:
    """Raise `InputError` for what is no language's code at all."""
    if language_id is not None and not isinstance(language_id, str):
        raise InputError(f"language_id={language_id!r:.80} must be a language's code, such as 'en', or None")


def check_conditionals(t3_cond: Any) -> None:
    """Raise `InputError` for what is no `T3Cond`."""
    fields = dataclasses.fields(t3_cond) if dataclasses.is_dataclass(t3_cond) and not isinstance(t3_cond, type) else ()
    if {"speaker_emb", "emotion_adv"} <= {field.name for field in fields}:
        return
    raise InputError(
        f"t3_cond is a {type(t3_cond).__name__} and must be upstream's T3Cond; of a Conditionals give its t3, and of a voice "
        "that was added its name, as voice"
    )


def check_seed(seed: Any, count: int = 1) -> None:
    """Raise `InputError` for what a generator of torch cannot be seeded with, or the `count` numbers from it on cannot."""
    if seed is None or (type(seed) is int and seed >= -(2**63) and seed + count <= 2**64):
        return
    raise InputError(f"seed={seed!r} must be a whole number up to {2**64 - count}, or None for torch's own generator")


def without_autocast(t3: Any) -> AbstractContextManager[Any]:
    """Within this block no autocast is in force on the model's device.

    What is computed of a voice is kept for later requests, and a cache has one dtype: neither may depend on which blocks a
    caller has entered or left in between.
    """
    return models.without_autocast([t3.device.type])


def autocast_on(t3: Any) -> bool:
    """Whether the caller's thread is in an autocast of the model's device."""
    return models.autocasts(t3.device.type)


def each_without_autocast(t3: Any, items: Generator[_T, None, None]) -> Iterator[_T]:
    """The items, each made without autocast; the caller's block is in force again wherever it has one of them."""
    return models.each_without_autocast([t3.device.type], items)
