"""Where snapshots of prefixes live between requests, processes and machines."""

from kvcache.prefixes.stores._aside import Aside
from kvcache.prefixes.stores._base import BlobStore, Store, StoreEntry, store_secret
from kvcache.prefixes.stores._disk import DiskStore, default_folder
from kvcache.prefixes.stores._memory import MemoryStore
from kvcache.prefixes.stores._redis import RedisStore
from kvcache.prefixes.stores._remote import RemoteStore
from kvcache.prefixes.stores._tiered import TieredStore
from kvcache.prefixes.stores._upkeep import (
    Checked,
    Described,
    describe,
    described,
    find,
    open_store,
    prunable,
    shown_place,
    verify,
)

__all__ = [
    "Aside",
    "BlobStore",
    "Checked",
    "Described",
    "DiskStore",
    "MemoryStore",
    "RedisStore",
    "RemoteStore",
    "Store",
    "StoreEntry",
    "TieredStore",
    "default_folder",
    "describe",
    "described",
    "find",
    "open_store",
    "prunable",
    "shown_place",
    "store_secret",
    "verify",
]
