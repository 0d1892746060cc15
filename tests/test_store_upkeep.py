"""A store that is looked after: its entries, what is added and removed by address, what is not intact."""

import time
from dataclasses import replace
from datetime import datetime, timezone

import pytest
import safetensors.torch
import torch
from support.inside import stores as inside
from support.snapshots import BLOBS, KINDS, cold, exact, ids, voice
from support.stores import HOSTILE, settled, size, tell_apart

from kvcache import CorruptError, InputError, PrefixSnapshot
from kvcache.cache import beginning, beginning_length
from kvcache.errors import SignatureError
from kvcache.prefixes.stores import DiskStore

pytestmark = pytest.mark.one_release


@pytest.mark.parametrize("kind", KINDS)
def test_entries_are_what_is_there(kind, stores):
    store, keys = stores(kind), [voice(i, tokens=i + 1) for i in range(4)]
    assert store.entries() == []
    began = time.time() - 0.1  # a file system's clock may be behind by a tick
    store.pin(keys[1])
    for key in keys:
        store.put(cold(key))
    settled(store).delete(keys[2])
    held = {key.address: key for key in (keys[0], keys[1], keys[3])}
    for tier in store.tiers:
        entries = {entry.address: entry for entry in tier.entries()}
        assert entries.keys() == held.keys()
        for address, entry in entries.items():
            assert entry.nbytes == size(tier, held[address]) and entry.pinned == (held[address] == keys[1])
            assert entry.used is not None and began <= entry.used <= time.time() + 0.1
    assert sum(entry.nbytes for entry in store.entries()) == store.nbytes


@pytest.mark.parametrize("kind", BLOBS)
def test_looking_is_not_using(kind, stores, tmp_path):
    old, new, newest = map(voice, range(3))
    store = stores(kind, max_bytes=2 * len(cold(old).to_bytes()))
    for i, key in enumerate((old, new)):
        store.put(cold(key))
        for folder in tmp_path.glob("disk-a"):
            tell_apart(folder, i)
    before = store.entries()
    whole = store.peek(old.address)
    assert exact(PrefixSnapshot.from_bytes(whole), old) and store.read_verified(old.address) == whole
    assert store.peek(old.address, 40) == whole[:40]
    assert store.peek(newest.address) is store.peek(newest.address, 40) is store.read_verified(newest.address) is None
    assert store.entries() == before and (store.hits, store.misses) == (0, 0)
    store.put(cold(newest))
    assert [store.has(key) for key in (old, new, newest)] == [False, True, True]


@pytest.mark.parametrize("kind", BLOBS)
def test_what_is_added_held_and_removed_by_address(kind, stores):
    store, other, key = stores(kind), stores(kind, where="b"), voice(0)
    other.put(cold(key))
    assert store.add(other.read_verified(key.address)) == key.address and exact(store.get(key), key)
    store.pin_address(key.address)
    assert [entry.pinned for entry in store.entries()] == [True]
    store.pin_address(key.address, False)
    assert [entry.pinned for entry in store.entries()] == [False]
    store.pin_address(key.address)
    store.remove(key.address)
    store.remove(key.address)  # what is not there is no error
    store.put(cold(key))
    assert [entry.pinned for entry in store.entries()] == [False]  # its pin went with it
    for name in HOSTILE:
        for act in (store.peek, store.read_verified, store.pin_address, store.remove):
            with pytest.raises(InputError, match="is no address"):
                act(name)


@pytest.mark.parametrize("kind", BLOBS)
def test_what_is_not_intact_is_told_from_what_others_signed(kind, stores):
    unsigned, key = cold(voice(0)).to_bytes(), voice(0)
    signed = cold(key).to_bytes(b"theirs")
    plain, ours = stores(kind), stores(kind, where="b", secret=b"ours")
    torn = unsigned[:-1]
    for store, data, foreign in (
        (plain, torn, False), (plain, signed, True), (ours, signed, True), (ours, unsigned, True), (ours, torn, True),
        (ours, cold(key).to_bytes(b"ours")[:-1], False), (plain, cold(voice(1)).to_bytes(), False),
    ):  # fmt: skip
        inside.write(store, key.address, data)
        with pytest.raises(CorruptError) as caught:
            store.read_verified(key.address)
        assert isinstance(caught.value, SignatureError) == foreign
    for store, data in ((plain, torn), (plain, signed), (ours, unsigned), (ours, signed)):
        store.remove(key.address)
        with pytest.raises(CorruptError):
            store.add(data)
        assert store.entries() == []
    assert "theirs" not in str(caught.value) and b"theirs" not in signed


@pytest.mark.parametrize("kind", ["disk", "remote-file", "remote-memory"])
def test_other_files_in_the_folder_are_neither_counted_nor_evicted(kind, stores, tmp_path):
    store = stores(kind, max_bytes=3 * len(cold(voice(0)).to_bytes()) // 2)
    store.put(cold(voice(0)))
    if kind == "remote-memory":
        inside.files_of(store).pipe_file(f"{inside.folder_of(store)}/sarah.voice.safetensors", bytes(10**6))
    else:
        (tmp_path / f"{kind.removesuffix('-file')}-a" / "sarah.voice.safetensors").write_bytes(bytes(10**6))
    assert store.nbytes == len(cold(voice(0)).to_bytes())
    store.put(cold(voice(1)))  # drives out the first, and nothing else
    assert [entry.address for entry in store.entries()] == [voice(1).address]
    if kind == "remote-memory":
        assert inside.files_of(store).exists(f"{inside.folder_of(store)}/sarah.voice.safetensors")
    else:
        assert [path.stat().st_size for path in tmp_path.rglob("sarah*")] == [10**6]


def test_the_beginning_of_a_file_says_what_it_is():
    data = cold(voice(0, model="bf16")).to_bytes(b"secret")
    length = beginning_length(data[:8])
    found = beginning(data[:length])
    assert found.nbytes == len(data) and found.signed and found.header == cold(voice(0, model="bf16")).header()
    expected = {name: list(tensor.shape) for name, tensor in cold(voice(0, model="bf16")).tensors().items()}
    assert {name: list(shape) for name, (_, shape) in found.tensors.items()} == expected
    assert found.tensors["keys.0"][0] == "BF16" and found.tensors["content"][0] == "F32"
    for short in (b"", data[:7], data[: length - 1], b"x" * 100, safetensors.torch.save({"a": torch.zeros(1)})):
        with pytest.raises(CorruptError):
            beginning(short)


@pytest.mark.parametrize(
    ("entry", "seconds"),
    [
        ({"mtime": 1.5e9}, 1.5e9),
        ({"LastModified": datetime(2017, 7, 14, 2, 40, tzinfo=timezone.utc)}, 1.5e9),
        ({"updated": "2017-07-14T02:40:00.000Z"}, 1.5e9),
        ({"updated": "yesterday"}, None),
        ({"size": 3}, None),
    ],
)
def test_times_of_file_systems(entry, seconds):
    assert inside.written(entry) == seconds


def test_what_continues_another_prefix_leaves_like_any(tmp_path):
    # Its row in the index knows the parent, which a look at the file does not tell.
    parent, other = ids(1, 2), ids(7, 8, 9)
    child = replace(cold(ids(1, 2, 3)), parent=parent.address)
    size = len(child.to_bytes())
    store = DiskStore(tmp_path, max_bytes=size + size // 2)
    store.put(child)
    store.put(cold(other))
    assert [entry.address for entry in store.entries()] == [other.address]
