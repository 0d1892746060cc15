"""Snapshots on a Redis or Valkey server, shared by a fleet."""

import re
import time
from typing import Any

from kvcache.errors import InputError, MissingDependencyError
from kvcache.stores.base import BlobStore, StoreEntry, check_address, check_room

_NAMESPACE = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LARGEST = 512 * 2**20  # a Redis string

# Makes room and writes in one step, so that the budget holds whoever writes at the same time. What has expired on the
# server is struck from the books first.
_PUT = """
local prefix, address, size, budget, ttl, now = ARGV[1], ARGV[2], tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]
local used, sizes, pins = KEYS[2], KEYS[3], KEYS[4]
local total, pinned = 0, 0
local all = redis.call('HGETALL', sizes)
for i = 1, #all, 2 do
  if all[i] ~= address then
    if redis.call('EXISTS', prefix .. all[i]) == 0 then
      redis.call('HDEL', sizes, all[i])
      redis.call('ZREM', used, all[i])
    else
      total = total + tonumber(all[i + 1])
      if redis.call('SISMEMBER', pins, all[i]) == 1 then pinned = pinned + tonumber(all[i + 1]) end
    end
  end
end
if budget > 0 and pinned + size > budget then return pinned end
if budget > 0 and total + size > budget then
  for _, old in ipairs(redis.call('ZRANGE', used, 0, -1)) do
    if total + size <= budget then break end
    if old ~= address and redis.call('SISMEMBER', pins, old) == 0 then
      total = total - tonumber(redis.call('HGET', sizes, old) or '0')
      redis.call('DEL', prefix .. old)
      redis.call('HDEL', sizes, old)
      redis.call('ZREM', used, old)
    end
  end
end
if ttl > 0 and redis.call('SISMEMBER', pins, address) == 0 then
  redis.call('SET', KEYS[1], ARGV[3], 'PX', ttl)
else
  redis.call('SET', KEYS[1], ARGV[3])
end
redis.call('HSET', sizes, address, size)
redis.call('ZADD', used, now, address)
return -1
"""


class RedisStore(BlobStore):
    """Snapshots as values of a Redis or Valkey server (extra ``redis``).

    Args:
        url: such as ``redis://host:6379/0``; ``rediss://user:password@host`` for TLS and a password, whose further
            settings the URL carries too (``?ssl_ca_certs=…``).
        namespace: what all of its keys begin with: letters, digits, dots, dashes and underscores.
        ttl: seconds after which a snapshot that is not pinned is forgotten.
        max_bytes: of all snapshots in this namespace; the least recently used leave first.
        secret: see `BlobStore`; a server that others can write to deserves one.
        timeout: seconds to wait for the server, for a connection and for each answer.

    Raises:
        InputError: for another namespace or URL, or without the package redis.
    """

    name = "redis"
    retry_after = 5.0

    def __init__(
        self,
        url: str = "redis://localhost:6379/0",
        *,
        namespace: str = "kvcache",
        ttl: float | None = None,
        max_bytes: int | str | None = None,
        secret: bytes | str | None = None,
        timeout: float = 2.0,
    ) -> None:
        super().__init__(max_bytes, secret)
        if _NAMESPACE.fullmatch(namespace) is None:
            raise InputError(
                f"namespace={namespace!r} must be 1 to 64 letters, digits, dots, dashes or underscores; give such a one"
            )
        try:
            import redis
        except ImportError as error:
            raise MissingDependencyError(
                "RedisStore needs the package redis; run: pip install 'kvcache[redis]'"
            ) from error
        self.ttl = ttl
        self._prefix = f"{{{namespace}}}:prefix:"  # in braces, so that a cluster keeps a namespace in one place
        self._books = [f"{{{namespace}}}:{name}" for name in ("used", "sizes", "pins")]
        try:
            self._client: Any = redis.Redis.from_url(url, socket_timeout=timeout, socket_connect_timeout=timeout)
        except ValueError as error:
            raise InputError(f"cannot use this URL for Redis: {error}") from error

    def _key(self, address: str) -> str:
        return self._prefix + check_address(address)

    def _has(self, address: str) -> bool:
        return bool(self._client.exists(self._key(address)))

    def _read(self, address: str) -> bytes | None:
        data: bytes | None = self._client.get(self._key(address))
        if data is not None:
            self._client.zadd(self._books[0], {address: time.time()}, xx=True)
        return data

    def _peek(self, address: str, most: int | None) -> bytes | None:
        key = self._key(address)
        data: bytes | None = self._client.get(key) if most is None else self._client.getrange(key, 0, most - 1)
        return data or None  # a range of what is not there is empty

    def _write(self, address: str, data: bytes) -> None:
        if len(data) > _LARGEST:
            raise ValueError(f"{len(data)} bytes; a value of Redis' holds {_LARGEST}")
        ttl = 0 if self.ttl is None else max(1, round(1000 * self.ttl))
        keys = [self._key(address), *self._books]
        full = self._client.eval(
            _PUT, len(keys), *keys, self._prefix, address, data, len(data), self.max_bytes or 0, ttl, time.time()
        )
        if full >= 0:
            check_room(len(data), full, self.max_bytes or 0)

    def _remove(self, address: str) -> None:
        used, sizes, pins = self._books
        pipeline = self._client.pipeline()
        pipeline.delete(self._key(address)).zrem(used, address).hdel(sizes, address).srem(pins, address).execute()

    def _pin(self, address: str, pinned: bool) -> None:
        pipeline = self._client.pipeline()
        if pinned:
            pipeline.sadd(self._books[2], address).persist(self._key(address))
        else:
            pipeline.srem(self._books[2], address)
            if self.ttl is not None:
                pipeline.pexpire(self._key(address), max(1, round(1000 * self.ttl)))
        pipeline.execute()

    def _used(self) -> int:
        return sum(self._sizes().values())

    def _sizes(self) -> dict[bytes, int]:
        """Of what is there: what has expired on the server is in the books until the next is written."""
        sizes: dict[bytes, bytes] = self._client.hgetall(self._books[1])
        pipeline = self._client.pipeline()
        for address in sizes:
            pipeline.exists(self._prefix + address.decode())
        there = pipeline.execute()
        return {address: int(size) for (address, size), found in zip(sizes.items(), there, strict=True) if found}

    def _entries(self) -> list[StoreEntry]:
        used, _, pins = self._books
        times: dict[bytes, float] = dict(self._client.zrange(used, 0, -1, withscores=True))
        pinned: set[bytes] = set(self._client.smembers(pins))
        return [
            StoreEntry(address.decode(), size, times.get(address), address in pinned)
            for address, size in self._sizes().items()
        ]

    def close(self) -> None:
        self._client.close()
