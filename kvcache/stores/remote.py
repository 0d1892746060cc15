"""Snapshots anywhere that fsspec reaches: S3, GCS, Azure, SSH, a web server's folder."""

from collections.abc import Callable
from concurrent.futures import Future
from datetime import datetime
from threading import Lock, Thread
from typing import Any, TypeVar

from kvcache.errors import InputError, MissingDependencyError
from kvcache.stores.base import BlobStore, StoreEntry, check_address, is_address, leaving

_SUFFIX = ".safetensors"
_PIN = ".pin"
_Answer = TypeVar("_Answer")


class RemoteStore(BlobStore):
    """Snapshots as files of an fsspec location (extra ``remote``, and the package of the protocol, such as ``s3fs``).

    Object stores write a file whole or not at all; where another location does not, the checksum finds what was torn.
    A budget is kept by this process as well as it can: others that write at the same time may exceed it together.

    Args:
        url: such as ``s3://bucket/voices``.
        max_bytes: of all files; those written longest ago leave first.
        secret: see `BlobStore`; a location that others can write to deserves one.
        timeout: seconds to wait for an answer before it counts as a miss.
        **storage_options: of the file system, such as credentials.

    Raises:
        InputError: without the package fsspec or that of the protocol.
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
        super().__init__(max_bytes, secret)
        try:
            from fsspec.core import url_to_fs

            self._files, self._folder = url_to_fs(url, **storage_options)
        except ImportError as error:
            raise MissingDependencyError(
                f"cannot open {url!r}: {error}; run: pip install 'kvcache[remote]' and the package of the protocol"
            ) from error
        except ValueError as error:
            raise InputError(f"cannot open {url!r}: {error}; give a URL of a protocol that fsspec knows") from error
        self.timeout = timeout
        self._lock = Lock()

    def _path(self, address: str, suffix: str = _SUFFIX) -> str:
        return f"{self._folder}/{check_address(address)}{suffix}"

    def _has(self, address: str) -> bool:
        return bool(self._files.exists(self._path(address)))

    def _read(self, address: str) -> bytes | None:
        return self._peek(address)

    def _peek(self, address: str, most: int | None = None) -> bytes | None:
        path, part = self._path(address), {} if most is None else {"start": 0, "end": most}
        return self._in_time(lambda: bytes(self._files.cat_file(path, **part)))

    def _in_time(self, ask: Callable[[], _Answer]) -> _Answer | None:
        """What the file system answers within `timeout`; None if there is no such file."""
        answer: Future[_Answer | None] = Future()

        def wait() -> None:
            try:
                answer.set_result(ask())
            except FileNotFoundError:
                answer.set_result(None)
            except Exception as error:  # raised again in the thread that asked
                answer.set_exception(error)

        Thread(
            target=wait, daemon=True, name="kvcache-remote"
        ).start()  # one that hangs must not keep the program alive
        return answer.result(self.timeout)

    def _write(self, address: str, data: bytes) -> None:
        with self._lock:
            self._files.makedirs(self._folder, exist_ok=True)
            if self.max_bytes is not None:
                self._make_room(len(data), self._path(address), self.max_bytes)
            self._files.pipe_file(self._path(address), data)

    def _make_room(self, needed: int, replaced: str, max_bytes: int) -> None:
        listed = self._listing()
        files = {
            name: (entry["size"], _written(entry) or 0.0)
            for name, entry in listed.items()
            if _address(name) and name != replaced
        }
        pinned = {name for name in files if name.removesuffix(_SUFFIX) + _PIN in listed}
        for name in leaving(files, pinned, needed, max_bytes):
            self._files.rm_file(name)

    def _listing(self) -> dict[str, dict[str, Any]]:
        try:
            return {entry["name"]: entry for entry in self._files.ls(self._folder, detail=True, refresh=True)}
        except FileNotFoundError:
            return {}

    def _remove(self, address: str) -> None:
        for suffix in (_PIN, _SUFFIX):
            if self._files.exists(self._path(address, suffix)):
                self._files.rm_file(self._path(address, suffix))

    def _pin(self, address: str, pinned: bool) -> None:
        mark = self._path(address, _PIN)
        if pinned:
            self._files.makedirs(self._folder, exist_ok=True)
            self._files.pipe_file(mark, b"")
        elif self._files.exists(mark):
            self._files.rm_file(mark)

    def _used(self) -> int:
        return sum(entry["size"] for name, entry in self._listing().items() if _address(name))

    def _entries(self) -> list[StoreEntry]:
        listed = self._in_time(self._listing) or {}
        return [
            StoreEntry(address, entry["size"], _written(entry), name.removesuffix(_SUFFIX) + _PIN in listed)
            for name, entry in listed.items()
            if (address := _address(name)) is not None
        ]


def _address(name: str) -> str | None:
    """Of the snapshot in a file of this name; None for someone's own file, which is neither counted nor evicted."""
    stem = name.rpartition("/")[2].removesuffix(_SUFFIX)
    return stem if name.endswith(_SUFFIX) and is_address(stem) else None


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
