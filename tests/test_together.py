"""Many streams on one vocoder: the most urgent first, those alike with it, and each hears of its own errors only."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.clocks import Clock
from support.inside.speech import TOGETHER_CLOCK, Waveform, audio_waiting, waiting
from support.waiting import until

from kvcache_chatterbox.units import SAMPLES_PER_TOKEN
from kvcache_chatterbox.vocoder import OneAtATime, Run, SeededNoise, Together
from kvcache_chatterbox.voices import Voice

WHO = Voice(None, {"embedding": torch.zeros(1)})


class Slow:
    """A vocoder that runs when it is let, and keeps what it ran; it cannot say a token 13."""

    lookahead, nbytes = 0, 0

    def __init__(self):
        self.free, self.busy, self.ran = threading.Semaphore(0), threading.Semaphore(0), []

    def check(self, voice):
        pass

    def before(self, voice):
        return 50

    def waves(self, runs):
        self.busy.release()
        assert self.free.acquire(timeout=30)
        if any(13 in run.tokens for run in runs):
            raise ValueError("13")
        self.ran.append([run.tokens.numel() for run in runs])
        return [Waveform(torch.full((run.tokens.numel() * SAMPLES_PER_TOKEN,), float(run.due))) for run in runs]


def run(count, due, token=1):
    return Run(torch.full((count,), token), WHO, SeededNoise(0), due=due)


@pytest.fixture
def slow():
    return Slow()


def test_each_is_told_its_part_of_the_seconds_of_a_run(slow, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(TOGETHER_CLOCK, clock)
    waves = slow.waves

    def timed(runs):
        clock.now += 3.0
        return waves(runs)

    slow.waves = timed
    together = Together(slow, most=1000)
    slow.free.release(2)
    assert together.waves([run(10, 0.0)])[0].seconds == 3.0
    assert [wave.seconds for wave in together.waves([run(10, 0.0), run(11, 1.0), run(12, 2.0)])] == [1.0] * 3


def test_who_has_least_to_hear_goes_first_and_what_is_as_long_goes_along(slow):
    together = Together(slow, most=1000)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(together.waves, [run(10, 0.0)])
        assert slow.busy.acquire(timeout=30)
        rest = [run(20, 9.0), run(22, 5.0), run(200, 7.0), run(21, 8.0)]
        others = [pool.submit(together.waves, [one]) for one in rest]
        until(lambda: len(waiting(together)) == 4)
        slow.free.release(10)
        assert first.result(30)[0].audio.numel() == 10 * SAMPLES_PER_TOKEN
        for one, future in zip(rest, others, strict=True):
            [made] = future.result(30)
            assert made.audio.numel() == one.tokens.numel() * SAMPLES_PER_TOKEN and float(made.audio[0]) == one.due
    assert slow.ran == [[10], [22, 21, 20], [200]]
    assert (together.runs, together.chunks) == (3, 5)


def test_no_more_go_along_than_are_allowed(slow):
    together = Together(slow, most=210)  # of 70 tokens each
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(together.waves, [run(1, 0.0)])
        assert slow.busy.acquire(timeout=30)
        others = [pool.submit(together.waves, [run(20, float(i))]) for i in range(5)]
        until(lambda: len(waiting(together)) == 5)
        slow.free.release(10)
        for future in [first, *others]:
            future.result(30)
    assert slow.ran == [[1], [20, 20, 20], [20, 20]]


def test_an_error_is_told_to_whom_it_concerns(slow):
    together = Together(slow, most=1000)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(together.waves, [run(10, 0.0)])
        assert slow.busy.acquire(timeout=30)
        good, bad = pool.submit(together.waves, [run(20, 1.0)]), pool.submit(together.waves, [run(20, 2.0, token=13)])
        until(lambda: len(waiting(together)) == 2)
        slow.free.release(10)
        assert first.result(30) and good.result(30)
        with pytest.raises(ValueError, match="13"):
            bad.result(30)
        assert together.waves([run(5, 3.0)])[0].audio.numel() == 5 * SAMPLES_PER_TOKEN


def test_its_thread_ends_when_nothing_is_to_be_done(slow):
    together = Together(slow, most=10, name="kvcache-vocoder-test")
    slow.free.release(10)
    for _ in range(3):
        together.waves([run(2, 0.0)])
        until(lambda: not any(thread.name == "kvcache-vocoder-test" for thread in threading.enumerate()))
    assert together.runs == 3


def test_tokens_and_audio_go_by_turns_and_audio_first():
    turns, order, inside, most = OneAtATime(), [], [], []
    begun, go = threading.Event(), threading.Event()

    def work(name, block, wait=None):
        with block():
            inside.append(name)
            most.append(len(inside))
            begun.set()
            if wait is not None:
                assert wait.wait(30)
            order.append(name)
            inside.remove(name)

    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(work, "first", turns.tokens, go)
        assert begun.wait(30)
        others = [pool.submit(work, f"tokens {i}", turns.tokens) for i in range(2)]
        others += [pool.submit(work, f"audio {i}", turns.audio) for i in range(2)]
        until(lambda: audio_waiting(turns) == 2)
        go.set()
        for future in [first, *others]:
            future.result(30)
    assert order[0] == "first"
    assert {name.split()[0] for name in order[1:3]} == {"audio"}
    assert set(most) == {1}


def test_a_turn_that_fails_is_over():
    turns = OneAtATime()
    for block in (turns.tokens, turns.audio):
        with pytest.raises(ValueError, match="so it is"), block():
            raise ValueError("so it is")
    with turns.tokens():
        pass


def test_the_vocoder_runs_within_what_it_is_given(slow):
    turns = OneAtATime()
    together = Together(slow, most=1000, within=turns.audio)
    with ThreadPoolExecutor(2) as pool:
        with turns.tokens():
            future = pool.submit(together.waves, [run(10, 0.0)])
            until(lambda: audio_waiting(turns) == 1)
            assert not slow.busy.acquire(timeout=0.05)
        slow.free.release()
        assert future.result(30)[0].audio.numel() == 10 * SAMPLES_PER_TOKEN
