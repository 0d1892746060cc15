"""Passwords stay in the process: no message, repr, event, metric, log or command output tells one, nor a part of one."""

import logging
import traceback

import pytest
from support.inside import stores as inside
from support.ports import deserted
from support.snapshots import cold, voice

from kvcache import KVCacheError, SpeakerCache
from kvcache.events import subscribe
from kvcache.io import Redactor, shown_url
from kvcache.prefixes import check_prefix_cache
from kvcache.prefixes.stores import (
    DiskStore,
    MemoryStore,
    RedisStore,
    RemoteStore,
    TieredStore,
    open_store,
    shown_place,
)

pytestmark = pytest.mark.one_release

KEY = voice(0)
# What may not appear anywhere; of the passwords with special characters neither the whole nor a part.
PARTS = ("hunter2", "hun", "ter2", "s3cr", "t0ken", "hun%2Fter2", "aHVudGVy")
LOGINS = [
    "user:hunter2@",
    ":hunter2@",
    "t0kent0ken@",
    "t0kent0kent0ken:x-oauth-basic@",
    "user:hun/ter2@",
    "user:hun@ter2@",
    "user:hun:ter2@",
    "user:hun::ter2@",
    "user:hun#ter2@",
    "user:hun?ter2@",
    "user:hun ter2@",
    "user:hun[ter2@",
    "user:hun%2Fter2@",
    "user:hun%2fter2@",
    "user:hun%40ter2%3A@",
    "user:hun&ter2=@",
    "user:hünter2@",
    "user:hun\\ter2'@",
]
QUERIES = [
    "?password=hunter2",
    "?token=hun@ter2",
    "?sig=hun%2Fter2&x=1",
    "?username=u&password=s3cr:t",
    "#hunter2",
    "?hunter2",
]


def tells(text):
    return [part for part in PARTS if part in text]


def everything_of(error):
    """An error as it would be printed, with all that it comes from, suppressed or not."""
    found = []
    while error is not None:
        found += [repr(error), str(error), *traceback.format_exception(error)]
        error = error.__cause__ or error.__context__
    return "\n".join(found)


def places(port):
    for login in LOGINS:
        yield f"redis://{login}127.0.0.1:{port}/0"
        yield f"memory://{login}127.0.0.1:{port}/voices"
        yield f"nothing://{login}127.0.0.1:{port}/voices"
        yield f"unix://{login}/nowhere/redis.sock"
        yield f"redis:/{login}127.0.0.1:{port}"
        yield f"simplecache::memory://{login}127.0.0.1:{port}/voices"
    for query in QUERIES:
        yield f"redis://127.0.0.1:{port}/0{query}"
        yield f"memory://127.0.0.1:{port}/voices{query}"
        yield f"unix:///nowhere/redis.sock{query}"


def used(place, options, said):
    """Whatever can be done with a store at this place, which is down, and all that it says."""
    for opens in (RedisStore, RemoteStore, open_store):
        try:
            store = opens(place, **(options if opens is RemoteStore else {}))
        except KVCacheError as error:
            said.append(everything_of(error))
            continue
        except OSError as error:  # a folder of that name cannot be
            said.append(f"{type(error).__name__}")
            continue
        if isinstance(store, DiskStore):
            said += [repr(store)]
            continue
        store.retry_after = 0.0
        broken(store)
        cache = SpeakerCache(TieredStore(MemoryStore(), store, write_behind=False))
        assert cache.get_or_build(KEY, lambda: cold(KEY)) is not None
        cache.pin(KEY)
        cache.evict(KEY)
        said += [repr(store), repr(cache), repr(cache.stats()), str(vars(inside.redactor_of(store)).keys())]
        for ask in (store.entries, lambda: store.peek(KEY.address), lambda: store.remove(KEY.address)):  # noqa: B023
            try:
                ask()
            except KVCacheError as error:
                said.append(everything_of(error))
        store.close()


def broken(store):
    """A location whose errors tell all that it knows, as those of HTTP do."""
    if not isinstance(store, RemoteStore):
        return
    url, options = store.opened_with

    class Files:
        protocol = "http"

        def __getattr__(self, name):
            def fails(*args, **kwargs):
                raise OSError(f"GET {url} failed: 403, {options}")

            return fails

    inside.on_files(store, Files())


@pytest.fixture
def telling(monkeypatch):
    """Remembers, in the test only, what a store was opened with."""
    begin = RemoteStore.__init__

    def init(store, url, **options):
        begin(store, url, **options)
        store.opened_with = url, options

    monkeypatch.setattr(RemoteStore, "__init__", init)


def test_crashes_stores_no_output_tells_a_password(tmp_path, caplog, monkeypatch, telling):
    pytest.importorskip("redis")
    pytest.importorskip("fsspec")
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.DEBUG, "kvcache")
    said, events = [], []
    options = {
        "password": "hunter2",
        "client_kwargs": {"headers": {"Authorization": "Bearer s3cr"}, "auth": ["u", "t0ken"]},
    }
    with deserted() as port, subscribe(events.append):
        for place in places(port):
            used(place, {}, said)
            said += [shown_place(place), shown_url(place)]
            for wrong in (lambda: SpeakerCache(place), lambda: check_prefix_cache(place)):  # noqa: B023
                with pytest.raises(KVCacheError) as caught:
                    wrong()
                said.append(str(caught.value))
        used("memory://a/b", options, said)
    said += [str(event) for event in events] + caplog.messages
    assert len(said) > 500 and events
    bad = [(tells(text), text) for text in said if tells(text)]
    assert bad == []


def test_crashes_stores_no_command_tells_a_password(capsys, monkeypatch, tmp_path):
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    pytest.importorskip("redis")
    from kvcache.cli import main

    monkeypatch.chdir(tmp_path)
    with deserted() as port:
        for place in list(places(port))[::2]:
            monkeypatch.setenv("KVCACHE_STORE", place)
            assert main(["prefixes", "list"]) in (0, 1, 2)
    written = capsys.readouterr()
    assert tells(written.out + written.err) == []
    assert "Traceback" not in written.err and written.err.count("\n") > 50


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("s3://bucket/voices", "s3://bucket/voices"),
        ("redis://user:hunter2@host:6379/0", "redis://user:…@host:6379/0"),
        ("redis://:hun/ter2@host:6379", "redis://:…@host:6379"),
        ("redis://t0ken@host", "redis://…@host"),
        ("https://t0kent0kent0kent0ken:x@host/v", "https://…@host/v"),
        ("redis://user:hun?ter2@host", "redis://…"),
        ("redis://host/0?password=a@b", "redis://…"),
        ("simplecache::s3://key:hunter2@bucket/v", "simplecache::s3://key:…@bucket/v"),
        ("redis://user:hun::ter2@host", "redis://user:…@host"),
        ("a folder", "a folder"),
    ],
)
def test_what_is_shown_of_a_url(given, shown):
    assert shown_url(given) == shown


def test_a_redactor_is_bounded_in_what_it_says_and_in_time():
    redact = Redactor("redis://user:hunter2@host")
    for text in ("x" * 10**6, "a:/" * 10**5, "a://" + "@" * 10**5, "hunter2" * 10**5, "\n" * 10**6):
        assert len(redact.text(text)) <= 401 and not tells(redact.text(text))
    assert redact.text("a\nb\x00 redis://x:y@z") == "a b� redis://…@z"
    assert repr(redact) == "Redactor()"
