"""Snapshots in a folder, shared by all processes of a machine."""

import os
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from kvcache.errors import InputError
from kvcache.stores.base import BlobStore, StoreEntry, check_address, is_address, leaving

_SUFFIX = ".safetensors"
_PIN = ".pin"
_PARTIAL = ".partial"


def default_folder() -> Path:
    """``$KVCACHE_HOME``, or ``kvcache`` in the user's cache folder."""
    own = os.environ.get("KVCACHE_HOME")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvcache"


class DiskStore(BlobStore):
    """Snapshots as safetensors files, one each. Several processes may use the folder at once.

    A file appears whole or not at all: it is written under another name and renamed. It is not forced to the platter; what
    a power failure tears, the checksum finds. Writers take turns by a lock on the folder, which the system lets go of if
    one of them is killed, so that the budget holds for all of them together; readers need no lock.

    Args:
        folder: made when first written to; by default `default_folder`.
        max_bytes: of all files; the least recently used leave first.
        secret: see `BlobStore`.

    Raises:
        InputError: if there is a file in the place of the folder.
    """

    name = "disk"

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        max_bytes: int | str | None = "4GiB",
        secret: bytes | str | None = None,
    ) -> None:
        super().__init__(max_bytes, secret)
        self.folder = default_folder() if folder is None else Path(folder)
        if os.path.exists(self.folder) and not os.path.isdir(self.folder):  # False for what no name can be, told in use
            raise InputError(f"folder={os.fspath(self.folder)!r} is a file; give a folder, which may be new")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({os.fspath(self.folder)!r}, max_bytes={self.max_bytes})"

    def _path(self, address: str, suffix: str = _SUFFIX) -> Path:
        return self.folder / (check_address(address) + suffix)

    def _turn(self) -> FileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / ".lock", timeout=60)

    def _has(self, address: str) -> bool:
        return self._path(address).exists()

    def _read(self, address: str) -> bytes | None:
        data = self._peek(address)
        if data is not None:
            with suppress(OSError):  # evicted meanwhile, or not ours to touch: it was read all the same
                os.utime(self._path(address))  # when it was last used
        return data

    def _peek(self, address: str, most: int | None = None) -> bytes | None:
        try:
            with self._path(address).open("rb") as file:
                return file.read(-1 if most is None else most)
        except FileNotFoundError:
            return None

    def _write(self, address: str, data: bytes) -> None:
        with self._turn():
            for left in self.folder.glob(f"*{_PARTIAL}"):  # by a writer that was killed: whoever writes holds the lock
                left.unlink(missing_ok=True)
            self._make_room(len(data), self._path(address))
            partial = self._path(address, _PARTIAL)
            try:
                partial.write_bytes(data)
                partial.replace(self._path(address))
            finally:
                partial.unlink(missing_ok=True)

    def _make_room(self, needed: int, replaced: Path) -> None:
        if self.max_bytes is None:
            return
        files = {
            path: (status.st_size, (path != replaced, status.st_mtime_ns)) for path, status in self._files().items()
        }
        pinned = {path for path in files if path != replaced and path.with_suffix(_PIN).exists()}
        for path in leaving(files, pinned, needed, self.max_bytes):
            path.unlink(missing_ok=True)

    def _files(self) -> dict[Path, os.stat_result]:
        found = {}
        for path in self.folder.glob(f"*{_SUFFIX}"):
            if not is_address(path.stem):  # someone's own file, which is neither counted nor evicted
                continue
            try:
                found[path] = path.stat()
            except FileNotFoundError:  # removed meanwhile
                continue
        return found

    def _remove(self, address: str) -> None:
        self._pin(address, False)
        self._path(address).unlink(missing_ok=True)

    def _pin(self, address: str, pinned: bool) -> None:
        mark = self._path(address, _PIN)
        if pinned:
            with self._turn():  # not while someone makes room
                mark.touch()
        else:
            mark.unlink(missing_ok=True)

    def _used(self) -> int:
        return sum(status.st_size for status in self._files().values())

    def _entries(self) -> list[StoreEntry]:
        if self.folder.exists():
            os.listdir(self.folder)  # glob() finds nothing in a folder that may not be read
        return [
            StoreEntry(path.stem, status.st_size, status.st_mtime, path.with_suffix(_PIN).exists())
            for path, status in self._files().items()
        ]
