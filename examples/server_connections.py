"""How the example server stays reachable whoever is on its connections, and how it ends in order.

* A connection that says nothing, or half a head, is closed after some seconds; so is one that leaves audio unread. There is
  room for a fixed number of them, below the limit of open files, and a newcomer takes the place of the one that has owed a
  request for longest: silence never keeps others out.
* When the server is told to end, whoever has heard nothing is told so at once. Streams that run have a grace to end in.

A proxy in front does more: TLS, limits for each address, HTTP/2. See docs/serving.md.
"""

import asyncio
import json
import logging
import socket
from functools import partial
from typing import Any

import h11
import uvicorn
from server_errors import Problem, shortened
from server_guard import Gate, Limits
from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

log = logging.getLogger("uvicorn.error")


class Connection(H11Protocol):
    """A connection that has to move on.

    `owes` is true while it has not sent a whole request: it can be closed for a newcomer then.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: Limits,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits
        self._since = 0.0  # when it began to owe a request
        self._head: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    @property
    def owes(self) -> bool:
        """Whether its next request is not here, or not all of it."""
        return self._awaits_head or self.cycle.more_body

    @property
    def _awaits_head(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()
        if len(self.connections) > self._limits.connections:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self._limits.unread_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread = _stopped(self._unread)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._head, self._unread = _stopped(self._head), _stopped(self._unread)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, in our own words; cut the connection where an answer has begun."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        problem = Problem(
            400, f"this is no HTTP/1.1, or its head is longer than {self._limits.head_bytes} bytes", "bad_http"
        )
        body = json.dumps(problem.body()).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _make_room(self) -> None:
        """Close the one that has owed a request for longest; it may be this one."""
        held = [one for one in self.connections if isinstance(one, Connection) and not one.transport.is_closing()]
        if len(held) > self._limits.connections:
            min((one for one in held if one.owes), key=lambda one: one._since, default=self).transport.abort()

    def _watch_head(self) -> None:
        if not self._awaits_head:
            self._head = _stopped(self._head)
        elif self._head is None and not self.transport.is_closing():
            self._since = self.loop.time()
            # Closing in order would wait for ever for a client that does not read.
            self._head = self.loop.call_later(self._limits.head_seconds, self.transport.abort)


def _stopped(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


# ---------------------------------------------------------------------- the server


class Shortened(logging.Filter):
    """Keeps a stranger's path from filling the log."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record through, with its long words cut."""
        if isinstance(record.args, tuple):
            record.args = tuple(shortened(one, 200) if isinstance(one, str) else one for one in record.args)
        return True


SHORT = Shortened()


class Server(uvicorn.Server):
    """Uvicorn that tells the app at once when it is to end, and cuts what still runs after the grace.

    Args:
        app: such as `create_app` makes.
        gate: of that app.
        limits: of connections.
        log_level: of uvicorn.
    """

    def __init__(self, app: ASGIApp, gate: Gate, limits: Limits, *, log_level: str = "info") -> None:
        self._gate, self._grace = gate, limits.grace_seconds
        # No limit_concurrency: a connection has one request at a time, and connections are limited with less noise.
        super().__init__(
            Config(
                app,
                http=partial(Connection, limits=limits),  # type: ignore[arg-type]
                ws="none",
                log_level=log_level,
                backlog=limits.backlog,
                server_header=False,
                headers=[("x-content-type-options", "nosniff"), ("referrer-policy", "no-referrer")],
                h11_max_incomplete_event_size=limits.head_bytes,
                timeout_graceful_shutdown=int(limits.grace_seconds) + 5,  # for what does not end when it is cut
            )
        )
        logging.getLogger("uvicorn.access").addFilter(SHORT)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._gate.shut()
        cut = asyncio.get_running_loop().call_later(self._grace, self._cut)
        try:
            await super().shutdown(sockets)
        finally:
            cut.cancel()

    def _cut(self) -> None:
        held = [one for one in self.server_state.connections if isinstance(one, Connection)]
        running = [one for one in held if one.cycle is not None and one.cycle.response_started]
        log.warning("%d streams still ran after %g s, and are cut", len(running), self._grace)
        for one in running:
            one.transport.abort()
