"""Rows of a batch that move hold what they held, and smaller batches are the first rows of its memory."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.decoders import CPU, DRAWING, GREEDY, begin, decoding_of, guided_decoding
from support.families import VOCABULARY, build, tiny, token_ids
from support.inside import decoding as inside
from support.searching import search
from support.static_rows import GEOMETRY, POLICIES, Row, assert_shows, prefilled, step
from support.tables import chain, through

from kvcache import GeometryError, KeepAll, KVCacheManager, MaxTokens, SlidingWindow
from kvcache.decoding import Batch, Job, Prefilled, Sampler, Sampling, StaticKV, TextEnd, chunks_of
from kvcache.models import exact_windows, kv_layers

pytestmark = pytest.mark.one_release


@st.composite
def moves(draw):
    """What happens to four rows, one after the other."""
    happens = st.one_of(
        st.tuples(st.just("load"), st.integers(0, 3), st.sampled_from(POLICIES), st.integers(1, 14), st.booleans()),
        st.tuples(st.just("move"), st.integers(0, 3), st.integers(0, 3)),
        st.tuples(st.just("free"), st.integers(0, 3)),
        st.tuples(st.just("step"), st.integers(1, 4), st.integers(1, 6)),
    )
    return draw(st.lists(happens, min_size=3, max_size=14))


@search(120)
@given(plan=moves(), dtype=st.sampled_from([None, torch.bfloat16]), pair=st.booleans())
def test_rows_that_move_hold_what_they_held(plan, dtype, pair):
    width = 2 if pair else 1  # rows of a request: they move together
    kv = StaticKV(GEOMETRY, 4 * width, 120, dtype=dtype)
    nbytes, fronts = kv.nbytes, {n: kv.first_rows(n * width) for n in range(1, 5)}  # taken before anything is there
    rows, policies = [None] * kv.rows, [None] * kv.rows

    def of(place):
        return slice(place * width, (place + 1) * width)

    for number, (what, *how) in enumerate(plan):
        if what == "load":
            place, policy, length, later = how
            if rows[place * width] is None:
                mine = [Row(policy, length + 90, 10 * number + i) for i in range(width)]
                for row in mine:
                    row.append(length)
                kv.free(place * width, width)  # it may have taken part in steps
                kv.load(place * width, prefilled(policy, mine, length, [0] * width, [], told=False), later=later)
                rows[of(place)], policies[of(place)] = mine, [policy] * width
        elif what == "move":
            place, to = how
            if rows[place * width] is not None and rows[to * width] is None:
                kv.move(place * width, to * width, width)
                rows[of(to)], policies[of(to)] = rows[of(place)], policies[of(place)]
                rows[of(place)], policies[of(place)] = [None] * width, [None] * width
                assert kv.seen[of(place)] == kv.length[of(place)].tolist() == [0] * width
                assert inside.pending_of(kv) == []
        elif what == "free":
            kv.free(how[0] * width, width)
            rows[of(how[0])] = policies[of(how[0])] = [None] * width
        else:
            places, steps = how
            front = fronts[places]
            front.settle()
            for _ in range(steps):
                upto = places * width
                assert_shows(front, rows[:upto], policies[:upto], step(front, rows[:upto]))
        busy = [i for i, row in enumerate(rows) if row is not None]
        assert inside.policies_of(kv) == policies
        assert [kv.seen[i] for i in busy] == [int(kv.length[i]) for i in busy] == [rows[i].seen for i in busy]
    kv.settle()
    if any(row is not None for row in rows):  # those that took no part in the last steps are as they were
        assert_shows(kv, rows, policies, step(kv, rows))
    assert kv.nbytes == nbytes


def test_a_front_is_the_same_memory():
    kv = StaticKV(GEOMETRY, 3, 8)
    front = kv.first_rows(2)
    assert (front.rows, front.slots, 3 * front.nbytes) == (2, 8, 2 * kv.nbytes)
    for ours, theirs in zip((*kv.keys, kv.length, kv.limit), (*front.keys, front.length, front.limit), strict=True):
        assert ours.data_ptr() == theirs.data_ptr() and theirs.shape[0] == 2
    row = Row(KeepAll(), 9, 0)
    row.append(4)
    kv.load(2, prefilled(KeepAll(), [row], 4, [0], [], told=False))
    front.check(1000)  # the row with 4 of 8 slots is none of its
    assert front.reach() == (1, False) and kv.reach() == (5, False)
    kv.load(0, prefilled(KeepAll(), [row], 4, [0], [], told=False))
    front.advance(2)
    assert (kv.seen[0], front.seen[0], kv.seen[2]) == (6, 6, 4)
    with pytest.raises(GeometryError, match="rows 2 to 2 are not among the 2 rows"):
        front.load(2, prefilled(KeepAll(), [row], 4, [0], [], told=False))
    decoding = chain(3)
    assert decoding.first_rows(3) is decoding
    assert decoding.first_rows(2) is decoding.first_rows(2) is not decoding.first_rows(1)
    assert decoding.first_rows(2).token.data_ptr() == decoding.token.data_ptr()


def test_settings_and_marks_move_along():
    generator = torch.Generator().manual_seed(1)
    settings = [
        Sampling(0.7, 0.8, 0.05, 5, 1.5, 0.5),
        GREEDY,
        Sampling(1.2, 1.0, 0.0, 0, 0.8, 1.5),
        Sampling(0.9, 0.5, 0.3, 3, 2.0, 0.0),
    ]
    sampler, moved = (Sampler(4, 30, inside.TRANSFORMERS, CPU, guided=True) for _ in range(2))
    logits = torch.randn(8, 30, generator=generator)
    noise = torch.empty(4, 30).exponential_(generator=generator)
    seen = [torch.randint(30, (n,), generator=generator) for n in (3, 0, 9, 5)]
    order = [2, 0, 3, 1]  # where each goes, by way of others
    for i, one in enumerate(settings):
        sampler.set(i, one)
        sampler.begin(i, seen[i])
    for i in (3, 1, 0, 2):  # each enters the last place but for the first, which is free by then
        moved.set(3, settings[i])
        moved.begin(3, seen[i])
        moved.move(3, order[i])
    # The last one that was set aside in place 3 went to order[2] == 3, where it stood already.
    assert order[2] == 3
    moved.move(3, 3)
    moved.set(order[0], settings[0])
    moved.begin(order[0], seen[0])
    back = torch.tensor(order)
    pairs = torch.stack([2 * back, 2 * back + 1], 1).flatten()
    shuffled = torch.empty_like(logits).index_copy_(0, pairs, logits)
    assert torch.equal(moved.process(shuffled, moved.drawing)[back], sampler.process(logits, sampler.drawing))
    other = torch.empty_like(noise).index_copy_(0, back, noise)
    assert torch.equal(moved(shuffled, other, moved.drawing)[back], sampler(logits, noise, sampler.drawing))
    assert torch.equal(moved.seen[back], sampler.seen)
    assert [inside.settings_of(moved)[i] for i in order] == inside.settings_of(sampler) == settings
    only = sampler.first_rows(2)
    assert torch.equal(only.process(logits[:4], sampler.drawing), sampler.process(logits, sampler.drawing)[:2])
    sampler.set(0, GREEDY)  # what is set after is the front's too; those behind it are none of its
    assert only.drawing is None and sampler.drawing is not None
    only(logits[:4], noise[:2], None)
    assert torch.equal(only.seen, sampler.seen[:2])


def request(model, policy, i):
    """The prompt and settings of a request, and its generator."""
    return token_ids(1, 5 + 4 * i, seed=i), (DRAWING, GREEDY, Sampling(1.1, 0.8, 0.0, 0, 1.0))[i % 3]


@pytest.mark.grid(5)
@pytest.mark.parametrize(("backend", "dtype"), [("eager", None), ("eager", torch.bfloat16), ("graph", None)], ids=str)
@pytest.mark.parametrize("policy", [None, SlidingWindow(12, sinks=3), MaxTokens(24, 15)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_request_that_moved_goes_on(name, policy, backend, dtype):
    model = tiny(name)
    manager = KVCacheManager(model, policy)
    slots = 80 if policy is None else policy.limit
    asked = [request(model, policy, i) for i in range(3)]
    expected = []
    for i, (ids, sampling) in enumerate(asked):
        one = decoding_of(model, 1, slots, dtype=dtype)
        first = begin(one, manager, ids, sampling, [torch.Generator().manual_seed(i)])
        expected.append(torch.cat([first, one.chunk(45)], 1)[0].tolist())
    together = decoding_of(model, 4, slots, backend, dtype=dtype)
    state = torch.get_rng_state()
    said = [
        begin(together, manager, ids, sampling, [torch.Generator().manual_seed(i)], first=place)[0].tolist()
        for i, place, (ids, sampling) in zip(range(3), (1, 2, 3), asked, strict=True)
    ]
    together.move(3, 0)  # what was loaded for later has not been copied yet
    where = {0: 1, 1: 2, 2: 0}
    for move, size, steps in ((None, 4, 5), (None, 3, 9), ((0, 3), 4, 3), ((3, 0), 3, 11), (None, 3, 17)):
        if move is not None:
            together.move(*move)
            where = {i: move[1] if place == move[0] else place for i, place in where.items()}
        tokens = together.first_rows(size).chunk(steps)
        for i, place in where.items():
            said[i] += tokens[place].tolist()
    assert said == expected
    # The others leave, and the last one goes on by itself.
    together.free(where[0], 1)
    together.free(where[2], 1)
    together.move(where[1], 0)
    ids, sampling = asked[1]
    one = decoding_of(model, 1, slots, dtype=dtype)
    begin(one, manager, ids, sampling, [torch.Generator().manual_seed(1)])
    one.chunk(45)
    assert torch.equal(together.first_rows(1).chunk(20), one.chunk(20))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(front.fallback is None for front in inside.fronts_of(together).values())
    assert (together.kv.seen[0], inside.policies_of(together.kv)[1:]) == (ids.shape[1] + 65, [None] * 3)


def test_both_rows_of_a_guided_request_move():
    model = build("llama", num_hidden_layers=1)
    manager = KVCacheManager(model, SlidingWindow(10, sinks=2))
    settings = [Sampling(0.9, 0.9, 0.0, 0, 1.2, 0.7), Sampling(0.8, 1.0, 0.0, 12, 1.0, 1.5)]

    def start(decoding, place, i):
        ids = token_ids(2, 6 + 5 * i, seed=i)
        cache = manager.new_cache(2)
        with torch.no_grad(), exact_windows(model):
            logits = model(ids, past_key_values=cache).logits[:, -1]
        decoding.load(2 * place, kv_layers(cache))
        return decoding.start(place, logits, [settings[i]], [torch.Generator().manual_seed(i)], [ids[0]]).tolist()

    expected = []
    for i in range(2):
        one = guided_decoding(model, 12, 1, "eager")
        expected.append(start(one, 0, i) + one.chunk(30)[0].tolist())
    for backend in ("eager", "graph"):
        together = guided_decoding(model, 12, 3, backend)
        said = [start(together, 2, 0), start(together, 1, 1)]
        for row, tokens in zip(said, together.chunk(7)[[2, 1]].tolist(), strict=True):
            row += tokens
        together.move(2, 0)
        for row, tokens in zip(said, together.first_rows(2).chunk(23).tolist(), strict=True):
            row += tokens
        assert said == expected
        assert inside.fronts_of(together)[2].fallback is None


@pytest.mark.parametrize(("backend", "sizes"), [("compile", [1, 3]), ("graph", [1, 2, 3])])
def test_batches_of_captured_and_compiled_steps_say_what_each_says_alone(backend, sizes, monkeypatch):
    # torch's compiler without its slow half, as in test_chatterbox.py
    monkeypatch.setattr(inside.COMPILED, partial(inside.Compiled, compiler="aot_eager"))
    model = build("llama", num_hidden_layers=1)
    manager = KVCacheManager(model)
    totals = (30, 9, 1, 22, 17, 30)

    def job(i):
        ids, sampling = request(model, None, i % 4)

        def prefill():
            new = manager.new_cache(1)
            with torch.no_grad():
                return Prefilled(model(ids, past_key_values=new).logits[:, -1], kv_layers(new))

        return Job(prefill, sampling, torch.Generator().manual_seed(i), totals[i], [70], ids[0])

    expected = []
    for i, total in enumerate(totals):
        one = decoding_of(model, 1, 64)
        ids, sampling = request(model, None, i % 4)
        begin(one, manager, ids, sampling, [torch.Generator().manual_seed(i)])
        expected.append([t for chunk in chunks_of(one, TextEnd([70], total), 9) for t in chunk[0].tolist()])
    together = decoding_of(model, 3, 64, backend)
    batch = Batch(together)
    assert inside.sizes_of(batch) == sizes
    assert through(batch, [job(i) for i in range(6)]) == expected
    fronts = {**inside.fronts_of(together), 3: together}
    assert sorted(fronts) == sizes  # all of them have run
    for front in fronts.values():
        assert (front.backend, front.fallback) == (backend, None)
        if backend == "graph":
            assert isinstance(inside.backend_of(front), inside.Graph)
            assert inside.owner_of(inside.backend_of(front)) is front
    assert any(0 < len(tokens) < total for tokens, total in zip(expected, totals, strict=True))
    assert max(max(tokens) for tokens in expected) < VOCABULARY
