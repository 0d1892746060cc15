"""What somebody hostile, or a mishap, leaves in a store's folder: it costs a computation, and nothing else."""

import json
import os
import socket
import sqlite3
import stat
import tempfile
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from fsspec.implementations.memory import MemoryFileSystem
from support.inside import stores as inside
from support.snapshots import PROCESSES, cold, exact, voice

from kvcache import CorruptError, InputError, PrefixSnapshot, SpeakerCache
from kvcache.cache import pack
from kvcache.decoding import Setting, TuningProfile
from kvcache.errors import StoreError
from kvcache.events import subscribe
from kvcache.io import check_given, make_private_folder, set_aside, write_given, write_private
from kvcache.memory import resident_bytes
from kvcache.models import RetrievalHeadProfile
from kvcache.prefixes import Layout
from kvcache.prefixes.stores import (
    DiskStore,
    MemoryStore,
    RedisStore,
    RemoteStore,
    TieredStore,
    describe,
    prunable,
    verify,
)

pytestmark = pytest.mark.one_release

LAYOUT = Layout(((2, 8, 8), (2, 8, 8)), torch.float32)
BUDGET = 2**20
posix = pytest.mark.skipif(os.name != "posix", reason="FIFOs, modes and umasks are POSIX's")


def known(seed):
    """A key that says what the model caches, as those of models do."""
    return replace(voice(seed), layout=LAYOUT)


KEY, OTHER = known(0), known(1)


def forged(tensors=(), drop=(), **header):
    """A file with a checksum that is right, which says something else."""
    snapshot = cold(KEY)
    parts = {name: t for name, t in (snapshot.tensors() | dict(tensors)).items() if name not in drop}
    return pack(parts, snapshot.header() | header)


def states(fill=0.5, heads=2, tokens=6, dim=8, dtype=torch.float32):
    return {"keys.0": torch.full((heads, tokens, dim), fill, dtype=dtype)}


def reheaded(change):
    """A genuine file whose safetensors header was changed, with a checksum that fits again."""
    data = cold(KEY).to_bytes()
    length = int.from_bytes(data[:8], "little")
    raw = change(json.loads(data[8 : 8 + length]))
    body = data[8 + length :]
    raw = raw.encode() if isinstance(raw, str) else json.dumps(raw, separators=(",", ":")).encode()
    blank = b"0" * 64
    checksum = json.loads(data[8 : 8 + length])["__metadata__"]["checksum"].encode()
    whole = len(raw).to_bytes(8, "little") + raw.replace(checksum, blank) + body
    at = whole.find(blank)
    return whole if at < 0 else whole[:at] + inside.checksum(whole, at, None).encode() + whole[at + 64 :]


def with_tensor(name, **changes):
    return reheaded(lambda header: header | {name: header[name] | changes})


def doubled(header):
    text = json.dumps(header, separators=(",", ":"))
    return text[:-1] + ',"keys.0":' + json.dumps(header["values.1"]) + "}"


GOOD = cold(KEY).to_bytes()
CONTENTS = {
    "empty": b"",
    "one byte": b"\0",
    "zeros": bytes(5000),
    "text": b"<html>502 Bad Gateway</html>",
    "a header of 2^63 bytes": (2**63).to_bytes(8, "little") + bytes(100),
    "a header longer than the file": (4000).to_bytes(8, "little") + b"{}",
    "a header of nothing": (0).to_bytes(8, "little") + b"{}",
    "cut by one": GOOD[:-1],
    "cut in its header": GOOD[:100],
    "longer by one": GOOD + b"\0",
    "twice": GOOD * 2,
    "one bit": GOOD[:-5] + bytes([GOOD[-5] ^ 1]) + GOOD[-4:],
    "NaN": forged(states(float("nan"))),
    "infinity": forged(states(float("inf"))),
    "minus infinity": forged(states(float("-inf"))),
    "one NaN amid good ones": forged({"values.1": cold(KEY).layers[1][1][0].index_fill(2, torch.tensor([3]), float("nan"))}),
    "three heads": forged(states(heads=3)),
    "no heads": forged(states(heads=0)),
    "keys of 16": forged(states(dim=16)),
    "keys of nothing": forged(states(dim=0)),
    "five tokens": forged(states(tokens=5)),
    "half precision": forged(states(dtype=torch.float16)),
    "whole numbers": forged(states(1, dtype=torch.int32)),
    "keys of two dimensions": forged({"keys.0": torch.zeros(6, 8)}),
    "one layer": forged(drop=("keys.1", "values.1"), layers=1),
    "three layers": forged({"keys.2": torch.zeros(2, 6, 8), "values.2": torch.zeros(2, 6, 8)}, layers=3),
    "says one layer, has two": forged(layers=1),
    "no layers": forged(layers=0),
    "less than no layers": forged(layers=-1),
    "10^12 layers": forged(layers=10**12),
    "layers in words": forged(layers="2"),
    "layers that are true": forged(layers=True),
    "endless layers": forged(layers=float("inf")),
    "a model that UTF-8 cannot write": forged(model="\ud800"),
    "float8": forged(states(dtype=torch.float8_e4m3fn)),
    "float8 that is not finite": forged(states(float("nan"), dtype=torch.float8_e5m2)),
    "another tensor": forged({"extra": torch.zeros(3)}),
    "no content": forged(drop=("content",)),
    "another content": forged({"content": voice(5).content}),
    "NaN seconds": forged(build_seconds=float("nan")),
    "endless seconds": forged(build_seconds=float("inf")),
    "seconds before": forged(build_seconds=-1.0),
    "10^300 seconds": forged(build_seconds=1e300),
    "seconds in words": forged(build_seconds="1"),
    "seconds that are true": forged(build_seconds=True),
    "no seconds": forged(build_seconds=None),
    "another model": forged(model="n"),
    "a model that is a list": forged(model=["m"]),
    "another format": forged(format="x" * 10**5),
    "another version": forged(version=2),
    "a parent that is a path": forged(parent="../../etc/passwd"),
    "a parent that is a number": forged(parent=3),
    "a signature of somebody": cold(KEY).to_bytes(b"somebody"),
    "offsets beyond the file": with_tensor("values.1", data_offsets=[0, 10**9]),
    "offsets backwards": with_tensor("values.1", data_offsets=[100, 0]),
    "offsets below zero": with_tensor("values.1", data_offsets=[-8, 0]),
    "a shape of 2^62": with_tensor("keys.0", shape=[2**62, 6, 8]),
    "a shape below zero": with_tensor("keys.0", shape=[-2, 6, 8]),
    "a dtype of nobody": with_tensor("keys.0", dtype="X7"),
    "another tensor's bytes": with_tensor("keys.0", data_offsets=[0, 384]),
    "a name twice": reheaded(doubled),
    "metadata that is a list": reheaded(lambda header: header | {"__metadata__": []}),
    "a header that is a list": reheaded(lambda header: "[]"),
    "a header 10^5 deep": reheaded(lambda header: "[" * 10**5),
    "a header that is no UTF-8": (9).to_bytes(8, "little") + b'{"a\xff":1}x',
}  # fmt: skip


def outside(path):
    """A genuine file elsewhere."""
    there = path.parent.parent / "elsewhere.safetensors"
    there.write_bytes(GOOD)
    return there


def socket_at(path):
    with tempfile.TemporaryDirectory() as short, closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(f"{short}/s")  # the name of a socket has at most 107 characters, until it is moved
        os.rename(f"{short}/s", path)


def sparse(path, beginning, size):
    path.write_bytes(beginning)
    os.truncate(path, size)


def full_folder(path):
    path.mkdir(parents=True, exist_ok=True)
    (path / "something").write_bytes(b"somebody's")


def fifo_to(path):
    os.mkfifo(path.parent.parent / "fifo")
    path.symlink_to(path.parent.parent / "fifo")


AT_THE_ADDRESS = {
    "a FIFO": os.mkfifo,
    "a socket": socket_at,
    "a folder": Path.mkdir,
    "a folder with files": full_folder,
    "a link to a genuine file": lambda path: path.symlink_to(outside(path)),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a FIFO": fifo_to,
    "a terabyte of nothing": lambda path: sparse(path, b"", 2**40),
    "a terabyte that begins well": lambda path: sparse(path, GOOD, 2**40),
    "a megabyte less one, of nothing": lambda path: sparse(path, b"", BUDGET - 1),
    "a megabyte less one, that begins well": lambda path: sparse(path, GOOD, BUDGET - 1),
}

COUNTING = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) AS count FROM c"
ENDLESS = f"AFTER INSERT ON entries BEGIN UPDATE totals SET count = ({COUNTING}); END"
BESIDE = {
    "a file of after 2262": lambda folder: os.utime(folder / f"{OTHER.address}.safetensors", ns=(10**19, 10**19)),
    "a file of before 1677": lambda folder: os.utime(folder / f"{OTHER.address}.safetensors", ns=(-(10**19), -(10**19))),
    "x.partial that is a folder": lambda folder: full_folder(folder / f"{'0' * 64}.partial"),
    "x.partial that is a link to itself": lambda folder: (folder / "x.partial").symlink_to("x.partial"),
    "a link to itself as a snapshot": lambda folder: (folder / f"{'a' * 64}.safetensors").symlink_to("x" * 9),
    "a FIFO as a snapshot": lambda folder: os.mkfifo(folder / f"{'b' * 64}.safetensors"),
    "a folder as a snapshot": lambda folder: full_folder(folder / f"{'c' * 64}.safetensors"),
    "a terabyte as a snapshot": lambda folder: sparse(folder / f"{'d' * 64}.safetensors", b"", 2**40),
    "a terabyte that is pinned": lambda folder: (sparse(folder / f"{'d' * 64}.safetensors", b"", 2**35),
                                                 (folder / f"{'d' * 64}.pin").touch()),
    "a pin that is a folder": lambda folder: full_folder(folder / f"{'e' * 64}.pin"),
    "a pin that is a link to itself": lambda folder: (folder / f"{KEY.address}.pin").symlink_to("x" * 70),
    "a name that is no text": lambda folder: os.close(os.open(os.fsencode(folder) + b"/\xff\xfe", os.O_CREAT)),
    "a lock that is a FIFO": lambda folder: os.mkfifo(anew(folder / ".lock")),
    "a lock that is a folder": lambda folder: full_folder(anew(folder / ".lock")),
    "a lock that is a link to itself": lambda folder: anew(folder / ".lock").symlink_to(".lock"),
    "a lock that is a link elsewhere": lambda folder: anew(folder / ".lock").symlink_to(outside(folder / "x")),
    "a lock that somebody left": lambda folder: anew(folder / ".lock").write_text("4711"),
    "our folder that is a file": lambda folder: anew(folder / ".kvcache").write_bytes(b"x"),
    "our folder that is a FIFO": lambda folder: os.mkfifo(anew(folder / ".kvcache")),
    "our folder that is a link": lambda folder: anew(folder / ".kvcache").symlink_to(folder.parent),
    "our folder that is a link to itself": lambda folder: anew(folder / ".kvcache").symlink_to(".kvcache"),
    "an index that is a FIFO": lambda folder: os.mkfifo(anew(index_of(folder))),
    "an index that is a folder": lambda folder: full_folder(anew(index_of(folder))),
    "an index that is a link elsewhere": lambda folder: anew(index_of(folder)).symlink_to(outside(folder / "x")),
    "a journal that is a FIFO": lambda folder: os.mkfifo(anew(index_of(folder, "-journal"))),
    "a write-ahead log that is a FIFO": lambda folder: os.mkfifo(anew(index_of(folder, "-wal"))),
    "an index of zeros": lambda folder: index_of(folder).write_bytes(bytes(8192)),
    "an index of nothing": lambda folder: index_of(folder).write_bytes(b""),
    "an index that was cut": lambda folder: os.truncate(index_of(folder), 3000),
    "an index that is torn": lambda folder: torn(index_of(folder)),
    "an index of another version": lambda folder: told(folder, "PRAGMA user_version = 99"),
    "an index without sums": lambda folder: told(folder, "DELETE FROM totals"),
    "an index without tables": lambda folder: told(folder, "DROP TABLE entries"),
    "an index with sums that are words": lambda folder: told(folder, "UPDATE totals SET nbytes = 'much'"),
    "an index with sums that are too large": lambda folder: told(folder, "UPDATE totals SET nbytes = 1000000000000"),
    "an index with sums that are too small": lambda folder: told(folder, "UPDATE totals SET nbytes = 1, pinned = 0"),
    "an index with sums below zero": lambda folder: told(folder, "UPDATE totals SET nbytes = -1000000000000"),
    "an index with a count below zero": lambda folder: told(folder, "UPDATE totals SET count = -5"),
    "an index with a size that is endless": lambda folder: told(folder, "UPDATE entries SET nbytes = 9e999, pinned = 7"),
    "an index with a trigger that never ends": lambda folder: told(folder, f"CREATE TRIGGER more {ENDLESS}"),
    "an index with a trigger of ours that never ends": lambda folder: (told(folder, "DROP TRIGGER added"),
                                                                      told(folder, f"CREATE TRIGGER added {ENDLESS}")),
    "an index with a view that never ends": lambda folder: (told(folder, "DROP TABLE totals"),
                                                            told(folder, f"CREATE VIEW totals AS {COUNTING}")),
    "an index with a table of somebody's": lambda folder: told(folder, "CREATE TABLE theirs (x)"),
    "an index that lists a path": lambda folder: told(folder, "INSERT INTO entries VALUES ('../../x', 1, 1, 0, NULL)"),
    "an index that lists nothing": lambda folder: told(folder, "DELETE FROM entries"),
    "a partial that is a folder": lambda folder: full_folder(folder / ".kvcache" / "x.partial"),
    "a partial that is a FIFO": lambda folder: os.mkfifo(folder / ".kvcache" / "x.partial"),
}  # fmt: skip


def anew(path):
    """A name that is free, for a thing of another kind."""
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name("was"))
    else:
        path.unlink(missing_ok=True)
    return path


def index_of(folder, end=""):
    return folder / ".kvcache" / f"index.sqlite{end}"


def told(folder, statement):
    with closing(sqlite3.connect(index_of(folder), isolation_level=None)) as db:
        db.execute(statement)


def torn(file):
    data = bytearray(file.read_bytes())
    for at in range(1024, len(data), 7):
        data[at] ^= 0xA5
    file.write_bytes(data)


def lives_on(store, keys):
    """Whether whatever is asked for is served right, and kept, within a time that only a hang exceeds."""

    def serve():
        cache = SpeakerCache(store)
        for _ in range(2):
            for key in keys:
                assert exact(cache.get_or_build(key, lambda key=key: cold(key)), key)
        assert all(exact(store.get(key), key) for key in keys)
        held = {entry.address for entry in store.entries()}
        assert held >= {key.address for key in keys} and store.nbytes >= len(keys) * len(GOOD)
        return cache.stats()

    return inside.Patience().in_time(serve, 60)


# ---------------------------------------------------------------------- W17 and "Crashes · Stores"


@pytest.mark.parametrize("kind", CONTENTS)
def test_w17_a_file_that_is_not_what_was_asked_for_is_refused_and_built_again(kind, tmp_path):
    store = DiskStore(tmp_path, BUDGET)
    store.put(cold(OTHER))
    (tmp_path / f"{KEY.address}.safetensors").write_bytes(CONTENTS[kind])
    told = []
    with subscribe(told.append, ["refused"]):
        assert store.get(KEY) is None and store.refused == 1
    assert len(told) == 1 and len(told[0].reason) < 600 and "\n" not in told[0].reason
    stats = lives_on(store, [KEY, OTHER, known(2)])
    assert stats.seconds_saved == 0 and stats.built == 2


@posix
@pytest.mark.parametrize("kind", AT_THE_ADDRESS)
def test_crashes_stores_what_is_no_file_is_never_opened(kind, tmp_path):
    folder = tmp_path / "store"
    for store in (DiskStore(folder, BUDGET), RemoteStore(f"file://{folder}", max_bytes=BUDGET)):
        store.put(cold(OTHER))
        path = anew(folder / f"{KEY.address}.safetensors")
        for left in (tmp_path / "fifo",):
            left.unlink(missing_ok=True)
        AT_THE_ADDRESS[kind](path)
        assert inside.Patience().in_time(lambda store=store: store.get(KEY), 60) is None
        assert exact(store.get(OTHER), OTHER)
        lives_on(store, [KEY, OTHER, known(2)])
        assert path.is_file() and not path.is_symlink()
        assert not (there := tmp_path / "elsewhere.safetensors").exists() or there.read_bytes() == GOOD


@posix
@pytest.mark.parametrize("kind", BESIDE)
def test_crashes_stores_one_bad_entry_stops_nothing(kind, tmp_path):
    folder = tmp_path / "store"
    store = DiskStore(folder, BUDGET)
    store.put(cold(OTHER))
    BESIDE[kind](folder)
    for again in (store, DiskStore(folder, BUDGET)):
        lives_on(again, [KEY, OTHER, known(2)])
    again.pin(KEY)
    again.delete(OTHER)
    assert again.get(OTHER) is None and exact(again.get(KEY), KEY)
    assert not (there := tmp_path / "elsewhere.safetensors").exists() or there.read_bytes() == GOOD


@posix
@pytest.mark.parametrize(
    "kind",
    [
        "an index of zeros",
        "an index that is torn",
        "an index that lists nothing",
        *(kind for kind in BESIDE if kind.startswith("an index with ")),
    ],
)
def test_a_broken_index_does_not_cost_the_budget(kind, tmp_path):
    budget = 3 * len(GOOD) + 100
    store = DiskStore(tmp_path, budget)
    for seed in range(3):
        store.put(cold(known(seed)))
    BESIDE[kind](tmp_path)
    inside.Patience().in_time(lambda: store.put(cold(known(3))), 60)
    assert [store.has(known(seed)) for seed in range(4)] == [False, True, True, True]
    assert store.nbytes <= budget


@contextmanager
def held_by_another(lock):
    """Another process has this lock."""
    there, end = PROCESSES.Event(), PROCESSES.Event()
    process = PROCESSES.Process(target=hold, args=(str(lock), there, end))
    process.start()
    assert there.wait(60)
    try:
        yield
    finally:
        end.set()
        process.join()


def hold(lock, there, end):
    with FileLock(lock):
        there.set()
        end.wait(60)


def test_crashes_stores_a_lock_that_is_not_had_costs_a_computation_at_once(tmp_path, caplog, monkeypatch):
    store = DiskStore(tmp_path)
    store.put(cold(OTHER))
    waited = []
    acquire = FileLock.acquire
    monkeypatch.setattr(
        FileLock, "acquire", lambda lock, timeout, **how: (waited.append(timeout), acquire(lock, timeout, **how))[1]
    )
    with held_by_another(tmp_path / ".lock"):
        cache = SpeakerCache(store)
        for _ in range(2):
            assert exact(cache.get_or_build(KEY, lambda: cold(KEY)), KEY)
            assert exact(cache.get_or_build(OTHER, lambda: cold(OTHER)), OTHER)
        cache.pin(OTHER)
        assert [entry.pinned for entry in store.entries()] == [True]
        cache.evict(OTHER)
        assert cache.get(OTHER) is None
    assert cache.stats().built == 2 and cache.stats().hits == {"disk": 2}
    assert sum(waited) <= 0.1 * 2 and max(waited) <= 0.1  # of two writes; to pin and to forget waits for nobody
    assert [line for line in caplog.messages if "another process holds the lock" not in line] == []
    store.put(cold(KEY))
    assert exact(store.get(KEY), KEY)


def test_an_index_that_a_stranger_holds_is_done_without(tmp_path):
    store = DiskStore(tmp_path, 3 * len(GOOD) + 100)
    store.put(cold(OTHER))
    with closing(sqlite3.connect(index_of(tmp_path), isolation_level=None)) as stranger:
        stranger.execute("BEGIN EXCLUSIVE")
        for seed in range(2, 6):
            store.put(cold(known(seed)))
        assert [store.has(known(seed)) for seed in range(1, 6)] == [False, False, True, True, True]
        stranger.execute("ROLLBACK")
    store.put(cold(KEY))
    assert not store.has(known(3)) and store.nbytes == 3 * len(GOOD)


def test_the_index_knows_what_a_prefix_continues(tmp_path):
    store = DiskStore(tmp_path)
    cache = SpeakerCache(TieredStore(MemoryStore(), store, write_behind=False))
    whole = voice(0, tokens=9)
    cache.get_or_extend(whole.first(4), lambda start: cold(whole.first(4)))
    cache.get_or_extend(whole, lambda start: cold(whole))
    with closing(inside.Index(tmp_path / ".kvcache")) as index:
        assert index.row(whole.address).parent == whole.first(4).address
        assert index.row(whole.first(4).address).parent is None
    assert PrefixSnapshot.from_bytes(store.peek(whole.address)).parent == whole.first(4).address


# ---------------------------------------------------------------------- larger than can be


def crafted(path, size):
    """A file that says what it is, and is nothing: it takes a block of the disk."""
    count = size // 4
    metadata = {"header": "{}", "checksum": "0" * 64}
    content = {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}
    raw = json.dumps({"__metadata__": metadata, "content": content}).encode()
    sparse(path, len(raw).to_bytes(8, "little") + raw, 8 + len(raw) + 4 * count)


class Location(MemoryFileSystem):
    """Tells no size of what it holds, and counts what is read of it."""

    protocol = "untold"
    served = 0

    def info(self, path, **how):
        return super().info(path, **how) | {"size": None}

    def ls(self, path, detail=True, **how):
        return [entry | {"size": None} for entry in super().ls(path, detail=True, **how)]

    def cat_file(self, path, start=None, end=None, **how):
        raise AssertionError("a range may be answered with the whole")

    def open(self, path, mode="rb", **how):
        file = super().open(path, mode, **how)
        return file if mode != "rb" else CountedReads(self, file)


class CountedReads:
    def __init__(self, location, file):
        self._location, self._file = location, file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.seek(0)

    def read(self, count):
        data = self._file.read(min(count, 1000))  # a stream gives what it has just now
        self._location.served += len(data)
        return data


@posix
@pytest.mark.parametrize("key", [KEY, voice(0)], ids=["of a known layout", "of any layout"])
def test_a_file_larger_than_its_key_can_be_is_not_read(key, tmp_path, monkeypatch, caplog):
    store = DiskStore(tmp_path, None)
    store.put(cold(OTHER))
    crafted(tmp_path / f"{key.address}.safetensors", 40 * 2**30)
    for one in (store, RemoteStore(f"file://{tmp_path}")):
        before = resident_bytes()
        assert one.get(key) is None and one.refused == 1 and exact(one.get(OTHER), OTHER)
        assert resident_bytes() - before < 2**28
        assert "more than the" in caplog.text
        caplog.clear()
    assert key.most_bytes < 2**28
    lives_on(store, [key, OTHER])


def test_a_location_that_tells_no_sizes_is_read_within_bounds(tmp_path):
    store = RemoteStore(f"memory://{tmp_path}")
    inside.on_files(store, Location())
    store.put(cold(KEY))
    assert exact(store.get(KEY), KEY) and exact(PrefixSnapshot.from_bytes(store.peek(KEY.address)), KEY)
    assert store.peek(KEY.address, 1500) == store.peek(KEY.address)[:1500]
    assert [entry.nbytes for entry in store.entries()] == [store.nbytes] == [0]
    inside.files_of(store).pipe_file(inside.path_of(store, KEY.address), GOOD + bytes(KEY.most_bytes))
    inside.files_of(store).served = 0
    assert store.get(KEY) is None and store.refused == 1
    assert inside.files_of(store).served == KEY.most_bytes + 1


def test_a_value_larger_than_its_key_can_be_is_not_read_from_a_server(redis_url):
    with RedisStore(redis_url, namespace="large", timeout=20) as store:
        store.put(cold(KEY))
        assert exact(store.get(KEY), KEY)
        inside.client_of(store).setrange(inside.key_of(store, KEY.address), KEY.most_bytes + 10, b"x")
        assert store.get(KEY) is None and store.refused == 1


# ---------------------------------------------------------------------- one bad entry among good ones


@posix
@pytest.mark.parametrize(
    "kind", ["endless layers", "a model that UTF-8 cannot write", "float8 that is not finite", "unreadable", "too much"]
)
def test_one_bad_entry_ends_neither_listing_nor_checking_of_the_others(kind, tmp_path, monkeypatch):
    store, bad = DiskStore(tmp_path, None), tmp_path / f"{'ab' * 32}.safetensors"
    store.put(cold(KEY))
    store.put(cold(OTHER))
    bad.write_bytes(CONTENTS.get(kind, GOOD))
    if kind in ("unreadable", "too much"):
        wrong = PermissionError(13, "Permission denied", str(bad)) if kind == "unreadable" else MemoryError()
        real = os.open

        def opened(path, *how):
            if str(path) == str(bad):
                raise wrong
            return real(path, *how)

        monkeypatch.setattr(os, "open", opened)
    entries = store.entries()
    problems = {checked.entry.address: checked.problem for checked in verify(store, entries)}
    assert problems[KEY.address] is problems[OTHER.address] is None and problems["ab" * 32] is not None
    assert {entry.address for entry in prunable(store, entries, model="m")} >= {KEY.address, OTHER.address}
    for entry in entries:
        with suppress(CorruptError):
            described = describe(store, entry.address)
            assert described.layers == 2 and described.model.encode() == b"m"
    with pytest.raises(CorruptError):
        store.read_verified("ab" * 32)


def test_keys_and_values_of_float8_are_kept_and_checked(tmp_path):
    snapshot = cold(KEY)
    small = PrefixSnapshot(
        voice(0), tuple(tuple(t.to(torch.float8_e4m3fn) for t in layer) for layer in snapshot.layers)
    )
    store = DiskStore(tmp_path)
    store.put(small)
    found = store.get(small.key)
    assert found is not None and torch.equal(found.layers[1][0].view(torch.uint8), small.layers[1][0].view(torch.uint8))


def test_a_key_of_a_model_that_utf8_cannot_write_is_refused():
    for model in ("\ud800", 5):
        with pytest.raises(InputError, match="give a fingerprint"):
            replace(KEY, model=model)


# ---------------------------------------------------------------------- many


class Counted:
    """What is asked of the system, counted."""

    def __init__(self, monkeypatch):
        self.asked = 0
        for name in ("stat", "lstat", "scandir", "unlink"):
            monkeypatch.setattr(os, name, self._counting(getattr(os, name)))

    def _counting(self, call):
        def counted(*args, **kwargs):
            self.asked += 1
            return call(*args, **kwargs)

        return counted


def filled(folder, count, size=10):
    """A folder of so many tiny files at addresses, as a store that has been used for long."""
    (folder / ".kvcache").mkdir(parents=True)
    for i in range(count):
        (folder / f"{i:064x}.safetensors").write_bytes(bytes(size))


def listings(folder, budget, monkeypatch):
    """How often a store lists its folder, and what it asks of the system, in four writes after the first."""
    store, listed = DiskStore(folder, budget), []
    store.put(cold(known(0)))
    with monkeypatch.context() as patch:
        patch.setattr(inside.DISK_LISTED, lambda one: (listed.append(1), inside.disk_listed(one))[1])
        asked = Counted(patch)
        for seed in range(1, 5):
            store.put(cold(known(seed)))
            assert exact(store.get(known(seed)), known(seed)) and store.nbytes <= (budget or 2**60)
    return len(listed), asked.asked


def test_crashes_stores_a_write_among_many_lists_nothing(tmp_path, monkeypatch):
    filled(tmp_path / "many", 1100, len(GOOD))
    for budget in (None, 1101 * len(GOOD)):  # also where each write drives another out
        listed, asked = listings(tmp_path / "many", budget, monkeypatch)
        assert listed == 0 and asked <= 4 * 60
    store = DiskStore(tmp_path / "many")
    (tmp_path / "many" / f"{'f' * 64}.safetensors").write_bytes(bytes(10))  # somebody else's: the folder has changed
    assert store.nbytes == sum(entry.nbytes for entry in store.entries())
    store.put(cold(known(9)))
    assert store.nbytes == sum(entry.nbytes for entry in store.entries())


@pytest.mark.slow
def test_crashes_stores_100_000_entries_cost_no_more_than_1_000(tmp_path, monkeypatch):
    work = {}
    for count in (1_000, 100_000):
        filled(tmp_path / str(count), count)
        listed, asked = listings(tmp_path / str(count), None, monkeypatch)
        store = DiskStore(tmp_path / str(count), None)
        counted = Counted(monkeypatch)
        entries = len(store.entries())
        monkeypatch.undo()
        work[count] = listed * count + asked, counted.asked
        assert entries == count + 5
    assert work[100_000][0] <= 3 * work[1_000][0] and work[100_000][1] <= 3 * work[1_000][1]


# ---------------------------------------------------------------------- private


def modes(folder):
    return {
        os.path.relpath(path, folder): stat.S_IMODE(path.lstat().st_mode)
        for path in [folder, *folder.rglob("*")]
        if not path.is_symlink()
    }


@posix
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_crashes_stores_what_is_written_is_its_owners_alone(umask, tmp_path):
    before = os.umask(umask)
    try:
        for store in (DiskStore(tmp_path / "a" / "disk"), RemoteStore(f"file://{tmp_path}/b/remote")):
            store.pin(OTHER)
            for seed in range(3):
                store.put(cold(known(seed)))
            assert exact(store.get(KEY), KEY)
    finally:
        os.umask(before)
    found = modes(tmp_path / "a") | modes(tmp_path / "b")
    folders = {name for name in found if (tmp_path / "a" / name).is_dir() or (tmp_path / "b" / name).is_dir()}
    assert {found[name] for name in folders} == {0o700}
    assert {mode for name, mode in found.items() if name not in folders} == {0o600}
    assert any("index.sqlite" in name for name in found) and any(".pin" in name for name in found)


def test_a_folder_that_is_there_keeps_its_mode(tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o755)
    DiskStore(folder).put(cold(KEY))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


# ---------------------------------------------------------------------- signed


def test_w17_a_key_in_the_environment_signs_and_refuses(tmp_path, monkeypatch):
    DiskStore(tmp_path).put(cold(OTHER))
    monkeypatch.setenv("KVCACHE_STORE_KEY", "a long random one")
    store = DiskStore(tmp_path)
    assert store.get(OTHER) is None and store.refused == 1  # written by who knew no key
    store.put(cold(KEY))
    assert exact(DiskStore(tmp_path).get(KEY), KEY)
    assert exact(DiskStore(tmp_path, secret="a long random one").get(KEY), KEY)
    assert DiskStore(tmp_path, secret="another").get(KEY) is None
    monkeypatch.delenv("KVCACHE_STORE_KEY")
    assert DiskStore(tmp_path).get(KEY) is None  # nothing was given to check it with
    with pytest.raises(InputError, match="secret is empty"):
        DiskStore(tmp_path, secret="")
    monkeypatch.setenv("KVCACHE_STORE_KEY", "")
    with pytest.raises(InputError, match=r"\$KVCACHE_STORE_KEY is empty"):
        MemoryStoreOver(tmp_path)


def MemoryStoreOver(folder):
    return TieredStore(MemoryStore(), DiskStore(folder))


def test_w17_what_is_not_finite_is_not_written_either(tmp_path, caplog):
    snapshot = cold(KEY)
    bad = replace(snapshot, layers=(snapshot.layers[0], tuple(t * float("nan") for t in snapshot.layers[1])))
    store = DiskStore(tmp_path)
    store.put(bad)
    assert not store.has(KEY) and "not finite" in caplog.text
    with pytest.raises(CorruptError, match="not finite"):
        store.add(bad.to_bytes())
    for seconds in (float("nan"), float("inf"), -1.0, "1", True, None):
        with pytest.raises(InputError, match="build_seconds"):
            replace(snapshot, build_seconds=seconds)


def test_w17_the_memory_tier_takes_over_nothing_that_does_not_fit(tmp_path):
    disk = DiskStore(tmp_path)
    inside.write(disk, KEY.address, CONTENTS["three heads"])
    with TieredStore(MemoryStore(), disk) as store:
        cache = SpeakerCache(store)
        assert exact(cache.get_or_build(KEY, lambda: cold(KEY)), KEY)
        assert cache.stats().refused == 1
    assert exact(disk.get(KEY), KEY)


def test_w17_a_store_of_somebodys_own_is_not_believed():
    class Wrong(MemoryStore):
        def get(self, key):
            with suppress(KeyError):
                return PrefixSnapshot.from_bytes(CONTENTS["keys of 16"])

    cache = SpeakerCache(Wrong())
    assert exact(cache.get_or_build(KEY, lambda: cold(KEY)), KEY) and cache.stats().refused == 1


# ---------------------------------------------------------------------- files that somebody names


@posix
@pytest.mark.parametrize("kind", ["folder", "FIFO", "link to a folder", "device"])
def test_what_is_no_file_is_never_replaced_by_one_that_somebody_names(kind, tmp_path):
    path, inside = tmp_path / "Documents", tmp_path / "folder"
    inside.mkdir()
    (inside / "thesis.txt").write_text("x")
    if kind == "folder":
        inside.rename(path)
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/null")
    else:
        path.symlink_to(inside)
    before = sorted(tmp_path.rglob("*")), os.stat(path).st_mode
    writers = (
        lambda: write_given(path, b"x"),
        lambda: check_given(path),
        lambda: RetrievalHeadProfile("m", 1, 2, 3, ((0.5,),)).save(path),
        lambda: TuningProfile("m", "", "latency", 1, 0.1, {}, {}, Setting(), (), ()).save(path),
    )
    for write in writers:
        with pytest.raises(InputError, match=r"Documents is a \w+, not a file; it is left as it is"):
            write()
    assert (sorted(tmp_path.rglob("*")), os.stat(path).st_mode) == before


@posix
@pytest.mark.parametrize("private", [True, False])
def test_a_link_that_somebody_names_stays_one(private, tmp_path):
    (tmp_path / "disk").mkdir()
    for there in (True, False):
        target, link = tmp_path / "disk" / f"{there}", tmp_path / f"link {there}"
        if there:
            target.write_bytes(b"old")
        link.symlink_to(target)
        write_given(link, b"new", private=private)
        assert link.is_symlink() and target.read_bytes() == b"new"
        assert not private or stat.S_IMODE(target.stat().st_mode) == 0o600
    assert {path.name for path in tmp_path.rglob("*")} == {"disk", "True", "False", "link True", "link False"}


@pytest.mark.parametrize("name", ["声" * 80 + ".voice", "a" + "é" * 120, "x" * 255], ids=ascii)
def test_every_name_that_a_file_may_have_can_be_written_and_set_aside(name, tmp_path):
    for write in (write_private, write_given):
        write(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"
    set_aside(tmp_path / name)
    [aside] = tmp_path.iterdir()
    assert ".aside-" in aside.name and aside.read_bytes() == b"new"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no folder that takes nothing")
def test_a_folder_that_cannot_be_made_though_its_parent_is_there(caplog):
    with pytest.raises(FileNotFoundError):
        make_private_folder("/proc/kvcache/voices")
    store = DiskStore("/proc/kvcache")
    store.put(cold(voice(1)))
    assert "RecursionError" not in caplog.text and "FileNotFoundError" in caplog.text
    with pytest.raises(StoreError, match="could not write"):
        store.add(cold(voice(1)).to_bytes())
