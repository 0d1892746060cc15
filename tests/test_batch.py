"""Jobs that come and go in one batch say what each says alone, and leave nothing behind."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.decoders import GREEDY
from support.inside import decoding as inside
from support.searching import search
from support.static_rows import assert_state, state_of
from support.tables import SYMBOLS, TABLE, Breaks, assert_empty, assert_free, chain, link, linked, through

from kvcache import CacheGeometry, CapacityError, GeometryError, InputError, MaxTokens, SlidingWindow
from kvcache.decoding import RECORDERS, Batch, Job, Prefilled

pytestmark = pytest.mark.one_release


@search(120)
@given(data=st.data(), places=st.integers(1, 4), quantum=st.integers(1, 9), compact=st.booleans())
def test_jobs_say_what_plain_python_says(data, places, quantum, compact):
    sizes = data.draw(st.none() | st.lists(st.integers(1, places), max_size=3))
    batch = Batch(chain(places, ahead=data.draw(st.sampled_from([1, 5, 64]))), sizes, compact, quantum)
    one = st.fixed_dictionaries(
        {
            "start": st.integers(0, SYMBOLS - 1),
            "total": st.integers(1, 20),
            "seed": st.integers(0, 5),
            "ends": st.lists(st.integers(0, SYMBOLS - 1), max_size=3),
            "first_may_end": st.booleans(),
            "include_stop_token": st.booleans(),
        }
    )
    asked = data.draw(st.lists(one, min_size=1, max_size=8))
    policies = st.sampled_from([None, SlidingWindow(4), MaxTokens(5, 2)])
    assert through(batch, [link(**job, policy=data.draw(policies)) for job in asked]) == [
        linked(**job) for job in asked
    ]
    assert_free(batch)


def test_what_breaks_behind_an_end_is_nothing():
    """Steps are decoded some at a time: what comes behind the token that ends a job is thrown away, whatever it is."""
    end = linked(1, 3, seed=2)[-1]
    expected = linked(1, 9, seed=2, ends=[end])

    def forward(tokens, made, given):
        return TABLE[tokens].masked_fill((tokens == end)[:, None], float("nan"))

    for included in (True, False):
        batch = Batch(chain(2, forward=forward))
        jobs = [link(1, 9, seed=2, ends=[end], include_stop_token=included), link(1, 9, seed=2, ends=[end])]
        said = [expected if included else expected[:-1], expected]
        assert through(batch, jobs) == said
        assert_free(batch)
    batch = Batch(chain(1, forward=forward))
    batch.add(link(1, 9, seed=2))  # which does not end there, and would go on
    [error] = [piece.error for _ in range(9) for piece in batch.step() if piece.error is not None]
    assert "cannot be drawn" in str(error)


def test_a_job_may_be_over_with_its_first_token():
    [first] = linked(2, 1)
    batch = Batch(chain(1))
    for options, tokens, over in (
        ({"total": 1}, [first], True),
        ({"total": 1, "ends": [first], "include_stop_token": False}, [], True),
        ({"total": 9, "ends": [first]}, [first], True),
        ({"total": 9, "ends": [first], "include_stop_token": False}, [], True),
        ({"total": 9, "ends": [first], "first_may_end": False}, [first], False),
        ({"total": 1, "ends": [first], "first_may_end": False, "include_stop_token": False}, [first], True),
    ):
        job = link(2, **options)
        piece = batch.add(job)
        assert (piece.job, piece.tokens.tolist(), piece.over) == (job, tokens, over)
        assert batch.busy == 1 - over
        batch.cancel(job)
        assert_empty(batch)
        assert batch.step() == []


def test_d10_a_job_whose_logits_are_no_numbers_ends_and_its_neighbours_go_on():
    spoiled = [False]

    def forward(tokens, made, given):
        logits = TABLE[tokens].clone()
        if spoiled[0]:
            logits[0, 1] = float("nan")
        return logits

    batch = Batch(chain(2, forward=forward), quantum=4)
    bad, good = link(2, 20, seed=1), link(5, 20, seed=3)
    said = {job: batch.add(job).tokens.tolist() for job in (bad, good)}
    said[bad] += next(piece.tokens.tolist() for piece in batch.step() if piece.job is bad)
    spoiled[0] = True
    [failed] = [piece for piece in batch.step() if piece.job is bad]
    assert failed.over and failed.tokens.tolist() == [] and "NaN" in str(failed.error)
    assert said[bad] == linked(2, 20, seed=1)[:5], "what came before is what it is"
    spoiled[0] = False
    assert batch.busy == 1
    while batch.busy:
        [piece] = batch.step()
        assert piece.job is good and piece.error is None

    def prefill():
        return Prefilled(torch.full((1, SYMBOLS), float("nan")), link(0, 1).prefill().layers)

    with pytest.raises(InputError, match="NaN"):
        batch.add(replace(link(2, 9), prefill=prefill))
    assert_empty(batch)


def test_a_job_that_forgets_is_penalized_for_what_it_drew():
    for reset_penalty_after_first in (False, True):
        decoding = chain(2)
        batch = Batch(decoding)
        batch.add(link(4, 20, seed=1, reset_penalty_after_first=not reset_penalty_after_first, penalty=1.5))
        job = link(2, 20, seed=7, reset_penalty_after_first=reset_penalty_after_first, penalty=1.5)
        said = batch.add(job).tokens.tolist()
        [piece] = [piece for piece in batch.step() if piece.job is job]
        said += piece.tokens.tolist()
        seen = set(decoding.sampler.seen[1].nonzero()[:, 0].tolist())
        assert seen == set(said) | (set() if reset_penalty_after_first else {2})
        assert 2 not in said  # or there would be no difference


def test_a_turn_runs_no_more_places_than_it_must():
    ran = []

    def forward(tokens, made, given):
        ran.append(len(tokens))
        return TABLE[tokens]

    def widths(batch, totals):
        ran.clear()
        through(batch, [link(1, total) for total in totals])
        return ran[::8]

    # First tokens aside, these jobs run 1, 2, 3, 4 turns: the last is moved to the first place, step by step.
    totals = (9, 17, 25, 33)
    assert widths(Batch(chain(4, forward=forward)), totals) == [4, 3, 2, 1]
    assert widths(Batch(chain(4, forward=forward), sizes=[1, 2]), totals) == [4, 4, 2, 1]
    assert widths(Batch(chain(4, forward=forward), sizes=[]), totals) == [4] * 4
    assert widths(Batch(chain(4, forward=forward), compact=False), totals) == [4] * 4
    assert widths(Batch(chain(4, forward=forward)), totals[::-1]) == [4, 3, 2, 1]
    assert widths(Batch(chain(4, forward=forward), quantum=1000), (61,)) == [1] * 8
    assert len(ran) == 60  # no step beyond the last token
    assert widths(Batch(chain(4, forward=forward)), (4,)) == [1]
    assert len(ran) == 3


def test_the_sizes_are_those_that_are_worth_it():
    assert inside.sizes_of(Batch(chain(6))) == [1, 2, 3, 4, 5, 6]
    assert inside.sizes_of(Batch(chain(6, backend="graph"))) == [1, 2, 4, 6]
    assert inside.sizes_of(Batch(chain(8, backend="graph"))) == [1, 2, 4, 8]
    assert inside.sizes_of(Batch(chain(6, backend="compile"))) == [1, 6]
    assert inside.sizes_of(Batch(chain(1, backend="compile"))) == [1]
    assert inside.sizes_of(Batch(chain(6), sizes=[3])) == [3, 6]
    for sizes in ([0], [7], [-1, 2]):
        with pytest.raises(GeometryError, match="a step can run 1 to 6 places"):
            Batch(chain(6), sizes=sizes)


def whole_state(batch):
    tensors, held = inside.state_of(batch)
    return [t.clone() for t in tensors], held, state_of(inside.decoding_of(batch).kv)


def assert_whole_state(batch, before):
    tensors, held, kv = before
    now = whole_state(batch)
    assert all(torch.equal(a, b) for a, b in zip(now[0], tensors, strict=True))
    assert now[1] == held
    assert_state(inside.decoding_of(batch).kv, kv)


def broken():
    raise Breaks("no prefill today")


def test_a_job_that_cannot_enter_changes_nothing():
    batch = Batch(chain(2, 20))
    inside = link(1, 18, seed=3)
    said = batch.add(inside).tokens.tolist()
    refused = [
        (CapacityError, "needs 21 slots, there are 20", link(2, 19)),
        (CapacityError, "needs 30 slots, there are 20", link(2, 1, prefix=30)),
        (CapacityError, "21 tokens do not fit 20 slots", link(2, 1, policy=SlidingWindow(21))),
        (Breaks, "no prefill today", Job(broken, GREEDY, torch.Generator(), 3, [], torch.tensor([1]))),
        # A job whose first token cannot be drawn: its row has been taken by then.
        (IndexError, "used as indices", link(2, 9)),
    ]
    refused[-1][2].seen = torch.tensor([0.5])
    for error, words, job in refused:
        before = whole_state(batch)
        with pytest.raises(error, match=words):
            batch.add(job)
        assert batch.busy == 1
        if error is IndexError:
            assert_free(batch)
        else:
            assert_whole_state(batch, before)
        said += [token for piece in batch.step()[:1] for token in piece.tokens.tolist()][: 18 - len(said)]
        if batch.busy == 0:
            batch = Batch(chain(2, 20))
            assert said == linked(1, 18, 3)
            said = batch.add(inside := link(1, 18, seed=3)).tokens.tolist()
    beside = link(5, 18, seed=9)
    batch.add(beside)
    before = whole_state(batch)
    with pytest.raises(CapacityError, match="all 2 places are taken"):
        batch.add(Job(broken, GREEDY, torch.Generator(), 3, [], torch.tensor([1])))  # it is not even prefilled
    assert_whole_state(batch, before)
    batch.cancel(link(5, 18, seed=9))  # not this one
    assert_whole_state(batch, before)
    batch.cancel(inside)
    batch.cancel(inside)
    batch.cancel(beside)
    assert_empty(batch)
    assert through(batch, [link(2, 18)]) == [linked(2, 18)]  # as much as fits


def test_a_job_without_positions_is_refused_and_not_its_neighbours():
    # What a table of learned positions holds is known before: a turn that fails would fail all who run.
    geometry = CacheGeometry(1, 1, 2, 2, max_positions=24)
    batch = Batch(chain(2, 64, geometry=geometry))
    inside = link(1, 22, seed=2)  # 3 and 21 more run
    said = batch.add(inside).tokens.tolist()
    for policy in (None, SlidingWindow(4)):
        with pytest.raises(CapacityError, match="24"):
            batch.add(link(2, 23, policy=policy))
    assert batch.busy == 1
    while batch.busy:
        [piece] = batch.step()
        said += piece.tokens.tolist()
    assert said == linked(1, 22, 2)


@pytest.mark.parametrize("compact", [True, False])
def test_a_place_that_nobody_has_uses_up_no_positions(compact):
    # A free place takes part in steps. Tables of positions, of the tokens made and of all tokens, are finite: for T3 4,100
    # of speech, and 8,196 of all for GPT-2. A place that stays free for long must not run past them.
    table = torch.zeros(40, 1)

    def forward(tokens, made, given):
        return TABLE[tokens] + table[made] + table[given["position_ids"][:, 0]]

    batch = Batch(chain(4, 64, forward=forward), sizes=[2], compact=compact)
    assert through(batch, [link(i, 30, i) for i in range(4)]) == [linked(i, 30, i) for i in range(4)]
    for seed in range(4):  # one at a time, beside places that are free
        assert through(batch, [link(1, 30, seed)]) == [linked(1, 30, seed)]


def test_the_account_is_of_who_is_there():
    decoding = chain(2, 32)
    batch, nbytes = Batch(decoding, compact=False), decoding.kv.nbytes
    layer = batch.report().layers[0]
    assert (layer.seen, layer.stored, batch.report().nbytes) == (0, 0, nbytes)
    short, long = link(1, 6, prefix=2), link(2, 20, prefix=5, policy=SlidingWindow(4))
    batch.add(short)
    assert batch.report().layers[0].seen == 2
    batch.add(long)
    layer = batch.report().layers[0]
    assert (layer.seen, layer.stored, layer.evicted) == (5, 4, 1)
    batch.step()
    layer = batch.report().layers[0]
    assert (batch.busy, layer.seen, layer.stored, layer.evicted) == (1, 10, 4, 6)
    while batch.busy:
        batch.step()
        assert batch.report().nbytes == nbytes
    layer = batch.report().layers[0]
    assert (layer.seen, layer.stored, layer.evicted) == (0, 0, 0)
    assert batch.report().backend == "eager"


def test_the_account_tells_of_a_front_that_fell_back(monkeypatch):
    def breaks(step, restore):
        raise Breaks("no capture today")

    batch = Batch(chain(2, 64, backend="graph"))
    assert (batch.report().backend, batch.report().fallback) == ("graph", None)
    monkeypatch.setitem(RECORDERS, "cpu", breaks)  # of what is made from now on
    assert through(batch, [link(1, 9)]) == [linked(1, 9)]
    assert batch.report().fallback == "graph failed: Breaks: no capture today"


def test_a_turn_that_fails_can_be_left_behind():
    fails = []

    def forward(tokens, made, given):
        if fails and int(made[0]) == 4:
            raise Breaks(fails.pop())
        return TABLE[tokens]

    batch = Batch(chain(3, forward=forward))
    jobs = [link(i, 30, i) for i in range(3)]
    for job in jobs:
        batch.add(job)
    batch.cancel(jobs[0])
    fails.append("in the middle of a chunk")
    with pytest.raises(Breaks, match="middle"):
        batch.step()
    for job in jobs:
        batch.cancel(job)
    assert_empty(batch)
    assert through(batch, [link(i, 30, i) for i in range(5)]) == [linked(i, 30, i) for i in range(5)]
