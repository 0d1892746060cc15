"""What a first request would have to wait for, done before it comes: compiled steps are loaded or made."""

import threading
import time
from collections.abc import Callable

from kvcache.decoding._programs import Made, Programs
from kvcache.memory import release_threads

Told = Callable[[str], object]
"""Is told, in the thread that does it, what is done next."""


def untold(line: str) -> None:
    """Tells nobody."""


class WarmUp:
    """A warm-up that has ended, or is under way.

    Args:
        programs: whose making it waits for, where requests would not.
        run: what it does.

    Attributes:
        seconds: that it took; None while it is under way.
    """

    def __init__(self, programs: Programs, run: Callable[[], None]) -> None:
        self._programs, self._run = programs, run
        self._before = len(programs.made)
        self._over = threading.Event()
        self._error: BaseException | None = None
        self.seconds: float | None = None

    def here(self) -> "WarmUp":
        """Do it now. What it raises comes through."""
        self._do()
        return self.wait()

    def in_background(self) -> "WarmUp":
        """Do it in a thread. From now on no request of this engine waits for a compiler: it runs eagerly until there is a program."""
        self._programs.waits = False
        threading.Thread(target=self._do, name="kvcache warm-up", daemon=True).start()
        return self

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self._over.is_set()

    def wait(self, seconds: float | None = None) -> "WarmUp":
        """Wait for its end.

        Args:
            seconds: at most; by default as long as it takes.

        Raises:
            TimeoutError: if it has not ended by then. What it raised comes through.
        """
        if not self._over.wait(seconds):
            raise TimeoutError(f"the warm-up is still under way after {seconds} s; requests run eagerly meanwhile")
        if self._error is not None:
            raise self._error
        return self

    @property
    def made(self) -> tuple[Made, ...]:
        """What was loaded or compiled since it began."""
        return tuple(self._programs.made[self._before :])

    def _do(self) -> None:
        began = time.perf_counter()
        try:
            with self._programs.waiting():
                self._run()
        except (Exception, KeyboardInterrupt) as error:
            self._error = error
        finally:
            self.seconds = time.perf_counter() - began
            self._over.set()
            release_threads()  # of the thread that warmed up; those that serve are others
