"""Questions to what may never answer."""

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from threading import Lock, Thread
from typing import TypeVar

_Answer = TypeVar("_Answer")


class Patience:
    """Asks in threads that are given up after a time.

    Nothing is asked while one that was given up still runs: where nobody answers, each would leave one more.
    """

    def __init__(self) -> None:
        self._given_up: list[Thread] = []
        self._lock = Lock()

    def in_time(self, ask: Callable[[], _Answer], seconds: float) -> _Answer:
        """What `ask` answers within so many seconds.

        Raises:
            TimeoutError: if it does not, and at once while a thread that was given up still runs; whatever `ask` raises.
        """
        with self._lock:
            self._given_up = [thread for thread in self._given_up if thread.is_alive()]
            if self._given_up:
                raise TimeoutError("an earlier question has still not been answered")
        answer: Future[_Answer] = Future()

        def wait() -> None:
            try:
                answer.set_result(ask())
            except BaseException as error:  # raised again in the thread that asked
                answer.set_exception(error)

        thread = Thread(
            target=wait, daemon=True, name="kvcache-store"
        )  # one that hangs must not keep the program alive
        thread.start()
        try:
            return answer.result(seconds)
        except FutureTimeout:
            if answer.done():  # its own
                raise
        with self._lock:
            self._given_up.append(thread)
        raise TimeoutError(f"no answer within {seconds:g} s")
