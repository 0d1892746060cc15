"""Jobs that come and go in one batch say what each says alone, and leave nothing behind."""

import random
from collections import defaultdict, deque
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.families import VOCABULARY, build, tiny, token_ids
from support.searching import search
from test_decoding import (
    CPU,
    DRAWING,
    GEOMETRY,
    GREEDY,
    POLICIES,
    Row,
    assert_shows,
    assert_state,
    begin,
    decoding_of,
    guided_decoding,
    prefilled,
    state_of,
    step,
)

from kvcache import (
    CacheGeometry,
    CapacityError,
    GeometryError,
    InputError,
    KeepAll,
    KVCacheManager,
    KVLayer,
    MaxTokens,
    SlidingWindow,
)
from kvcache.decoding import Batch, Decoding, Job, Sampler, Sampling, StaticKV
from kvcache.decoding import _backends as backends
from kvcache.decoding._backends import Graph
from kvcache.decoding._sampler import TRANSFORMERS
from kvcache.models import exact_windows, kv_layers

pytestmark = pytest.mark.one_release

# ---------------------------------------------------------------------- segments on T3, against each alone


class Recorded(Batch):
    """A batch that writes down the logits of every token, of each job ``[rows, vocabulary]`` a token."""

    def __init__(self, decoding, **options):
        super().__init__(decoding, **options)
        self.logits = defaultdict(list)

    def _piece(self, place, job, tokens):
        decoding, rows = self._decoding, self._decoding.rows
        if self._made[place] == 0:
            self.logits[job].append(decoding.first)
        else:
            log = decoding.log[: len(tokens), place * rows : (place + 1) * rows]
            self.logits[job] += log.clone().unbind()
        return super()._piece(place, job, tokens)


def recording(engine):
    """Let every decoding of an engine write down its logits: `first` of a prefill, `log` of the steps of a chunk.

    The log is written within the step, so that a recorded step writes it too.
    """
    make = engine._stepper.decoding

    def made(requests, rows, slots):
        decoding = make(requests, rows, slots)
        forward, start, chunk = decoding._forward, decoding.start, decoding.chunk
        log = torch.zeros(decoding.ahead, requests * rows, decoding.sampler.vocabulary)

        def logged(tokens, made, given):
            logits = forward(tokens, made, given)
            log[:, : logits.shape[0]].index_copy_(0, decoding._column, logits[None])
            return logits

        def started(first, logits, *rest):
            decoding.first = logits.clone()
            return start(first, logits, *rest)

        def chunked(steps):
            tokens = chunk(steps)
            decoding.all.extend(log[:steps].clone().unbind())
            return tokens

        decoding.log, decoding.all = log, []
        decoding._forward, decoding.start = logged, started
        if requests == 1:
            decoding.chunk = chunked
        return decoding

    engine._stepper.decoding = made
    return engine


TEXTS = ("Hi.", "The birch canoe slid on the smooth planks.", "Glue the sheet to the dark blue background. " * 3)
TOTALS = (1, 2, 9, 17, 30, 30, 30)
ENDS = {"english": 5.0, "gpt": 5.0}
T3_POLICIES = (None, SlidingWindow(16))


@cache
def t3(kind):
    """A model whose weights are wide enough that attention matters, and greedy text varies and ends somewhere."""
    from t3_models import likely_end, tiny_t3

    model = likely_end(tiny_t3(kind), by=ENDS[kind])
    with torch.no_grad():
        model.speech_head.weight.mul_(10)
        for weight in model.tfmr.parameters():
            if weight.dim() == 2:
                weight.mul_(3)
    return model


@cache
def engine_of(kind, policy, backend):
    from kvcache_chatterbox import ChatterboxEngine, random_conditionals

    engine = recording(ChatterboxEngine(t3(kind), policy, backend=backend))
    for i, name in enumerate("abc"):
        engine.add_voice(name, conditionals=random_conditionals(t3(kind), i))
    return engine


@cache
def cases(kind):
    """Utterances of all kinds; some share a seed."""
    from kvcache_chatterbox import byte_tokens

    engine, chosen, made = engine_of(kind, None, "eager"), random.Random(5), []
    for i in range(24):
        settings = {
            "temperature": chosen.choice((0.0, 0.7, 1.2)),
            "top_p": chosen.choice((0.8, 0.95, 1.0)),
            "min_p": chosen.choice((0.0, 0.05)),
            "top_k": chosen.choice((0, 50, 1000)),
            "repetition_penalty": chosen.choice((1.0, 1.2, 2.0)),
        }
        if kind == "english":
            settings["cfg_weight"] = chosen.choice((0.0, 0.5))
        voice, text = engine.voices["abc"[i % 3]], byte_tokens(t3(kind), chosen.choice(TEXTS))
        total = TOTALS[i % len(TOTALS)]
        made.append(engine.utterance(voice, text, max_new_tokens=total, seed=i // 2, **settings))
    return made


def slots_of(engine, kind):
    return max(engine.slots(one) for one in cases(kind))


@cache
def alone(kind, policy, case):
    """What a case says by itself, its end included, and the logits of each token."""
    engine, utterance = engine_of(kind, policy, "eager"), cases(kind)[case]
    lent = []
    make = engine._stepper._pool.lent

    def lend(*arguments, **options):
        lent.append(make(*arguments, **options))
        return lent[-1]

    engine._stepper._pool.lent = lend
    try:
        said = torch.cat([torch.zeros(1, 0, dtype=torch.long), *engine._tokens(utterance, 64)], 1)[0].tolist()
    finally:
        engine._stepper._pool.lent = make
    rows = 2 if utterance.sampling.cfg_weight > 0 else 1
    decoding = engine._stepper._pool._idle[rows]
    logits, decoding.all = [decoding.first, *decoding.all], []
    return ended(kind, utterance, said), logits


def ended(kind, utterance, said):
    """With the end that the GPT-2 models keep to themselves."""
    stop = t3(kind).hp.stop_speech_token
    return [*said, stop] if kind == "gpt" and len(said) < utterance.max_new_tokens else said


def drawn(order, begin, reset_penalty_after_first, utterance, logits, before):
    """The token that an utterance draws from these logits, ``[rows, vocabulary]``, after those `before`."""
    sampler = Sampler(1, logits.shape[1], order, CPU, guided=logits.shape[0] == 2)
    sampler.set(0, utterance.sampling)
    sampler.begin(0, torch.tensor(before if before and reset_penalty_after_first else [begin, *before]))
    generator, noise = utterance.generator(), torch.empty(1, logits.shape[1])
    for _ in range(len(before) + 1):
        noise.exponential_(generator=generator)
    return int(sampler(logits, noise, sampler.drawing))


def assert_agrees(draw, ours, theirs, whole):
    """The same tokens, up to one that rounding explains.

    The logits of each token agree. Where a token differs, both are what the same draw takes from logits that agree: it
    lay so close to a boundary that moving them by no more than that takes it across. What comes after is not compared,
    as it follows another text.

    Args:
        draw: from logits and the tokens before to the token.
        ours, theirs: tokens and their logits, ``[rows, vocabulary]`` each; theirs may lack the unconditional row.
        whole: False where our job was cancelled.
    """
    (tokens, logits), (expected, others) = ours, theirs
    assert len(tokens) <= len(logits)
    for at, (a, b) in enumerate(zip(tokens, expected, strict=False)):
        apart = float((logits[at][: len(others[at])] - others[at]).abs().max())
        assert apart <= 1e-4, f"logits of token {at} are {apart} apart"
        if a != b:
            assert draw(logits[at], tokens[:at]) == a, f"token {at} is not what its logits give"
            assert draw(others[at], expected[:at]) == b, f"token {at} is not what the other logits give"
            return
    assert len(tokens) == len(expected) if whole else len(tokens) <= len(expected)


def assert_free(batch):
    """The places that nobody has are empty and draw nothing."""
    kv, rows = batch._decoding.kv, batch._decoding.rows
    for place, job in enumerate(batch._jobs):
        policies = kv._policies[place * rows : (place + 1) * rows]
        assert [policy is None for policy in policies] == [job is None] * rows
        assert (batch._decoding._generators[place] is None) == (job is None)
        assert batch._decoding.sampler._chosen[place].greedy or job is not None


def assert_empty(batch):
    kv = batch._decoding.kv
    assert batch.busy == 0
    assert kv.seen == kv.length.tolist() == [0] * kv.rows
    assert kv._policies == [None] * kv.rows
    assert kv._pending == [] and batch._decoding._generators == [None] * batch.places


def run_schedule(kind, policy, backend, places, compact, schedule):
    engine = engine_of(kind, policy, backend)
    waiting, arrives = deque(), 0
    for case, gap, stays in schedule:
        arrives += gap
        waiting.append((arrives, case, stays))
    said, who, leaves = defaultdict(list), {}, {}
    over = set()
    state = torch.get_rng_state()
    with engine.batch(places, slots_of(engine, kind), compact=compact) as plain:
        batch, kv = Recorded(plain._decoding, compact=compact), plain._decoding.kv
        memory = [t.data_ptr() for t in (*kv.keys, *kv.values)], kv.nbytes

        def take(piece):
            said[piece.job] += piece.tokens.tolist()
            if piece.over:
                over.add(piece.job)
                leaves.pop(piece.job, None)

        turn = 0
        while waiting or batch.busy:
            while waiting and waiting[0][0] <= turn and batch.busy < places:  # a free place is refilled at once
                _, case, stays = waiting.popleft()
                job = engine.job(cases(kind)[case])
                who[job], leaves[job] = case, None if stays is None else turn + stays
                take(batch.enter(job))
            for job, when in list(leaves.items()):
                if when == turn:
                    batch.leave(job)
                    del leaves[job]
            assert_free(batch)
            running = {job for job in batch._jobs if job is not None}
            pieces = batch.turn()
            assert {piece.job for piece in pieces} == running and len(pieces) == len(running)
            for piece in pieces:
                take(piece)
            assert batch.busy == len(running - over)
            turn += 1
        assert_free(batch)
        assert batch.turn() == []
        assert memory == ([t.data_ptr() for t in (*kv.keys, *kv.values)], kv.nbytes)
        assert batch.report().backend == backend and batch.report().fallback is None
    assert_empty(batch)
    assert torch.equal(torch.get_rng_state(), state)
    return [(who[job], said[job], batch.logits[job], job in over) for job in who]


@st.composite
def schedules(draw):
    """Who comes, how many turns after the one before, and after how many turns it is cancelled."""
    one = st.tuples(st.integers(0, 23), st.sampled_from([0, 0, 0, 1, 2]), st.sampled_from([None, None, None, 0, 1, 2]))
    return draw(st.lists(one, min_size=1, max_size=9))


def assert_schedule(kind, policy, backend, places, compact, schedule):
    from kvcache_chatterbox.speech import order

    for case, said, logits, over in run_schedule(kind, policy, backend, places, compact, schedule):
        utterance = cases(kind)[case]
        draw = partial(drawn, order(kind == "gpt"), t3(kind).hp.start_speech_token, kind == "gpt", utterance)
        ours = ended(kind, utterance, said) if over else said
        assert_agrees(draw, (ours, logits), alone(kind, policy, case), over)


@pytest.mark.slow  # a check of the cases, which no change of the library can break
def test_the_cases_end_in_many_places():
    for kind in ("english", "gpt"):
        for policy in T3_POLICIES:
            lengths = [len(alone(kind, policy, case)[0]) for case in range(24)]
            totals = [one.max_new_tokens for one in cases(kind)]
            assert len(set(lengths)) > 6
            assert sum(a < b for a, b in zip(lengths, totals, strict=True)) > 6
            assert sum(a == b > 16 for a, b in zip(lengths, totals, strict=True)) > 1


@pytest.mark.parametrize("kind", ["english", "gpt"])
@search(14)
@given(
    policy=st.sampled_from(T3_POLICIES),
    places=st.sampled_from([1, 3, 8]),
    compact=st.booleans(),
    schedule=schedules(),
)
def test_whoever_comes_and_goes_each_says_what_it_says_alone(kind, policy, places, compact, schedule):
    assert_schedule(kind, policy, "eager", places, compact, schedule)


@pytest.mark.parametrize("kind", ["english", "gpt"])
@search(4)
@given(policy=st.sampled_from(T3_POLICIES), compact=st.booleans(), schedule=schedules())
def test_whoever_comes_and_goes_the_graphs_follow(kind, policy, compact, schedule):
    assert_schedule(kind, policy, "graph", 3, compact, schedule)


@pytest.mark.grid(3)
@pytest.mark.parametrize("places", [1, 3, 8])
@pytest.mark.parametrize("kind", ["english", "gpt"])
def test_all_cases_through_one_batch(kind, places):
    schedule = [(case, 0, None) for case in range(24)]
    for policy in T3_POLICIES:
        assert_schedule(kind, policy, "eager", places, True, schedule)


@pytest.mark.parametrize("kind", ["english", "gpt"])
def test_what_a_job_says_is_the_same_whoever_is_cancelled_beside_it(kind):
    schedule = [(case, 0, None) for case in (13, 4, 18, 9, 14)]
    left = [(case, 0, when) for (case, _, _), when in zip(schedule, (None, 1, None, 0, 2), strict=True)]
    for policy in T3_POLICIES:
        whole = run_schedule(kind, policy, "eager", 3, True, schedule)
        some = run_schedule(kind, policy, "eager", 3, True, left)
        assert [over for *_, over in some] == [
            when is None or over for (_, _, when), (*_, over) in zip(left, some, strict=True)
        ]
        for (_, tokens, _, _), (_, others, _, over) in zip(whole, some, strict=True):
            assert others == (tokens if over else tokens[: len(others)])


def test_only_rounding_is_an_excuse():
    from kvcache_chatterbox import Sampling as Options
    from kvcache_chatterbox import Utterance

    generator = torch.Generator().manual_seed(0)
    for temperature in (0.0, 1.0):
        sampling = Options(temperature=temperature, top_p=1.0, repetition_penalty=1.0)
        utterance = Utterance(None, torch.zeros(1, 1), sampling, 9, 4, True)
        draw = partial(drawn, TRANSFORMERS, 0, False, utterance)
        theirs = list(torch.randn(3, 1, 50, generator=generator))
        said = []
        for logits in theirs:
            said.append(draw(logits, said))
        # The runner-up at the middle token, brought to within rounding of the winner.
        winner = said[1]
        runner = next(t for t in range(50) if t != winner)
        low, high = -50.0, 50.0
        for _ in range(60):  # where the runner-up begins to win
            middle = (low + high) / 2
            theirs[1][0, runner] = middle
            low, high = (middle, high) if draw(theirs[1], said[:1]) == winner else (low, middle)
        theirs[1][0, runner] = low - 2e-5
        assert draw(theirs[1], said[:1]) == winner
        ours = [logits.clone() for logits in theirs]
        assert_agrees(draw, (said, ours), (said, theirs), True)
        ours[1][0, runner] = high + 2e-5
        other = [said[0], runner, 49]
        assert_agrees(draw, (other, ours), (said, theirs), True)
        assert_agrees(draw, (other[:2], ours), (said, theirs), False)
        with pytest.raises(AssertionError, match="token 1 is not what its logits give"):  # the logits do not explain it
            assert_agrees(draw, (other, theirs), (said, theirs), True)
        third = next(t for t in range(50) if t not in (winner, runner))
        with pytest.raises(AssertionError, match="token 1 is not what its logits give"):  # nor this token
            assert_agrees(draw, ([said[0], third], ours), (said, theirs), True)
        ours[1][0, runner] = high + 3e-4
        with pytest.raises(AssertionError, match="logits of token 1 are"):  # it is more than rounding
            assert_agrees(draw, (other, ours), (said, theirs), True)
        with pytest.raises(AssertionError):  # one ended, the other did not
            assert_agrees(draw, (said[:2], theirs), (said, theirs), True)
        ours[1] = theirs[1].clone()
        ours[2][0, 3] += 3e-4
        with pytest.raises(AssertionError, match="logits of token 2 are"):  # tokens that agree by luck
            assert_agrees(draw, (said, ours), (said, theirs), True)


def test_an_engine_says_what_it_cannot_batch():
    engine, utterance = engine_of("gpt", None, "eager"), cases("gpt")[0]
    from kvcache_chatterbox import ChatterboxEngine

    with pytest.raises(InputError, match="needs a seed"):
        engine.job(replace(utterance, seed=None))
    for other in (ChatterboxEngine(t3("gpt"), backend="off"), ChatterboxEngine(t3("gpt"))):
        if other._stepper is not None:
            other.disable_kv_cache()
        assert not other.batches
        with pytest.raises(InputError, match="one utterance at a time"):
            other.batch(2, 64)
    assert engine.batches


# ---------------------------------------------------------------------- a model that is a table


SYMBOLS = 12
TABLE = torch.randn(SYMBOLS, SYMBOLS, generator=torch.Generator().manual_seed(3)) * 2
SMALL = CacheGeometry(1, 1, 2, 2)


def chain(places, slots=64, forward=None, geometry=SMALL, backend="eager", **options):
    """A decoding whose next token depends on the last one only."""
    kv = StaticKV(geometry, places, slots)
    sampler = Sampler(places, SYMBOLS, TRANSFORMERS, CPU)
    return Decoding(forward or (lambda tokens, made, given: TABLE[tokens]), kv, sampler, backend, **options)


def link(start, total, seed=0, ends=(), prefix=3, policy=None, temperature=1.0, penalty=1.0, **options):
    """A job that goes on from a token, after a prefix of so many."""

    def prefill():
        kv = KVLayer(policy)
        kv.append(torch.zeros(1, 1, prefix, 2), torch.zeros(1, 1, prefix, 2))
        return TABLE[start][None], [kv]

    sampling = Sampling(temperature, 1.0, repetition_penalty=penalty)
    return Job(prefill, sampling, torch.Generator().manual_seed(seed), total, ends, torch.tensor([start]), **options)


def linked(start, total, seed=0, ends=(), first_may_end=True, include_stop_token=True):
    """What such a job says, in plain Python."""
    generator, token, said = torch.Generator().manual_seed(seed), start, []
    while len(said) < total:
        noise = torch.empty(SYMBOLS).exponential_(generator=generator)
        token = int((torch.softmax(TABLE[token], 0) / noise).argmax())
        said.append(token)
        if token in ends and (first_may_end or len(said) > 1):
            return said if include_stop_token else said[:-1]
    return said


def through(batch, jobs):
    """What each of these jobs says, entered as places come free."""
    said, waiting = {job: [] for job in jobs}, list(jobs)
    while waiting or batch.busy:
        pieces = [batch.enter(waiting.pop(0)) for _ in range(min(len(waiting), batch.places - batch.busy))]
        for piece in (*pieces, *batch.turn()):
            said[piece.job] += piece.tokens.tolist()
    return [said[job] for job in jobs]


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
        piece = batch.enter(job)
        assert (piece.job, piece.tokens.tolist(), piece.over) == (job, tokens, over)
        assert batch.busy == 1 - over
        batch.leave(job)
        assert_empty(batch)
        assert batch.turn() == []


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
    batch.enter(link(1, 9, seed=2))  # which does not end there, and would go on
    [error] = [piece.error for _ in range(9) for piece in batch.turn() if piece.error is not None]
    assert "cannot be drawn" in str(error)


def test_d10_a_job_whose_logits_are_no_numbers_ends_and_its_neighbours_go_on():
    spoiled = [False]

    def forward(tokens, made, given):
        logits = TABLE[tokens].clone()
        if spoiled[0]:
            logits[0, 1] = float("nan")
        return logits

    batch = Batch(chain(2, forward=forward), quantum=4)
    bad, good = link(2, 20, seed=1), link(5, 20, seed=3)
    said = {job: batch.enter(job).tokens.tolist() for job in (bad, good)}
    said[bad] += next(piece.tokens.tolist() for piece in batch.turn() if piece.job is bad)
    spoiled[0] = True
    [failed] = [piece for piece in batch.turn() if piece.job is bad]
    assert failed.over and failed.tokens.tolist() == [] and "NaN" in str(failed.error)
    assert said[bad] == linked(2, 20, seed=1)[:5], "what came before is what it is"
    spoiled[0] = False
    assert batch.busy == 1
    while batch.busy:
        [piece] = batch.turn()
        assert piece.job is good and piece.error is None

    def prefill():
        return torch.full((1, SYMBOLS), float("nan")), link(0, 1).prefill()[1]

    with pytest.raises(InputError, match="NaN"):
        batch.enter(replace(link(2, 9), prefill=prefill))
    assert_empty(batch)


def test_a_job_that_forgets_is_penalized_for_what_it_drew():
    for reset_penalty_after_first in (False, True):
        decoding = chain(2)
        batch = Batch(decoding)
        batch.enter(link(4, 20, seed=1, reset_penalty_after_first=not reset_penalty_after_first, penalty=1.5))
        job = link(2, 20, seed=7, reset_penalty_after_first=reset_penalty_after_first, penalty=1.5)
        said = batch.enter(job).tokens.tolist()
        [piece] = [piece for piece in batch.turn() if piece.job is job]
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
    assert Batch(chain(6))._sizes == [1, 2, 3, 4, 5, 6]
    assert Batch(chain(6, backend="graph"))._sizes == [1, 2, 4, 6]
    assert Batch(chain(8, backend="graph"))._sizes == [1, 2, 4, 8]
    assert Batch(chain(6, backend="compile"))._sizes == [1, 6]
    assert Batch(chain(1, backend="compile"))._sizes == [1]
    assert Batch(chain(6), sizes=[3])._sizes == [3, 6]
    for sizes in ([0], [7], [-1, 2]):
        with pytest.raises(GeometryError, match="a step can run 1 to 6 places"):
            Batch(chain(6), sizes=sizes)


def whole_state(batch):
    decoding = batch._decoding
    tensors = [*decoding.state(), decoding.sampler._settings, decoding.sampler._top_k]
    held = list(batch._jobs), list(batch._made), list(decoding._generators), list(decoding.sampler._chosen)
    return [t.clone() for t in tensors], held, state_of(decoding.kv)


def assert_whole_state(batch, before):
    tensors, held, kv = before
    now = whole_state(batch)
    assert all(torch.equal(a, b) for a, b in zip(now[0], tensors, strict=True))
    assert now[1] == held
    assert_state(batch._decoding.kv, kv)


class Breaks(Exception):
    """What a test lets fail."""


def broken():
    raise Breaks("no prefill today")


def test_a_job_that_cannot_enter_changes_nothing():
    batch = Batch(chain(2, 20))
    inside = link(1, 18, seed=3)
    said = batch.enter(inside).tokens.tolist()
    refused = [
        (CapacityError, "needs 21 slots, there are 20", link(2, 19)),
        (CapacityError, "needs 30 slots, there are 20", link(2, 1, prefix=30)),
        (CapacityError, "21 tokens do not fit 20 slots", link(2, 1, policy=SlidingWindow(21))),
        (Breaks, "no prefill today", Job(broken, GREEDY, torch.Generator(), 3, [], torch.tensor([1]))),
        # A job whose first token cannot be drawn: its row has been taken by then.
        (IndexError, "out of bounds", link(2, 9)),
    ]
    refused[-1][2].seen = torch.tensor([SYMBOLS])
    for error, words, job in refused:
        before = whole_state(batch)
        with pytest.raises(error, match=words):
            batch.enter(job)
        assert batch.busy == 1
        if error is IndexError:
            assert_free(batch)
        else:
            assert_whole_state(batch, before)
        said += [token for piece in batch.turn()[:1] for token in piece.tokens.tolist()][: 18 - len(said)]
        if batch.busy == 0:
            batch = Batch(chain(2, 20))
            assert said == linked(1, 18, 3)
            said = batch.enter(inside := link(1, 18, seed=3)).tokens.tolist()
    beside = link(5, 18, seed=9)
    batch.enter(beside)
    before = whole_state(batch)
    with pytest.raises(CapacityError, match="all 2 places are taken"):
        batch.enter(Job(broken, GREEDY, torch.Generator(), 3, [], torch.tensor([1])))  # it is not even prefilled
    assert_whole_state(batch, before)
    batch.leave(link(5, 18, seed=9))  # not this one
    assert_whole_state(batch, before)
    batch.leave(inside)
    batch.leave(inside)
    batch.leave(beside)
    assert_empty(batch)
    assert through(batch, [link(2, 18)]) == [linked(2, 18)]  # as much as fits


def test_a_job_without_positions_is_refused_and_not_its_neighbours():
    # What a table of learned positions holds is known before: a turn that fails would fail all who run.
    geometry = CacheGeometry(1, 1, 2, 2, max_positions=24)
    batch = Batch(chain(2, 64, geometry=geometry))
    inside = link(1, 22, seed=2)  # 3 and 21 more run
    said = batch.enter(inside).tokens.tolist()
    for policy in (None, SlidingWindow(4)):
        with pytest.raises(CapacityError, match="24"):
            batch.enter(link(2, 23, policy=policy))
    assert batch.busy == 1
    while batch.busy:
        [piece] = batch.turn()
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
    batch.enter(short)
    assert batch.report().layers[0].seen == 2
    batch.enter(long)
    layer = batch.report().layers[0]
    assert (layer.seen, layer.stored, layer.evicted) == (5, 4, 1)
    batch.turn()
    layer = batch.report().layers[0]
    assert (batch.busy, layer.seen, layer.stored, layer.evicted) == (1, 10, 4, 6)
    while batch.busy:
        batch.turn()
        assert batch.report().nbytes == nbytes
    layer = batch.report().layers[0]
    assert (layer.seen, layer.stored, layer.evicted) == (0, 0, 0)
    assert batch.report().backend == "eager"


def test_the_account_tells_of_a_front_that_fell_back(monkeypatch):
    def breaks(step, restore):
        raise Breaks("no capture today")

    batch = Batch(chain(2, 64, backend="graph"))
    assert (batch.report().backend, batch.report().fallback) == ("graph", None)
    monkeypatch.setattr(backends, "traced", breaks)  # of what is made from now on
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
        batch.enter(job)
    batch.leave(jobs[0])
    fails.append("in the middle of a chunk")
    with pytest.raises(Breaks, match="middle"):
        batch.turn()
    for job in jobs:
        batch.leave(job)
    assert_empty(batch)
    assert through(batch, [link(i, 30, i) for i in range(5)]) == [linked(i, 30, i) for i in range(5)]


# ---------------------------------------------------------------------- rows that move


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
                assert kv._pending == []
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
        assert kv._policies == policies
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
    sampler, moved = (Sampler(4, 30, TRANSFORMERS, CPU, guided=True) for _ in range(2))
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
    assert [moved._chosen[i] for i in order] == sampler._chosen == settings
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
    assert all(front.fallback is None for front in together._fronts.values())
    assert (together.kv.seen[0], together.kv._policies[1:]) == (ids.shape[1] + 65, [None] * 3)


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
        assert together._fronts[2].fallback is None


@pytest.mark.parametrize(("backend", "sizes"), [("compile", [1, 3]), ("graph", [1, 2, 3])])
def test_batches_of_captured_and_compiled_steps_say_what_each_says_alone(backend, sizes, monkeypatch):
    # torch's compiler without its slow half, as in test_chatterbox.py
    monkeypatch.setattr(backends, "Compiled", partial(backends.Compiled, compiler="aot_eager"))
    model = build("llama", num_hidden_layers=1)
    manager = KVCacheManager(model)
    totals = (30, 9, 1, 22, 17, 30)

    def job(i):
        ids, sampling = request(model, None, i % 4)

        def prefill():
            new = manager.new_cache(1)
            with torch.no_grad():
                return model(ids, past_key_values=new).logits[:, -1], kv_layers(new)

        return Job(prefill, sampling, torch.Generator().manual_seed(i), totals[i], [70], ids[0])

    expected = []
    for i, total in enumerate(totals):
        one = decoding_of(model, 1, 64)
        ids, sampling = request(model, None, i % 4)
        begin(one, manager, ids, sampling, [torch.Generator().manual_seed(i)])
        expected.append([t for chunk in one.chunks(total, 9, [70]) for t in chunk[0].tolist()])
    together = decoding_of(model, 3, 64, backend)
    batch = Batch(together)
    assert batch._sizes == sizes
    assert through(batch, [job(i) for i in range(6)]) == expected
    fronts = {**together._fronts, 3: together}
    assert sorted(fronts) == sizes  # all of them have run
    for front in fronts.values():
        assert (front.backend, front.fallback) == (backend, None)
        if backend == "graph":
            assert isinstance(front._backend, Graph) and front._backend._of is front
    assert any(0 < len(tokens) < total for tokens, total in zip(expected, totals, strict=True))
    assert max(max(tokens) for tokens in expected) < VOCABULARY
