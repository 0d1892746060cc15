"""Prefixes that anyone who knows their key can compute again, stores of every kind, a real Redis server, processes."""

import hashlib
import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcache import PrefixKey, PrefixSnapshot
from kvcache.models import tensor_bytes
from kvcache.prefixes.stores import DiskStore, MemoryStore, RedisStore, RemoteStore, TieredStore
from support.ports import held
from support.waiting import until

torch.set_num_threads(1)  # in child processes too, which do not load conftest.py

LAYERS, HEADS, DIM = 2, 2, 8

BLOBS = ("disk", "redis", "remote-memory", "remote-file")
KINDS = ("memory", *BLOBS, "memory+disk", "memory+disk+redis")

# Forked from a server with one thread that has imported all this once, so that a child is there within milliseconds,
# whatever threads the tests have started.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "hypothesis", "redis", "fsspec", "kvcache.prefixes.stores"])


def ids(*tokens: int, model: str = "m") -> PrefixKey:
    return PrefixKey(model, torch.tensor(tokens))


def voice(seed: int, tokens: int = 6, dtype: torch.dtype = torch.float32, model: str = "m") -> PrefixKey:
    """A key of embeddings, or with `torch.long` of ids, that has nothing in common with that of another seed."""
    random = torch.Generator().manual_seed(seed)
    if dtype is torch.long:
        return ids(seed, *torch.randint(100, (tokens - 1,), generator=random).tolist(), model=model)
    return PrefixKey(model, torch.randn(tokens, 3, generator=random).to(dtype))


def cold(key: PrefixKey) -> PrefixSnapshot:
    """What computing `key` gives. Causal, as attention is, and otherwise the bits of any numbers below 2."""
    dtype = torch.bfloat16 if "bf16" in key.model else torch.float32
    raw, count = bytes(tensor_bytes(key.content)), len(key)
    so_far, rows = hashlib.shake_128(f"{key.model} {key.content.dtype}".encode()), []
    for token in range(count):
        so_far.update(raw[len(raw) // count * token : len(raw) // count * (token + 1)])
        rows.append(so_far.digest(LAYERS * 2 * HEADS * DIM * dtype.itemsize))
    states = torch.frombuffer(bytearray(b"".join(rows)), dtype=dtype).reshape(count, LAYERS, 2, HEADS, DIM)
    words = states.view({4: torch.int32, 2: torch.int16}[dtype.itemsize])
    words &= ~(1 << (8 * dtype.itemsize - 2))  # the highest bit of the exponent: neither NaN nor infinite
    layers = states.permute(1, 2, 3, 0, 4).unsqueeze(2)
    return PrefixSnapshot(key, tuple((keys.contiguous(), values.contiguous()) for keys, values in layers))


def exact(found: PrefixSnapshot | None, key: PrefixKey) -> bool:
    """Whether this is, to the last bit, what computing `key` gives."""

    def parts(snapshot: PrefixSnapshot) -> dict[str, Any]:
        return {name: (t.dtype, t.shape, bytes(tensor_bytes(t))) for name, t in snapshot.tensors().items()}

    return found is not None and found.key == key and parts(found) == parts(cold(key))


class Stores:
    """Opens stores of any kind, each `where` another place, and closes them at the end of the test."""

    def __init__(self, request: pytest.FixtureRequest, folder: Path) -> None:
        self._request, self._folder = request, folder
        self._open: list[Any] = []

    @cached_property
    def _redis_url(self) -> str:
        url: str = self._request.getfixturevalue("redis_url")  # only now, as without a server it skips the test
        return url

    def __call__(self, kind: str, where: str = "a", **options: Any) -> Any:
        store = self._make(kind, where, options)
        self._open.append(store)
        return store

    def _make(self, kind: str, where: str, options: dict[str, Any]) -> Any:
        match kind:
            case "memory":
                return MemoryStore(**options)
            case "disk":
                return DiskStore(self._folder / f"disk-{where}", **options)
            case "remote-file":
                return RemoteStore(f"file://{self._folder}/remote-{where}", **options)
            case "remote-memory":
                return RemoteStore(f"memory://{self._folder}/{where}", **options)
            case "redis":
                name = hashlib.sha256(f"{self._folder} {where}".encode()).hexdigest()
                return RedisStore(self._redis_url, namespace=name, timeout=20, **options)
        return TieredStore(*(self._make(tier, where, options) for tier in kind.split("+")))

    def close(self) -> None:
        for store in self._open:
            store.close()


@contextmanager
def running_redis(folder: Path, *options: str, password: str = "") -> "Iterator[RedisServer]":
    """A server of this user's own on a free port; skips the test where there is none to start."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    redis = pytest.importorskip("redis")
    server = RedisServer(redis, folder, password, options)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        server.port.close()


class RedisServer:
    def __init__(self, redis: Any, folder: Path, password: str, options: Sequence[str]) -> None:
        self._redis, self._folder = redis, folder
        self._process: subprocess.Popen[bytes] | None = None
        self._options = [*(("--requirepass", password) if password else ()), *options]
        self.port = held()  # until the end, so that it is this server's also while that is down
        self._number = self.port.getsockname()[1]
        self.url = f"redis://{f':{password}@' if password else ''}127.0.0.1:{self._number}/0"

    def start(self) -> None:
        if sys.platform != "linux":  # where no server may listen on a port that is held
            self.port.close()
        command = [
            "redis-server",
            "--port",
            str(self._number),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--dir",
            str(self._folder),
        ]
        process = self._process = subprocess.Popen([*command, *self._options], stdout=subprocess.DEVNULL)
        with self._redis.Redis.from_url(self.url) as client:

            def answers() -> Any:
                assert process.poll() is None, "redis-server does not start"
                with suppress(self._redis.ConnectionError):
                    return client.ping()
                return None

            until(answers)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
