"""Requests on one batch: whose turn it is and what is delivered, against a model in plain Python."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.clocks import Clock
from support.inside.decoding import TURNS_CLOCK
from support.searching import search
from support.tables import SYMBOLS, Breaks, assert_empty, chain, link, linked
from support.turns import Asked, World

from kvcache import InputError
from kvcache.decoding import Batch, Request, Turns

pytestmark = pytest.mark.one_release


@st.composite
def worlds(draw):
    places = draw(st.integers(1, 4))
    failing = draw(st.booleans())
    what = st.tuples(st.sampled_from(["make", "enter", "deliver", "deliver"]), st.integers(0, 2))
    asked = st.fixed_dictionaries(
        {
            "lengths": st.lists(st.integers(1, 9), min_size=1, max_size=4),
            "size": st.sampled_from([1, 1, 2, 3, 5]),
            "alone": st.sampled_from([1, 1, 3, 6]),
            "sequence": st.booleans(),
            "fails": st.none() | what if failing else st.none(),
            "blocked": st.sampled_from([False, False, True]),
        }
    )
    plan = st.tuples(asked, st.integers(0, 4), st.none() | st.integers(0, 3))  # when it comes, and when it is dropped
    return {
        "places": places,
        "quantum": draw(st.integers(1, 4)),
        "prefills": draw(st.integers(1, 4)),
        "reserved": draw(st.integers(0, places - 1)),
        "begun": draw(st.none() | st.integers(1, 3)),
        "fails": draw(st.lists(st.integers(1, 12), max_size=2)) if failing else [],
        "plans": draw(st.lists(plan, min_size=1, max_size=7)),
    }


@search(400)
@given(world=worlds())
def test_turns_are_fair_and_chunks_in_order(world):
    plans = world.pop("plans")
    here = World(**world)
    all_asked = [Asked(number, here, **asked) for number, (asked, _, _) in enumerate(plans)]
    dropped = []
    for turn in range(200):
        for asked, (_, comes, _) in zip(all_asked, plans, strict=True):
            if comes == turn:
                here.there.append(asked)
                here.turns.add(asked.request)
        for asked, (_, comes, stays) in zip(all_asked, plans, strict=True):
            if stays is not None and comes + stays == turn and asked in here.there:
                here.turns.drop(asked.request)
                here.there.remove(asked)
                dropped.append(asked)
                assert asked.running == 0
                here.turns.drop(asked.request)  # nothing happens
        if turn > 8 and here.batch.busy == 0 and not here.eligible():
            assert all(one.blocked and one.chunks for one in here.there)  # all that is left waits for its consumer
            here.step()
            here.unblocked = True
        here.step()
        if turn > 4 and not here.there:
            break
    assert here.there == here.turns.requests == here.batch.jobs == []  # nobody waits for ever
    for asked in all_asked:
        if asked not in dropped:
            assert asked.failed or asked.chunks == asked.expected()
            assert str(asked.request.error) in ("None", "step", *(asked.fails or ("None",))[:1], "prefill")
    assert here.turns.tokens >= sum(len(tokens) for asked in all_asked for _, tokens, _ in asked.chunks)


def quietly(lengths, size=3, **options):
    """A request of so many jobs, and its chunks."""
    chunks = []

    def make(index, before):
        return link(index, lengths[index], seed=index)

    return Request(len(lengths), make, size=size, deliver=chunks.append, **options), chunks


def assert_said(chunks, lengths):
    for index, length in enumerate(lengths):
        mine = [chunk for chunk in chunks if chunk.index == index]
        assert [token for chunk in mine for token in chunk.tokens.tolist()] == linked(index, length, index)
        assert [chunk.last for chunk in mine] == [False] * (len(mine) - 1) + [True]


@pytest.mark.parametrize("sequence", [False, True])
def test_a_real_batch_says_what_each_says_alone(sequence):
    batch = Batch(chain(3))
    turns = Turns(batch, reserved=1)
    lengths = [[9, 17, 1, 4], [30], [2, 2, 2], [12, 25], [1]]
    asked = [quietly(one, sequence=sequence) for one in lengths]
    for request, _ in asked:
        turns.add(request)
    over = []
    while turns.requests:
        over += turns.step()
    assert set(over) == {request for request, _ in asked} and len(over) == 5
    for (request, chunks), one in zip(asked, lengths, strict=True):
        assert request.error is None
        assert_said(chunks, one)
    assert turns.tokens == sum(map(sum, lengths))
    assert_empty(batch)


def test_the_first_chunk_comes_before_further_jobs():
    batch = Batch(chain(4), quantum=2)
    turns, (request, chunks) = Turns(batch), quietly([30, 5, 5], size=7)
    turns.add(request)
    for entered, given_ in ((1, 0), (1, 0), (1, 1), (3, 1)):
        turns.step()
        assert (request.entered, len(chunks)) == (entered, given_)


def test_a_chunk_tells_how_long_the_batch_had_computed_and_not_what_was_between_turns(monkeypatch):
    clock, batch = Clock(), Batch(chain(1), quantum=2)
    monkeypatch.setattr(TURNS_CLOCK, clock)
    step = batch.step

    def slow():
        clock.now += 0.5
        return step()

    monkeypatch.setattr(batch, "step", slow)
    turns, (request, chunks) = Turns(batch), quietly([9], size=2)
    turns.add(request)
    while turns.requests:
        turns.step()
        clock.now += 60.0  # a vocoder has its turn
    assert [chunk.at for chunk in chunks] == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_a_newcomer_finds_the_reserved_place():
    for reserved, waits in ((1, False), (0, True)):
        batch = Batch(chain(3), quantum=2)
        turns, (long, _) = Turns(batch, reserved=reserved), quietly([60] * 6, size=1)
        turns.add(long)
        for _ in range(3):
            turns.step()
        assert len(long.running) == 3 - reserved
        newcomer, chunks = quietly([9], size=1)
        turns.add(newcomer)
        turns.step()
        assert (chunks == []) == waits


def test_who_fails_to_deliver_its_first_token_leaves_no_job_behind():
    def fails(chunk):
        raise Breaks("the consumer is gone")

    batch = Batch(chain(2))
    turns = Turns(batch)
    bad = Request(2, lambda index, before: link(index, 20), size=1, deliver=fails)
    good, chunks = quietly([20])
    turns.add(bad)
    turns.add(good)
    assert turns.step() == [bad]
    assert str(bad.error) == "the consumer is gone" and batch.busy == 1
    while turns.requests:
        turns.step()
    assert_said(chunks, [20])
    assert_empty(batch)


def test_an_end_that_is_not_said_still_ends_its_job():
    batch, chunks = Batch(chain(2)), []
    said = linked(3, 20, 1)
    stop = next(t for i, t in enumerate(said) if i > 3 and t not in said[:i])
    at = said.index(stop)
    for size in (at, at + 1, 1):
        chunks.clear()
        turns = Turns(batch)
        make = [
            link(3, 20, 1, ends=[stop], include_stop_token=False),
            link(4, 2, 5, ends=range(SYMBOLS), include_stop_token=False),
        ]
        befores = []
        turns.add(
            Request(
                2,
                lambda index, before, make=make, befores=befores: befores.append(before) or make[index],
                size=size,
                sequence=True,
                deliver=chunks.append,
            )
        )
        while turns.requests:
            turns.step()
        assert [t for c in chunks for t in c.tokens.tolist() if c.index == 0] == said[:at]
        assert [(c.index, c.last) for c in chunks if c.last] == [(0, True), (1, True)]
        assert chunks[-1].tokens.tolist() == []
        assert (befores[0], befores[1].tolist()) == (None, said[:at])


def test_requests_of_nothing_are_refused():
    for jobs, size, name in ((0, 5, "jobs"), (1.5, 5, "jobs"), (1, 0, "size"), (1, math.nan, "size"), (1, 2.5, "size")):
        with pytest.raises(InputError, match=f"{name}=.* must be a whole number of at least 1"):
            Request(jobs, lambda index, before: None, size=size)
    for total in (0, -3, 2.5):
        with pytest.raises(InputError, match=f"total={total} must be a whole number"):
            link(0, total)


def test_errors_of_what_a_request_makes_are_no_sign_of_a_broken_batch():
    def fails(index, before):
        raise KeyError("a voice's field")

    turns, others = Turns(Batch(chain(1))), []
    for _ in range(20):
        bad = Request(1, fails, size=1, deliver=others.append)
        turns.add(bad)
        assert turns.step() == [bad] and isinstance(bad.error, KeyError)
    good, chunks = quietly([5])
    turns.add(good)
    while turns.requests:
        turns.step()
    assert_said(chunks, [5])
