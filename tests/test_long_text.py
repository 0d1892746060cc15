"""Long texts through the engine: segments together and one by one say the same, in order, within the memory planned."""

import asyncio
import dataclasses
import threading

import pytest
import torch
from support.inside.decoding import idle
from support.inside.speech import decode_by, decoder_of, model_of, pool_of, speaker_of
from support.speech import SHORT, TEXT, audio
from support.t3_models import likely_end, tiny_t3

from kvcache import BusyError, CapacityError, ClosedError, InputError, SlidingWindow
from kvcache.decoding import Batch
from kvcache_chatterbox import (
    ChatterboxEngine,
    SpeechRequest,
    SpeechScheduler,
    Voice,
    byte_tokens,
    random_conditionals,
    stand_in,
)
from kvcache_chatterbox.units import SAMPLES_PER_TOKEN


def engine(kind="english", policy=None, ends=0.0, **options):
    t3 = likely_end(tiny_t3(kind), by=ends) if ends else tiny_t3(kind)
    return ChatterboxEngine(stand_in(t3), policy, **options)


@pytest.mark.grid(2)
@pytest.mark.parametrize("policy", [None, SlidingWindow(12)])
@pytest.mark.parametrize("kind", ["english", "gpt"])
def test_together_one_by_one_and_whole_are_the_same_audio(kind, policy):
    ours = engine(kind, policy, ends=2.0)
    together = audio(ours.generate_stream(TEXT, chunking=[7], **SHORT))
    assert len(ours.plan(TEXT, segment_characters=90, max_new_tokens=30).segments) == 3
    for other in (
        audio(ours.generate_stream(TEXT, max_rows=1, **SHORT)),
        audio(ours.generate_stream(TEXT, max_rows=2, overlap=True, **SHORT)),
        audio(engine(kind, policy, ends=2.0, backend="off").generate_stream(TEXT, **SHORT)),
        ours.generate(TEXT, **SHORT),
    ):
        torch.testing.assert_close(other, together, atol=1e-6, rtol=0)  # joints fade between equal signals


@pytest.mark.parametrize("kind", ["english", "gpt"])
def test_a_segment_says_what_it_says_alone_with_its_seed(kind):
    ours = engine(kind, ends=2.0)
    texts = [byte_tokens(ours.t3, text) for text in ("Hello there.", "Good morning to you all.", "Bye.", "So it goes.")]
    voice = random_conditionals(ours.t3)
    got = {}
    for index, tokens in ours.inference_segments(
        texts=texts, t3_cond=voice, seed=5, max_new_tokens=25, chunk_size=4, max_rows=3
    ):
        assert index >= max(got, default=0)  # in the order of the texts
        got.setdefault(index, []).append(tokens)
    for i, text in enumerate(texts):
        alone = list(
            ours.inference_stream(text_tokens=text, t3_cond=voice, seed=5 + i, max_new_tokens=25, chunk_size=4)
        )
        assert torch.equal(torch.cat(got[i], 1), torch.cat(alone, 1))
        assert [chunk.shape for chunk in got[i][:-1]] == [(1, 4)] * (len(got[i]) - 1)


def test_the_first_chunk_waits_for_no_other_segment(monkeypatch):
    ours = engine()
    jobs, entered = [], []
    make = ours.job
    monkeypatch.setattr(ours, "job", lambda utterance: jobs.append(make(utterance)) or jobs[-1])
    seen = []
    with torch.no_grad():
        ours.t3.speech_head.bias = torch.nn.Parameter(torch.zeros(ours.t3.speech_head.out_features))
        ours.t3.speech_head.bias[6561:] = -30.0  # all is speech: ten tokens are a chunk of ten
    stream = ours.generate_stream(TEXT, chunking=[10, 5], watch=lambda *said: seen.append(said), **SHORT)
    for job in jobs:
        monkeypatch.setattr(job, "prefill", lambda run=job.prefill: entered.append(1) or run())
    next(stream)
    assert len(jobs) == 3
    assert {index for index, _, _ in seen} == {0}
    assert sum(tokens for _, tokens, _ in seen) <= 10 + 8  # one look beyond the chunk
    list(stream)
    spoken = [sum(tokens for index, tokens, _ in seen if index == i) for i in range(3)]
    assert spoken == [30, 30, 30]
    assert sorted(index for index, _, over in seen if over) == [0, 1, 2]


def test_the_tail_is_carried_into_the_next_segments_prompt():
    ours = engine()
    said, prompts = [], []
    step = decoder_of(ours)

    def watched(utterance, *args):
        prompts.append(utterance.voice.t3.cond_prompt_speech_tokens[0])
        return step(utterance, *args)

    decode_by(ours, watched)
    texts = [byte_tokens(ours.t3, text) for text in ("Hello there.", "Good morning.", "Bye.")]
    ours.add_voice("v", conditionals=random_conditionals(ours.t3))
    said = {}
    for index, tokens in ours.inference_segments(texts=texts, voice="v", seed=1, max_new_tokens=30, carry="tail"):
        said.setdefault(index, []).append(tokens[0])
    first = prompts[0]
    for i in (1, 2):
        before = torch.cat(said[i - 1])
        tail = before[before < 6561][-len(first) // 2 :]
        assert torch.equal(prompts[i][-len(tail) :], tail) and torch.equal(
            prompts[i][: -len(tail)], first[: -len(tail)]
        )
    alone = torch.cat(list(ours.inference_stream(text_tokens=texts[0], voice="v", seed=1, max_new_tokens=30)), 1)
    assert torch.equal(torch.cat(said[0]), alone[0])
    assert len(ours.voices) == 1 and torch.equal(ours.voices["v"].t3.cond_prompt_speech_tokens[0], first)
    joined = audio(ours.generate_stream(TEXT, carry="tail", pause=0.0, **SHORT))
    whole = ours.generate(TEXT, carry="tail", pause=0.0, **SHORT)
    assert joined.shape == whole.shape


def test_a_carried_tail_never_makes_the_prompt_longer():
    ours = engine("gpt")
    voice = Voice.of(ours.t3, random_conditionals(ours.t3))
    for length, replaced in ((1, 0), (2, 1), (3, 1)):
        prompt = voice.t3.cond_prompt_speech_tokens[:, :length]
        short = Voice(dataclasses.replace(voice.t3, cond_prompt_speech_tokens=prompt), {})
        utterance = ours.utterance(short, byte_tokens(ours.t3, "Hi."), max_new_tokens=5)
        after = utterance.after(torch.arange(100, 130)).voice.t3.cond_prompt_speech_tokens[0].tolist()
        assert after == [*prompt[0, : length - replaced].tolist(), *range(130 - replaced, 130)]


@pytest.mark.grid(2)
@pytest.mark.parametrize("kind", ["english", "gpt"])
@pytest.mark.parametrize("kv_dtype", [None, torch.bfloat16])
def test_what_the_plan_says_is_what_the_batch_holds(kind, kv_dtype):
    ours = engine(kind, kv_dtype=kv_dtype)
    for rows in (2, 3):
        plan = ours.plan(TEXT, max_rows=rows, segment_characters=90, max_new_tokens=30)
        assert plan.rows == rows
        list(ours.generate_stream(TEXT, max_rows=rows, **SHORT))
        assert ours.report().nbytes == plan.kv_bytes == rows * plan.row_bytes
    one = ours.plan(TEXT, max_rows=1, segment_characters=90, max_new_tokens=30).row_bytes
    bounded = {"memory_budget": 2 * one + one // 2}
    assert ours.plan(TEXT, segment_characters=90, max_new_tokens=30, **bounded).rows == 2
    list(ours.generate_stream(TEXT, **SHORT, **bounded))
    assert ours.report().nbytes <= bounded["memory_budget"]
    with pytest.raises(CapacityError, match=r"one segment takes .* MiB of KV cache"):
        ours.generate_stream(TEXT, memory_budget=one - 1, **SHORT)


def test_a_window_bounds_the_plan():
    plan = engine(policy=SlidingWindow(12)).plan(TEXT, segment_characters=90, max_new_tokens=400)
    whole = engine().plan(TEXT, segment_characters=90, max_new_tokens=400)
    assert plan.slots == whole.slots - 399 + 12 and plan.kv_bytes < whole.kv_bytes


def test_captured_steps_serve_texts_of_other_lengths():
    ours = engine(backend="graph")
    plans = [ours.plan(TEXT, segment_characters=90, max_new_tokens=most) for most in (30, 60)]
    assert plans[0].slots == plans[1].slots == 256
    list(ours.generate_stream(TEXT, **SHORT))
    held = next(decoding for kind, decoding in idle(pool_of(ours)).items() if kind == ("batch", 3))
    list(ours.generate_stream(TEXT, **{**SHORT, "max_new_tokens": 60}))
    assert held in idle(pool_of(ours)).values()
    ours.release()
    assert not idle(pool_of(ours))


def test_an_engine_that_decodes_on_the_host_speaks_one_segment_after_the_other():
    ours = engine("english", backend="off")
    request = {**SHORT, "max_new_tokens": 6}
    assert audio(ours.generate_stream(TEXT, **request)).shape[1] > 0
    with pytest.raises(InputError, match=r"one utterance at a time.*backend is off"):
        SpeechScheduler(ours)


def test_an_early_end_leaves_nothing_behind():
    ours = engine()
    stream = ours.generate_stream(TEXT, overlap=True, **SHORT)
    next(stream)
    stream.close()
    decoding = idle(pool_of(ours))["batch", 3]
    assert set(decoding.kv.seen) == {0} and decoding.kv.length.tolist() == [0] * 6
    assert audio(ours.generate_stream(TEXT, **SHORT)).shape[1] > 0


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "text is empty"),
        ("  \n ", {}, "text is empty"),
        ("🙂🙃", {}, "no letter or digit"),
        ("word" * 1250, {}, "5000 characters cannot be divided"),
        (TEXT, {"language_id": "klingon"}, "'klingon' is not a two-letter code"),
        (TEXT, {"voice": "nobody"}, "there is no voice 'nobody'"),
        (TEXT, {"max_rows": 0}, "max_rows=0 must be"),
        (TEXT, {"carry": "all"}, "carry='all' must be"),
        (TEXT, {"first_chunk": 0}, "first_chunk=0 must be"),
        (TEXT, {"chunking": "slow"}, "chunking='slow' must be"),
        (TEXT, {"segment_characters": 3}, "segment_characters=3"),
        (TEXT, {"pause": -1.0}, "pause=-1.0"),
        (TEXT, {"voice": "silent"}, "no reference for the vocoder"),
        (TEXT, {"temperature": -1.0}, "temperature=-1.0"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(text, options, message):
    ours = engine()
    ours.add_voice("silent", conditionals=random_conditionals(ours.t3))
    with pytest.raises(InputError, match=message):
        ours.generate_stream(text, **options)
    if "max_rows" in options:
        with pytest.raises(InputError, match="max_rows=0"):
            SpeechScheduler(ours, **options)
        return

    async def submit():
        async with SpeechScheduler(ours) as scheduler:
            try:
                request = SpeechRequest.of(text, **options)
            except InputError:  # what no request can be never reaches the scheduler
                with pytest.raises(InputError, match=message):
                    scheduler.submit(text, **options)
                assert scheduler.metrics().refused == 0
            else:
                with pytest.raises(InputError, match=message):
                    await anext(scheduler.submit(request))
                assert (scheduler.metrics().refused, scheduler.metrics().failed) == (1, 0)

    asyncio.run(submit())


def test_no_segment_too_long_for_the_cache():
    ours = engine(max_cache_length=100)
    with pytest.raises(CapacityError, match=r"segment 0 .* may need .* slots of cache"):
        ours.generate_stream(TEXT, **SHORT)
    with pytest.raises(CapacityError, match="one row of 100 tokens takes"):
        SpeechScheduler(ours, memory_budget=1000)


def test_clients_hear_what_they_would_hear_alone():
    ours = engine(ends=2.0)
    ours.add_voice("other", conditionals=stand_in(ours.t3, seed=4).conds)
    requests = [
        {**SHORT, "seed": i, "voice": ("other" if i % 3 == 0 else None), "temperature": 0.0 if i == 2 else 0.8}
        for i in range(7)
    ]
    requests[4]["carry"] = "tail"

    async def client(scheduler, request):
        return torch.cat(
            [torch.zeros(1, 0), *[part async for part in scheduler.submit(TEXT, chunking=[9], **request)]], 1
        )

    async def all_of_them():
        async with SpeechScheduler(ours, max_rows=3, slots=300) as scheduler:
            heard = await asyncio.gather(*(client(scheduler, request) for request in requests))
            return heard, scheduler.metrics()

    heard, metrics = asyncio.run(all_of_them())
    for request, got in zip(requests, heard, strict=True):
        torch.testing.assert_close(got, audio(ours.generate_stream(TEXT, chunking=[9], **request)), atol=1e-6, rtol=0)
        assert got.shape[1] % SAMPLES_PER_TOKEN == 0
    assert (metrics.finished, metrics.busy, metrics.waiting, metrics.running) == (7, 0, 0, 0)
    assert set(metrics.ttfa) == {"p50", "p90", "p99"}


def test_who_speaks_is_who_was_meant_when_it_was_submitted():
    ours = engine("gpt")
    mine, other = (stand_in(ours.t3, seed=seed).conds for seed in (4, 5))
    ours.add_voice("v", conditionals=mine)
    given = {"seed": 0, "max_new_tokens": 9}
    expected = {name: audio(ours.generate_stream("Hello.", voice=name, **given)) for name in ("v", None)}

    replaced, choose = threading.Event(), ours.chosen_voice

    def late(*asked):  # the thread that prepares does nothing before all is replaced
        if threading.current_thread() is not threading.main_thread():
            replaced.wait(10)
        chosen = choose(*asked)
        return lambda: (replaced.wait(10), chosen())[1]

    ours.chosen_voice = late

    async def run():
        async with SpeechScheduler(ours, max_rows=1, slots=200) as scheduler:
            streams = {name: scheduler.submit("Hello.", voice=name, **given) for name in ("v", None)}
            unknown = scheduler.submit("Hello.", voice="later", **given)
            for name in ("v", "later"):
                ours.add_voice(name, conditionals=other)
            model_of(speaker_of(ours)).conds = other
            replaced.set()
            with pytest.raises(InputError, match="no voice 'later'"):
                await anext(unknown)
            heard = {}
            for name, stream in streams.items():
                heard[name] = torch.cat([part async for part in stream], 1)
            return heard

    heard = asyncio.run(run())
    for name, sound in expected.items():
        torch.testing.assert_close(heard[name], sound, atol=1e-6, rtol=0)  # fp32 rounding, as above
    assert not torch.equal(audio(ours.generate_stream("Hello.", voice="v", **given)), expected["v"])


def test_limits_have_clear_refusals():
    ours = engine()

    async def run():
        scheduler = SpeechScheduler(ours, max_rows=1, max_waiting=1, max_characters=500)
        with pytest.raises(ClosedError, match="closed"):
            scheduler.submit(TEXT, **SHORT)
        async with scheduler:
            with pytest.raises(InputError, match="max_characters is 500"):
                scheduler.submit(TEXT * 5, **SHORT)
            with pytest.raises(CapacityError, match="slots of cache"):
                await anext(scheduler.submit(TEXT, max_new_tokens=3000))
            running = scheduler.submit(TEXT, **SHORT)
            await anext(running)
            waiting = scheduler.submit(TEXT, **SHORT)
            with pytest.raises(BusyError, match="1 requests wait already"):
                scheduler.submit(TEXT, **SHORT)
            await running.aclose()
            assert (await anext(waiting)).shape[1] > 0
            left = scheduler.submit(TEXT, **SHORT)
        with pytest.raises(ClosedError, match="closed before"):
            async for _ in left:
                pass
        return scheduler.metrics()

    metrics = asyncio.run(run())
    assert (metrics.refused, metrics.cancelled, metrics.finished, metrics.busy) == (2, 1, 0, 0)


def test_what_is_wanted_whole_decodes_together_from_the_first_token_on(monkeypatch):
    ours, busy = ChatterboxEngine(stand_in(tiny_t3("gpt"))), []
    turn = Batch.step
    monkeypatch.setattr(Batch, "step", lambda batch: (busy.append(batch.busy), turn(batch))[1])
    given = {"segment_characters": 30, "max_new_tokens": 40}
    assert ours.plan(TEXT, **given).rows >= 4
    ours.generate(TEXT, **given)
    assert busy[0] == max(busy) >= 4
