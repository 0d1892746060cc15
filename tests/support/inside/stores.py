"""Inside of stores and of what is built once: what lies there, spoilt; places that fail; who waits."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvcache import SpeakerCache
from kvcache.cache._archive import _checksum as checksum  # of files that a test makes, whose sum is right
from kvcache.prefixes.stores import BlobStore, DiskStore, RedisStore, RemoteStore, TieredStore
from kvcache.prefixes.stores._base import check_address  # of any text
from kvcache.prefixes.stores._index import Index  # of files that a test wrote
from kvcache.prefixes.stores._patience import Patience  # of any question
from kvcache.prefixes.stores._remote import _written as written  # of what file systems say of a time

__all__ = ["Index", "Patience", "check_address", "checksum", "written"]

BASE_CLOCK = "kvcache.prefixes.stores._base.time"
CACHE_CLOCK = "kvcache.prefixes._cache.time"
DISK_LISTED = "kvcache.prefixes.stores._disk.DiskStore._listed"
DISK_PEEK = "kvcache.prefixes.stores._disk.DiskStore._peek"
DISK_REMOVE = "kvcache.prefixes.stores._disk.DiskStore._remove"
DISK_WRITE = "kvcache.prefixes.stores._disk.DiskStore._write"
MEMORY_CLOCK = "kvcache.prefixes.stores._memory.time"

disk_listed, disk_peek, disk_remove = DiskStore._listed, DiskStore._peek, DiskStore._remove


def write(store: BlobStore, address: str, data: bytes) -> None:
    """Put any bytes at an address, as a process that is no friend would."""
    store._write(address, data)


def path_of(store: DiskStore | RemoteStore, address: str) -> Any:
    """Where what has this address lies."""
    return store._path(address)


def redactor_of(store: Any) -> Any:
    """What takes secrets out of messages; what it holds is a secret too."""
    return store._redact


# ---------------------------------------------------------------------- a server


def client_of(store: RedisStore) -> Any:
    """The connection, for what only another of the server's users would do."""
    return store._client


def books_of(store: RedisStore) -> Sequence[Any]:
    """The names of the last uses, the sizes, the pins, the ends and the sum."""
    return store._books


def key_of(store: RedisStore, address: str) -> Any:
    """The server's name for what has this address."""
    return store._key(address)


def prefix_of(store: RedisStore) -> str:
    """What all of the store's names begin with."""
    return store._prefix


# ---------------------------------------------------------------------- a location


def files_of(store: RemoteStore) -> Any:
    """The file system, of fsspec."""
    return store._files


def on_files(store: RemoteStore, files: Any) -> None:
    """Let a file system of the test's stand for the store's."""
    store._files = files


def folder_of(store: RemoteStore) -> str:
    return store._folder


def available(store: BlobStore) -> bool:
    """Whether it is asked, or was found to be down a moment ago."""
    return store._available()


def ask(store: RedisStore, question: Callable[[], Any]) -> Any:
    """As the store asks its location: within its time, and of what is available."""
    return store._do(question)


def ask_by(store: RedisStore, asking: Callable[..., Any]) -> None:
    """Let a function of the test's have the questions."""
    store._do = asking  # type: ignore[method-assign]


# ---------------------------------------------------------------------- who waits


def still_to_write(store: TieredStore) -> Mapping[Any, Any]:
    """What memory has given up, and the tiers below have not yet."""
    return store._pending


def building(cache: SpeakerCache) -> Any:
    """What is being built, by its key."""
    return cache._building


def waiting(cache: SpeakerCache) -> Any:
    """How many wait for what is being built, by its key."""
    return cache._waiting
