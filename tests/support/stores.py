"""What the tests of stores share."""

import os
from pathlib import Path
from typing import TypeVar

import hypothesis
import torch
from hypothesis import HealthCheck

from kvcache import PrefixKey
from kvcache.prefixes.stores import MemoryStore, Store, TieredStore
from support import searching
from support.snapshots import cold, ids, voice

StoreT = TypeVar("StoreT", bound=Store)


def search(examples: int) -> hypothesis.settings:
    # Each example opens a place of its own in the test's folder.
    return searching.search(examples, suppress_health_check=[HealthCheck.function_scoped_fixture])


def settled(store: StoreT) -> StoreT:
    """The same store, with nothing left to write."""
    if isinstance(store, TieredStore):
        store.flush()
    return store


def size(store: Store, key: PrefixKey) -> int:
    snapshot = cold(key)
    return snapshot.nbytes if isinstance(store, MemoryStore) else len(snapshot.to_bytes())


SORTS = [
    voice(1),
    voice(1, dtype=torch.bfloat16),
    voice(1, dtype=torch.float16, model="bf16"),
    voice(1, dtype=torch.long),
    voice(1, dtype=torch.long, model="bf16"),
    voice(1, tokens=1),
    ids(-(2**63), 2**63 - 1),
    PrefixKey("m", torch.tensor([[0.0, float("nan")], [-0.0, float("inf")]])),
    ids(1, model="0" * 64),  # what stands where the checksum goes, before it is known
]


def tell_apart(folder: Path, tick: int) -> None:
    """Give the file that was just used a time of its own: a file system's clock may tick 100 times a second only."""
    for path in folder.glob("*.safetensors"):
        if path.stat().st_mtime > 2e8:
            os.utime(path, (1e8 + tick, 1e8 + tick))


VOICES = [voice(i, tokens) for i, tokens in enumerate((4, 5, 6, 7, 20))]


HOSTILE = [
    "../../x",
    "a/b",
    "/etc/x",
    "\0",
    "*",
    "?",
    "[a]",
    "a\nb",
    "a\r\nDEL b",
    " ",
    "~",
    "C:\\x",
    "{a}",
    "ü",
    "%2e%2e",
]
