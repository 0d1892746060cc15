"""Where snapshots of prefixes live between requests, processes and machines."""

from kvcache.stores.base import BlobStore, Store, StoreEntry
from kvcache.stores.disk import DiskStore, default_folder
from kvcache.stores.memory import MemoryStore
from kvcache.stores.redis import RedisStore
from kvcache.stores.remote import RemoteStore
from kvcache.stores.tiered import TieredStore

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
