"""Where snapshots of prefixes live between requests, processes and machines."""

from kvcache.prefixes.stores._base import BlobStore, Store, StoreEntry
from kvcache.prefixes.stores._disk import DiskStore, default_folder
from kvcache.prefixes.stores._memory import MemoryStore
from kvcache.prefixes.stores._redis import RedisStore
from kvcache.prefixes.stores._remote import RemoteStore
from kvcache.prefixes.stores._tiered import TieredStore

__all__ = [
    "BlobStore",
    "DiskStore",
    "MemoryStore",
    "RedisStore",
    "RemoteStore",
    "Store",
    "StoreEntry",
    "TieredStore",
    "default_folder",
]
