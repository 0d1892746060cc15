"""Snapshots in a folder, shared by all processes of a machine."""

import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Lock

from filelock import FileLock, Timeout

from kvcache.cache import beginning, beginning_length
from kvcache.errors import CorruptError, InputError, StoreError
from kvcache.io import (
    LARGEST,
    PARTIAL,
    is_folder,
    is_regular,
    make_private_file,
    make_private_folder,
    opened_regular,
    read_regular,
    set_aside,
    shown_url,
    shown_value,
    write_private,
)
from kvcache.prefixes._snapshot import is_address
from kvcache.prefixes.stores._base import BlobStore, StoreEntry, check_address
from kvcache.prefixes.stores._index import Index, Row, discard, nanoseconds
from kvcache.prefixes.stores._room import check_room

_SUFFIX = ".safetensors"
_PIN = ".pin"
_LOCK = ".lock"
_OWN = ".kvcache"  # the folder of the index, and of what is being written
_OTHERS = 0.1  # seconds to wait for another process
_THREADS = 2.0  # seconds to wait for another thread of this one
_FEW = 1000  # files that are listed each time: it takes milliseconds, and nothing can be missed
_FIRST_READ = 2**15  # bytes: the headers of most snapshots in one go


def default_folder() -> Path:
    """``$KVCACHE_HOME``, or ``kvcache`` in the user's cache folder.

    Raises:
        InputError: if neither is set, and the user has no home.
    """
    if own := os.environ.get("KVCACHE_HOME"):
        return Path(own)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "kvcache"
    try:
        return Path.home() / ".cache" / "kvcache"
    except RuntimeError as error:
        raise InputError(
            "this user has no home folder to keep prefixes in; set KVCACHE_HOME to a folder that may be written to"
        ) from error


class DiskStore(BlobStore):
    """Snapshots as safetensors files, one each. Several processes may use the folder at once.

    A file appears whole or not at all: it is written under another name and renamed. It is not forced to the platter; what
    a power failure tears, the checksum finds. Writers take turns by a lock on the folder, which the system lets go of if
    one of them is killed, so that the budget holds for all of them together; readers need no lock. Who does not get the lock
    within a tenth of a second does not write: what was computed is computed again when it is next asked for.

    Files are their owner's alone (0600), and so is a folder that is made (0700), whatever the umask. Only files are read, no
    links, folders, FIFOs or devices. How many files there are does not matter to a write: an index says what the folder holds.

    Args:
        folder: made when first written to; by default `default_folder`. On a disk of this machine: a network file system
            may neither lock nor tell in time what others have written.
        max_bytes: of all files; the least recently used leave first.
        secret: see `BlobStore`.

    Raises:
        InputError: if there is a file in the place of the folder, or it is no path, or the secret is empty.
    """

    name = "disk"

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        max_bytes: int | str | None = "4GiB",
        secret: bytes | str | None = None,
    ) -> None:
        super().__init__(max_bytes, secret)
        if folder is not None and (not isinstance(folder, (str, os.PathLike)) or folder == ""):
            raise InputError(
                f"folder={shown_value(folder)} must be the path of a folder; give one, or None for the user's cache"
            )
        self.folder = default_folder() if folder is None else Path(folder)
        if os.path.exists(self.folder) and not os.path.isdir(self.folder):  # False for what no name can be, told in use
            raise InputError(f"folder={shown_url(os.fspath(self.folder))!r} is a file; give a folder, which may be new")
        self._threads = Lock()
        self._process = os.getpid()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({shown_url(os.fspath(self.folder))!r}, max_bytes={self.max_bytes})"

    def _path(self, address: str, suffix: str = _SUFFIX) -> Path:
        return self.folder / (check_address(address) + suffix)

    # ------------------------------------------------------------------ reading, without a lock

    def _has(self, address: str) -> bool:
        return is_regular(self._path(address))

    def _read(self, address: str, most: int) -> bytes | None:
        try:
            with opened_regular(self._path(address), most) as (file, size):
                first = file.read(_FIRST_READ)
                if (needed := beginning_length(first)) > len(first) == _FIRST_READ:
                    first += file.read(needed - len(first))
                if (told := beginning(first).nbytes) < size:  # before the rest is read: it may be gigabytes of nothing
                    raise CorruptError(f"it has {size} bytes, and says {told}; write it again")
                return first + file.read(size - len(first))
        except FileNotFoundError:
            return None

    def _touch(self, address: str) -> None:
        now = time.time_ns()
        with suppress(OSError):  # evicted meanwhile, or not ours to touch: it was read all the same
            os.utime(self._path(address), ns=(now, now))

    def _peek(self, address: str, most: int | None = None) -> bytes | None:
        if most is None:
            return self._read(address, LARGEST)
        try:
            return read_regular(self._path(address), most)
        except FileNotFoundError:
            return None

    def _entries(self) -> list[StoreEntry]:
        return [StoreEntry(address, row.nbytes, row.used / 1e9, row.pinned) for address, row in self._listed().items()]

    def _used(self) -> int:
        try:
            index = Index(self.folder / _OWN, reading=True)
            try:
                if index.count > _FEW and index.folder == self._changed():
                    return index.nbytes
            finally:
                index.close()
        except (sqlite3.Error, OSError):  # it is not there, or somebody writes it
            pass
        return sum(row.nbytes for row in self._listed().values())

    def _listed(self) -> dict[str, Row]:
        """What the folder holds, by address; someone's own files are neither counted nor evicted."""
        found: dict[str, os.stat_result] = {}
        pins: set[str] = set()
        try:
            with os.scandir(self.folder) as names:
                for entry in names:
                    stem, dot, suffix = entry.name.partition(".")
                    if not is_address(stem):
                        continue
                    if dot + suffix == _PIN:
                        pins.add(stem)
                    elif dot + suffix == _SUFFIX:
                        with suppress(FileNotFoundError):  # removed meanwhile
                            found[stem] = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return {}
        return {
            address: Row(status.st_size, nanoseconds(status.st_mtime_ns), address in pins)
            for address, status in found.items()
            if stat.S_ISREG(status.st_mode) and status.st_size <= LARGEST
        }

    # ------------------------------------------------------------------ writing, in turn

    def _write(self, address: str, data: bytes) -> None:
        written = False

        def place(index: Index) -> None:
            nonlocal written
            self._make_room(index, address, len(data))
            write_private(self._path(address), data, self.folder / _OWN)
            written = True
            self._touch(address)  # by a finer clock than a file system's own
            if (row := self._row(address, _parent(data))) is not None:
                index.note(address, row)

        with self._turn(_OTHERS) as has_turn:
            if not has_turn:
                raise StoreError(f"another process holds the lock {_LOCK} of the folder; it is not kept")
            self._clear()
            try:
                self._indexed(None, place)
            except sqlite3.Error as error:  # full, broken, or held by a stranger: the folder is listed instead
                discard(self.folder / _OWN, error)
                if not written:
                    self._indexed(self._listed(), place)

    def _make_room(self, index: Index, address: str, needed: int) -> None:
        if self.max_bytes is None:
            return
        check_room(needed, index.pinned(address, self.max_bytes), self.max_bytes)
        stuck: set[str] = set()  # what may not be removed
        while index.nbytes + needed > self.max_bytes:
            known = index.row(address)
            leaving = address if known and address not in stuck else index.next_to_leave(self.max_bytes, stuck)
            if leaving is None:
                raise ValueError(f"{needed} bytes do not fit beside what cannot be removed into {self.max_bytes}")
            row, noted = self._row(leaving), index.row(leaving)
            newer = row is not None and (noted is None or row != replace(noted, parent=row.parent))
            if row is not None and newer and leaving != address and row.nbytes <= self.max_bytes:
                index.note(leaving, row)  # used, pinned or replaced since it was noted: it is not yet its turn
                continue
            try:
                self._path(leaving).unlink(missing_ok=True)
                index.forget(leaving)
            except OSError:
                stuck.add(leaving)

    def _remove(self, address: str) -> None:
        def remove() -> None:
            self._path(address, _PIN).unlink(missing_ok=True)
            if is_folder(self._path(address)):
                set_aside(self._path(address))
            self._path(address).unlink(missing_ok=True)

        self._change(remove, lambda index: index.forget(address))

    def _pin(self, address: str, pinned: bool) -> None:
        mark = self._path(address, _PIN)

        def change() -> None:
            if not pinned:
                mark.unlink(missing_ok=True)
            elif not os.path.lexists(mark):
                make_private_folder(self.folder)
                with suppress(FileExistsError):  # another process pins it, too
                    make_private_file(mark)

        def note(index: Index) -> None:
            if (row := self._row(address)) is not None:
                index.note(address, row)

        self._change(change, note)

    def _change(self, act: Callable[[], None], note: Callable[[Index], None]) -> None:
        """Change the folder in turn and note it, or else at once: a later listing finds it."""
        if not self.folder.is_dir():
            act()
            return
        with self._turn(0.0) as has_turn:
            before = self._changed()
            act()
            with suppress(sqlite3.Error, OSError):  # an index that failed is not of now, and so not believed
                if has_turn:
                    self._indexed(None, note, before)

    def _indexed(self, listed: dict[str, Row] | None, act: Callable[[Index], None], before: int | None = None) -> None:
        """Do something with the index, which says what the folder says.

        Args:
            listed: what it says, to be put into an index in memory; None for the index of the folder.
            before: only if this is the change that the index knows as the folder's last; None: else the folder is listed.
        """
        index = Index(None if listed is not None else self.folder / _OWN)
        try:
            if before is not None:
                if index.folder != before:
                    return
            elif listed is not None or index.count <= _FEW or index.folder != self._changed():
                index.match(self._listed() if listed is None else listed)
            act(index)
            index.commit(self._changed())
        finally:
            index.close()

    # ------------------------------------------------------------------ inside

    def _changed(self) -> int:
        """When a file last came to the folder or left it, in nanoseconds since 1970."""
        return nanoseconds(os.stat(self.folder).st_mtime_ns)

    def _row(self, address: str, parent: str | None = None) -> Row | None:
        """What the file at an address says of itself; None if there is none."""
        try:
            status = os.lstat(self._path(address))
        except FileNotFoundError:
            return None
        pinned = os.path.lexists(self._path(address, _PIN))
        return Row(status.st_size, nanoseconds(status.st_mtime_ns), pinned, parent)

    def _clear(self) -> None:
        """Remove what a writer left that was killed: whoever writes has the turn."""
        own = self.folder / _OWN
        if os.path.lexists(own) and not is_folder(own):
            set_aside(own)
        make_private_folder(own)
        for left in own.glob(f"*{PARTIAL}"):
            if not is_folder(left):
                left.unlink(missing_ok=True)

    @contextmanager
    def _turn(self, seconds: float) -> Iterator[bool]:
        """Whether this thread alone writes to the folder, after waiting for at most so long for other processes."""
        if self._process != os.getpid():  # forked: whoever held it stayed in the parent
            self._threads, self._process = Lock(), os.getpid()
        if not self._threads.acquire(timeout=_THREADS):
            yield False
            return
        try:
            make_private_folder(self.folder)
            path = self.folder / _LOCK
            if os.path.lexists(path) and not is_regular(path):
                set_aside(path)
            lock = FileLock(path, mode=0o600)
            try:
                lock.acquire(seconds, poll_interval=0.005)
                has_turn = True
            except Timeout:
                has_turn = False
            try:
                yield has_turn
            finally:
                lock.release()
        finally:
            self._threads.release()


def _parent(data: bytes) -> str | None:
    """The address of the prefix that a file says it continues."""
    try:
        parent = beginning(data).header.get("parent")
    except CorruptError:
        return None
    return str(parent) if is_address(parent) else None
