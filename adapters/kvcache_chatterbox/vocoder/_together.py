"""One vocoder for many streams: a thread of its own, which runs what is most urgent, and with it what is as long."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch

from kvcache.memory import release_threads
from kvcache_chatterbox.vocoder._run import Run, Vocoder, Waveform
from kvcache_chatterbox.voices import Voice

_MOST, _MOST_CPU = 8192, 512  # tokens of one run for several streams
_ALIKE = 1.25  # a run joins one that is so many times as long at most: what is padded is computed, too


class Together:
    """A vocoder for any number of threads, each of which waits for its own run.

    The run whose listener has least left to hear goes first. Those that follow it in that order join it while all together,
    padded, go over at most `most` tokens, and the longest is at most a quarter longer than the shortest.

    Args:
        vocoder: the one that runs.
        most: tokens of a run of several, those of the references among them; see `most_together`.
        name: of the thread.
        within: gives what each run happens in, see `OneAtATime`.

    Attributes:
        runs: of the vocoder so far.
        chunks: that came of them.
    """

    def __init__(
        self,
        vocoder: Vocoder,
        most: int,
        name: str = "kvcache-vocoder",
        within: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.vocoder, self._most, self._name, self._within = vocoder, most, name, within
        self._lock = threading.Lock()
        self._waiting: list[_Waits] = []
        self._working = False
        self.runs = 0
        self.chunks = 0

    @property
    def lookahead(self) -> int:
        return self.vocoder.lookahead

    @property
    def nbytes(self) -> int:
        return self.vocoder.nbytes

    def check(self, voice: Voice) -> None:
        self.vocoder.check(voice)

    def before(self, voice: Voice) -> int:
        return self.vocoder.before(voice)

    def waves(self, runs: Sequence[Run]) -> list[Waveform]:
        """See `Vocoder`. What one run raises is raised for that one."""
        mine: list[_Waits] = [(run, Future()) for run in runs]
        with self._lock:
            self._waiting += mine
            if not self._working:  # the thread lives as long as there is something to do
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
                self._working = True
        try:
            return [future.result() for _, future in mine]
        finally:
            with self._lock:  # one has failed, or nobody waits any more
                self._waiting = [one for one in self._waiting if one not in mine]

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._working = False
                    return
                waiting, self._waiting = self._waiting, []
            waiting.sort(key=lambda one: one[0].due)
            try:
                chosen = self._chosen(waiting)
            except Exception:  # of what a voice holds, which its own run says
                chosen = waiting[:1]
            self._run(chosen)
            with self._lock:
                self._waiting += [one for one in waiting if one not in chosen]
            del waiting, chosen

    def _chosen(self, waiting: Sequence["_Waits"]) -> list["_Waits"]:
        """The first, and those that run with it."""
        chosen: list[_Waits] = []
        lengths: list[int] = []
        for one in waiting:
            tried = [*lengths, self.vocoder.before(one[0].voice) + one[0].tokens.numel()]
            if not chosen or (max(tried) * len(tried) <= self._most and max(tried) <= _ALIKE * min(tried)):
                chosen.append(one)
                lengths = tried
        return chosen

    def _run(self, chosen: Sequence["_Waits"]) -> None:
        try:
            with self._within():
                begin = time.perf_counter()
                made = self.vocoder.waves([run for run, _ in chosen])
                each = (time.perf_counter() - begin) / len(chosen)
        except BaseException as error:  # told to who waits: the thread serves others
            if len(chosen) == 1:
                chosen[0][1].set_exception(error)
            else:  # one of them is to blame
                for one in chosen:
                    self._run([one])
            return
        self.runs += 1
        self.chunks += len(chosen)
        for (_, future), audio in zip(chosen, made, strict=True):
            future.set_result(replace(audio, seconds=each))


class OneAtATime:
    """Two threads that compute by turns: audio, for which somebody waits, before tokens.

    On the same cores each would take more than twice as long beside the other, as each divides its work among all of them and
    waits for the slowest part. Whose turn ends lets go of its workers, see `release_threads`.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._busy = False
        self._audio = 0

    @contextmanager
    def audio(self) -> Iterator[None]:
        """A block that begins once nothing else runs."""
        with self._changed:
            self._audio += 1
            try:
                self._changed.wait_for(lambda: not self._busy)
                self._busy = True
            finally:
                self._audio -= 1
        yield from self._running()

    @contextmanager
    def tokens(self) -> Iterator[None]:
        """A block that begins once nothing else runs, and no audio is to be made."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._busy or self._audio))
            self._busy = True
        yield from self._running()

    def _running(self) -> Iterator[None]:
        try:
            yield
        finally:
            try:
                release_threads()
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()


def most_together(device: torch.device) -> int:
    """Tokens of a run of several streams at most.

    A GPU takes as long for many as for one. A CPU computes one after the other anyway, and who is first would wait for all.
    """
    return _MOST_CPU if device.type in ("cpu", "meta") else _MOST


_Waits = tuple[Run, "Future[Waveform]"]
