"""What every store promises: the bits that were put, for the content that was asked for, within its budget."""

import io
import os
import pickle
import re
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from random import Random

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from support import searching
from support.clocks import Clock
from support.snapshots import BLOBS, KINDS, Stores, cold, exact, ids, running_redis, voice
from support.waiting import until

from kvcache import CorruptError, InputError, PrefixKey, PrefixSnapshot, SpeakerCache
from kvcache.cache import beginning, beginning_length, pack
from kvcache.errors import SignatureError
from kvcache.prefixes.stores import (
    DiskStore,
    MemoryStore,
    RedisStore,
    RemoteStore,
    TieredStore,
    default_folder,
    open_store,
)
from kvcache.prefixes.stores._base import check_address
from kvcache.prefixes.stores._remote import _written

pytestmark = pytest.mark.one_release


def search(examples):
    # Each example opens a place of its own in the test's folder.
    return searching.search(examples, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory):
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture
def stores(request, tmp_path):
    opened = Stores(request, tmp_path)
    yield opened
    opened.close()


def settled(store):
    """The same store, with nothing left to write."""
    if isinstance(store, TieredStore):
        store.flush()
    return store


def size(store, key):
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

# ---------------------------------------------------------------------- every store


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_put_comes_back_bit_for_bit(kind, stores):
    store = stores(kind)
    for i, key in enumerate(SORTS):
        assert store.get(key) is None and not store.has(key)
        store.put(cold(key))
        assert exact(settled(store).get(key), key) and store.has(key)
        assert (store.hits, store.misses) == (i + 1, i + 1)
    assert all(exact(store.get(key), key) for key in SORTS)
    for other in (voice(2), voice(1, model="n"), ids(1, 2, 3), voice(1, tokens=7)):
        assert not store.has(other)
        found = store.get(other)
        assert found is None or len(found) < len(other)  # the memory tier has its beginning


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "memory"])
def test_what_one_has_put_another_finds(kind, stores):
    with stores(kind) as store:
        for key in SORTS:
            store.put(cold(key))
    again = stores(kind)
    assert all(exact(again.get(key), key) for key in SORTS)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_deleted_is_gone_pinned_or_not(kind, stores):
    store, (kept, gone, pinned) = stores(kind), map(voice, range(3))
    store.pin(pinned)
    for key in (kept, gone, pinned):
        store.put(cold(key))
    for key in (gone, pinned):
        store.delete(key)
        store.delete(key)  # what is not there is no error
    assert [settled(store).has(key) for key in (kept, gone, pinned)] == [True, False, False]
    assert store.get(gone) is store.get(pinned) is None
    assert exact(store.get(kept), kept)


@pytest.mark.parametrize("kind", KINDS)
def test_pinned_ones_stay_until_they_are_released(kind, stores):
    early, late, deleted, *others = map(voice, range(12))
    store = stores(kind, max_bytes=4 * len(cold(early).to_bytes()))
    store.pin(early)
    store.pin(deleted)
    store.delete(deleted)  # its pin too
    store.put(cold(deleted))
    for key in (early, late):
        store.put(cold(key))
    settled(store).pin(late)
    for key in others:
        store.put(cold(key))
    assert exact(settled(store).get(early), early) and exact(store.get(late), late)
    assert not store.has(deleted)
    for key in (early, late):
        store.pin(key, False)
        store.pin(key, False)
    for key in others:
        store.put(cold(key))
    assert not settled(store).has(early) and not store.has(late)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_reported_are_bytes_held(kind, stores):
    store, keys = stores(kind), [voice(i, tokens=i + 1) for i in range(4)]
    assert store.nbytes == 0
    for count, key in enumerate(keys, 1):
        store.put(cold(key))
        store.put(cold(key))
        for tier in settled(store).tiers:
            assert tier.nbytes == sum(size(tier, held) for held in keys[:count])
    assert store.nbytes == sum(tier.nbytes for tier in store.tiers)
    store.delete(keys[2])
    assert all(tier.nbytes == sum(size(tier, keys[i]) for i in (0, 1, 3)) for tier in store.tiers)


@pytest.mark.parametrize("kind", KINDS)
def test_what_can_never_fit_drives_nothing_out(kind, stores, caplog):
    small, pinned, large, huge = voice(0, 2), voice(1, 20), voice(2, 25), voice(3, 50)
    store = stores(kind, max_bytes=len(cold(large).to_bytes()) + 500)
    store.pin(pinned)
    for key in (small, pinned):
        store.put(cold(key))
    for key in (large, huge):  # one does not fit beside what is pinned, the other not at all
        settled(store).put(cold(key))
    assert [settled(store).has(key) for key in (small, pinned, large, huge)] == [True, True, False, False]
    assert exact(store.get(small), small)
    tiers = len(store.tiers)
    assert sum(f"fit beside {size(tier, pinned)} pinned" in caplog.text for tier in store.tiers) == tiers
    assert len(caplog.records) == 2 * tiers


class Oracle:
    """A store with a budget as its documentation describes it: a list, from the one that leaves first."""

    def __init__(self, budget, reading_is_using):
        self.budget, self.reading_is_using = budget, reading_is_using
        self.held, self.pinned = {}, set()

    def put(self, name, size):
        rest = {other: held for other, held in self.held.items() if other != name}
        if sum(rest[other] for other in self.pinned & rest.keys()) + size > self.budget:
            return
        for other in list(rest):
            if sum(rest.values()) + size > self.budget and other not in self.pinned:
                del rest[other]
        self.held = {**rest, name: size}

    def get(self, name):
        if self.reading_is_using and name in self.held:
            self.held[name] = self.held.pop(name)

    def delete(self, name):
        self.held.pop(name, None)
        self.pinned.discard(name)


def tell_apart(folder, tick):
    """Give the file that was just used a time of its own: a file system's clock may tick 100 times a second only."""
    for path in folder.glob("*.safetensors"):
        if path.stat().st_mtime > 2e8:
            os.utime(path, (1e8 + tick, 1e8 + tick))


VOICES = [voice(i, tokens) for i, tokens in enumerate((4, 5, 6, 7, 20))]
ACTIONS = ("put",) * 6 + ("get",) * 5 + ("pin", "unpin", "delete")  # mostly what makes others leave
actions = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 4)), min_size=15, max_size=40)


@pytest.mark.search
@pytest.mark.parametrize("kind", ["memory", *BLOBS])
def test_the_least_recently_used_leave_first_and_the_budget_holds(kind, stores, tmp_path):
    places = iter(range(10**6))

    @search(60)
    @given(st.floats(1.5, 4), actions)
    def check(room, todo):
        where = next(places)
        with stores(kind, where, max_bytes=int(room * len(cold(VOICES[3]).to_bytes()))) as store:
            oracle = Oracle(store.max_bytes, reading_is_using=not kind.startswith("remote"))
            for tick, (action, i) in enumerate(todo):
                key = VOICES[i]
                match action:
                    case "put":
                        store.put(cold(key))
                        oracle.put(i, size(store, key))
                    case "get":
                        found = store.get(key)
                        assert exact(found, key) if i in oracle.held else found is None
                        oracle.get(i)
                    case "pin":
                        store.pin(key)
                        oracle.pinned.add(i)
                    case "unpin":
                        store.pin(key, False)
                        oracle.pinned.discard(i)
                    case "delete":
                        store.delete(key)
                        oracle.delete(i)
                if kind in ("disk", "remote-file"):
                    tell_apart(tmp_path / f"{kind.removesuffix('-file')}-{where}", tick)
                assert {j for j in range(len(VOICES)) if store.has(VOICES[j])} == oracle.held.keys(), (tick, action, i)
                assert store.nbytes == sum(oracle.held.values()) <= store.max_bytes

    check()


@pytest.mark.search
@pytest.mark.parametrize("kind", ["memory+disk", "memory+disk+redis"])
def test_tiers_keep_their_budgets_their_pins_and_their_word(kind, stores):
    places = iter(range(10**6))

    @search(40)
    @given(st.floats(1.5, 4), actions)
    def check(room, todo):
        budget, safe = int(room * len(cold(VOICES[3]).to_bytes())), set()
        with stores(kind, next(places), max_bytes=budget) as store:
            pinned = set()
            for action, i in todo:
                key = VOICES[i]
                match action:
                    case "put":
                        store.put(cold(key))
                        assert len(cold(key).to_bytes()) > budget or pinned or exact(store.get(key), key)
                    case "get":
                        found = store.get(key)
                        assert found is None or exact(found, key)
                    case "pin":
                        store.pin(key)
                        pinned.add(i)
                    case "unpin":
                        store.pin(key, False)
                        pinned.discard(i)
                    case "delete":
                        store.delete(key)
                        pinned.discard(i)
                        assert store.get(key) is None
                assert all(tier.nbytes <= budget for tier in store.tiers)
                store.flush()
                assert all(tier.nbytes <= budget for tier in store.tiers)
                safe &= pinned
                assert all(store.has(VOICES[j]) for j in safe)
                safe |= {j for j in pinned if store.has(VOICES[j])}

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_threads_may_share_a_store(kind, stores):
    keys = [voice(i, tokens=3 + i) for i in range(6)]
    budget = 3 * len(cold(keys[-1]).to_bytes())
    store = stores(kind, max_bytes=budget)

    def work(seed):
        random = Random(seed)
        for _ in range(60):
            key = random.choice(keys)
            match random.choice(("get", "get", "put", "put", "pin", "unpin", "delete")):
                case "get":
                    found = store.get(key)
                    assert found is None or exact(found, key)
                case "put":
                    store.put(cold(key))
                case "delete":
                    store.delete(key)
                case pin:
                    store.pin(key, pin == "pin")
            assert all(tier.nbytes <= budget for tier in store.tiers if tier.name != "remote")  # as well as it can

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    for key in keys:
        store.delete(key)
    assert store.nbytes == 0


# ---------------------------------------------------------------------- memory


@search(150)
@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "put", "wait", "wait", "pin", "unpin", "delete"]), st.integers(0, 3)),
        min_size=5,
        max_size=30,
    )
)
def test_what_is_old_is_forgotten_unless_it_is_pinned(todo):
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr("kvcache.prefixes.stores._memory.time", clock)
        store, stored, pinned = MemoryStore(ttl=5), {}, set()
        for action, i in todo:
            match action:
                case "put":
                    store.put(cold(VOICES[i]))
                    stored[i] = clock.now
                case "wait":
                    clock.now += 1 + 2 * i
                case "pin":
                    store.pin(VOICES[i])
                    pinned.add(i)
                case "unpin":
                    store.pin(VOICES[i], False)
                    pinned.discard(i)
                case "delete":
                    store.delete(VOICES[i])
                    stored.pop(i, None)
                    pinned.discard(i)
            stored = {j: at for j, at in stored.items() if clock.now - at <= 5 or j in pinned}
            first, second = ("has", "get") if i % 2 else ("get", "has")  # either finds out what has become old
            assert {j for j in range(4) if getattr(store, first)(VOICES[j])} == stored.keys()
            assert {j for j in range(4) if getattr(store, second)(VOICES[j])} == stored.keys()
            assert store.nbytes == sum(size(store, VOICES[j]) for j in stored)


beginnings = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)


@search(200)
@given(
    st.lists(st.tuples(st.sampled_from(["put", "put", "put", "pin", "unpin"]), st.sampled_from("mn"), beginnings)),
    st.lists(beginnings, min_size=1, max_size=8),
    st.integers(1, 20) | st.just(10**6),
)
def test_the_longest_beginning_is_found(todo, asked, room):
    store, put = MemoryStore(room * cold(ids(*range(6))).nbytes), set()
    for action, model, tokens in todo:
        key = ids(*tokens, model=model)
        if action == "put":
            store.put(cold(key))
            put.add((model, tokens))
        else:
            store.pin(key, action == "pin")
        assert store.nbytes <= store.max_bytes
    for tokens in asked:
        best = max(
            (n for n in range(7) if any(model == "m" and known[:n] == tokens[:n] != () for model, known in put)),
            default=0,
        )
        best = min(best, len(tokens))
        found = store.get(ids(*tokens))
        if room == 10**6:
            assert (0 if found is None else len(found)) == best
        assert found is None or (len(found) <= best and exact(found, ids(*tokens[: len(found)])))


def test_of_two_that_begin_alike_the_longer_serves_both():
    store, short, long = MemoryStore(), ids(1, 2), ids(1, 2, 3)
    store.put(cold(short))
    store.put(cold(long))
    assert len(store) == 1 and store.nbytes == cold(long).nbytes
    store.put(cold(short))
    assert len(store) == 1 and not store.has(short) and exact(store.get(short), short)
    store.pin(short)  # from now on it has to outlive the longer one
    assert (store.hits, store.misses) == (1, 0)  # to pin is not to ask
    store.delete(long)
    assert store.has(short) and exact(store.get(ids(1, 2, 9)), short)


def test_a_snapshot_that_was_cut_from_a_longer_one_takes_no_more_than_its_own():
    store, part = MemoryStore(), cold(ids(*range(100))).first(2)
    store.put(part)
    assert store.nbytes == cold(part.key).nbytes < part.nbytes
    assert exact(store.get(part.key), part.key)


# ---------------------------------------------------------------------- what is stored is not trusted


class Exploding:
    """What unpickling would run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def torch_saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


def forged(**changes):
    """A file with a checksum that is right, which says something else."""
    snapshot = cold(voice(0))
    tensors = snapshot.tensors() | changes.pop("tensors", {})
    return pack(tensors, snapshot.header() | changes)


JUNK = {
    "nothing": lambda mark: b"",
    "zeros": lambda mark: bytes(1000),
    "text": lambda mark: b"<html>502 Bad Gateway</html>",
    "a pickle": lambda mark: pickle.dumps(Exploding(mark)),
    "torch.save": lambda mark: torch_saved(Exploding(mark)),
    "torch.save of tensors": lambda mark: torch_saved(cold(voice(0)).tensors()),
    "safetensors": lambda mark: safetensors.torch.save(cold(voice(0)).tensors()),
    "safetensors with a header": lambda mark: safetensors.torch.save(cold(voice(0)).tensors(), {"header": "{}"}),
    "another checksum": lambda mark: safetensors.torch.save(
        cold(voice(0)).tensors(), {"header": "{}", "checksum": "a" * 64}
    ),
    "a checksum that is a list": lambda mark: (11).to_bytes(8, "little") + b'{"a": [[1]]' + bytes(99),
    "a deep header": lambda mark: (10**6).to_bytes(8, "little") + b"[" * 10**6,
    "a header that is a list": lambda mark: pack({"content": torch.zeros(1)}, []),
    "another format": lambda mark: forged(format="something"),
    "another version": lambda mark: forged(version=2),
    "another model": lambda mark: forged(model="n"),
    "no layers": lambda mark: forged(layers=0),
    "more layers": lambda mark: forged(layers=3),
    "another content": lambda mark: forged(tensors={"content": voice(1).content}),
    "a content without tokens": lambda mark: forged(tensors={"content": torch.zeros(0, 3)}),
    "a content without width": lambda mark: forged(tensors={"content": torch.zeros(6, 0)}),
    "keys of another length": lambda mark: forged(tensors={"keys.0": torch.zeros(2, 5, 8)}),
}


@pytest.mark.parametrize("kind", BLOBS)
@pytest.mark.parametrize("junk", JUNK)
def test_what_is_no_intact_snapshot_is_refused_and_replaced(kind, junk, stores, tmp_path, caplog):
    store, key, mark = stores(kind), voice(0), tmp_path / "unpickled"
    store._write(key.address, JUNK[junk](mark))
    assert store.get(key) is None
    assert len(caplog.records) == 1 and caplog.records[0].levelname == "WARNING"
    assert exact(SpeakerCache(store).get_or_build(key, lambda: cold(key)), key)
    assert exact(store.get(key), key)
    assert not mark.exists()


@pytest.mark.parametrize("kind", BLOBS)
def test_a_snapshot_at_the_address_of_another_is_refused_and_replaced(kind, stores, caplog):
    store, mine, other = stores(kind), voice(0), voice(1)
    store.put(cold(mine))
    store._write(other.address, store.peek(mine.address))
    assert store.has(other) and store.get(other) is None
    assert "it will not be used" in caplog.text
    cache = SpeakerCache(store)
    assert exact(cache.get_or_build(other, lambda: cold(other)), other)
    assert exact(store.get(other), other) and exact(store.get(mine), mine)
    assert cache.stats().built == 1


@pytest.mark.search
@pytest.mark.parametrize("hashes", ["addresses collide", "hashes collide too"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_collision_of_hashes_serves_another_voice(kind, hashes, stores, monkeypatch, caplog):
    monkeypatch.setattr(PrefixKey, "address", "0" * 64)
    if hashes == "hashes collide too":
        monkeypatch.setattr(PrefixKey, "__hash__", lambda key: 0)
    places = iter(range(10**6))
    kinds = st.sampled_from([torch.long, torch.float32, torch.float16, torch.bfloat16])
    keys = st.builds(voice, st.integers(0, 3), st.integers(1, 3), kinds, st.sampled_from(["m", "n", "m bf16"]))

    @search(25)
    @given(st.lists(keys, max_size=12))
    def check(asked):
        with stores(kind, next(places)) as store:
            cache = SpeakerCache(store)
            for key in asked:
                assert exact(cache.get_or_build(key, lambda key=key: cold(key)), key)
                assert exact(settled(store).get(key), key)

    check()


@pytest.mark.parametrize("kind", BLOBS)
@pytest.mark.parametrize(
    ("written", "read", "trusted"),
    [
        (None, None, True), ("a secret", b"a secret", True), (b"\xff", b"\xff", True), (None, "a secret", False),
        ("a secret", None, False), ("a secret", "another", False),
    ],
)  # fmt: skip
def test_what_was_not_signed_with_the_secret_is_refused(kind, written, read, trusted, stores, caplog):
    key = voice(0)
    stores(kind, secret=written).put(cold(key))
    reader = stores(kind, secret=read)
    assert exact(reader.get(key), key) == trusted
    assert len(caplog.records) == (not trusted) and "secret" not in caplog.text
    assert exact(SpeakerCache(reader).get_or_build(key, lambda: cold(key)), key)
    assert exact(reader.get(key), key)


class Liar(MemoryStore):
    def get(self, key):
        return cold(voice(99))


def test_the_cache_trusts_no_store(caplog):
    cache, key = SpeakerCache(Liar()), voice(0)
    for _ in range(3):
        assert exact(cache.get_or_build(key, lambda: cold(key)), key)
        assert cache.get(key) is None
    assert cache.stats().refused == 6
    assert "it will not be used" in caplog.text


# ---------------------------------------------------------------------- names

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


@search(300)
@given(st.text() | st.text("0123456789abcdefABCDEF\n/.٣", min_size=60, max_size=66))
def test_only_64_hex_digits_are_an_address(text):
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        assert check_address(text) == text
    else:
        with pytest.raises(InputError, match="is no address"):
            check_address(text)


@pytest.mark.parametrize("kind", BLOBS)
def test_no_address_leads_out_of_the_store(kind, stores, tmp_path, caplog):
    store, inside = stores(kind), voice(0)
    store.put(cold(inside))
    (tmp_path / "x.safetensors").write_bytes(cold(inside).to_bytes())
    before = sorted(tmp_path.rglob("*"))
    for name in [*HOSTILE, "../x", "", "0" * 63, "0" * 64 + "\n", "../" + "0" * 64]:
        key = voice(0)
        key.__dict__["address"] = name  # no content has such an address
        store.put(cold(key))
        assert not store.has(key) and store.get(key) is None
        store.pin(key)
        store.delete(key)
    assert sorted(tmp_path.rglob("*")) == before
    assert {"InputError" in record.getMessage() for record in caplog.records} == {True}
    assert exact(store.get(inside), inside)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_may_be_named_anything(kind, stores, tmp_path):
    store = stores(kind)
    for name in HOSTILE:
        key = voice(0, model=name)
        assert store.get(key) is None
        store.put(cold(key))
        settled(store).pin(key)
        assert exact(store.get(key), key)
    ours = (".lock", "index.sqlite")
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in ours]
    assert all(re.fullmatch(r"[0-9a-f]{64}\.(safetensors|pin)", path.name) for path in files)
    assert {path.parent.name for path in files} <= {"disk-a", "remote-a"}


@pytest.mark.parametrize("name", [*HOSTILE, "", "a:b", "x" * 65, "a\n"])
def test_a_namespace_is_a_plain_word(name):
    with pytest.raises(InputError, match="must be 1 to 64 letters"):
        RedisStore(namespace=name)


def test_namespaces_are_apart(redis_url):
    one, two = (RedisStore(redis_url, namespace=name, timeout=20) for name in ("one", "two.a-b_c"))
    with one, two:
        one.put(cold(voice(0)))
        assert not two.has(voice(0)) and two.get(voice(0)) is None and two.nbytes == 0
        two.delete(voice(0))
        assert exact(one.get(voice(0)), voice(0))


def test_what_cannot_be_opened_is_refused():
    with pytest.raises(InputError, match="no tier"):
        TieredStore()
    with pytest.raises(InputError, match=r"cannot open 'nowhere://x'.*give a URL of a protocol that fsspec knows"):
        RemoteStore("nowhere://x")


NO_TIMES = (float("nan"), float("inf"), -5, 0, "1h", True, 1e12)
SETTINGS = [
    *((lambda ttl=ttl: MemoryStore(ttl=ttl), f"ttl={ttl!r} must be a number of seconds above 0") for ttl in NO_TIMES),
    *((lambda ttl=ttl: RedisStore(ttl=ttl), f"ttl={ttl!r} must be a number of seconds above 0") for ttl in NO_TIMES),
    *((lambda wait=wait: RedisStore(timeout=wait), f"timeout={wait!r} must be") for wait in (None, *NO_TIMES)),
    *(
        (lambda wait=wait: RemoteStore("memory://x", timeout=wait), f"timeout={wait!r} must")
        for wait in (None, *NO_TIMES)
    ),
    *((lambda folder=folder: DiskStore(folder), f"folder={folder!r} must be the path") for folder in ("", 5, b"x")),
    *((lambda kind=kind: kind(5), "url=5 must be text; give") for kind in (RedisStore, RemoteStore)),
    (lambda: RedisStore(namespace=5), "namespace=5 must be 1 to 64 letters"),
    (lambda: DiskStore(secret=4711), "secret is of int, and must be text or bytes; give"),
    (lambda: TieredStore("redis://u:hunter2@h"), "was given 'redis://u:…@h', which is no Store; give for example"),
    (lambda: TieredStore(MemoryStore(), MemoryStore), "which is no Store; give for example"),
    (lambda: TieredStore(MemoryStore(), None), "was given None, which is no Store; give for example"),
]


@pytest.mark.parametrize("n", range(len(SETTINGS)))
def test_settings_that_are_none_are_refused_before_anything_happens(n, tmp_path, monkeypatch):
    monkeypatch.setenv("KVCACHE_HOME", str(tmp_path / "home"))
    make, said = SETTINGS[n]
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        make()
    assert "hunter2" not in str(caught.value) and "4711" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_without_a_home_folder_the_setting_that_helps_is_named(monkeypatch):
    for name in ("KVCACHE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    for make in (DiskStore, SpeakerCache, open_store):
        with pytest.raises(InputError, match=r"no home folder.*set KVCACHE_HOME"):
            make()
    with pytest.raises(InputError, match="give a whole path"):
        open_store("~nobody-of-this-name/x")


def test_the_default_folder_is_the_users_own(monkeypatch, tmp_path):
    monkeypatch.delenv("KVCACHE_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "kvcache"
    monkeypatch.setenv("KVCACHE_HOME", str(tmp_path / "own"))
    assert DiskStore().folder == tmp_path / "own"
    assert not (tmp_path / "own").exists()  # until something is written
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.delenv("KVCACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "kvcache"


# ---------------------------------------------------------------------- Redis


def test_redis_forgets_what_is_old_unless_it_is_pinned(redis_url):
    early, late, plain, released = map(voice, range(4))
    # The server's clock is the real one; what is asserted holds however long it takes.
    with RedisStore(redis_url, namespace="ttl", ttl=0.05, max_bytes="1MB", timeout=20) as store:
        store.pin(early)
        for key in (early, late, plain, released):
            store.put(cold(key))
        for key in (late, released):
            store.pin(key)
            store.put(cold(key))  # also if it was slow, and had expired before it was pinned
        store.pin(released, False)
        until(lambda: not (store.has(plain) or store.has(released)))
        assert all(store._client.ttl(store._key(key.address)) == -1 for key in (early, late))  # they have no end
        assert [store.has(key) for key in (early, late, plain, released)] == [True, True, False, False]
        assert store.nbytes == sum(size(store, key) for key in (early, late))
        store.put(cold(early))  # strikes the others from the books
        assert store._client.hlen(store._books[1]) == store._client.zcard(store._books[0]) == 2


def test_to_pin_is_to_stop_the_clock(redis_url):
    key = voice(0)
    with RedisStore(redis_url, namespace="clock", ttl=1000, timeout=20) as store:
        store.put(cold(key))
        for pinned in (False, True, False):
            store.pin(key, pinned)
            assert (store._client.pttl(store._key(key.address)) == -1) == pinned


# ---------------------------------------------------------------------- tiers


class Gated(DiskStore):
    """Writes when it is let."""

    def __init__(self, folder):
        super().__init__(folder)
        self.gate = threading.Event()

    def _write(self, address, data):
        assert self.gate.wait(10)
        super()._write(address, data)


def small_over_gated(folder):
    """Memory for one voice, over a disk that is not yet let write."""
    disk = Gated(folder)
    return TieredStore(MemoryStore(cold(voice(0)).nbytes), disk), disk


def when_waited_for(monkeypatch, act):
    """From now on `act` is called as soon as somebody waits for the end of a write."""
    result = Future.result

    def waits(future, timeout=None):
        act()
        return result(future, timeout)

    monkeypatch.setattr(Future, "result", waits)


def test_what_is_found_below_is_moved_up(stores, redis_url, tmp_path):
    key = voice(0)
    with RedisStore(redis_url, namespace="up", timeout=20) as far:
        far.put(cold(key))
    with TieredStore(MemoryStore(), DiskStore(tmp_path), RedisStore(redis_url, namespace="up", timeout=20)) as store:
        memory, disk, far = store.tiers
        assert exact(store.get(key), key)
        store.flush()
        assert memory.has(key) and disk.has(key)
        assert exact(store.get(key), key)
        assert [tier.hits for tier in store.tiers] == [1, 0, 1]
        far.delete(key)
        memory.delete(key)
        assert exact(store.get(key), key) and memory.has(key)
        assert [tier.hits for tier in store.tiers] == [1, 1, 1]
        assert not far.has(key)  # nothing moves down by being asked for


def test_what_memory_evicts_is_written_below_if_it_is_not_there(tmp_path):
    first, second = voice(0), voice(1)
    with TieredStore(MemoryStore(cold(first).nbytes), DiskStore(tmp_path)) as store:
        memory, disk = store.tiers
        memory.put(cold(first))
        assert not disk.has(first)
        store.put(cold(second))
        store.flush()
        assert not memory.has(first) and disk.has(first)
        written = disk._path(first.address).stat().st_ino
        assert exact(store.get(first), first)  # drives out the second, and is driven out by it
        assert exact(store.get(second), second)
        store.flush()
        assert disk._path(first.address).stat().st_ino == written


def test_what_is_still_to_be_written_is_served(tmp_path):
    store, disk = small_over_gated(tmp_path)
    with store:
        for i in range(5):
            store.put(cold(voice(i)))
        assert not any(disk.has(voice(i)) for i in range(5))
        assert all(exact(store.get(voice(i)), voice(i)) for i in range(5))
        disk.gate.set()
        store.flush()
        assert all(disk.has(voice(i)) for i in range(5))
    assert store.hits == 5 and store.misses == 0


def test_a_beginning_in_memory_does_not_hide_what_is_still_to_be_written(tmp_path):
    disk, short, long = Gated(tmp_path), ids(1, 2), ids(1, 2, 3)
    with TieredStore(MemoryStore(cold(long).nbytes), disk) as store:
        store.put(cold(long))
        store.tiers[0].delete(long)
        store.tiers[0].put(cold(short))
        found = store.get(long)
        disk.gate.set()
    assert exact(found, long)


def test_what_is_deleted_before_it_was_written_stays_deleted(tmp_path, monkeypatch):
    store, disk = small_over_gated(tmp_path)
    with store:
        for i in range(4):
            store.put(cold(voice(i)))
        when_waited_for(monkeypatch, disk.gate.set)
        store.delete(voice(1))
        store.flush()
        assert [store.has(voice(i)) for i in range(4)] == [True, False, True, True]
        assert store.get(voice(1)) is None


def test_s4_writes_that_wait_are_bounded_and_nobody_waits_for_them(tmp_path, caplog, monkeypatch):
    store, disk = small_over_gated(tmp_path)
    when_waited_for(monkeypatch, lambda: pytest.fail("a request waits for a write"))
    for i in range(40):
        store.put(cold(voice(i)))  # the disk is not let write: each of them returns at once
        assert len(store._pending) <= 16
    assert store.dropped >= 24 and len(caplog.messages) == 1 and "16 others wait" in caplog.text
    store.delete(voice(15))
    assert store.get(voice(15)) is None
    monkeypatch.undo()
    disk.gate.set()
    store.flush()
    assert [disk.has(voice(i)) for i in range(40)] == [i < 15 for i in range(40)]
    store.close()


def test_closing_writes_what_waits_and_later_puts_are_logged(tmp_path, caplog, monkeypatch):
    store, disk = small_over_gated(tmp_path)
    store.put(cold(voice(0)))
    when_waited_for(monkeypatch, disk.gate.set)
    store.close()
    assert disk.has(voice(0)) and not caplog.records
    store.put(cold(voice(1)))
    store.close()
    assert "is not written" in caplog.text and not disk.has(voice(1))


def test_without_writing_behind_all_tiers_have_it_at_once(tmp_path):
    disk = DiskStore(tmp_path)
    with TieredStore(MemoryStore(), disk, write_behind=False) as store:
        store.put(cold(voice(0)))
        assert disk.has(voice(0))


# ---------------------------------------------------------------------- SpeakerCache


@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_that_ask_for_the_same_wait_for_one_that_builds(kind, stores, monkeypatch):
    store, key, built, all_there = stores(kind), voice(0), [], threading.Barrier(16)
    cache, clock = SpeakerCache(store), Clock()
    monkeypatch.setattr("kvcache.prefixes._cache.time", clock)

    def build():
        built.append(threading.get_ident())
        until(lambda: cache._waiting[key] == 16)
        clock.now += 0.25
        return cold(key)

    def ask(_):
        all_there.wait()
        return cache.get_or_build(key, build)

    with ThreadPoolExecutor(16) as pool:
        assert all(exact(found, key) for found in pool.map(ask, range(16)))
    assert len(built) == cache.stats().built == 1
    assert store.hits == 15 and cache.stats().build_seconds == 0.25
    assert not cache._building and not cache._waiting


def test_those_that_ask_for_different_ones_do_not_wait_for_each_other():
    cache, both = SpeakerCache(MemoryStore()), threading.Barrier(2, timeout=30)

    def ask(i):
        def build():
            both.wait()  # passes only if both are building
            return cold(voice(i))

        return cache.get_or_build(voice(i), build)

    with ThreadPoolExecutor(2) as pool:
        assert all(exact(found, voice(i)) for i, found in enumerate(pool.map(ask, range(2))))


def test_an_error_is_its_callers_and_the_next_one_tries():
    cache, key, tries, all_there = SpeakerCache(MemoryStore()), voice(0), [], threading.Barrier(8)

    def build():
        tries.append(1)
        until(lambda: cache._waiting[key] == 9 - len(tries))  # all but those that have failed
        if len(tries) <= 2:
            raise ZeroDivisionError
        return cold(key)

    def ask(_):
        all_there.wait()
        try:
            return cache.get_or_build(key, build)
        except ZeroDivisionError as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert sum(isinstance(answer, ZeroDivisionError) for answer in answers) == 2
    assert sum(exact(answer, key) for answer in answers if not isinstance(answer, ZeroDivisionError)) == 6
    assert len(tries) == 3 and not cache._building
    assert cache.stats().built == 1


def test_extending_goes_on_from_the_longest_known_beginning():
    cache, starts = SpeakerCache(MemoryStore()), []

    def ask(*tokens):
        key = ids(*tokens)

        def extend(start):
            starts.append(0 if start is None else len(start))
            assert start is None or exact(start, key.first(len(start)))
            return cold(key)

        assert exact(cache.get_or_extend(key, extend), key)

    for tokens in ((1, 2, 3), (1, 2, 3, 4, 5), (1, 2, 3, 4, 6, 7), (1, 2), (1, 9), (2,), (1, 2, 3, 4, 6)):
        ask(*tokens)
    assert starts == [0, 3, 4, 1, 0]
    stats = cache.stats()
    assert (stats.built, stats.extended, stats.hits) == (2, 3, {"memory": 2})


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_found_extended_and_built_adds_up_to_what_was_asked(kind, stores):
    store, random = stores(kind, max_bytes=3 * len(cold(voice(0)).to_bytes())), Random(0)
    cache, built = SpeakerCache(store), []
    for asked in range(1, 80):
        key = ids(random.randrange(2), *(random.randrange(3) for _ in range(random.randrange(5))))

        def extend(start, key=key):
            built.append(start)
            return cold(key)

        assert exact(cache.get_or_extend(key, extend), key)
        settled(store)
        if asked % 10 == 0:
            cache.evict(key)
            assert not store.has(key)
        stats = cache.stats()
        assert sum(stats.hits.values()) + stats.extended + stats.built == asked == store.hits + store.misses
        assert (stats.built, stats.extended) == (built.count(None), len(built) - built.count(None))
        assert stats.nbytes == {tier.name: tier.nbytes for tier in store.tiers}


def test_what_is_pinned_ahead_stays(stores):
    store, keys = stores("memory+disk", max_bytes=2 * len(cold(voice(0)).to_bytes())), [voice(i) for i in range(6)]
    cache = SpeakerCache(store)
    cache.pin(keys[0])
    for key in keys:
        cache.get_or_build(key, lambda key=key: cold(key))
    assert exact(cache.get(keys[0]), keys[0])
    assert not all(store.has(key) for key in keys)
    cache.evict(keys[0])
    assert cache.get(keys[0]) is None


@pytest.mark.parametrize("other", [voice(1), voice(0, tokens=5), voice(0, model="n"), voice(0, dtype=torch.float16)])
def test_a_build_of_something_else_is_refused_and_not_kept(other):
    cache, key = SpeakerCache(MemoryStore()), voice(0)
    for ask in (
        lambda: cache.get_or_build(key, lambda: cold(other)),
        lambda: cache.get_or_extend(key, lambda _: cold(other)),
    ):
        with pytest.raises(InputError, match="build exactly what the key says"):
            ask()
    assert cache.stats().nbytes == {"memory": 0} and cache.get(key) is None
    assert exact(cache.get_or_build(key, lambda: cold(key)), key)


# ---------------------------------------------------------------------- looked after


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
        store._write(key.address, data)
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
        store._files.pipe_file(f"{store._folder}/sarah.voice.safetensors", bytes(10**6))
    else:
        (tmp_path / f"{kind.removesuffix('-file')}-a" / "sarah.voice.safetensors").write_bytes(bytes(10**6))
    assert store.nbytes == len(cold(voice(0)).to_bytes())
    store.put(cold(voice(1)))  # drives out the first, and nothing else
    assert [entry.address for entry in store.entries()] == [voice(1).address]
    if kind == "remote-memory":
        assert store._files.exists(f"{store._folder}/sarah.voice.safetensors")
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
    assert _written(entry) == seconds


def test_what_continues_another_prefix_leaves_like_any(tmp_path):
    # Its row in the index knows the parent, which a look at the file does not tell.
    parent, other = ids(1, 2), ids(7, 8, 9)
    child = replace(cold(ids(1, 2, 3)), parent=parent.address)
    size = len(child.to_bytes())
    store = DiskStore(tmp_path, max_bytes=size + size // 2)
    store.put(child)
    store.put(cold(other))
    assert [entry.address for entry in store.entries()] == [other.address]
