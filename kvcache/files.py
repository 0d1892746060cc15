"""Files that only their owner can read, and reading that neither waits nor fills memory, whatever lies at a path."""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kvcache.errors import CorruptError

LARGEST = 64 * 2**30  # bytes of one file: more than any prefix takes
PARTIAL = ".partial"  # how the name of a file ends that is being written

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# Windows has neither of the first two, POSIX not the last.
_READ = (
    os.O_RDONLY
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
_MAKE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


@contextmanager
def opened_regular(path: str | os.PathLike[str], largest: int = LARGEST) -> Iterator[tuple[BinaryIO, int]]:
    """A file to read, and its size. Nothing else is opened: no link, folder, FIFO, socket or device.

    Args:
        path: of the file.
        largest: bytes of a file that is still opened.

    Raises:
        CorruptError: if it is something else, or larger.
        OSError: if it is not there, or may not be read.
    """
    _check(os.lstat(path), largest)  # before it is opened: to open a device may already do something
    with os.fdopen(os.open(path, _READ), "rb") as file:
        status = os.fstat(file.fileno())
        _check(status, largest)  # what was opened, should it have been replaced meanwhile
        yield file, status.st_size


def read_regular(path: str | os.PathLike[str], most: int | None = None, largest: int = LARGEST) -> bytes:
    """A file's bytes, or its first `most`; see `opened_regular`."""
    with opened_regular(path, largest) as (file, size):
        return file.read(size if most is None else min(most, size))


def read_given(path: str | os.PathLike[str], largest: int = LARGEST) -> bytes:
    """The bytes of a file that somebody named: a symbolic link to it will do."""
    return read_regular(os.path.realpath(path), largest=largest)


def make_private_folder(path: str | os.PathLike[str]) -> None:
    """Make a folder, and those above it that are missing, for their owner alone (0700, whatever the umask)."""
    path = Path(path)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not path.is_dir():
            raise
        return
    except FileNotFoundError:
        if path == path.parent:
            raise
        make_private_folder(path.parent)
        make_private_folder(path)
        return
    os.chmod(path, 0o700)  # the umask may have taken even these rights


def make_private_file(path: str | os.PathLike[str], data: bytes = b"") -> None:
    """Write a new file for its owner alone (0600, whatever the umask).

    Raises:
        FileExistsError: if there is one.
    """
    with os.fdopen(os.open(path, _MAKE, 0o600), "wb") as file:
        os.chmod(path, 0o600)
        file.write(data)


def write_private(path: str | os.PathLike[str], data: bytes, beside: Path | None = None) -> None:
    """Write a file whole or not at all, for its owner alone; what is there is replaced.

    Args:
        path: of the file.
        data: what it will hold.
        beside: the folder to write it in before it is moved to its place, on the same disk; by default the file's own.
    """
    path = Path(path)
    partial = (path.parent if beside is None else beside) / f"{path.name[:100]}.{secrets.token_hex(8)}{PARTIAL}"
    try:
        make_private_file(partial, data)
        if is_folder(path):  # which no file can replace
            set_aside(path)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def set_aside(path: Path) -> None:
    """Give what lies at a path another name, so that the path is free. Nothing is lost."""
    path.rename(path.with_name(f"{path.name[:100]}.aside-{secrets.token_hex(8)}"))


def is_folder(path: Path) -> bool:
    """Whether this is a folder, not a link to one."""
    return stat.S_ISDIR(_mode(path))


def is_regular(path: Path) -> bool:
    """Whether this is a file: no link, folder, FIFO, socket or device."""
    return stat.S_ISREG(_mode(path))


def _mode(path: Path) -> int:
    try:
        return os.lstat(path).st_mode
    except FileNotFoundError:
        return 0


def _check(status: os.stat_result, largest: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something")
        raise CorruptError(f"it is {kind}, not a file; it is not opened, remove it")
    if status.st_size > largest:
        raise CorruptError(
            f"it has {status.st_size} bytes, more than the {largest} that may be; it is not read, remove it"
        )
