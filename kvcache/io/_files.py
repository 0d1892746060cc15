"""Files that only their owner can read, and reading that neither waits nor fills memory, whatever lies at a path."""

import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kvcache.errors import CorruptError, InputError

LARGEST = 64 * 2**30  # bytes of one file: more than any prefix takes
PARTIAL = ".partial"  # how the name of a file ends that is being written
_LONGEST_NAME = 100  # bytes that are kept of a name which gets more to it; most file systems take 255

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
        _make_folder(path)
    except FileNotFoundError:
        if path == path.parent:
            raise
        make_private_folder(path.parent)
        _make_folder(path)  # not again: below /proc none can be made, whatever lies above


def _make_folder(path: Path) -> None:
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not path.is_dir():
            raise
    else:
        os.chmod(path, 0o700)  # the umask may have taken even these rights


def make_private_file(path: str | os.PathLike[str], data: bytes = b"") -> None:
    """Write a new file for its owner alone (0600, whatever the umask).

    Raises:
        FileExistsError: if there is one.
    """
    with os.fdopen(os.open(path, _MAKE, 0o600), "wb") as file:
        # By the open file: another process may have removed the name meanwhile. Windows knows no such thing before 3.13.
        os.chmod(file.fileno() if os.chmod in os.supports_fd else path, 0o600)
        file.write(data)


def write_private(path: str | os.PathLike[str], data: bytes, beside: Path | None = None) -> None:
    """Write a file of a store's own whole or not at all, for its owner alone. What is there is replaced, a folder set aside.

    Args:
        path: of the file. One that somebody named is for `write_given`.
        data: what it will hold.
        beside: the folder to write it in before it is moved to its place, on the same disk; by default the file's own.
    """
    path = Path(path)
    with _partial(path, path.parent if beside is None else beside) as partial:
        make_private_file(partial, data)
        if is_folder(path):  # which no file can replace
            set_aside(path)
        os.replace(partial, path)


def write_given(path: str | os.PathLike[str], data: bytes, *, private: bool = True) -> None:
    """Write a file that somebody named, whole or not at all; see `check_given` for what is replaced.

    Args:
        path: of the file. A symbolic link stays one: what it leads to is written.
        data: what it will hold.
        private: whether for its owner alone (0600), or as the umask has it.

    Raises:
        InputError: before anything is written, if something else than a file is there.
    """
    check_given(path)
    path = Path(os.path.realpath(path))
    with _partial(path, path.parent) as partial:
        if private:
            make_private_file(partial, data)
        else:
            with open(partial, "xb") as file:
                file.write(data)
        os.replace(partial, path)


def check_given(path: str | os.PathLike[str]) -> None:
    """Raise `InputError` unless a file can be written there: nothing is there, or a file, or a link to either."""
    mode = _mode(Path(os.path.realpath(path)))
    if mode and not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise InputError(f"{os.fspath(path)} is {kind}, not a file; it is left as it is, give the name of a file")


@contextmanager
def _partial(path: Path, folder: Path) -> Iterator[Path]:
    """The name in a folder under which a file is written before it gets its own; what is left there is removed."""
    partial = folder / f"{_begin(path.name)}.{secrets.token_hex(8)}{PARTIAL}"
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def set_aside(path: Path) -> None:
    """Give what lies at a path of a store's own another name, so that the path is free. Nothing is lost."""
    path.rename(path.with_name(f"{_begin(path.name)}.aside-{secrets.token_hex(8)}"))


def _begin(name: str) -> str:
    """The beginning of a file's name, which leaves room for more: file systems count bytes, of which a character has up to 4."""
    return os.fsencode(name)[:_LONGEST_NAME].decode(sys.getfilesystemencoding(), "ignore")


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
