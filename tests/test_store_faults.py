"""What stores stand on breaks: files rot, writers are killed, disks fill up, servers leave. It costs a computation."""

import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures import thread as pools
from contextlib import contextmanager, nullcontext, suppress
from itertools import count
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from support.clocks import Clock
from support.inside import stores as inside
from support.ports import deserted
from support.searching import examples
from support.snapshots import PROCESSES, cold, exact, running_redis, voice
from support.waiting import until

from kvcache import CorruptError, PrefixSnapshot, SpeakerCache
from kvcache.errors import StoreError
from kvcache.prefixes.stores import DiskStore, MemoryStore, RedisStore, RemoteStore, TieredStore

pytestmark = pytest.mark.one_release


@pytest.fixture
def children():
    """Processes to submit work to, which share nothing with this one; the next one that is free does it."""
    with ProcessPoolExecutor(4, mp_context=PROCESSES) as pool:
        yield pool


def served(cache, key):
    """Whether a request for `key` gets what a cold build gives."""
    return exact(cache.get_or_build(key, lambda: cold(key)), key)


def held(folder):
    """The names and bytes of the snapshots in a folder, and whether each is what it says it is."""
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        snapshot = PrefixSnapshot.from_bytes(data)
        assert snapshot.key.address == path.stem and exact(snapshot, snapshot.key)
        yield path.name, len(data)


# ---------------------------------------------------------------------- files rot


def damaged(data, count):
    """The file with one byte changed: each byte of its header, and as many others as make `count`; its parts; and more."""
    random, header = Random(0), 8 + int.from_bytes(data[:8], "little")
    assert header < 1500
    for at in [*range(header), *random.sample(range(header, len(data)), count - header)]:
        yield data[:at] + bytes([data[at] ^ random.randrange(1, 256)]) + data[at + 1 :]
    for length in [*range(20), header - 1, header, header + 1, *random.sample(range(len(data)), 100), len(data) - 1]:
        yield data[:length]
    for added in (b"\0", b"\n", b"}", data[:1], data, bytes(1000)):
        yield data + added


def test_every_changed_byte_is_noticed():
    data = cold(voice(0, tokens=1000, model="a" * 64)).to_bytes()
    assert 200_000 < len(data) < 400_000 and exact(PrefixSnapshot.from_bytes(data), voice(0, 1000, model="a" * 64))
    for broken in damaged(data, 3000):
        with pytest.raises(CorruptError, match="write it again"):
            PrefixSnapshot.from_bytes(broken)


def test_every_changed_bit_of_a_signed_header_is_noticed():
    data = cold(voice(0, model="a" * 64)).to_bytes(b"secret")
    for bit in range(8 * (8 + int.from_bytes(data[:8], "little"))):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptError):
            PrefixSnapshot.from_bytes(bytes(broken), b"secret")


def test_a_file_that_has_rotted_is_computed_and_written_again(tmp_path, caplog):
    key = voice(0, tokens=100)
    data = cold(key).to_bytes()
    cache = SpeakerCache(DiskStore(tmp_path))
    path = tmp_path / f"{key.address}.safetensors"
    for i, broken in enumerate(list(damaged(data, 1500))[::20]):
        path.write_bytes(broken)
        assert served(cache, key)
        assert len(caplog.records) == i + 1 and "is not that (" in caplog.records[i].getMessage()
        assert PrefixSnapshot.from_bytes(path.read_bytes()).key == key
        assert cache.get(key) is not None
    assert cache.stats().built == i + 1


# ---------------------------------------------------------------------- writers are killed


def killed_after(steps, folder, budget):
    """How a writer ended that was killed after so many steps, in a process forked from this one: milliseconds."""
    if (child := os.fork()) == 0:
        signal.alarm(60)  # ends it, should it write nothing
        write_until_killed(steps, folder, budget)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def write_until_killed(steps, folder, budget):
    """A step is a call that reaches the file system, or half of a file."""
    random, store, taken = Random(steps), DiskStore(folder, budget), count()
    snapshots = [cold(voice(random.randrange(100), tokens=500)) for _ in range(4)]

    def step(event, args=()):
        if event.startswith(("open", "os.", "fcntl.")) and next(taken) == steps:
            os.kill(os.getpid(), signal.SIGKILL)

    def in_halves(path, data):
        with path.open("wb", buffering=0) as file:
            for half in (data[: len(data) // 2], data[len(data) // 2 :]):
                step("open")
                file.write(half)

    Path.write_bytes = in_halves
    sys.addaudithook(step)
    while True:
        store.put(random.choice(snapshots))


@pytest.mark.search
def test_a_writer_killed_at_any_moment_leaves_nothing_broken(tmp_path, children):
    budget = 5 * len(cold(voice(0, tokens=500)).to_bytes()) + 100
    for steps in Random(0).sample(range(200), examples(120)):
        assert children.submit(killed_after, steps, tmp_path, budget).result() == -signal.SIGKILL
        assert sum(size for _, size in held(tmp_path)) == DiskStore(tmp_path).nbytes <= budget
        assert sum(path.stat().st_size for path in tmp_path.rglob("*") if counts(path)) <= budget
    store, key = DiskStore(tmp_path, budget), voice(1000)
    store.put(cold(key))
    assert exact(store.get(key), key)
    assert not list(tmp_path.rglob("*.partial"))
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ""}  # the lock and our folder have none


# ---------------------------------------------------------------------- disks fill up, or cannot be written to


def with_files_of_at_most(limit, folder):
    """As on a disk that is full; what was logged."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    lines = logged()
    cache, large, small = SpeakerCache(DiskStore(folder)), voice(0, tokens=200), voice(1)
    for _ in range(2):
        assert served(cache, small) and served(cache, large)
    assert cache.stats().built == 3 and exact(cache.get(small), small)
    return lines


def logged():
    """The lines that the stores of this child process log from now on."""
    lines, logger = [], logging.getLogger("kvcache.stores")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.handlers, logger.propagate = [handler], False
    return lines


def test_what_the_disk_has_no_room_for_is_computed_each_time(tmp_path, children):
    lines = children.submit(with_files_of_at_most, 20_000, tmp_path).result()
    assert len(lines) == 2 and all("could not write (OSError: [Errno 27] File too large" in line for line in lines)
    assert len(list(held(tmp_path))) == 1 and not list(tmp_path.rglob("*.partial"))


@contextmanager
def mounted(folder, *options):
    """A file system of memory in this folder, where one may be mounted."""
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], capture_output=True).returncode
    ):
        pytest.skip("not allowed to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_costs_what_does_not_fit(tmp_path, caplog):
    with mounted(tmp_path, "-o", "size=256k"):
        cache, keys = SpeakerCache(DiskStore(tmp_path)), [voice(i, tokens=200) for i in range(8)]
        for key in keys * 2:
            assert served(cache, key)
        kept = len(list(held(tmp_path)))
        assert 2 <= kept < 8 and cache.stats().hits == {"disk": kept}
        assert len(caplog.records) == 16 - 2 * kept and "No space left on device" in caplog.text
        assert not list(tmp_path.rglob("*.partial"))
        cache.evict(keys[0])
        assert served(cache, keys[7]) and cache.get(keys[7])  # there is room again


@contextmanager
def read_only(folder):
    if os.geteuid():  # root may write whatever the mode says
        folder.chmod(0o500)
        yield
        folder.chmod(0o700)
    else:
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        yield


def test_a_folder_that_cannot_be_written_to_is_still_read(tmp_path, caplog):
    with mounted(tmp_path) if os.geteuid() == 0 else nullcontext():
        cache, known, new = SpeakerCache(DiskStore(tmp_path)), voice(0), voice(1)
        assert served(cache, known)
        with read_only(tmp_path):
            assert served(cache, known) and cache.stats().hits == {"disk": 1}
            assert not caplog.records
            for _ in range(2):
                assert served(cache, new)
            cache.pin(known)
            cache.evict(known)
            assert served(cache, known)
        assert [line.split("(")[0].strip() for line in caplog.messages] == [
            f"disk: could not {what}" for what in ("write", "write", "pin", "remove")
        ]


@pytest.mark.parametrize("through", ["file/store", "loop/store", "x" * 300])
def test_a_folder_that_cannot_be_costs_a_computation_each_time(through, tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"something else")
    (tmp_path / "loop").symlink_to("loop")
    cache, key = SpeakerCache(TieredStore(DiskStore(tmp_path / through), write_behind=False)), voice(0)
    for asked in range(1, 4):
        assert served(cache, key)
        assert cache.stats().built == asked <= len(caplog.records)
    cache.pin(key)
    cache.evict(key)
    assert cache.stats().nbytes == {"disk": 0}
    assert (tmp_path / "file").read_bytes() == b"something else"


@pytest.mark.parametrize("deleted", ["files", "folder"])
def test_what_is_deleted_under_a_store_is_computed_again(deleted, tmp_path):
    folder, random = tmp_path / "store", Random(0)
    cache = SpeakerCache(TieredStore(MemoryStore(cold(voice(0)).nbytes), DiskStore(folder, "20kB")))

    def delete():
        if deleted == "folder":
            shutil.rmtree(folder, ignore_errors=True)
        for path in list(folder.glob("*")):
            if path.is_file():
                path.unlink(missing_ok=True)

    with ThreadPoolExecutor(1) as pool:
        for _ in range(150):
            deleting = pool.submit(delete)
            for _ in range(3):  # the first while it is deleted
                assert served(cache, voice(random.randrange(6)))
            deleting.result()
    cache.store.flush()  # what waits to be written is served from there, all of it where the writer had no turn
    built = cache.stats().built
    delete()
    for i in range(6):
        assert served(cache, voice(i))
    assert cache.stats().built > built
    cache.evict(voice(9))
    assert served(cache, voice(9))
    cache.close()
    assert DiskStore(folder).has(voice(9))


# ---------------------------------------------------------------------- Redis leaves


def test_a_server_that_leaves_and_comes_back(tmp_path, caplog, monkeypatch):
    random, clock = Random(0), Clock()
    monkeypatch.setattr(inside.BASE_CLOCK, clock)
    with running_redis(tmp_path) as server:
        far = RedisStore(server.url, max_bytes="20kB", timeout=20)
        far.retry_after = 0.2
        with TieredStore(MemoryStore(cold(voice(0)).nbytes), far) as store:
            cache = SpeakerCache(store)

            def requests(enough, least=30, most=3000):
                for made in range(most):
                    if made >= least and enough():
                        return
                    assert served(cache, voice(random.randrange(6)))
                    clock.now += 0.03
                raise AssertionError(f"{most} requests were not enough")

            requests(lambda: far.hits > 20)
            assert not caplog.records
            for _ in range(3):
                server.stop()
                built, hits = cache.stats().built, far.hits
                requests(lambda built=built: cache.stats().built > built + 20)
                assert far.hits == hits and far.nbytes == 0
                server.start()
                requests(lambda hits=hits: far.hits > hits + 20)
            assert {record.levelname for record in caplog.records} == {"WARNING"}
            assert "left alone for 0.2 s" in caplog.text


def test_a_server_that_leaves_amid_requests(tmp_path):
    with running_redis(tmp_path) as server:
        far = RedisStore(server.url, timeout=5)
        far.retry_after = 0  # each request finds it as it is
        with TieredStore(MemoryStore(cold(voice(0)).nbytes), far) as store:
            cache, stop, made = SpeakerCache(store), threading.Event(), [0] * 3

            def requests(i):
                random = Random(i)
                while not stop.is_set():
                    assert served(cache, voice(random.randrange(20)))
                    made[i] += 1

            def each_makes(more):
                goals = [n + more for n in made]
                until(lambda: wait(asking, 0).done or all(n >= goal for n, goal in zip(made, goals, strict=True)))

            with ThreadPoolExecutor(3) as pool:
                asking = [pool.submit(requests, i) for i in range(3)]
                try:
                    for _ in range(8):
                        hits = far.hits
                        until(lambda hits=hits: wait(asking, 0).done or far.hits > hits + 5)
                        server.stop()
                        each_makes(5)
                        server.start()
                finally:
                    stop.set()
                for future in asking:
                    future.result()


def test_a_server_that_never_answers_is_asked_once(caplog):
    with (
        socket.create_server(("127.0.0.1", 0)) as hole,
        RedisStore(f"redis://127.0.0.1:{hole.getsockname()[1]}", timeout=0.05) as store,
    ):
        store.retry_after = 1000
        cache = SpeakerCache(store)
        for i in range(50):
            assert served(cache, voice(i % 5))
        assert cache.stats().nbytes == {"redis": 0}
    assert caplog.messages == [
        "redis: could not read (TimeoutError: Timeout reading from socket); left alone for 1000 s"
    ]


def test_a_password_is_used_and_never_logged(tmp_path, caplog):
    key = voice(0)
    with running_redis(tmp_path, password="hunter2") as server:
        with RedisStore(server.url, timeout=20) as store:
            assert served(SpeakerCache(store), key) and exact(store.get(key), key)
        assert not caplog.records
        for password in ("hunter3", ""):
            with RedisStore(server.url.replace(":hunter2@", f":{password}@" if password else "")) as store:
                store.retry_after = 0
                cache = SpeakerCache(store)
                assert served(cache, key)
                cache.pin(key)
                cache.evict(key)
                assert not store.has(key) and store.nbytes == 0
        assert len(caplog.records) >= 10 and "hunter" not in caplog.text
        with RedisStore(server.url, timeout=20) as store:
            assert exact(store.get(key), key)


SUM = """
local total = 0
for _, key in ipairs(redis.call('KEYS', ARGV[1] .. '*')) do total = total + redis.call('STRLEN', key) end
return total
"""


def test_the_budget_on_a_server_holds_whoever_writes(redis_url, caplog):
    keys = [voice(i, tokens=2 + 3 * i) for i in range(8)]
    budget, most, done = 3 * len(cold(keys[-1]).to_bytes()), 0, threading.Event()

    def work(seed):
        random = Random(seed)
        with RedisStore(redis_url, namespace="busy", max_bytes=budget, timeout=20) as store:
            for _ in range(150):
                key = random.choice(keys)
                match random.choice(("put", "put", "get", "get", "delete")):
                    case "put":
                        store.put(cold(key))
                    case "get":
                        found = store.get(key)
                        assert found is None or exact(found, key)
                    case "delete":
                        store.delete(key)

    with RedisStore(redis_url, namespace="busy", max_bytes=budget, timeout=20) as store, ThreadPoolExecutor(4) as pool:
        working = [pool.submit(work, seed) for seed in range(4)]
        for future in working:
            future.add_done_callback(lambda _: done.set() if all(each.done() for each in working) else None)
        while not done.wait(0.001):
            most = max(most, inside.client_of(store).eval(SUM, 0, inside.prefix_of(store)))
        for future in working:
            future.result()
        for key in keys:
            store.put(cold(key))
        assert not caplog.records
        assert 0 < most <= budget and store.nbytes <= budget
        names = {address.decode() for address in inside.client_of(store).hkeys(inside.books_of(store)[1])}
        assert names == {
            address.decode() for address in inside.client_of(store).zrange(inside.books_of(store)[0], 0, -1)
        }
        assert names == {key.address for key in keys if store.has(key)}
        # The last ones put are those that stayed.
        assert [store.has(key) for key in keys] == sorted(store.has(key) for key in keys)


def fill(url, seeds):
    with RedisStore(url, namespace="fleet", timeout=20) as store:
        for seed in seeds:
            store.put(cold(voice(seed)))
    return os.getpid()


def find(url, seeds):
    with RedisStore(url, namespace="fleet", timeout=20) as store:
        return os.getpid(), [exact(store.get(voice(seed)), voice(seed)) for seed in seeds]


def test_what_one_process_puts_on_a_server_another_gets(redis_url):
    with (
        ProcessPoolExecutor(1, mp_context=PROCESSES) as one,
        ProcessPoolExecutor(1, mp_context=PROCESSES) as two,
    ):
        writer, other = one.submit(fill, redis_url, range(5)), two.submit(fill, redis_url, range(5, 10))
        assert writer.result() != other.result()
        for pool, seeds in ((two, range(5)), (one, range(5, 10))):
            pid, found = pool.submit(find, redis_url, seeds).result()
            assert found == [True] * 5 and pid in (writer.result(), other.result())


# ---------------------------------------------------------------------- several processes, one folder


def write_and_fork(folder):
    """As a server that loads a model and then forks: how the child ended, which also writes."""
    store = TieredStore(MemoryStore(), DiskStore(folder))
    store.put(cold(voice(0)))
    store.flush()
    if (child := os.fork()) == 0:
        signal.alarm(30)  # ends it, should it wait for the thread that it has not got
        for i in range(1, 40):
            store.put(cold(voice(i)))
            store.flush()  # or it would drop what comes faster than it writes
        store.delete(voice(1))
        store.close()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_process_forked_from_one_that_has_written_writes_too(tmp_path, children):
    assert children.submit(write_and_fork, tmp_path).result() == 0
    assert [DiskStore(tmp_path).has(voice(i)) for i in range(40)] == [i != 1 for i in range(40)]


def work(folder, budget, seed, times):
    """Ask, pin and forget at random; how often something was found, and what was logged beside what did not fit or had no turn."""
    random, lines = Random(seed), logged()
    cache = SpeakerCache(DiskStore(folder, budget))
    keys = [voice(i, tokens=10 + 30 * i) for i in range(8)]
    asked = 0
    for _ in range(times):
        key = random.choice(keys)
        match random.choice(("ask",) * 8 + ("evict", "pin", "unpin")):
            case "ask":
                assert served(cache, key)
                asked += 1
            case "evict":
                cache.evict(key)
            case "pin":
                cache.pin(keys[seed])  # never all of them
            case "unpin":
                cache.pin(keys[seed], False)
    stats = cache.stats()
    assert stats.hits["disk"] + stats.built == asked
    expected = ("do not fit beside", "another process holds the lock")  # four that do nothing but write meet often
    return stats.hits["disk"], stats.built, [line for line in lines if not any(word in line for word in expected)]


@pytest.mark.parametrize("other", ["unpins", "pins"])
def test_another_process_that_changes_the_pin_meanwhile_is_no_failure(other, tmp_path, monkeypatch):
    store, lines = DiskStore(tmp_path), logged()
    cache = SpeakerCache(store)
    assert served(cache, voice(0))
    opened = os.open

    def meanwhile(path, *how, **more):
        if not str(path).endswith(".pin"):
            return opened(path, *how, **more)
        if other == "pins":
            os.close(opened(path, *how, **more))
        file = opened(path, *how, **more)
        if other == "unpins":
            os.unlink(path)
        return file

    monkeypatch.setattr(os, "open", meanwhile)
    cache.pin(voice(0))
    monkeypatch.undo()
    assert lines == []
    assert [entry.pinned for entry in store.entries()] == [other == "pins"]
    cache.pin(voice(0))
    assert [entry.pinned for entry in store.entries()] == [True]


def counts(entry):
    """Whether this is a snapshot, or is going to be one."""
    return entry.name.endswith((".safetensors", ".partial"))


def bytes_in(folder):
    """The folder's bytes at one moment, half-written files too: what two looks in a row agree on. Or None."""

    def look():
        found = set()
        for place in (folder, folder / ".kvcache"):
            with os.scandir(place) as entries:
                found |= {(entry.name, entry.inode(), entry.stat().st_size) for entry in entries if counts(entry)}
        return found

    with suppress(FileNotFoundError):
        first = look()
        if first == look():
            return sum(size for _, _, size in first)
    return None


@pytest.mark.parametrize("times", [150, pytest.param(1500, marks=pytest.mark.slow)])
def test_processes_that_share_a_folder_keep_to_its_budget_and_to_the_truth(times, tmp_path, children):
    budget = 2 * len(cold(voice(0, tokens=220)).to_bytes())
    working = [children.submit(work, tmp_path, budget, seed, times) for seed in range(4)]
    sizes = []
    while wait(working, 0.0002).not_done:
        if (size := bytes_in(tmp_path)) is not None:
            assert size <= budget
            sizes.append(size)
    for future in working:
        hits, built, lines = future.result()
        assert hits > 0 and built > 0 and lines == []
    assert max(sizes) > 0
    assert sum(size for _, size in held(tmp_path)) <= budget


# ---------------------------------------------------------------------- locations hang


def test_a_location_that_hangs_is_not_asked_again_before_it_answers(tmp_path):
    key, over, asked = voice(0), threading.Event(), count()
    store = RemoteStore(f"memory://{tmp_path}", timeout=0.02)
    store.retry_after, files = 0.0, inside.files_of(store)

    def hang(*args, **kwargs):
        next(asked)
        over.wait(60)

    inside.on_files(store, SimpleNamespace(info=hang, exists=hang, makedirs=hang, ls=hang))
    before = threading.active_count()
    for _ in range(20):
        assert store.get(key) is None and not store.has(key) and store.nbytes == 0
        store.put(cold(key))
        store.pin(key)
    assert next(asked) == 1 and threading.active_count() <= before + 1
    over.set()
    until(lambda: threading.active_count() == before)
    inside.on_files(store, files)
    store.timeout = 20
    store.put(cold(key))
    assert exact(store.get(key), key)


def test_a_server_that_hangs_costs_one_thread():
    pytest.importorskip("redis")
    over = threading.Event()
    with RedisStore("redis://127.0.0.1:1", timeout=0.01) as store:
        before = threading.active_count()
        for _ in range(5):
            with pytest.raises(TimeoutError):
                inside.ask(store, lambda: over.wait(60))
        assert threading.active_count() <= before + 1
        over.set()


# ---------------------------------------------------------------------- programs end


class Last(DiskStore):
    """Writes when no thread can be started any more."""

    def put(self, snapshot):
        until(lambda: pools._shutdown)
        super().put(snapshot)


def put_and_end(folder, key):
    TieredStore(MemoryStore(), Last(folder)).put(large(key))


def large(key):
    """A snapshot whose file has several chunks to hash."""
    states = torch.full((1, 8, len(key), 2**16), 0.5)
    return PrefixSnapshot(key, ((states, states.clone()),))


def test_a_large_prefix_of_a_program_that_ends_at_once_is_stored(tmp_path):
    key = voice(0)
    process = PROCESSES.Process(target=put_and_end, args=(tmp_path, key))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    ((_, size),) = ((path, path.stat().st_size) for path in tmp_path.glob("*.safetensors"))
    found = DiskStore(tmp_path).get(key)
    assert size > 2 * 4 * 2**20 and torch.equal(found.layers[0][0], large(key).layers[0][0])


# ---------------------------------------------------------------------- looked after while down


@pytest.mark.parametrize("what", ["entries", "peek", "read_verified", "add", "remove", "pin_address"])
def test_who_looks_after_a_store_is_told_why_it_cannot_be(what, tmp_path):
    key, disk = voice(0), DiskStore(tmp_path / "file")
    (tmp_path / "file").touch()
    with deserted() as port:
        for store in (RedisStore(f"redis://127.0.0.1:{port}", timeout=1), disk):
            given = {"entries": (), "add": (cold(key).to_bytes(),)}.get(what, (key.address,))
            with pytest.raises(StoreError, match=rf"{store.name}: could not .+ \(.+\); check that it is up"):
                getattr(store, what)(*given)


def test_a_location_that_does_not_answer_is_told_in_time(tmp_path):
    store, over = RemoteStore(f"memory://{tmp_path}", timeout=0.01), threading.Event()
    hangs = SimpleNamespace(ls=lambda *args, **kwargs: over.wait(10), info=lambda *args: over.wait(10))
    inside.on_files(store, hangs)
    for ask in (store.entries, lambda: store.peek(voice(0).address)):
        with pytest.raises(StoreError, match="Timeout"):
            ask()
    over.set()
