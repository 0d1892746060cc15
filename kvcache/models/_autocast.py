"""Autocast, which torch keeps for each thread: whether it is in force, blocks and generators without it."""

from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import TypeVar, cast

import torch

_T = TypeVar("_T")
_OVER = object()


def autocasts(kind: str) -> bool:
    """Whether autocast is in force, in this thread, on devices of this kind, ``"cpu"``."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


@contextmanager
def without_autocast(kinds: Iterable[str]) -> Iterator[None]:
    """Within this block no autocast is in force on devices of these kinds.

    What is kept for later requests, and for other callers, must not depend on the block in which somebody asked for it.
    """
    with ExitStack() as block:
        for kind in kinds:
            if autocasts(kind):
                block.enter_context(torch.autocast(kind, enabled=False))
        yield


def each_without_autocast(kinds: Iterable[str], items: Generator[_T, None, None]) -> Iterator[_T]:
    """The items, each made without autocast; the caller's block is in force again wherever it has one of them."""
    kinds = list(kinds)
    with closing(items):
        while True:
            with without_autocast(kinds):
                item = next(items, _OVER)
            if item is _OVER:
                return
            yield cast(_T, item)
