"""When tokens become audio: a listener simulated on a clock that only the test moves, and the rule's promises."""

import gc
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.clocks import Clock
from support.inside.speech import GROWTH, SECOND, Cost, Listener, Pace
from support.searching import search

from kvcache import InputError
from kvcache_chatterbox.audio import Chunking, chunking_of
from kvcache_chatterbox.units import TOKENS_PER_SECOND

BEFORE = 100  # tokens of reference and context


class Machine:
    """Decodes and vocodes at known speeds: seconds for a token, and of a run for itself and for each token it goes over."""

    def __init__(self, token, run, each, known=True):
        self.token, self.run, self.each = token, run, each
        self.cost = Cost()
        for tokens in (BEFORE + 25, BEFORE + 250) if known else ():
            self.cost.took(tokens, self.took(tokens))

    def took(self, tokens):
        return self.run + self.each * tokens

    def say(self, rule, total):
        """The sizes of the chunks, the listener, and when the first and the last came."""
        clock = Clock(0.0)
        listener, pace = Listener(clock.perf_counter), Pace(rule, self.cost, BEFORE)
        waiting, made, sizes, first = 0, 0, [], None
        while made < total or waiting:
            step = min(rule.step, total - made)
            if step:
                clock.now += step * self.token
                made += step
                waiting += step
                pace.came(step, step * self.token)
            size = pace.due(waiting, listener.left) if made < total else waiting
            while size:
                took = self.took(BEFORE + size)
                clock.now += took
                pace.ran(size, took)
                listener.heard(size / TOKENS_PER_SECOND)
                first = clock.now if first is None else first
                sizes.append(size)
                waiting -= size
                size = pace.due(waiting, listener.left) if waiting and made < total else 0
        return sizes, listener, first, clock.now


speeds = st.tuples(st.floats(0.001, 0.1), st.floats(0.0, 3.0), st.floats(0.0, 0.03))


@search(200)
@given(speeds, st.integers(1, 1500), st.integers(1, 60), st.integers(60, 400), st.booleans())
def test_every_token_is_said_once_in_chunks_that_are_no_larger_than_allowed(speed, total, first, most, known):
    sizes, _, began, ended = Machine(*speed, known).say(Chunking(None, first, most), total)
    assert sum(sizes) == total and all(1 <= size <= most + Chunking(None, first, most).step for size in sizes)
    assert began <= ended
    if total >= max(first, SECOND):
        assert sizes[0] >= first


@search(200)
@given(speeds, st.integers(100, 1000))
def test_nothing_is_silent_where_the_machine_is_fast_enough(speed, total):
    """If some chunk of 20 tokens or fewer lasts as long as it takes, with caution: the first one, of up to 25, sees to that."""
    machine, rule = Machine(*speed), Chunking()
    lasting = (
        n for n in range(rule.step, 21, rule.step) if n / 25 >= n * machine.token + 1.2 * machine.took(BEFORE + n)
    )
    _, listener, _, _ = machine.say(rule, total)
    if next(lasting, None):
        assert listener.silence == 0 and listener.underruns == 0


@search(200)
@given(speeds, st.integers(250, 1500))
def test_it_is_never_worse_than_fixed_chunks_in_all_it_costs(speed, total):
    """The time of all is no more than with chunks of one second, and so is the silence, but for one chunk's."""
    machine = Machine(*speed)
    sizes, grown, _, ended = machine.say(Chunking(None, SECOND, 250), total)
    _, fixed, _, fixed_ended = machine.say(Chunking((SECOND,)), total)
    assert ended <= fixed_ended + 1e-6
    assert grown.silence <= fixed.silence + machine.took(BEFORE + max(sizes)) + max(sizes) * machine.token


def test_chunks_grow_as_the_listeners_buffer_does():
    sizes, listener, first, _ = Machine(0.008, 0.1, 0.003).say(Chunking(), 750)
    assert listener.silence == 0 and first < 0.8
    assert sizes[0] <= SECOND and max(sizes) == 250 and sorted(sizes[1:-1]) == sizes[1:-1]


def test_where_speech_takes_longer_than_it_lasts_chunks_grow_at_once():
    sizes, _, _, ended = Machine(0.1, 10.0, 0.03).say(Chunking(), 750)
    assert sizes[:4] == [10, 10 * GROWTH, 10 * GROWTH**2, 250]
    assert ended < Machine(0.1, 10.0, 0.03).say(Chunking((SECOND,)), 750)[3] / 2


def test_at_the_edge_of_what_a_machine_can_no_chunk_is_smaller_than_what_lasts():
    """Small ones in time cost a run each, and the silence came all the same: 17, 10 and 5 tokens were, where 45 last."""
    machine = Machine(0.026, 0.28, 0.001)
    sizes, listener, _, _ = machine.say(Chunking(), 250)
    assert all(n / 25 >= n * machine.token + machine.took(BEFORE + n) for n in sizes[1:-1])
    assert listener.underruns == 1


def test_just_above_what_lasts_chunks_grow_and_do_not_stay_as_small_as_they_may_be():
    """Nano on a quiet machine: 25 chunks of 10 tokens, each made in 0.39 s and heard in 0.4, at twice the work of growing ones."""
    machine = Machine(0.007, 0.12, 0.0017)
    sizes, listener, _, ended = machine.say(Chunking(), 250)
    assert listener.silence == 0 and len(sizes) <= 6 and ended < 5
    assert sizes[1] / 25 >= 1.1 * (sizes[1] * machine.token + machine.took(BEFORE + sizes[1]))


def test_a_little_slower_than_time_the_last_chunk_is_not_all_that_is_waited_for():
    """English, fast, at an RTF of 1.0: the last chunk was ten seconds long, and so was the silence before it."""
    machine = Machine(0.034, 0.28, 0.0015)
    sizes, listener, first, ended = machine.say(Chunking(), 750)
    assert ended > 30 and max(sizes) <= 100
    assert first + listener.silence < 5
    slow = Machine(0.1, 10.0, 0.03).say(Chunking(), 750)[0]
    assert max(slow) == 250  # where a run takes ten seconds, few runs are all that counts


class Nobody(set):
    """In place of a vocoder's listeners: each thinks that it is alone."""

    def add(self, one):
        pass


class Table(Machine):
    """Several listeners at once on such a machine, tokens and audio by turns, audio first."""

    def say_to(self, listeners, rule, total):
        """The sizes of each one's chunks, the listeners, and when the last was served."""
        clock = Clock(0.0)
        ears = [Listener(clock.perf_counter) for _ in range(listeners)]
        paces = [Pace(rule, self.cost, BEFORE) for _ in range(listeners)]
        sizes, waiting, made = [[] for _ in ears], [0] * listeners, 0
        while made < total:
            step = min(rule.step, total - made)
            clock.now += step * self.token
            made += step
            for i, pace in enumerate(paces):
                waiting[i] += step
                pace.came(step, step * self.token)
            due = [pace.due(n, ear.left) for pace, n, ear in zip(paces, waiting, ears, strict=True)]
            for i, size in enumerate(waiting[:] if made == total else due):
                if size:
                    took = self.took(BEFORE + size)
                    clock.now += took
                    paces[i].ran(size, took)
                    ears[i].heard(size / TOKENS_PER_SECOND)
                    sizes[i].append(size)
                    waiting[i] -= size
        return sizes, ears, clock.now


@search(100)
@given(speeds, st.integers(2, 8), st.integers(100, 1000))
def test_several_listeners_cost_no_more_than_with_fixed_chunks(speed, listeners, total):
    sizes, ears, ended = Table(*speed).say_to(listeners, Chunking(None, SECOND, 250), total)
    _, fixed, fixed_ended = Table(*speed).say_to(listeners, Chunking((SECOND,)), total)
    assert all(sum(one) == total for one in sizes)
    assert ended <= fixed_ended + 1e-6
    longest = listeners * Machine(*speed).took(BEFORE + 250) + 250 * speed[0]
    assert all(ear.silence <= other.silence + longest for ear, other in zip(ears, fixed, strict=True))


def test_those_who_share_a_vocoder_have_fewer_and_larger_chunks():
    """Nano, fast: four at once take longer than time, and each was given as many runs as one alone."""
    speed = (0.0085, 0.1, 0.0025)
    alone, [ear], _ = Table(*speed).say_to(1, Chunking(), 250)
    together, ears, ended = Table(*speed).say_to(4, Chunking(), 250)
    assert ear.silence == 0 and len(alone[0]) > len(together[3])
    unknowing = Table(*speed)
    unknowing.cost.listeners = Nobody()
    _, others, later = unknowing.say_to(4, Chunking(), 250)
    assert ended < later / 2 and max(ear.silence for ear in ears) < min(ear.silence for ear in others) / 2


def test_who_is_over_or_forgotten_counts_as_a_listener_no_more():
    cost = Cost()
    cost.took(100, 1.0)
    paces = [Pace(Chunking(), cost, BEFORE) for _ in range(3)]
    assert cost.round(100) == 1.0, "nobody listens yet"
    for pace in paces:
        pace.came(5, 0.1)
    assert cost.round(100) == pytest.approx(3 * 1.2)
    paces[0].over()
    paces[0].came(5, 0.1)  # which were on their way
    assert cost.round(100) == pytest.approx(2 * 1.2)
    del pace, paces[1:]
    gc.collect()
    assert cost.round(100) == 1.0


def test_what_comes_last_is_said_with_what_is_still_to_be_said():
    """The tokens that are looked ahead at had a run of their own, of three."""
    pace = Pace(Chunking(), Cost(), BEFORE)
    pace.came(30, 0.1)
    assert pace.due(30, -1.0) == 30 and pace.due(30, -1.0, ending=0) == 0
    assert pace.due(300, -1.0, ending=0) == 250, "a chunk has its most tokens all the same"
    assert pace.due(247, -1.0, ending=3) == 0 and pace.due(248, -1.0, ending=3) == 248, "those that end the text, too"
    fixed = Pace(Chunking((25,)), Cost(), BEFORE)
    assert fixed.due(25, -1.0, ending=0) == 25, "of given sizes each is kept"


def test_given_sizes_are_kept_and_the_last_goes_on():
    assert Machine(0.01, 0.1, 0.001).say(Chunking((5, 10, 20)), 60)[0] == [5, 10, 20, 20, 5]
    assert Machine(0.01, 0.1, 0.001).say(chunking_of("fixed"), 60)[0] == [25, 25, 10]


@pytest.mark.parametrize(
    ("given_", "rule"),
    [
        ({}, Chunking()),
        ({"first_chunk": 5}, Chunking(None, 5, 250)),
        ({"first_chunk": 300}, Chunking(None, 300, 300)),
        ({"max_chunk": 40}, Chunking(None, 10, 40)),
        ({"chunking": "fixed"}, Chunking((25,))),
        ({"chunking": "fixed", "first_chunk": 50}, Chunking((50,))),
        ({"chunking": [25, 50]}, Chunking((25, 50))),
        ({"chunking": Chunking(None, 7, 70)}, Chunking(None, 7, 70)),
    ],
)
def test_what_the_arguments_stand_for(given_, rule):
    assert chunking_of(**given_) == rule


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"chunking": "slow"}, "'auto', 'fixed' or a list"),
        ({"chunking": 25}, "a list of sizes"),
        ({"chunking": b"fixed"}, "a list of sizes"),
        ({"chunking": []}, "no size"),
        ({"chunking": [25, 0]}, r"chunking\[1\]=0"),
        ({"first_chunk": 0}, "at least 1"),
        ({"first_chunk": True}, "whole number"),
        ({"first_chunk": 2.5}, "whole number"),
        ({"max_chunk": 5}, "first_chunk=10 is more than max_chunk=5"),
        ({"chunking": "fixed", "max_chunk": 5}, "leave them out"),
        ({"chunking": [25], "first_chunk": 5}, "leave them out"),
    ],
)
def test_what_cannot_be_is_refused(given_, said):
    with pytest.raises(InputError, match=said):
        chunking_of(**given_)


def test_a_listener_tells_silence_and_how_often_it_began():
    clock = Clock(0.0)
    listener = Listener(clock.perf_counter)
    assert listener.left == math.inf
    clock.now = 3.0
    listener.heard(1.0)
    clock.now = 3.5
    assert listener.left == 0.5 and listener.due == 4.0
    listener.heard(1.0)
    clock.now = 6.0
    assert listener.left == -1.0
    listener.heard(1.0)
    assert (listener.silence, listener.underruns) == (1.0, 1)
    clock.now = 7.25
    listener.heard(1.0)
    assert (listener.silence, listener.underruns) == (1.25, 2)


def test_the_cost_of_a_run_is_the_line_through_those_that_were():
    cost = Cost()
    assert cost.of(100) == 0
    cost.took(100, 2.0)
    assert cost.of(150) == pytest.approx(3.0), "of one size alone, in proportion"
    cost.took(200, 3.0)
    assert cost.of(300) == pytest.approx(4.0) and cost.of(0) == pytest.approx(1.0)
    for _ in range(16):
        cost.took(100, 5.0)
    assert cost.of(100) == pytest.approx(5.0), "what was long ago is forgotten"


@search(100)
@given(
    speeds,
    st.lists(st.integers(1, 300), min_size=12, max_size=12, unique=True),
    st.lists(st.tuples(st.integers(1, 300), st.floats(0, 200)), max_size=2),
    st.randoms(use_true_random=False),
)
def test_runs_that_compiled_or_were_held_up_do_not_tell_what_the_next_takes(speed, sizes, held_up, random):
    """One run in eight may have taken any time: a first one that compiled once made every later chunk four times the one before."""
    machine = Machine(*speed, known=False)
    runs = [(size, machine.took(size)) for size in sizes] + held_up
    random.shuffle(runs)
    for tokens, took in runs:
        machine.cost.took(tokens, took)
    assert machine.cost.of(200) == pytest.approx(machine.took(200), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("odd", [(355, 5.0), (345, 5.0), (20, 60.0), (350, 60.0)])
def test_one_odd_run_among_others_of_one_size_makes_none_cost_nothing(odd):
    cost = Cost()
    for _ in range(15):
        cost.took(350, 0.9)
    cost.took(*odd)
    assert 0.2 < cost.of(110) <= 0.9 + 1e-9 and 0.8 < cost.of(350) < 1.0


def test_long_runs_are_longer_than_a_line_through_many_short_ones():
    """Nano's runs of 300 tokens took a fifth more than that, and a listener waited."""
    cost = Cost()
    for n in (120, 125, 130, 145, 150, 160, 180, 200, 350, 350, 350, 340):
        cost.took(n, 0.1 + 0.001 * n + 0.00001 * n * n)
    for n in (120, 150, 200, 300, 350):
        assert cost.of(n) == pytest.approx(0.1 + 0.001 * n + 0.00001 * n * n, rel=0.2), n
    assert cost.of(350) == pytest.approx(0.1 + 0.35 + 1.225, rel=0.02)


def test_after_a_first_run_that_compiled_the_second_request_is_as_good_as_any():
    machine = Machine(0.008, 0.1, 0.003, known=False)
    machine.cost.took(BEFORE + 10, 60.0)
    machine.say(Chunking(), 750)
    _, listener, first, _ = machine.say(Chunking(), 750)
    assert listener.silence == 0 and first < 0.8
