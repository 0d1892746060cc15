"""Stores, each tried by writing a made-up snapshot and reading it back."""

import os
import shutil
import tempfile
import time
from pathlib import Path

import torch

from kvcache.errors import InputError, KVCacheError
from kvcache.prefixes import PrefixKey, PrefixSnapshot
from kvcache.prefixes.stores import BlobStore, DiskStore, default_folder, store_secret
from kvcache.tools.doctor._finding import ELSEWHERE, Finding


def default_store() -> Finding:
    """The folder of the default store, tried: by a round trip if it is there, else by making a folder where it would be."""
    try:
        folder = default_folder()
    except InputError as error:
        return Finding("stores", "default", "broken", str(error), ELSEWHERE)
    if str(folder).startswith("~"):
        said = f"KVCACHE_HOME is {folder}, and no shell has put your home there: it is a folder of that name in {Path.cwd()}"
        return Finding("stores", "default", "broken", said, f"set KVCACHE_HOME={folder.expanduser()}")
    try:
        if folder.is_dir():
            tried = round_trip(DiskStore(folder, None), str(folder), None, "default", ELSEWHERE)
            return tried if tried.state == "broken" else _with_room(tried.said, shutil.disk_usage(folder).free)
        if folder.exists():
            return Finding("stores", "default", "broken", f"{folder} is a file, and no folder", ELSEWHERE)
        parent = next(parent for parent in folder.absolute().parents if parent.exists())
        os.rmdir(tempfile.mkdtemp(prefix="kvcache-doctor-", dir=parent))
    except OSError as error:
        said = f"{folder} cannot be made or read: {error.strerror or error}"
        return Finding("stores", "default", "broken", said, ELSEWHERE)
    return _with_room(f"{folder} is made when it is first used", shutil.disk_usage(parent).free)


def round_trip(
    store: BlobStore,
    place: str,
    secret: bytes | None,
    name: str | None = None,
    advice: str = "check that it is up and may be written to",
) -> Finding:
    """Put a snapshot of one made-up token, read it back, remove it."""
    states = torch.zeros(1, 1, 1, 8)
    key = PrefixKey("kvcache doctor", torch.tensor([time.time_ns()]))
    data = PrefixSnapshot(key, ((states, states.clone()),)).to_bytes(store_secret(secret))
    name, began = name or store.name, time.perf_counter()
    try:
        held = len(store.entries())
        address = store.add(data)
        try:
            back = store.peek(address)
        finally:
            store.remove(address)
    except (KVCacheError, OSError) as error:
        return Finding("stores", name, "broken", f"{place}: {error}", advice)
    if back != data:
        return Finding("stores", name, "broken", f"{place}: what was written did not come back as it was", advice)
    took = time.perf_counter() - began
    said = f"{place}: {held} there; listed, written, read back and removed in {1000 * took:.1f} ms"
    return Finding("stores", name, "ok", said)


def _with_room(said: str, free: int) -> Finding:
    said, budget = f"{said}; {free / 2**30:.1f} GiB free", DiskStore().max_bytes or 0
    if free < budget:
        advice = "make room, set KVCACHE_HOME to another disk, or give DiskStore a smaller budget"
        return Finding("stores", "default", "note", f"{said}, less than its budget of {budget / 2**30:.0f}", advice)
    return Finding("stores", "default", "ok", said)
