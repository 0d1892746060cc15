"""What a store of prefixes is, and what all stores of bytes share."""

import logging
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from kvcache.errors import CorruptError, InputError, KVCacheError, StoreError
from kvcache.events import Event, emit
from kvcache.policies import parse_bytes
from kvcache.prefix import PrefixKey, PrefixSnapshot

log = logging.getLogger("kvcache.stores")

_ADDRESS = re.compile(r"[0-9a-f]{64}")
_File = TypeVar("_File")


@dataclass(frozen=True)
class StoreEntry:
    """What a store tells of a snapshot without reading it.

    Attributes:
        address: of its key, 64 hex digits.
        nbytes: that it takes there.
        used: when it was last read or written, in seconds since 1970; when it was written, where a store knows no more
            (memory, remote); None if not even that.
        pinned: whether it stays until it is deleted.
    """

    address: str
    nbytes: int
    used: float | None
    pinned: bool


class Store(AbstractContextManager["Store"], ABC):
    """Where snapshots live between requests. Safe to use from several threads.

    A store may lose what it was given, at any time. It never hands out a snapshot of another content than was asked for,
    and never raises because what it stands on is down, full or broken: that costs a computation, and a line in the log.

    Attributes:
        name: of the tier, in statistics.
        hits, misses: answers of `get`, with and without a snapshot of the whole key.
        refused: what was found and not used, because it was corrupt or of another content.
    """

    name: str = "store"

    def __init__(self) -> None:
        self.hits = 0
        self.misses = 0
        self.refused = 0

    def __repr__(self) -> str:  # no address: it may hold a password
        return f"{type(self).__name__}({self.name}: {self.hits} hits, {self.misses} misses)"

    @abstractmethod
    def get(self, key: PrefixKey) -> PrefixSnapshot | None:
        """The longest beginning of `key` that this store can tell, or None."""

    @abstractmethod
    def has(self, key: PrefixKey) -> bool:
        """Whether something is stored for exactly this key, without reading it."""

    @abstractmethod
    def put(self, snapshot: PrefixSnapshot) -> None:
        """Keep a snapshot, as long as there is room."""

    @abstractmethod
    def delete(self, key: PrefixKey) -> None:
        """Forget a snapshot; one that is pinned too."""

    @abstractmethod
    def pin(self, key: PrefixKey, pinned: bool = True) -> None:
        """Never evict this snapshot, nor let it expire; or again as any other."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held; 0 if that cannot be told now."""

    @abstractmethod
    def entries(self) -> list[StoreEntry]:
        """What is in it, in no order; of several tiers, what each of them holds.

        Raises:
            StoreError: if that cannot be told now: who asks this looks after a store, and is told the reason.
        """

    @property
    def tiers(self) -> "tuple[Store, ...]":
        """The stores that this one is made of."""
        return (self,)

    def close(self) -> None:
        """Wait for what is still being written, and let go of connections."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _counted(self, key: PrefixKey, found: PrefixSnapshot | None) -> PrefixSnapshot | None:
        if found is not None and len(found) == len(key):
            self.hits += 1
        else:
            self.misses += 1
        return found


class BlobStore(Store):
    """A store of bytes under addresses of 64 hex digits; a subclass says how to read, write and remove them.

    What is read is untrusted: its checksum, its version and its content are compared with what was asked for. A failure
    of what lies below is logged and taken for a miss; after one, the store is left alone for `retry_after` seconds, so
    that a server that is down does not cost every request its time-out. What is stored being corrupt, or what is put too
    large, is no such failure.

    `entries`, `peek`, `intact`, `add`, `remove` and `hold` are for who looks after the store: by address, without a rest after a
    failure, and a failure is raised.

    Args:
        max_bytes: never hold more, such as ``"4GiB"``; the least recently used leave first. None sets no limit.
        secret: sign what is written, and refuse what was not signed with it. For a store that others can write to.
    """

    retry_after = 0.0

    def __init__(self, max_bytes: int | str | None, secret: bytes | str | None) -> None:
        super().__init__()
        self.max_bytes = None if max_bytes is None else parse_bytes(max_bytes)
        self._secret = secret.encode() if isinstance(secret, str) else secret
        self._quiet_until = 0.0

    @abstractmethod
    def _has(self, address: str) -> bool: ...

    @abstractmethod
    def _read(self, address: str) -> bytes | None: ...

    @abstractmethod
    def _write(self, address: str, data: bytes) -> None: ...

    @abstractmethod
    def _remove(self, address: str) -> None: ...

    @abstractmethod
    def _pin(self, address: str, pinned: bool) -> None: ...

    @abstractmethod
    def _used(self) -> int: ...

    @abstractmethod
    def _peek(self, address: str, most: int | None) -> bytes | None: ...

    @abstractmethod
    def _entries(self) -> list[StoreEntry]: ...

    def get(self, key: PrefixKey) -> PrefixSnapshot | None:
        return self._counted(key, self._found(key))

    def _found(self, key: PrefixKey) -> PrefixSnapshot | None:
        try:
            data = self._read(key.address) if self._available() else None
        except Exception as error:  # whatever lies below, down to the errors of a third party's driver
            self._failed("read", error)
            return None
        if data is None:
            return None
        try:
            found = PrefixSnapshot.from_bytes(data, self._secret)
            if found.key != key:
                raise CorruptError(f"it is {found.key!r}")
        except Exception as error:  # what a stranger may have written there has no end
            self.refused += 1
            log.warning("%s: what is stored for %r is not that (%s); it will not be used", self.name, key, error)
            emit(Event("refused", repr(key), reason=f"{self.name}: {error}"))
            return None
        return found

    def has(self, key: PrefixKey) -> bool:
        try:
            return self._available() and self._has(key.address)
        except Exception as error:
            self._failed("look", error)
            return False

    def put(self, snapshot: PrefixSnapshot) -> None:
        if not self._available():
            return
        try:
            data = snapshot.to_bytes(self._secret)
            if self.max_bytes is not None and len(data) > self.max_bytes:
                log.warning(
                    "%s: %r takes %d bytes, the store's limit is %d; it is not kept",
                    self.name, snapshot, len(data), self.max_bytes,
                )  # fmt: skip
                return
            self._write(snapshot.key.address, data)
        except Exception as error:
            self._failed("write", error)

    def delete(self, key: PrefixKey) -> None:
        try:
            self._remove(key.address)
        except Exception as error:
            self._failed("remove", error)

    def pin(self, key: PrefixKey, pinned: bool = True) -> None:
        try:
            self._pin(key.address, pinned)
        except Exception as error:
            self._failed("pin", error)

    @property
    def nbytes(self) -> int:
        try:
            return self._used() if self._available() else 0
        except Exception as error:
            self._failed("measure", error)
            return 0

    # ------------------------------------------------------------------ looked after

    def entries(self) -> list[StoreEntry]:
        with self._asked("list what is there"):
            return self._entries()

    def peek(self, address: str, most: int | None = None) -> bytes | None:
        """The file at an address, or its first bytes, as it is there: nothing is checked, and it does not count as used.

        Args:
            most: so many first bytes; None for all.

        Returns:
            None if there is none.

        Raises:
            StoreError: if the store is down.
        """
        with self._asked("read"):
            return self._peek(check_address(address), most)

    def add(self, data: bytes) -> str:
        """Keep a file that `put` wrote in a store with the same secret, and return its address.

        Raises:
            CorruptError: if it is not intact, or not signed with this store's secret.
            StoreError: if it does not fit, or the store is down.
        """
        address = PrefixSnapshot.from_bytes(data, self._secret).key.address
        with self._asked("write"):
            self._write(address, data)
        return address

    def intact(self, address: str) -> bytes | None:
        """`peek` at the whole file, after all that `get` checks has been checked.

        Raises:
            CorruptError: if it is not intact, is the prefix of another address, or is signed otherwise (`SignatureError`).
            StoreError: if the store is down.
        """
        if (data := self.peek(address)) is not None:
            found = PrefixSnapshot.from_bytes(data, self._secret).key
            if found.address != address:
                raise CorruptError(f"it is {found!r}, which belongs elsewhere; it will not be used")
        return data

    def remove(self, address: str) -> None:
        """Forget what is at an address; one that is pinned too.

        Raises:
            StoreError: if the store is down, or does not allow it.
        """
        with self._asked("remove"):
            self._remove(check_address(address))

    def hold(self, address: str, pinned: bool = True) -> None:
        """`pin` by address.

        Raises:
            StoreError: if the store is down, or does not allow it.
        """
        with self._asked("pin"):
            self._pin(check_address(address), pinned)

    @contextmanager
    def _asked(self, what: str) -> Iterator[None]:
        """Whatever goes wrong below is said in one line."""
        try:
            yield
        except KVCacheError:
            raise
        except Exception as error:
            said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise StoreError(f"{self.name}: could not {what} ({said}); check that it is up and may be used") from error

    # ------------------------------------------------------------------ inside

    def _available(self) -> bool:
        return time.monotonic() >= self._quiet_until

    def _failed(self, what: str, error: Exception) -> None:
        down = self.retry_after and not isinstance(error, ValueError)  # which is about a snapshot, not about the store
        if down:
            self._quiet_until = time.monotonic() + self.retry_after
        wait = f"; left alone for {self.retry_after:g} s" if down else ""
        log.warning("%s: could not %s (%s: %s)%s", self.name, what, type(error).__name__, error, wait)


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


def is_address(name: str) -> bool:
    """Whether this is 64 hex digits."""
    return _ADDRESS.fullmatch(name) is not None


def check_address(address: str) -> str:
    """Raise `InputError` unless this is an address; so no name can lead out of a folder or namespace."""
    if not is_address(address):
        raise InputError(f"{address!r} is no address of a prefix: 64 hex digits")
    return address
