"""Redis servers that refuse, lie, hang or hold other things: hits are served where they can be, and no request fails."""

import threading
from contextlib import contextmanager, suppress

import pytest
import torch
from support.inside import stores as inside
from support.ports import deserted, held
from support.snapshots import cold, exact, running_redis, voice

from kvcache import InputError, SpeakerCache
from kvcache.errors import KVCacheError, StoreError
from kvcache.prefixes.stores import RedisStore

pytestmark = pytest.mark.one_release

KEY, OTHER, NEW = voice(0), voice(1), voice(2)


def address_of(store, key):
    return inside.key_of(store, key.address)


def as_user(url, name, *rights):
    """The URL of a user of the server with these rights."""
    with RedisStore(url, timeout=20) as admin:
        inside.client_of(admin).execute_command("ACL", "SETUSER", name, "reset", "on", ">pw", "~*", *rights)
    return url.replace("redis://", f"redis://{name}:pw@")


def book(number):
    def spoil(store):
        inside.client_of(store).delete(inside.books_of(store)[number])
        inside.client_of(store).lpush(inside.books_of(store)[number], "not a book of ours")

    return spoil


def garbage(store):
    used, sizes, pins, ends, total = inside.books_of(store)
    inside.client_of(store).hset(sizes, mapping={b"\xff\xfe": "much", "../../x": "12", KEY.address: "much"})
    inside.client_of(store).zadd(used, {b"\xff\xfe": 1, "": 0})
    inside.client_of(store).sadd(pins, b"\xff\xfe")
    inside.client_of(store).zadd(ends, {"x": 0})
    inside.client_of(store).set(total, "much")


def too_little(store):
    inside.client_of(store).set(inside.books_of(store)[4], -(10**9))


def sum_of(value):
    return lambda store: inside.client_of(store).set(inside.books_of(store)[4], value)


def size_of(value):
    return lambda store: inside.client_of(store).hset(inside.books_of(store)[1], KEY.address, value)


NO_SUMS = ("nan", "inf", "-inf", "1e3", "1.5", "0x10", "9223372036854775807", "9" * 5000, "1", "0", "-7", " 1", "")
NO_SIZES = ("nan", "inf", "1e3", "1.5", "0x10", "-1000000", "9" * 5000, "")


@pytest.mark.parametrize(
    "spoil",
    [
        *(pytest.param(sum_of(value), id=f"a sum of {value[:20]!r}") for value in NO_SUMS),
        *(pytest.param(size_of(value), id=f"a size of {value[:20]!r}") for value in NO_SIZES),
    ],
)
def test_crashes_stores_redis_books_that_lie_cost_neither_budget_nor_writes(spoil, redis_url):
    size = len(cold(KEY).to_bytes())
    with RedisStore(redis_url, namespace="lies", max_bytes=4 * size, timeout=20) as store:
        inside.client_of(store).delete(*inside.client_of(store).keys("{lies}*"), "x")
        for key in (KEY, OTHER):
            store.put(cold(key))
        spoil(store)
        store.put(cold(NEW))
        assert all(store.has(key) for key in (KEY, OTHER, NEW)) and len(store.entries()) == 3
        for seed in range(10, 16):
            store.put(cold(voice(seed)))
            assert store.has(voice(seed))
        spoil(store)
        store.delete(voice(15))
        store.put(cold(voice(15)))
        there = sum(
            inside.client_of(store).strlen(name) for name in inside.client_of(store).keys(f"{inside.prefix_of(store)}*")
        )
        assert there <= 4 * size and store.has(voice(15))


@pytest.mark.parametrize("time", [float("inf"), float("-inf"), 1e300, -5.0])
def test_crashes_stores_a_time_on_a_server_that_is_none_is_not_told(time, redis_url):
    with RedisStore(redis_url, namespace="times", timeout=20) as store:
        store.put(cold(KEY))
        inside.client_of(store).zadd(inside.books_of(store)[0], {KEY.address: time})
        assert [entry.used for entry in store.entries()] == [None]


def a_list_at_the_address(store):
    inside.client_of(store).delete(address_of(store, KEY))
    inside.client_of(store).lpush(address_of(store, KEY), "x")


def full(store):
    inside.client_of(store).config_set("maxmemory", "100kb")  # less than the server itself takes
    inside.client_of(store).config_set("maxmemory-policy", "noeviction")


def a_replica(store):
    inside.client_of(store).replicaof("127.0.0.1", "1")


# What is wrong: what is done to the server, and whether what is stored is served, what is new is kept.
FAULTS = {
    "a user who may only read": (lambda store: None, ("-@all", "+@read", "+@connection"), True, False),
    "a user who may not note the use": (lambda store: None, ("+@all", "-zadd"), True, False),
    "a user who may not run scripts": (lambda store: None, ("+@all", "-@scripting"), True, False),
    "a user who may not read": (lambda store: None, ("+@all", "-get"), False, False),
    "a user of other keys": (lambda store: None, ("+@all", "resetkeys", "~other:*"), False, False),
    "a list at the address": (a_list_at_the_address, (), False, True),
    "the times are a list": (book(0), (), True, False),
    "the sizes are a list": (book(1), (), True, False),
    "the pins are a list": (book(2), (), True, False),
    "the ends are a list": (book(3), (), True, False),
    "the sum is a list": (book(4), (), True, False),
    "books full of garbage": (garbage, (), True, True),
    "a sum that is too small": (too_little, (), True, True),
    "a server without memory": (full, (), True, None),
    "a replica that may not be written to": (a_replica, (), True, False),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_crashes_stores_redis_that_refuses_still_serves(fault, tmp_path, redis_url, caplog):
    spoil, rights, serves, keeps = FAULTS[fault]
    name = fault.replace(" ", "-")
    with running_redis(tmp_path) as own:
        url = as_user(own.url, "user", *rights) if rights else own.url
        with RedisStore(own.url, namespace=name, max_bytes="100kB", timeout=20) as writer:
            for key in (KEY, OTHER):
                writer.put(cold(key))
            spoil(writer)
        with RedisStore(url, namespace=name, max_bytes="100kB", timeout=20) as store:
            cache = SpeakerCache(store)
            for _ in range(3):  # a refusal does not silence what follows
                for key in (NEW, KEY, OTHER):
                    assert exact(cache.get_or_build(key, lambda key=key: cold(key)), key)
            assert exact(store.get(OTHER), OTHER) == (serves or fault == "a list at the address")
            assert (store.hits > 0) == bool(serves or keeps)
            assert keeps is None or exact(store.get(NEW), NEW) == keeps  # None: as the server's version has it
            assert inside.available(store)  # it answers: it is not down
            store.pin(KEY)
            store.delete(OTHER)
            assert store.nbytes >= 0
            for look in (store.entries, lambda: store.peek(KEY.address)):
                with suppress(StoreError):  # by its own name, and nothing else
                    look()
    assert "left alone" not in caplog.text


def silent(connection, over):
    over.wait()


def dripping(connection, over):
    connection.sendall(b"$100000000\r\n")
    while not over.wait(0.01):
        connection.sendall(b"x")


def closing(connection, over):
    pass


def says(answer):
    def say(connection, over):
        while connection.recv(2**16):
            connection.sendall(answer)

    return say


def never_ends(connection, over):
    while not over.is_set():
        connection.sendall(b"x" * 4096)


SERVERS = {
    "says nothing": silent,
    "drips": dripping,
    "closes": closing,
    "never ends a line": never_ends,
    "speaks HTTP": says(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "speaks in zeros": says(bytes(64)),
    "says ever the same": says(b"+OK\r\n"),
    "answers with a number": says(b":7\r\n"),
    "is loading": says(b"-LOADING Redis is loading the dataset in memory\r\n"),
    "is busy": says(b"-BUSY Redis is busy running a script\r\n"),
    "has no master": says(b"-MASTERDOWN Link with MASTER is down\r\n"),
    "wants a login": says(b"-NOAUTH Authentication required.\r\n"),
    "has moved": says(b"-MOVED 866 127.0.0.1:1\r\n"),
    "promises 2^60 bytes": says(b"$1152921504606846976\r\nx"),
    "promises 2^60 answers": says(b"*1152921504606846976\r\n$1\r\nx\r\n"),
    "promises less than nothing": says(b"$-7\r\n"),
}  # fmt: skip


@contextmanager
def server_that(behave):
    """A server that is none of Redis'; its URL."""
    over = threading.Event()
    with held() as port:
        port.listen()

        def serve():
            while True:
                try:
                    connection, _ = port.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        def answer(connection):
            with connection:
                try:
                    behave(connection, over)
                except OSError:  # nobody listens any more
                    return

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield f"redis://user:hunter2@127.0.0.1:{port.getsockname()[1]}/0"
        finally:
            over.set()


@pytest.mark.parametrize("kind", SERVERS)
def test_crashes_stores_a_server_that_is_no_redis_costs_a_computation(kind, caplog):
    pytest.importorskip("redis")
    with server_that(SERVERS[kind]) as url, RedisStore(url, timeout=0.05) as store:
        store.retry_after = 1000.0
        cache = SpeakerCache(store)

        def ask():
            for key in (KEY, OTHER, KEY):
                assert exact(cache.get_or_build(key, lambda key=key: cold(key)), key)
            cache.pin(KEY)
            cache.evict(KEY)
            return store.nbytes

        assert inside.Patience().in_time(ask, 60) >= 0
        assert cache.stats().built == 3
        with suppress(KVCacheError):
            assert inside.Patience().in_time(lambda: store.read_verified(KEY.address), 60) is None
    assert caplog.records and "hunter2" not in caplog.text


def test_crashes_stores_a_server_that_is_not_there_is_asked_once():
    pytest.importorskip("redis")
    with deserted() as port, RedisStore(f"redis://127.0.0.1:{port}", timeout=1) as store:
        store.retry_after = 1000.0
        assert store.get(KEY) is None and not inside.available(store)
        asked = []
        inside.ask_by(store, asked.append)
        store.pin(KEY)
        store.delete(KEY)
        store.put(cold(KEY))
        assert store.get(KEY) is None and store.nbytes == 0 and asked == []


def test_what_the_url_says_cannot_make_it_wait(redis_url):
    """`?socket_timeout=1000` and `?decode_responses=1` are settings that this store needs for itself."""
    with RedisStore(f"{redis_url}?socket_timeout=1000&decode_responses=True", namespace="url", timeout=7) as store:
        assert inside.client_of(store).connection_pool.connection_kwargs["socket_timeout"] == 7
        store.put(cold(KEY))
        assert exact(store.get(KEY), KEY)


def test_the_books_keep_their_sum(redis_url):
    size = len(cold(KEY).to_bytes())
    with RedisStore(redis_url, namespace="sum", max_bytes=4 * size, timeout=20) as store:
        for _ in range(2):
            for seed in range(9):
                store.put(cold(voice(seed)))
                store.put(cold(voice(seed)))
        store.delete(voice(8))
        held_there = sum(
            inside.client_of(store).strlen(key) for key in inside.client_of(store).keys(f"{inside.prefix_of(store)}*")
        )
        assert store.nbytes == held_there == 3 * size == sum(entry.nbytes for entry in store.entries())
        inside.client_of(store).delete(inside.books_of(store)[4])  # lost: it is summed up again
        store.put(cold(voice(20)))
        assert store.nbytes == 4 * size
        inside.client_of(store).delete(
            inside.key_of(store, voice(20).address)
        )  # evicted by the server: room that stays unused for a while
        for seed in range(30, 34):
            store.put(cold(voice(seed)))
        assert store.nbytes == 4 * size


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@host",
        "redis://:hunter2@host:port",
        "redis://:hun/ter2@host:6379",
        "nothing",
        "",
        "redis://[::1",
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_its_password(url):
    pytest.importorskip("redis")
    with pytest.raises(InputError, match="cannot use the URL") as caught:
        RedisStore(url)
    assert "hun" not in str(caught.value) and "ter2" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__context__ is None


def test_a_snapshot_that_is_no_floating_point_is_refused(redis_url):
    with RedisStore(redis_url, namespace="ints", timeout=20) as store:
        snapshot = cold(KEY)
        ints = tuple((k.to(torch.int32), v) for k, v in snapshot.layers)
        store.put(type(snapshot)(KEY, ints))
        assert not store.has(KEY)
