"""Room for what is stored next: whether it fits, and what has to leave for it."""

from collections.abc import Iterator, Mapping, Set
from typing import Any, TypeVar

_File = TypeVar("_File")


def check_room(needed: int, pinned: int, max_bytes: int) -> None:
    """Raise ValueError if these bytes do not fit beside the pinned ones; to be asked before any other is evicted."""
    if pinned + needed > max_bytes:
        raise ValueError(f"{needed} bytes do not fit beside {pinned} pinned ones into {max_bytes}")


def leaving(files: Mapping[_File, tuple[int, Any]], pinned: Set[_File], needed: int, max_bytes: int) -> Iterator[_File]:
    """Which files have to leave so that `needed` more bytes fit, one by one.

    Args:
        files: the size of each, and what they leave in the order of.
        pinned: those of them that stay.

    Raises:
        ValueError: before any leaves, if they do not fit beside the pinned ones.
    """
    check_room(needed, sum(files[file][0] for file in pinned), max_bytes)
    total = sum(size for size, _ in files.values())
    for file in sorted(files.keys() - pinned, key=lambda file: files[file][1]):
        if total + needed <= max_bytes:
            return
        yield file
        total -= files[file][0]
