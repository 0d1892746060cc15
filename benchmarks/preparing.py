"""How long compiling and capturing took, told apart from what comes after them."""
# Not by `make bench`: what benchmarks share.

import time
from typing import Any

from torch._dynamo.callback import on_compile_end, on_compile_start

from kvcache.events import Event, subscribe


class Preparing:
    """Counts, from now on, the seconds that this process compiles and captures.

    Attributes:
        compiled: seconds in torch's compiler.
        captured: seconds in which steps were recorded, the compiler's among them where it works on a recorded step.
        captures: how many steps were recorded.
    """

    def __init__(self) -> None:
        self.compiled = self.captured = 0.0
        self.captures = 0
        self._began = 0.0
        on_compile_start(self._start)
        on_compile_end(self._end)
        self._subscription = subscribe(self._recorded, ("captured",))

    def notes(self) -> dict[str, Any]:
        """What a row says of it; None where there was nothing of the kind."""
        return {
            "compile, s": self.compiled or None,
            "capture, s": self.captured - self.compiled if self.captures else None,
            "captures": self.captures or None,
        }

    def _start(self, _: Any) -> None:
        self._began = time.perf_counter()

    def _end(self, _: Any) -> None:
        self.compiled += time.perf_counter() - self._began

    def _recorded(self, event: Event) -> None:
        self.captured += event.numbers["seconds"]
        self.captures += 1
