"""Ports of this machine that nobody else can take while a test needs them."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


def held() -> socket.socket:
    """A free port, bound and not listened on: the system gives it to nobody, and refuses who connects to it.

    On Linux a server that sets SO_REUSEADDR, as most do, may listen on it all the same.
    """
    taken = socket.socket()
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    taken.bind(("127.0.0.1", 0))
    return taken


@contextmanager
def deserted() -> Iterator[int]:
    """A port that nobody listens on for as long as the block runs."""
    with held() as taken:
        yield taken.getsockname()[1]
