"""Prompts of a language model in one batch and for many clients: each says what it says alone, whoever comes and goes."""

import asyncio
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
    MemoryStore,
    PrefixCache,
    SlidingWindow,
    TextScheduler,
)
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


def counted():
    """A manager of a model that notes the tokens of each of its runs, and the notes."""
    ran, model = [], build("llama")

    @looks_on
    def note(module, args, kwargs):
        ran.append((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape[1])

    model.register_forward_pre_hook(note, with_kwargs=True)
    manager = KVCacheManager(model, prefix_cache=PrefixCache(MemoryStore()))
    manager.add_prefix("system", token_ids(1, 11, seed=9)[0])
    with manager.batch(max_rows=1, slots=40) as batch:  # what is tried of the model is tried now
        batch.add(manager.job(token_ids(1, 3), max_new_tokens=1, do_sample=False))
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
    return torch.cat([torch.zeros(1, 0, dtype=torch.long), *chunks], 1)[0].tolist()


def job_of(manager, case, **options):
    ids, prefix, settings = prompt(case)
    return manager.job(ids[0] if case % 2 else ids, prefix=prefix, seed=case, **settings, **options)


def together(manager, rows, schedule, piece):
    """What each case of a schedule said, and whether it was cancelled."""
    said, who, leaves, over = defaultdict(list), {}, {}, set()
    with manager.batch(max_rows=rows, slots=100) as batch:
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
        if over and any(one in (3, 7) for one in expected):  # which `stream` fills with pads behind an end
            expected = expected[: len(said)]
        assert said == (expected if over else expected[: len(said)])


def test_a_long_prompt_holds_others_up_for_one_piece_at_a_time():
    manager, ran = counted()
    given_ = {"do_sample": False, "prefill_chunk": 8}
    with manager.batch(max_rows=3, slots=100) as batch:
        batch.add(manager.job(token_ids(1, 3), max_new_tokens=95, **given_))
        ran.clear()
        for tokens in (41, 30):
            batch.add(manager.job(token_ids(1, tokens), max_new_tokens=9, **given_))
        assert ran == [], "joining runs nothing of it"
        pieces = []
        while batch.busy:
            said = batch.step()
            if len(pieces) < 10:
                assert said, "who decodes goes on meanwhile"
            pieces.append([tokens for tokens in ran if tokens > 1])
            ran.clear()
    assert max(map(len, pieces)) == 1
    assert [one[0] for one in pieces if one] == [8, 8, 8, 8, 8, 8, 8, 8, 6], "the last token of 41 is a piece of one"


def test_a_prefill_that_fails_or_is_cancelled_midway_is_its_own_matter():
    manager = manager_of("llama")
    with manager.batch(max_rows=3, slots=100) as batch:
        kept = job_of(manager, 18)
        said = batch.add(kept).tokens.tolist()
        bad, gone = (job_of(manager, 4, prefill_chunk=4) for _ in range(2))
        pieces = bad.pieces

        def breaks():
            yield from list(pieces())[:2]
            raise OSError("gone")

        bad.pieces = breaks
        batch.add(bad)
        batch.add(gone)
        with pytest.raises(CapacityError, match="all 3 places are taken"):
            batch.add(job_of(manager, 2))
        failed = []
        while not failed:
            found = batch.step()
            failed = [one for one in found if one.job is bad]
            said += [token for one in found if one.job is kept for token in one.tokens.tolist()]
        assert failed[0].over and isinstance(failed[0].error, OSError)
        batch.cancel(gone)
        while batch.busy:
            said += batch.step()[0].tokens.tolist()
    assert said == alone(manager, 18)


def test_a_prefix_is_computed_once_for_all():
    manager, ran = counted()
    with manager.batch(max_rows=4, slots=60) as batch:
        for i in range(4):
            batch.add(manager.job(token_ids(1, 4 + i), prefix="system", max_new_tokens=2, do_sample=False))
    assert ran == [4, 5, 6, 7]


def test_rows_are_as_many_as_the_budget_holds():
    manager = manager_of("llama")
    row = 50 * manager.geometry.token_bytes
    assert manager.rows(max_rows=8, slots=50) == 8
    assert manager.rows(max_rows=8, slots=50, memory_budget=3 * row + 1) == 3
    with manager.batch(BatchRoom(8, 50, 3 * row)) as batch:
        assert batch.places == 3
        assert (
            sum(one.capacity_bytes if hasattr(one, "capacity_bytes") else one.nbytes for one in batch.report().layers)
            <= 3 * row
        )
    with pytest.raises(CapacityError, match=r"one row of 50 tokens takes .* memory_budget is"):
        manager.batch(max_rows=8, slots=50, memory_budget=row - 1).__enter__()


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
        lambda: manager.job(token_ids(1, 3)),
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
        (token_ids(1, 5), {"no_repeat_ngram_size": 2}, "does not know no_repeat_ngram_size"),
        (token_ids(1, 5), {"prefill_chunk": 0}, "prefill_chunk=0"),
        (token_ids(1, 5), {"prefix": "nobody"}, "nobody"),
        (token_ids(1, 5), {"temperature": -1.0, "do_sample": True}, "temperature"),
    ],
)
def test_what_cannot_be_batched_is_refused_before_anything_runs(inputs, given_, words):
    manager, ran = counted()
    with pytest.raises(InputError, match=words):
        manager.job(inputs, **{"max_new_tokens": 3, **given_})
    assert ran == []


def test_a_prompt_that_does_not_fit_is_refused_before_it_is_run():
    manager, ran = counted()
    with manager.batch(max_rows=2, slots=30) as batch:
        with pytest.raises(CapacityError, match="a job of 25 tokens and 7 new ones needs 31 slots, there are 30"):
            batch.add(manager.job(token_ids(1, 25), max_new_tokens=7, do_sample=False))
        assert ran == [] and batch.busy == 0
        batch.add(manager.job(token_ids(1, 25), max_new_tokens=6, do_sample=False))


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
