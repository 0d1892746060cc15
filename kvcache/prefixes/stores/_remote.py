"""Snapshots anywhere that fsspec reaches: S3, GCS, Azure, SSH, a web server's folder."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from kvcache.errors import CorruptError, InputError, MissingDependencyError, StoreError
from kvcache.io import Redactor, make_private_folder, read_regular, shown_url, write_private
from kvcache.prefixes._snapshot import is_address
from kvcache.prefixes.stores._base import (
    LONGEST_WAIT,
    BlobStore,
    StoreEntry,
    check_address,
    check_seconds,
    check_url,
)
from kvcache.prefixes.stores._patience import Patience
from kvcache.prefixes.stores._room import leaving

_SUFFIX = ".safetensors"
_PIN = ".pin"
_SPEED = 2**20  # bytes a second: slower than that is no answer
_Answer = TypeVar("_Answer")


class RemoteStore(BlobStore):
    """Snapshots as files of an fsspec location (extra ``remote``, and the package of the protocol, such as ``s3fs``).

    Object stores write a file whole or not at all; where another location does not, the checksum finds what was torn.
    A budget is kept by this process as well as it can: others that write at the same time may exceed it together.

    Args:
        url: such as ``s3://bucket/voices``. A login or token in it is never said again, in no message and no error.
        max_bytes: of all files; those written longest ago leave first.
        secret: see `BlobStore`; a location that others can write to deserves one.
        timeout: seconds to wait for an answer before it counts as a miss; to write, a second more for each MiB.
        **storage_options: of the file system, such as credentials.

    Raises:
        InputError: without the package fsspec or that of the protocol, for a URL or options that it cannot use, for a
            time-out that is none, or for an empty secret.
        StoreError: where the location is asked at once (SSH, FTP), and does not answer.
    """

    name = "remote"
    retry_after = 5.0

    def __init__(
        self,
        url: str,
        *,
        max_bytes: int | str | None = None,
        secret: bytes | str | None = None,
        timeout: float = 10.0,
        **storage_options: Any,
    ) -> None:
        check_url(url)
        check_seconds("timeout", timeout, LONGEST_WAIT)
        super().__init__(max_bytes, secret, Redactor(url, storage_options))
        self.timeout = timeout
        self._patience = Patience()
        self._files, self._folder = self._opened(url, storage_options)
        protocol = self._files.protocol
        self._local = "file" in ((protocol,) if isinstance(protocol, str) else protocol)
        self._lock = Lock()

    def _opened(self, url: str, options: dict[str, Any]) -> tuple[Any, str]:
        """The file system and the folder in it. What goes wrong is said without the foreign error, which may tell a login."""
        wrong: type[InputError] | type[StoreError] = StoreError
        try:
            from fsspec.core import url_to_fs

            opened: tuple[Any, str] = self._patience.in_time(lambda: url_to_fs(url, **options), self.timeout)
            return opened
        except ImportError as error:
            wrong, why = MissingDependencyError, self._redact.text(str(error))
            todo = "run: pip install 'kvcache[remote]' and the package of the protocol"
        except (ValueError, TypeError) as error:
            wrong, why = InputError, self._redact.text(str(error))
            todo = "give a URL of a protocol that fsspec knows"
        except Exception as error:
            why, todo = self._redact.error(error), "check that it is up and may be used"
        raise wrong(f"cannot open {shown_url(url)!r}: {why}; {todo}")

    def _path(self, address: str, suffix: str = _SUFFIX) -> str:
        return f"{self._folder}/{check_address(address)}{suffix}"

    def _has(self, address: str) -> bool:
        return bool(self._in_time(lambda: self._files.exists(self._path(address))))

    def _read(self, address: str, most: int) -> bytes | None:
        return self._in_time(lambda: self._bytes(self._path(address), None, most))

    def _peek(self, address: str, most: int | None = None) -> bytes | None:
        return self._in_time(lambda: self._bytes(self._path(address), most, self._largest))

    def _bytes(self, path: str, most: int | None, largest: int) -> bytes:
        """All of a file that has no more than the `largest` number of bytes, or its first `most`."""
        if self._local:
            return read_regular(path, most, largest)
        about = self._files.info(path)
        size = about.get("size")
        if about.get("type", "file") != "file" or (size or 0) > largest:
            raise CorruptError(f"it is a {about.get('type')} of {size} bytes; it is not read, remove it")
        if size is None:
            data = self._streamed(path, largest + 1 if most is None else most)
        else:
            data = bytes(self._files.cat_file(path, **({} if most is None else {"start": 0, "end": most})))
        if most is None and len(data) > largest:
            raise CorruptError(f"it has more than the {largest} bytes that may be; it is not read, remove it")
        return data

    def _streamed(self, path: str, most: int) -> bytes:
        """The first bytes of a file whose size nobody tells: a range of it might be answered with the whole."""
        parts: list[bytes] = []
        with self._files.open(path, "rb") as file:
            while most > 0 and (part := file.read(min(most, _SPEED))):
                parts.append(bytes(part[:most]))
                most -= len(parts[-1])
        return b"".join(parts)

    def _in_time(self, ask: Callable[[], _Answer]) -> _Answer | None:
        """What the file system answers in time; None if there is no such file."""
        try:
            return self._patience.in_time(ask, self.timeout)
        except FileNotFoundError:
            return None

    def _write(self, address: str, data: bytes) -> None:
        self._alone(lambda: self._place(address, data), len(data))

    def _alone(self, act: Callable[[], None], nbytes: int = 0) -> None:
        """Do something that others of this process do not do at the same time; in time."""
        if not self._lock.acquire(timeout=self.timeout):
            raise TimeoutError(f"another thread has been writing for {self.timeout:g} s")
        try:
            self._patience.in_time(act, self.timeout + nbytes / _SPEED)
        finally:
            self._lock.release()

    def _place(self, address: str, data: bytes) -> None:
        self._make_folder()
        if self.max_bytes is not None:
            self._make_room(len(data), self._path(address), self.max_bytes)
        self._write_file(self._path(address), data)

    def _make_folder(self) -> None:
        if self._local:
            make_private_folder(self._folder)
        else:
            self._files.makedirs(self._folder, exist_ok=True)

    def _write_file(self, path: str, data: bytes) -> None:
        if self._local:
            write_private(Path(path), data)
        else:
            self._files.pipe_file(path, data)

    def _make_room(self, needed: int, replaced: str, max_bytes: int) -> None:
        listed = self._listing()
        files = {
            name: (_size(entry), (_size(entry) <= max_bytes, _written(entry) or 0.0))  # what is too large is not ours
            for name, entry in listed.items()
            if _address(name) and name != replaced
        }
        pinned = {name for name, (size, _) in files.items() if size <= max_bytes and _pin_of(name) in listed}
        for name in leaving(files, pinned, needed, max_bytes):
            self._files.rm_file(name)

    def _listing(self) -> dict[str, dict[str, Any]]:
        try:
            listed = self._files.ls(self._folder, detail=True, refresh=True)
        except FileNotFoundError:
            return {}
        return {entry["name"]: entry for entry in listed if entry.get("type") == "file" and not entry.get("islink")}

    def _remove(self, address: str) -> None:
        def remove() -> None:
            for suffix in (_PIN, _SUFFIX):
                if self._files.exists(self._path(address, suffix)):
                    self._files.rm_file(self._path(address, suffix))

        self._alone(remove)

    def _pin(self, address: str, pinned: bool) -> None:
        mark = self._path(address, _PIN)

        def change() -> None:
            if pinned:
                self._make_folder()
                self._write_file(mark, b"")
            elif self._files.exists(mark):
                self._files.rm_file(mark)

        self._alone(change)

    def _used(self) -> int:
        listed = self._in_time(self._listing) or {}
        return sum(_size(entry) for name, entry in listed.items() if _address(name))

    def _entries(self) -> list[StoreEntry]:
        listed = self._in_time(self._listing) or {}
        return [
            StoreEntry(address, _size(entry), _written(entry), _pin_of(name) in listed)
            for name, entry in listed.items()
            if (address := _address(name)) is not None
        ]


def _pin_of(name: str) -> str:
    return name.removesuffix(_SUFFIX) + _PIN


def _address(name: str) -> str | None:
    """Of the snapshot in a file of this name; None for someone's own file, which is neither counted nor evicted."""
    stem = name.rpartition("/")[2].removesuffix(_SUFFIX)
    return stem if name.endswith(_SUFFIX) and is_address(stem) else None


def _size(entry: dict[str, Any]) -> int:
    """Of a file, in bytes; 0 where the location does not tell."""
    return int(entry.get("size") or 0)


def _written(entry: dict[str, Any]) -> float | None:
    """When a file was written, in seconds since 1970: local and SSH, S3, Azure, GCS, memory each have a word for it."""
    names = ("mtime", "LastModified", "last_modified", "updated", "created")
    given = next((entry[name] for name in names if entry.get(name)), None)
    if isinstance(given, str):
        try:
            given = datetime.fromisoformat(given.replace("Z", "+00:00"))
        except ValueError:  # another way to write it
            return None
    return given.timestamp() if isinstance(given, datetime) else None if given is None else float(given)
