"""Segments of speech in one batch, against each alone, whoever comes and goes."""

import random
from collections import defaultdict, deque
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.decoders import CPU
from support.inside import decoding as inside
from support.inside.speech import pool_of, stepper_of, tokens_of
from support.searching import search
from support.tables import assert_empty, assert_free

from kvcache import InputError, SlidingWindow
from kvcache.decoding import Batch, Sampler

pytestmark = pytest.mark.one_release


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
    make = stepper_of(engine).decoding

    def made(requests, rows, slots):
        decoding = make(requests, rows, slots)
        forward, start, chunk = inside.forward_of(decoding), decoding.start, decoding.chunk
        log = torch.zeros(decoding.ahead, requests * rows, decoding.sampler.vocabulary)

        def logged(tokens, made, given):
            logits = forward(tokens, made, given)
            log[:, : logits.shape[0]].index_copy_(0, inside.column_of(decoding), logits[None])
            return logits

        def started(first, logits, *rest):
            decoding.first = logits.clone()
            return start(first, logits, *rest)

        def chunked(steps):
            tokens = chunk(steps)
            decoding.all.extend(log[:steps].clone().unbind())
            return tokens

        decoding.log, decoding.all = log, []
        inside.run_with(decoding, logged)
        decoding.start = started
        if requests == 1:
            decoding.chunk = chunked
        return decoding

    stepper_of(engine).decoding = made
    return engine


TEXTS = ("Hi.", "The birch canoe slid on the smooth planks.", "Glue the sheet to the dark blue background. " * 3)
TOTALS = (1, 2, 9, 17, 30, 30, 30)
ENDS = {"english": 5.0, "gpt": 5.0}
T3_POLICIES = (None, SlidingWindow(16))


@cache
def t3(kind):
    """A model whose weights are wide enough that attention matters, and greedy text varies and ends somewhere."""
    from support.t3_models import likely_end, tiny_t3

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
    make = pool_of(engine).lent

    def lend(*arguments, **options):
        lent.append(make(*arguments, **options))
        return lent[-1]

    pool_of(engine).lent = lend
    try:
        said = torch.cat([torch.zeros(1, 0, dtype=torch.long), *tokens_of(engine, utterance, 64)], 1)[0].tolist()
    finally:
        pool_of(engine).lent = make
    rows = 2 if utterance.sampling.cfg_weight > 0 else 1
    decoding = inside.idle(pool_of(engine))[rows]
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
        batch, kv = Recorded(inside.decoding_of(plain), compact=compact), inside.decoding_of(plain).kv
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
                take(batch.add(job))
            for job, when in list(leaves.items()):
                if when == turn:
                    batch.cancel(job)
                    del leaves[job]
            assert_free(batch)
            running = {job for job in inside.jobs_of(batch) if job is not None}
            pieces = batch.step()
            assert {piece.job for piece in pieces} == running and len(pieces) == len(running)
            for piece in pieces:
                take(piece)
            assert batch.busy == len(running - over)
            turn += 1
        assert_free(batch)
        assert batch.step() == []
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
        draw = partial(drawn, inside.TRANSFORMERS, 0, False, utterance)
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
        other.enabled = stepper_of(other) is None
        assert not other.batches
        with pytest.raises(InputError, match="one utterance at a time"):
            other.batch(2, 64)
    assert engine.batches
