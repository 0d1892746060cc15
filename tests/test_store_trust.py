"""What is stored is not trusted, and no name leads out of a store."""

import io
import pickle
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.inside.stores import check_address, write
from support.snapshots import BLOBS, KINDS, cold, exact, voice
from support.stores import HOSTILE, search, settled

from kvcache import InputError, PrefixKey, SpeakerCache
from kvcache.cache import pack
from kvcache.prefixes.stores import (
    DiskStore,
    MemoryStore,
    RedisStore,
    RemoteStore,
    TieredStore,
    default_folder,
    open_store,
)

pytestmark = pytest.mark.one_release

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
    write(store, key.address, JUNK[junk](mark))
    assert store.get(key) is None
    assert len(caplog.records) == 1 and caplog.records[0].levelname == "WARNING"
    assert exact(SpeakerCache(store).get_or_build(key, lambda: cold(key)), key)
    assert exact(store.get(key), key)
    assert not mark.exists()


@pytest.mark.parametrize("kind", BLOBS)
def test_a_snapshot_at_the_address_of_another_is_refused_and_replaced(kind, stores, caplog):
    store, mine, other = stores(kind), voice(0), voice(1)
    store.put(cold(mine))
    write(store, other.address, store.peek(mine.address))
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
