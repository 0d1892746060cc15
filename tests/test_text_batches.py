"""Prompts of a language model in one batch and for many clients: each says what it says alone, whoever comes and goes."""

import asyncio
import gc
import weakref
from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.families import build, token_ids
from support.searching import search
from support.waiting import until_async

from kvcache import (
    H2O,
    BusyError,
    CapacityError,
    ClosedError,
    InputError,
    KVCacheManager,
    KVQuantization,
    MaxBytes,
    MemoryStore,
    PrefixCache,
    SlidingWindow,
    TextScheduler,
)
from kvcache.decoding import Piece, Request, Turns
from kvcache.manager import BatchRoom, TextSchedulerOptions
from kvcache.models import looks_on

KINDS = ("llama", "gpt2")
POLICIES = (None, SlidingWindow(16, sinks=2))
SETTINGS = (
    {"do_sample": False},
    {"do_sample": False, "repetition_penalty": 1.7},
    {"do_sample": True, "temperature": 0.8, "top_k": 12},
    {"do_sample": True, "top_p": 0.8, "repetition_penalty": 1.2, "eos_token_id": [3, 7]},
)
MODELS, MANAGERS = {}, {}


def opened(manager, **room):
    """A batch that takes jobs as they are."""
    return manager.batches.opened(BatchRoom(**room), "eager")


def jobs(manager, ids, prefix=None, seed=None, prefill_chunk=256, **given_):
    return manager.batches.job(ids, given_, prefix=prefix, seed=seed, prefill_chunk=prefill_chunk)


def counted():
    """A manager of a model that notes the tokens of each of its runs, and the notes."""
    ran, model = [], build("llama")

    @looks_on
    def note(module, args, kwargs):
        tokens = (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape[1]
        ran.extend([tokens] if tokens > 1 else [])  # what is decoded runs a copy, which has the hook, too

    model.register_forward_pre_hook(note, with_kwargs=True)
    manager = KVCacheManager(model, prefix_cache=PrefixCache(MemoryStore()))
    manager.add_prefix("system", token_ids(1, 11, seed=9)[0])
    with opened(manager, max_rows=1, slots=40) as batch:  # what is tried of the model is tried now
        batch.add(jobs(manager, token_ids(1, 3), max_new_tokens=1, do_sample=False))
        batch.step()
    ran.clear()
    return manager, ran


def model_of(kind):
    if kind not in MODELS:
        MODELS[kind] = build(kind)
    return MODELS[kind]


def manager_of(kind, policy=None):
    if (kind, policy) not in MANAGERS:
        made = KVCacheManager(model_of(kind), policy, prefix_cache=PrefixCache(MemoryStore()))
        made.add_prefix("system", token_ids(1, 11, seed=9)[0])
        MANAGERS[kind, policy] = made
    return MANAGERS[kind, policy]


def prompt(case):
    """Its ids, prefix and settings."""
    tokens = (1, 5, 9, 17, 30, 41)[case % 6]
    given_ = {"max_new_tokens": (1, 2, 9, 20, 26)[case % 5], **SETTINGS[case % len(SETTINGS)]}
    return token_ids(1, tokens, seed=case), "system" if case % 3 == 1 else None, given_


def alone(manager, case):
    ids, prefix, settings = prompt(case)
    torch.manual_seed(case)
    chunks = manager.stream(ids, prefix=prefix, backend="eager", **settings)
    said = torch.cat([torch.zeros(1, 0, dtype=torch.long), *chunks], 1)[0].tolist()
    ends = [i for i, token in enumerate(said) if token in settings.get("eos_token_id", ())]
    return said[: ends[0] + 1] if ends else said


def job_of(manager, case, **options):
    ids, prefix, settings = prompt(case)
    return jobs(manager, ids[0] if case % 2 else ids, prefix=prefix, seed=case, **settings, **options)


def together(manager, rows, schedule, piece):
    """What each case of a schedule said, and whether it was cancelled."""
    said, who, leaves, over = defaultdict(list), {}, {}, set()
    with opened(manager, max_rows=rows, slots=100, prefill_chunk=piece) as batch:
        waiting, turn, found = list(schedule), 0, []

        def take(one):
            assert one.error is None
            said[one.job] += one.tokens.tolist()
            if one.over:
                over.add(one.job)

        while waiting or batch.busy:
            while waiting and waiting[0][1] <= turn and batch.busy < rows:
                case, _, stays = waiting.pop(0)
                job = job_of(manager, case, prefill_chunk=piece)
                who[job], leaves[job] = case, None if stays is None else turn + stays
                found.append(job)
                take(batch.add(job))
            for job in [job for job, when in leaves.items() if when == turn and job not in over]:
                batch.cancel(job)
            for one in batch.step():
                take(one)
            turn += 1
    return [(who[job], said[job], job in over) for job in found]


@st.composite
def schedules(draw):
    """Who comes, at which turn at the earliest, and after how many turns it is cancelled."""
    gone = st.sampled_from([None, None, None, 0, 1, 3])
    cases = draw(st.lists(st.tuples(st.integers(0, 23), st.integers(0, 2), gone), min_size=1, max_size=8))
    at, found = 0, []
    for case, gap, stays in cases:
        at += gap
        found.append((case, at, stays))
    return found


@pytest.mark.parametrize("kind", KINDS)
@search(12)
@given(st.sampled_from(POLICIES), st.sampled_from([1, 3, 8]), st.sampled_from([4, 16, 1000]), schedules())
def test_whoever_comes_and_goes_each_says_what_it_says_alone(kind, policy, rows, piece, schedule):
    manager = manager_of(kind, policy)
    for case, said, over in together(manager, rows, schedule, piece):
        expected = alone(manager, case)
        assert said == (expected if over else expected[: len(said)])


def test_whoever_joins_others_wait_for_so_many_tokens_of_prompts_at_a_time():
    manager, ran = counted()
    with opened(manager, max_rows=8, slots=100, prefill_chunk=8) as batch:
        long = jobs(manager, token_ids(1, 3), max_new_tokens=97, do_sample=False, prefill_chunk=8)
        batch.add(long)
        assert [len(one.tokens) for one in batch.step()] == [1], "it is alone"
        ran.clear()
        for tokens in (40, 30, 3, 3, 2, 5, 2):
            batch.add(jobs(manager, token_ids(1, tokens), max_new_tokens=2, do_sample=False, prefill_chunk=8))
        assert ran == [], "joining runs nothing of it"
        pieces = []
        while len(pieces) < 11:
            said = batch.step()
            assert [one for one in said if one.job is long and len(one.tokens)], "who decodes goes on meanwhile"
            pieces.append([*ran])
            ran.clear()
    assert [sum(one) for one in pieces] == [8, 8, 8, 8, 8, 8, 8, 8, 6, 8, 7]
    assert pieces[9:] == [[3, 3, 2], [5, 2]]


def test_a_prefill_that_fails_or_is_cancelled_midway_is_its_own_matter():
    manager = manager_of("llama")
    with opened(manager, max_rows=3, slots=100, prefill_chunk=4) as batch:
        kept = job_of(manager, 18)
        batch.add(kept)
        bad, gone = (job_of(manager, 4, prefill_chunk=4) for _ in range(2))

        def breaks():
            raise OSError("gone")

        bad.pieces = [*bad.pieces[:2], Piece(4, breaks)]
        for job in (bad, gone):
            batch.add(job)
        with pytest.raises(CapacityError, match="all 3 places are taken"):
            batch.add(job_of(manager, 2))
        with pytest.raises(InputError, match="in the batch already"):
            batch.add(gone)
        said, failed = [], []
        while not failed:
            found = batch.step()
            failed = [one for one in found if one.job is bad]
            said += [token for one in found if one.job is kept for token in one.tokens.tolist()]
        assert failed[0].over and isinstance(failed[0].error, OSError)
        batch.step()
        cache = weakref.ref(kv_cache_of(gone))
        batch.cancel(gone)
        gc.collect()
        assert cache() is None, "what was begun for it is let go of"
        while batch.busy:
            said += [token for one in batch.step() for token in one.tokens.tolist()]
    assert said == alone(manager, 18)


def kv_cache_of(job):
    """That its pieces have begun."""
    return job.pieces[0].run.args[-1]()


def test_a_batch_in_which_all_prefills_break_says_so():
    """Each request failed by itself, so the scheduler stayed open for others."""
    manager = manager_of("llama")

    def broken(case):
        job = job_of(manager, case)
        job.prefill = lambda: 1 / 0
        return job

    with opened(manager, max_rows=3, slots=100) as batch:
        turns = Turns(batch)
        for _ in range(7):
            turns.add(Request(1, lambda index, before: broken(4), size=4))
            turns.step()
        turns.add(Request(1, lambda index, before: broken(4), size=4))
        with pytest.raises(ZeroDivisionError):
            turns.step()


def test_a_prefix_is_computed_once_for_all():
    manager, ran = counted()
    with opened(manager, max_rows=4, slots=60) as batch:
        for i in range(4):
            batch.add(jobs(manager, token_ids(1, 4 + i), prefix="system", max_new_tokens=2, do_sample=False))
        batch.step()
    assert ran == [4, 5, 6, 7]


def test_rows_are_as_many_as_the_budget_holds():
    manager = manager_of("llama")
    row = 50 * manager.geometry.token_bytes
    assert manager.batches.room(BatchRoom(8, 50))[0] == 8
    assert manager.batches.room(BatchRoom(8, 50, 3 * row + 1))[0] == 3
    with manager.batch(BatchRoom(8, 50, 3 * row)) as batch:
        assert batch.rows == 3
        assert (
            sum(one.capacity_bytes if hasattr(one, "capacity_bytes") else one.nbytes for one in batch.report().layers)
            <= 3 * row
        )
    with pytest.raises(CapacityError, match=r"one row of 50 tokens takes .* memory_budget is"):
        opened(manager, max_rows=8, slots=50, memory_budget=row - 1).__enter__()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": H2O(40)}, "ranked on the host"),
        ({"storage": KVQuantization(8)}, "quantized cache"),
        ({"policy": SlidingWindow(8), "positions": "rerotated"}, "re-rotated"),
        ({"policy": [SlidingWindow(8), SlidingWindow(9)]}, "policies of their own"),
    ],
)
def test_what_does_not_decode_on_the_engine_is_refused_with_the_reason(options, words):
    manager = KVCacheManager(build("llama", num_hidden_layers=2), **options)
    for begin in (
        lambda: manager.batch().__enter__(),
        lambda: jobs(manager, token_ids(1, 3)),
        lambda: TextScheduler(manager),
    ):
        with pytest.raises(InputError, match=f"cannot decode together here: .*{words}"):
            begin()


@pytest.mark.parametrize(
    ("inputs", "given_", "words"),
    [
        (token_ids(2, 5), {}, "2 rows; give each row"),
        (token_ids(1, 5), {"attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}, "without pads"),
        (token_ids(1, 5), {"num_return_sequences": 2, "do_sample": True}, "more than one row"),
        (token_ids(1, 5), {"num_beams": 2}, "does not know num_beams"),
        (token_ids(1, 5), {"prefix": "nobody"}, "nobody"),
        (token_ids(1, 5), {"temperature": -1.0, "do_sample": True}, "temperature"),
    ],
)
def test_what_cannot_be_batched_is_refused_before_anything_runs(inputs, given_, words):
    manager, ran = counted()
    with pytest.raises(InputError, match=words):
        jobs(manager, inputs, **{"max_new_tokens": 3, **given_})
    assert ran == []


def test_a_prompt_that_does_not_fit_is_refused_before_it_is_run():
    manager, ran = counted()
    with opened(manager, max_rows=2, slots=30) as batch:
        with pytest.raises(CapacityError, match="the job needs 31 slots, there are 30"):
            batch.add(jobs(manager, token_ids(1, 25), max_new_tokens=7, do_sample=False))
        assert ran == [] and batch.busy == 0
        batch.add(jobs(manager, token_ids(1, 25), max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_rows": 0}, "max_rows=0"),
        ({"slots": 0}, "slots=0"),
        ({"memory_budget": "much"}, "cannot read 'much'"),
        ({"prefill_chunk": 0}, "prefill_chunk=0"),
        ({"rows": 3}, "rows is no setting of TextScheduler"),
        ({"options": TextSchedulerOptions(), "max_rows": 3}, "put them into the options"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, words):
    with pytest.raises(Exception, match=words) as refused:
        TextScheduler(manager_of("llama"), **options)
    assert type(refused.value).__name__ in ("InputError", "PolicyError")
    if "rows" in options:
        with pytest.raises(InputError, match="rows is no setting of a batch"):
            manager_of("llama").batch(rows=3)


# ------------------------------------------------------------------ for many clients


async def whole(stream):
    return torch.cat([torch.zeros(0, dtype=torch.long), *[chunk async for chunk in stream]]).tolist()


def submitted(scheduler, case):
    ids, prefix, settings = prompt(case)
    return scheduler.submit(ids, prefix=prefix, seed=case, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_each_client_is_given_what_its_prompt_says_alone(kind):
    manager, cases = manager_of(kind), [0, 2, 4, 6, 8, 10, 12, 15, 16, 20, 21]
    cases = [case for case in cases if "eos_token_id" not in prompt(case)[2]]

    async def main():
        async with TextScheduler(manager, max_rows=3, slots=100, prefill_chunk=8) as scheduler:
            assert scheduler.rows == 3
            found = await asyncio.gather(*[whole(submitted(scheduler, case)) for case in cases])
            metrics = scheduler.metrics()
            assert (metrics.finished, metrics.busy, metrics.waiting) == (len(cases), 0, 0)
            return found

    assert asyncio.run(main()) == [alone(manager, case) for case in cases]


def test_clients_that_leave_make_room_and_what_cannot_be_is_told_to_one():
    manager = manager_of("llama")

    async def main():
        scheduler = TextScheduler(manager, max_rows=1, slots=100, max_waiting=1)
        with pytest.raises(ClosedError):
            scheduler.submit(token_ids(1, 3))
        async with scheduler:
            first = scheduler.submit(token_ids(1, 3), max_new_tokens=90, do_sample=False, chunk_size=2)
            await anext(first)
            second = submitted(scheduler, 15)
            with pytest.raises(BusyError, match="wait already"):
                submitted(scheduler, 3)
            await first.aclose()
            assert await whole(second) == alone(manager, 15)
            for bad, error in (
                ({"num_beams": 3, "max_new_tokens": 3}, InputError),
                ({"max_new_tokens": 100}, CapacityError),
            ):
                with pytest.raises(error):
                    await whole(scheduler.submit(token_ids(1, 3), **bad))
            with pytest.raises(InputError, match="chunk_size=0"):
                scheduler.submit(token_ids(1, 3), chunk_size=0)
            assert await whole(submitted(scheduler, 15)) == alone(manager, 15)
            await until_async(lambda: scheduler.metrics().busy == 0)
        assert scheduler.closed and scheduler.error is None
        with pytest.raises(ClosedError):
            scheduler.submit(token_ids(1, 3))

    asyncio.run(main())


def test_a_batch_takes_prompts_and_tells_what_each_has_said():
    manager, cases = manager_of("llama"), [0, 18, 12, 2]
    said = {}
    with manager.batch(max_rows=3, slots=100, prefill_chunk=8) as batch:
        waiting = list(cases)
        while waiting or batch.busy:
            while waiting and batch.busy < batch.rows:
                ids, prefix, settings = prompt(waiting[0])
                said[batch.add(ids[0], prefix=prefix, seed=waiting.pop(0), **settings)] = []
            for piece in batch.step():
                assert piece.error is None
                said[piece.job] += piece.tokens.tolist()
        assert list(said.values()) == [alone(manager, case) for case in cases]
        for _ in range(2):
            gone = batch.add(token_ids(1, 3), max_new_tokens=1, do_sample=False)
        with pytest.raises(CapacityError, match="needs 101 slots"):
            batch.add(token_ids(1, 3), max_new_tokens=99, do_sample=False)
        batch.cancel(gone)
        batch.add(token_ids(1, 3), max_new_tokens=1, do_sample=False)
        assert [len(piece.tokens) for piece in batch.step()] == [1, 1] and batch.step() == []
        kept = [batch.add(token_ids(1, 3), max_new_tokens=9, do_sample=False) for _ in range(3)]
        with pytest.raises(CapacityError, match="all 3 rows are taken"):
            batch.add(token_ids(1, 3), max_new_tokens=1, do_sample=False)
        for one in kept:
            batch.cancel(one)
        assert batch.busy == 0 and batch.step() == []


def test_what_no_row_can_hold_is_refused_before_it_is_run():
    window, learned = manager_of("llama", POLICIES[1]), manager_of("gpt2")
    with opened(window, max_rows=2, slots=24) as batch:
        with pytest.raises(
            CapacityError, match="needs 29 slots, there are 24"
        ):  # a prefix is pinned besides its window
            batch.add(jobs(window, token_ids(1, 3), prefix="system", max_new_tokens=2, do_sample=False))
        batch.add(jobs(window, token_ids(1, 3), max_new_tokens=2, do_sample=False))
    with pytest.raises(CapacityError, match=r"slots=9 are fewer than the 18 tokens"):
        window.batches.room(BatchRoom(2, 9))
    with pytest.raises(CapacityError, match="positions"):
        jobs(learned, token_ids(1, 3), max_new_tokens=10_000, do_sample=False)
    bounded = KVCacheManager(model_of("llama"), max_cache_length=50)
    with pytest.raises(CapacityError, match="slots=60 are more than max_cache_length=50"):
        bounded.batches.room(BatchRoom(2, 60))
    with pytest.raises(InputError, match="a budget for all rows of a call"):
        KVCacheManager(model_of("llama"), MaxBytes("1MiB")).batches.room(BatchRoom())
    bounded.enabled = False
    with pytest.raises(InputError, match="the cache is disabled"):
        bounded.batch()


def test_a_model_that_changes_wants_another_batch():
    model = build("llama")
    manager = KVCacheManager(model)
    with opened(manager, max_rows=2, slots=60) as batch:
        batch.add(jobs(manager, token_ids(1, 3), max_new_tokens=4, do_sample=False))
        model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
        with pytest.raises(InputError, match="the model has changed since this batch was made"):
            batch.add(jobs(manager, token_ids(1, 3), max_new_tokens=4, do_sample=False))


def test_steps_are_taken_without_the_callers_autocast():
    manager = manager_of("llama")
    job = job_of(manager, 18)
    with opened(manager, max_rows=2, slots=100) as batch, torch.autocast("cpu", torch.bfloat16):
        batch.add(job)
        said = []
        while batch.busy:
            said += [token for one in batch.step() for token in one.tokens.tolist()]
    assert said == alone(manager, 18)


def test_a_batch_that_is_over_takes_and_says_nothing():
    manager = manager_of("llama")
    with manager.batch(max_rows=2, slots=40) as batch:
        left = batch.add(token_ids(1, 5), max_new_tokens=9)
    assert batch.busy == 0
    for begin in (batch.step, lambda: batch.add(token_ids(1, 5), max_new_tokens=3)):
        with pytest.raises(ClosedError, match="this batch is closed"):
            begin()
    batch.cancel(left)
    with manager.batch(max_rows=2, slots=40) as other:  # the same memory
        other.add(token_ids(1, 5), max_new_tokens=3)
        with pytest.raises(ClosedError):
            batch.step()
        assert sum(len(piece.tokens) for _ in range(2) for piece in other.step()) == 3
