"""Autocast, which torch keeps for each thread: whether it is in force, and blocks without it."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch


def autocasts(kind: str) -> bool:
    """Whether autocast is in force, in this thread, on devices of this kind, ``"cpu"``."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


@contextmanager
def without_autocast(kinds: Iterable[str]) -> Iterator[None]:
    """Within this block no autocast is in force on devices of these kinds: what is kept for later requests, and for other
    callers, must not depend on the block in which somebody asked for it."""
    with ExitStack() as block:
        for kind in kinds:
            if autocasts(kind):
                block.enter_context(torch.autocast(kind, enabled=False))
        yield
