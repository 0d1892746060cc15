"""The example server on a real port, in a thread of the test."""

import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.waiting import until

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))
import server  # type: ignore[import-not-found]
import server_load  # type: ignore[import-not-found]
from server_connections import Server  # type: ignore[import-not-found]
from server_guard import STANDARD, Gate, Limits  # type: ignore[import-not-found]

from kvcache_chatterbox import ChatterboxEngine, stand_in

__all__ = ["TEXT", "body", "engine_of", "running", "server", "server_load", "serving"]

TEXT = "The birch canoe slid on the smooth planks. Glue the sheet to the dark blue background. Rice is served in bowls."


@contextmanager
def running(
    app: Any, gate: Gate, limits: Limits = STANDARD, log_level: str = "critical"
) -> Iterator[tuple[str, Server]]:
    """The URL of an app, and its server; setting its `should_exit` is what SIGTERM does."""
    runner = Server(app, gate, limits, log_level=log_level)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: runner.started or not thread.is_alive())
            assert runner.started
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", runner
        finally:
            runner.should_exit = True
            thread.join()


@contextmanager
def serving(app: Any, gate: Gate | None = None, limits: Limits = STANDARD) -> Iterator[str]:
    """The URL of an app that `server.create_app` made, or of one around it and its gate."""
    with running(app, gate or app.state.gate, limits) as (url, _):
        yield url


def engine_of(t3: Any) -> ChatterboxEngine:
    """An engine around a stand-in, with a few voices."""
    engine = ChatterboxEngine(stand_in(t3))
    server.make_up_voices(engine)
    return engine


def body(text: str = TEXT, **more: Any) -> dict[str, Any]:
    """A request for speech."""
    return {"model": "chatterbox", "input": text, "voice": "sarah", "seed": 1, **more}
