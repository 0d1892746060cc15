"""Snapshots on a Redis or Valkey server, shared by a fleet."""

import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from kvcache.errors import CorruptError, InputError, MissingDependencyError
from kvcache.io import Redactor, shown_url, shown_value
from kvcache.prefixes._snapshot import is_address
from kvcache.prefixes.stores._base import (
    LONGEST_LIFE,
    LONGEST_WAIT,
    BlobStore,
    StoreEntry,
    check_address,
    check_seconds,
    check_url,
)
from kvcache.prefixes.stores._patience import Patience
from kvcache.prefixes.stores._room import check_room

_NAMESPACE = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LARGEST = 512 * 2**20  # a Redis string
_LAST = 2**33  # seconds since 1970: the year 2242
_Answer = TypeVar("_Answer")

# What the books hold that is no size of ours is none: a number of another kind would be kept as the sum, and believed.
_WHOLE = """
local function whole(text)
  if text and #text <= 15 and string.find(text, '^%d+$') then return tonumber(text) end
end
"""

# Makes room and writes in one step, so that the budget holds whoever writes at the same time. What has expired on the
# server is struck from the books first, which keep the sum: beyond a thousand, how many there are does not matter. The value
# comes last, as a script that fails half-way is not taken back: what is in the books and not there (also what the server
# itself evicted) leaves room unused until its turn comes; what would be there and not in the books would be too much.
_PUT = f"""{_WHOLE}
local prefix, address, size, budget = ARGV[1], ARGV[2], tonumber(ARGV[4]), tonumber(ARGV[5])
local ttl, now = tonumber(ARGV[6]), ARGV[7]
local used, sizes, pins, ends, total = KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local sum
local function size_of(one) return whole(redis.call('HGET', sizes, one)) or 0 end
local function note(held)
  sum = held
  redis.call('SET', total, string.format('%.0f', sum))
end
local function add_up()
  local held = 0
  for _, one in ipairs(redis.call('HVALS', sizes)) do held = held + (whole(one) or 0) end
  note(held)
end
local function strike(one)
  local held = size_of(one)
  redis.call('HDEL', sizes, one)
  redis.call('ZREM', used, one)
  redis.call('ZREM', ends, one)
  if sum < held then add_up() else note(sum - held) end
end
sum = whole(redis.call('GET', total))
if not sum or redis.call('HLEN', sizes) <= 1000 then add_up() end
local time = redis.call('TIME')
local clock = time[1] * 1000 + math.floor(time[2] / 1000)
for _, one in ipairs(redis.call('ZRANGEBYSCORE', ends, '-inf', clock, 'LIMIT', 0, 1000)) do
  if redis.call('EXISTS', prefix .. one) == 0 then strike(one) end
end
if budget > 0 then
  local old, pinned = size_of(address), 0
  for _, one in ipairs(redis.call('SMEMBERS', pins)) do
    if one ~= address then pinned = pinned + size_of(one) end
  end
  if pinned + size > budget then return pinned end
  if sum < pinned + old then add_up() end
  local place = 0
  while sum - old + size > budget do
    local one = redis.call('ZRANGE', used, place, place)[1]
    if not one then break end
    if one == address or redis.call('SISMEMBER', pins, one) == 1 then
      place = place + 1
    else
      strike(one)
      redis.call('DEL', prefix .. one)
    end
  end
end
strike(address)
local mortal = ttl > 0 and redis.call('SISMEMBER', pins, address) == 0
if mortal then redis.call('ZADD', ends, clock + ttl, address) end
redis.call('ZADD', used, now, address)
note(sum + size)
redis.call('HSET', sizes, address, size)
if mortal then
  redis.call('SET', KEYS[1], ARGV[3], 'PX', ttl)
else
  redis.call('SET', KEYS[1], ARGV[3])
end
return -1
"""

_REMOVE = f"""{_WHOLE}
redis.call('DEL', KEYS[1])
local held = whole(redis.call('HGET', KEYS[3], ARGV[1]))
if held and whole(redis.call('GET', KEYS[6])) then redis.call('DECRBY', KEYS[6], held) end
redis.call('HDEL', KEYS[3], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('SREM', KEYS[4], ARGV[1])
redis.call('ZREM', KEYS[5], ARGV[1])
"""


class RedisStore(BlobStore):
    """Snapshots as values of a Redis or Valkey server (extra ``redis``).

    Rights to read are enough to be served. What may not be written is logged, and computed by whoever asks.

    Args:
        url: such as ``redis://host:6379/0``; ``rediss://user:password@host`` for TLS and a password, whose further
            settings the URL carries too (``?ssl_ca_certs=…``). Special characters in user and password are percent-encoded.
            It is never said again, in no message and no error.
        namespace: what all of its keys begin with: letters, digits, dots, dashes and underscores.
        ttl: seconds after which a snapshot that is not pinned is forgotten.
        max_bytes: of all snapshots in this namespace; the least recently used leave first.
        secret: see `BlobStore`; a server that others can write to deserves one.
        timeout: seconds to wait for the server, for a connection and for each answer to begin or go on; five times as long
            for a whole answer. Then it counts as down, see `retry_after`.

    Raises:
        InputError: for another namespace or URL, times that are none, an empty secret, or without the package redis.
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
        timeout: float = 1.0,
    ) -> None:
        check_url(url)
        check_seconds("ttl", ttl, LONGEST_LIFE, or_none=True)
        check_seconds("timeout", timeout, LONGEST_WAIT)
        super().__init__(max_bytes, secret, Redactor(url))
        if not isinstance(namespace, str) or _NAMESPACE.fullmatch(namespace) is None:
            raise InputError(
                f"namespace={shown_value(namespace)} must be 1 to 64 letters, digits, dots, dashes or underscores; give such a one"
            )
        try:
            import redis
        except ImportError as error:
            raise MissingDependencyError(
                "RedisStore needs the package redis; run: pip install 'kvcache[redis]'"
            ) from error
        self.ttl = ttl
        self.timeout = timeout
        self._patience = Patience()
        self._prefix = f"{{{namespace}}}:prefix:"  # in braces, so that a cluster keeps a namespace in one place
        self._books = [f"{{{namespace}}}:{name}" for name in ("used", "sizes", "pins", "ends", "total")]
        self._answered: type[Exception] = redis.ResponseError  # the server is up, and says no
        self._client = _client(redis, url, timeout)

    def _key(self, address: str) -> str:
        return self._prefix + check_address(address)

    def _do(self, ask: Callable[[], _Answer]) -> _Answer:
        """Ask the server, for a bounded time also if its answer drips."""
        try:
            return self._patience.in_time(ask, 5 * self.timeout)
        except TimeoutError:
            self._client.connection_pool.disconnect()  # ends the thread that still waits
            raise

    def _is_down(self, error: Exception) -> bool:
        return super()._is_down(error) and not isinstance(error, self._answered)

    def _has(self, address: str) -> bool:
        return bool(self._do(lambda: self._client.exists(self._key(address))))

    def _read(self, address: str, most: int) -> bytes | None:
        data = self._peek(address, None)  # a server holds no value larger than it was set to, 512 MiB by default
        if data is not None and len(data) > most:
            raise CorruptError(f"it has {len(data)} bytes, more than the {most} that may be; remove it")
        return data

    def _touch(self, address: str) -> None:
        with suppress(self._answered):  # who may only read is served all the same; then the order is that of writing
            self._do(lambda: self._client.zadd(self._books[0], {address: time.time()}, xx=True))

    def _peek(self, address: str, most: int | None) -> bytes | None:
        key = self._key(address)
        if most is None:
            return self._got(lambda: self._client.get(key))
        return (
            self._got(lambda: self._client.getrange(key, 0, most - 1)) or None
        )  # a range of what is not there is empty

    def _got(self, ask: Callable[[], bytes | None]) -> bytes | None:
        try:
            return self._do(ask)
        except self._answered as error:
            if "WRONGTYPE" not in str(error):
                raise
        raise CorruptError("it is no string; remove it")

    def _write(self, address: str, data: bytes) -> None:
        if len(data) > _LARGEST:
            raise ValueError(f"{len(data)} bytes; a value of Redis' holds {_LARGEST}")
        ttl = 0 if self.ttl is None else max(1, round(1000 * self.ttl))
        given = (self._prefix, address, data, len(data), self.max_bytes or 0, ttl, time.time())
        full = self._script(_PUT, address, *given)
        if full >= 0:
            check_room(len(data), full, self.max_bytes or 0)

    def _remove(self, address: str) -> None:
        self._script(_REMOVE, address, address)

    def _script(self, script: str, address: str, *given: Any) -> Any:
        keys = [self._key(address), *self._books]
        return self._do(lambda: self._client.eval(script, len(keys), *keys, *given))

    def _pin(self, address: str, pinned: bool) -> None:
        _, _, pins, ends, _ = self._books
        pipeline = self._client.pipeline()
        if pinned:
            pipeline.sadd(pins, address).persist(self._key(address)).zrem(ends, address)
        else:
            pipeline.srem(pins, address)
            if self.ttl is not None:
                ttl = max(1, round(1000 * self.ttl))
                pipeline.pexpire(self._key(address), ttl).zadd(ends, {address: int(1000 * time.time()) + ttl})
        self._do(pipeline.execute)

    def _used(self) -> int:
        """The sum of the books, less what has expired on the server since somebody wrote."""
        _, sizes, _, ends, total = self._books
        gone = self._do(lambda: self._client.zrangebyscore(ends, "-inf", int(1000 * time.time())))
        held = self._do(lambda: self._client.hmget(sizes, gone)) if gone else []
        there = self._do(lambda: self._there([bytes(address) for address in gone]))
        expired = sum(_number(size) for size, found in zip(held, there, strict=True) if not found)
        return max(0, _number(self._do(lambda: self._client.get(total))) - expired)

    def _there(self, addresses: Sequence[bytes]) -> list[bool]:
        pipeline = self._client.pipeline()
        for address in addresses:
            pipeline.exists(self._prefix.encode() + address)
        return [bool(found) for found in pipeline.execute()]

    def _entries(self) -> list[StoreEntry]:
        used, sizes, pins, _, _ = self._books
        held: dict[bytes, bytes] = self._do(lambda: self._client.hgetall(sizes))
        times: dict[bytes, float] = dict(self._do(lambda: self._client.zrange(used, 0, -1, withscores=True)))
        pinned: set[bytes] = set(self._do(lambda: self._client.smembers(pins)))
        names = [name for name in held if is_address(name.decode(errors="replace"))]
        there = self._do(lambda: self._there(names))  # what has expired is in the books until the next is written
        return [
            StoreEntry(name.decode(), _number(held[name]), _time(times.get(name)), name in pinned)
            for name, found in zip(names, there, strict=True)
            if found
        ]

    def close(self) -> None:
        self._client.close()


def _client(redis: Any, url: str, timeout: float) -> Any:
    """A client that waits no longer than this, and asks a second time only where a connection had been closed.

    Raises:
        InputError: for a URL that redis cannot use; what redis says of it may tell the password, and is not said.
    """
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    again = Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))
    wait = {"socket_timeout": timeout, "socket_connect_timeout": timeout}
    with suppress(ValueError, TypeError, AttributeError):
        client = redis.Redis.from_url(url, **wait, retry=again)
        client.connection_pool.connection_kwargs.update(**wait, decode_responses=False)  # whatever the URL says
        return client
    raise InputError(
        f"cannot use the URL {shown_url(url)} for Redis; give redis://, rediss:// or unix://, as in "
        "redis://user:password@host:6379/0, with special characters in user and password percent-encoded"
    )


def _number(given: bytes | None) -> int:
    """What is in the books, or 0 for what nobody of ours wrote there."""
    return int(given) if given is not None and len(given) <= 15 and given.isdigit() else 0


def _time(given: float | None) -> float | None:
    """When something was used, in seconds since 1970; None for what is no time of ours."""
    return given if given is not None and 0 <= given < _LAST else None
