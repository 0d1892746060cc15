"""Which requests reach the example server's app: whole ones, of a sane size, for a name of this server, while it is open."""

import asyncio
import ipaddress
import logging
from collections.abc import Awaitable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeVar

from server_errors import Problem, closing
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

T = TypeVar("T")
log = logging.getLogger("uvicorn.error")


@dataclass(frozen=True)
class Limits:
    """What is allowed on connections.

    Attributes:
        connections: at a time.
        head_seconds: until a connection has sent the head of a request, from its begin or its last answer on.
        body_seconds: until the body is there, too.
        unread_seconds: that audio may wait for a client to read on.
        grace_seconds: that streams have left when the server is told to end.
        head_bytes, body_bytes: of a request.
        backlog: connections that the system may hold for us. Python opens so many at once before one of them can be closed.
        files: that the process may need beside connections.
    """

    connections: int = 512
    head_seconds: float = 10
    body_seconds: float = 30
    unread_seconds: float = 120
    grace_seconds: float = 30
    head_bytes: int = 16 * 1024
    body_bytes: int = 320_000
    backlog: int = 64
    files: int = 128

    @property
    def descriptors(self) -> int:
        """Open files that all this may come to; a connection that is being closed has its file for a few turns more."""
        return self.connections + 4 * self.backlog + self.files


STANDARD = Limits()


class Gate:
    """Whether requests are taken: ``starting``, ``ready``, ``closing``, ``closed``."""

    def __init__(self) -> None:
        self.state = "starting"
        self._shut: asyncio.Future[None] | None = None

    def open(self) -> None:
        """Take requests, in the event loop that runs."""
        self.state, self._shut = "ready", asyncio.get_running_loop().create_future()

    def shut(self) -> None:
        """Take no more, and tell whoever waits in `unless_shut`. Once is enough."""
        if self._shut is not None and not self._shut.done():
            self.state = "closing"
            self._shut.set_result(None)

    async def unless_shut(self, wanted: Awaitable[T]) -> T:
        """What `wanted` gives.

        Raises:
            Problem: if the gate is shut meanwhile; `wanted` is cancelled then.
        """
        found = await first_of(wanted, *([asyncio.shield(self._shut)] if self._shut and self.state == "ready" else []))
        if found is None:
            raise closing()
        return found.result()


async def first_of(wanted: Awaitable[T], *others: Awaitable[Any]) -> "asyncio.Future[T] | None":
    """What `wanted` comes to, or None if one of the others ends before. All are over then."""
    first, *rest = map(asyncio.ensure_future, (wanted, *others))
    try:
        await asyncio.wait((first, *rest), return_when=asyncio.FIRST_COMPLETED)
        return first if first.done() else None
    finally:
        for task in (first, *rest):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task


class Guard:
    """An ASGI app before another: only whole requests of a sane size and of this server's name come through.

    Args:
        app: what is behind.
        gate: which is shut when the server ends.
        limits: of bodies.
        hosts: names that a request may call this server, beside addresses and names without a dot; ``"*"`` allows any.
    """

    def __init__(self, app: ASGIApp, *, gate: Gate, limits: Limits, hosts: Collection[str] = ()) -> None:
        self._app, self._gate, self._limits = app, gate, limits
        self._hosts = frozenset(name.lower().rstrip(".") for name in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_head(scope)
            self._check_host(headers.get("host", ""))
            if "content-length" in headers or "transfer-encoding" in headers:
                receive = _after(await self._body(headers, receive), receive)
        except Problem as problem:
            await problem.response()(scope, receive, send)
        except ClientDisconnect:
            log.debug("a client left within its request")
        else:
            await self._app(scope, receive, partial(self._send, send))

    def _check_head(self, scope: Scope) -> None:
        most = self._limits.head_bytes
        if len(scope["raw_path"]) + len(scope["query_string"]) + sum(map(len, chain(*scope["headers"]))) > most:
            raise Problem(431, f"the request's head is longer than {most} bytes", "too_large", {"Connection": "close"})

    def _check_host(self, host: str) -> None:
        if not is_ours(host, self._hosts):
            raise Problem(
                400, f"this server is not {host[:80]!r}; start it with --allow-host to give it that name", "wrong_host"
            )

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        most, seconds, length = self._limits.body_bytes, self._limits.body_seconds, headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            raise _too_large(most)
        try:
            return await self._gate.unless_shut(asyncio.wait_for(_read(receive, most), seconds))
        except asyncio.TimeoutError:
            raise Problem(
                408, f"the body was not here after {seconds:g} s; send it at once", "slow", {"Connection": "close"}
            ) from None

    async def _send(self, send: Send, message: Message) -> None:
        if message["type"] == "http.response.start" and self._gate.state == "closing":
            closed = [(name, value) for name, value in message["headers"] if name.lower() != b"connection"]
            message = message | {"headers": [*closed, (b"connection", b"close")]}
        await send(message)


def _too_large(most: int) -> Problem:
    return Problem(413, f"the body is longer than {most} bytes; send the text in parts", "too_large")


async def _read(receive: Receive, most: int) -> bytes:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        if len(body) > most:
            raise _too_large(most)
        if not message.get("more_body"):
            return body


def _after(body: bytes, receive: Receive) -> Receive:
    """`receive` for an app behind a body that has been read."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def received() -> Message:
        return pending.pop() if pending else await receive()

    return received


def is_ours(host: str, names: Collection[str]) -> bool:
    """Whether a `Host` header is one that only someone sends who means this server.

    A page of a stranger can let a name of his own stand for 127.0.0.1, and a browser then talks to us in that name (DNS
    rebinding). Nobody can do so with an address or with a name without a dot. Without the header it is no browser.
    """
    name = host[1:].partition("]")[0] if host.startswith("[") else host.rsplit(":", 1)[0]
    name = name.lower().rstrip(".")
    if "*" in names or name in names or not {".", ":"} & set(name):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
