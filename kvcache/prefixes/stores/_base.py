"""What a store of prefixes is, and what all stores of bytes share."""

import errno
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from threading import Lock
from types import TracebackType
from typing import TypeVar

from kvcache.errors import CorruptError, InputError, KVCacheError, StoreError
from kvcache.events import Event, emit
from kvcache.io import LARGEST, Redactor, parse_bytes, shown_value
from kvcache.prefixes._snapshot import PrefixKey, PrefixSnapshot, is_address

log = logging.getLogger("kvcache.stores")

_Answer = TypeVar("_Answer")
STORE_KEY = "KVCACHE_STORE_KEY"  # the environment's secret
LONGEST_WAIT = 86400.0  # seconds, a day: to wait for an answer
LONGEST_LIFE = 1e9  # seconds, 31 years: to keep a snapshot
_ITS_OWN = (errno.EACCES, errno.EPERM, errno.EIO)  # errors of one file, while others may be sound


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
        self._counting = Lock()

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
        with self._counting:
            if found is not None and len(found) == len(key):
                self.hits += 1
            else:
                self.misses += 1
        return found


class BlobStore(Store):
    """A store of bytes under addresses of 64 hex digits; a subclass says how to read, write and remove them.

    What is read is untrusted: its checksum, its version, its content and its shape are compared with what was asked for. A
    failure of what lies below is logged and taken for a miss; after one, the store is left alone for `retry_after` seconds,
    so that a server that is down does not cost every request its time-out. What is stored being corrupt, what is put too
    large, or what a server does not allow, is no such failure.

    `entries`, `peek`, `read_verified`, `add`, `remove` and `pin_address` are for who looks after the store: by address, without a rest after a
    failure, and a failure is raised.

    Args:
        max_bytes: never hold more, such as ``"4GiB"``; the least recently used leave first. None sets no limit.
        secret: sign what is written, and refuse what was not signed with it. For a store that others can write to. By default
            what the environment variable ``KVCACHE_STORE_KEY`` holds, if it is set.
        redactor: knows what of this store's settings must not be said.

    Raises:
        InputError: for a secret that is empty, or is none.
    """

    retry_after = 0.0

    def __init__(
        self, max_bytes: int | str | None, secret: bytes | str | None, redactor: Redactor | None = None
    ) -> None:
        super().__init__()
        self.max_bytes = None if max_bytes is None else parse_bytes(max_bytes)
        self._secret = store_secret(secret)
        self._redact = redactor or Redactor()
        self._quiet_until = 0.0

    @abstractmethod
    def _has(self, address: str) -> bool: ...

    @abstractmethod
    def _read(self, address: str, most: int) -> bytes | None:
        """All of it. `CorruptError` for more than `most` bytes, before they are read."""

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

    def _touch(self, address: str) -> None:
        """Note that this was used just now. Its failing costs nothing but the order in which they leave."""

    def _is_down(self, error: Exception) -> bool:
        """Whether this says that nobody answers, and not only that this one thing cannot be done."""
        return not isinstance(error, ValueError)

    def get(self, key: PrefixKey) -> PrefixSnapshot | None:
        return self._counted(key, self._found(key))

    def _found(self, key: PrefixKey) -> PrefixSnapshot | None:
        try:
            most = min(self._largest, key.most_bytes)
            data = self._read(key.address, most) if self._available() else None
        except CorruptError as error:
            self._refuse(key, error)
            return None
        except Exception as error:  # whatever lies below, down to the errors of a third party's driver
            self._failed("read", error)
            return None
        if data is None:
            return None
        try:
            found = PrefixSnapshot.from_bytes(data, self._secret)
            found.check(key)
            if found.key != key:
                raise CorruptError(f"it is {found.key!r}")
        except Exception as error:  # what a stranger may have written there has no end
            self._refuse(key, error)
            return None
        try:
            self._touch(key.address)
        except Exception as error:
            self._failed("note the use", error)
        return found

    def _refuse(self, key: PrefixKey, error: Exception) -> None:
        with self._counting:
            self.refused += 1
        why = self._redact.text(str(error))
        log.warning("%s: what is stored for %r is not that (%s); it will not be used", self.name, key, why)
        emit(Event("refused", repr(key), reason=f"{self.name}: {why}"))

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
            snapshot.check_finite()
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
            self._awake("remove", key, lambda: self._remove(key.address))
        except Exception as error:
            self._failed("remove", error)

    def pin(self, key: PrefixKey, pinned: bool = True) -> None:
        try:
            self._awake("pin", key, lambda: self._pin(key.address, pinned))
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
        return self._asked("list what is there", self._entries)

    def peek(self, address: str, most: int | None = None) -> bytes | None:
        """The file at an address, or its first bytes, as it is there: nothing is checked, and it does not count as used.

        Args:
            most: so many first bytes; None for all.

        Returns:
            None if there is none.

        Raises:
            CorruptError: if what is there is no file, or cannot be read while others may be.
            StoreError: if the store is down.
        """

        def peek() -> bytes | None:
            try:
                return self._peek(check_address(address), most)
            except (OSError, MemoryError) as error:
                if (
                    isinstance(error, OSError)
                    and error.errno not in _ITS_OWN
                    and not isinstance(error, PermissionError)
                ):
                    raise
                why = self._redact.error(error)
            raise CorruptError(f"it cannot be read ({why}); see to its rights and the machine's memory, or remove it")

        return self._asked("read", peek)

    def add(self, data: bytes) -> str:
        """Keep a file that `put` wrote in a store with the same secret, and return its address.

        Raises:
            CorruptError: if it is not intact, or not signed with this store's secret.
            StoreError: if it does not fit, or the store is down.
        """
        address = PrefixSnapshot.from_bytes(data, self._secret).key.address
        self._asked("write", lambda: self._write(address, data))
        return address

    def read_verified(self, address: str) -> bytes | None:
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
        self._asked("remove", lambda: self._remove(check_address(address)))

    def pin_address(self, address: str, pinned: bool = True) -> None:
        """`pin` by address.

        Raises:
            StoreError: if the store is down, or does not allow it.
        """
        self._asked("pin", lambda: self._pin(check_address(address), pinned))

    def _asked(self, what: str, ask: Callable[[], _Answer]) -> _Answer:
        """Whatever goes wrong below is said in one line, without the foreign error, which may tell a password."""
        try:
            return ask()
        except KVCacheError:
            raise
        except Exception as error:
            why = self._redact.error(error)
        raise StoreError(f"{self.name}: could not {what} ({why}); check that it is up and may be used")

    # ------------------------------------------------------------------ inside

    @property
    def _largest(self) -> int:
        """Bytes of what may be a snapshot of this store's."""
        return LARGEST if self.max_bytes is None else self.max_bytes

    def _available(self) -> bool:
        return time.monotonic() >= self._quiet_until

    def _awake(self, what: str, key: PrefixKey, act: Callable[[], None]) -> None:
        if self._available():
            act()
        else:
            log.warning("%s: did not %s %r: it is left alone since it failed", self.name, what, key)

    def _failed(self, what: str, error: Exception) -> None:
        down = self.retry_after and self._is_down(error)
        if down:
            self._quiet_until = time.monotonic() + self.retry_after
        wait = f"; left alone for {self.retry_after:g} s" if down else ""
        log.warning("%s: could not %s (%s)%s", self.name, what, self._redact.error(error), wait)


def store_secret(given: bytes | str | None) -> bytes | None:
    """The secret that a store's files are signed with: the given one, else that of ``KVCACHE_STORE_KEY``, else None.

    Raises:
        InputError: if it is empty: whoever guesses that signs too; if it is neither text nor bytes.
    """
    secret = os.environ.get(STORE_KEY) if given is None else given
    if secret is not None and not isinstance(secret, (str, bytes)):  # which is not said: it may be one all the same
        raise InputError(f"secret is of {type(secret).__name__}, and must be text or bytes; give a long random one")
    if secret is not None and len(secret) == 0:
        where = f"${STORE_KEY}" if given is None else "secret"
        raise InputError(f"{where} is empty, which would sign nothing; give a long random one, or leave it out")
    return secret.encode(errors="surrogateescape") if isinstance(secret, str) else secret


def check_seconds(name: str, given: object, most: float, *, or_none: bool = False) -> None:
    """Raise `InputError` for what is no time to wait for: a number above 0, up to `most`."""
    if given is None and or_none:
        return
    number = isinstance(given, (int, float)) and not isinstance(given, bool)
    if not number or not 0 < given <= most:  # type: ignore[operator]
        none = ", or None for no end" if or_none else ""
        raise InputError(
            f"{name}={shown_value(given)} must be a number of seconds above 0, at most {most:,.0f}{none}; give for example 60"
        )


def check_url(given: object) -> None:
    """Raise `InputError` for a URL that is no text."""
    if not isinstance(given, str):
        raise InputError(
            f"url={shown_value(given)} must be text; give for example 'redis://host:6379/0' or 's3://bucket/voices'"
        )


def check_address(address: str) -> str:
    """Raise `InputError` unless this is an address; so no name can lead out of a folder or namespace."""
    if not is_address(address):
        raise InputError(f"{address!r} is no address of a prefix: 64 hex digits")
    return address
