"""`traced_graphs`: recorded steps where there are no CUDA graphs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.fx.experimental.proxy_tensor import make_fx

from kvcache.decoding import RECORDERS


@contextmanager
def traced_graphs() -> Iterator[None]:
    """Let ``backend="graph"`` decode on a CPU, as a trace of each step instead of a CUDA graph of it.

    A trace is the list of a step's operators with every Python number baked in, as a capture bakes it in. So it shows on any
    machine that a step can be recorded: what hangs on the host is wrong when it is replayed, and the tokens differ. It is no
    faster than ``"eager"``. Outside of the block the back end is refused on a CPU; other threads see it too.
    """
    before = RECORDERS.get("cpu")
    RECORDERS["cpu"] = traced
    try:
        yield
    finally:  # the other devices' stay there meanwhile: other threads may ask for them
        if before is None:
            RECORDERS.pop("cpu", None)
        else:
            RECORDERS["cpu"] = before


def traced(step: Callable[[], None], _restore: Callable[[], None]) -> Callable[[], Any]:
    """Record a step as the list of its operators: a `kvcache.decoding.Recorder`."""
    return make_fx(step)()
