"""What making audio is planned to take, against what it holds; and that nothing of 200 requests is left."""

import asyncio
import gc
import json

import pytest
import torch
from support.t3_models import UPSTREAMS_WARNINGS, tiny_t3
from support.whole import reference, s3gen, short_s3gen, take_away_the_audio_stack
from torch.profiler import ProfilerActivity, profile

from kvcache import InputError, MemoryStore, SpeakerCache
from kvcache.decoding import Setting, VocoderSetting
from kvcache.testing import no_leaks
from kvcache.tools import plan, subject
from kvcache_chatterbox import ChatterboxEngine, SpeechScheduler, VocoderOptions, random_conditionals, stand_in
from kvcache_chatterbox.vocoder import Run, SeededNoise
from kvcache_chatterbox.voices import Voice

pytestmark = [*UPSTREAMS_WARNINGS, pytest.mark.one_release, pytest.mark.filterwarnings("ignore")]


def engine(vocoder, kind="gpt", **options):
    model = stand_in(tiny_t3(kind))
    model.s3gen = vocoder
    return ChatterboxEngine(model, prefix_cache=SpeakerCache(MemoryStore("32MiB")), vocoder=VocoderOptions(**options))


def voice_of(ours, seconds=2.0):
    return Voice(random_conditionals(ours.t3), reference(seconds))


def peak(run, tmp_path):
    """Bytes that torch allocates at most within a call."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    trace.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    held = most = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda one: float(one["ts"])):
        held += int(event["args"]["Bytes"])
        most = max(most, held)
    return most


@pytest.mark.audio
@pytest.mark.parametrize("options", [{}, {"guidance": 0}, {"precision": "int8"}, {"reference_seconds": 1}], ids=str)
def test_the_largest_run_takes_what_was_planned(options, tmp_path):
    ours = engine(s3gen(False), "english", steps=2, **options)
    voice = voice_of(ours)
    planned = ours.plan("Hello there.", voice=voice, max_chunk=40, max_new_tokens=60).vocoder
    assert planned.chunk == 40
    vocoder = ours.vocoder
    run = Run(torch.arange(25 + 3 + 40), voice, SeededNoise(1), 25, 25, 480)
    found = peak(lambda: vocoder.waves([run]), tmp_path)
    # What torch's kernels for a CPU lay out for themselves is allocated as well.
    assert planned.workspace == pytest.approx(found, rel=0.03)


def alive():
    """Bytes of the storages of all tensors that there are."""
    gc.collect()
    held = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":  # a weak proxy only looks like one
            held[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(held.values())


def held_by(model):
    """Bytes of the storages of a module: weights, and tables that are plain attributes."""
    tables = [value for part in model.modules() for value in vars(part).values() if isinstance(value, torch.Tensor)]
    tensors = [*model.parameters(), *model.buffers(), *tables]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.audio
@pytest.mark.parametrize("distilled", [False, True])
def test_planned_weights_and_voice_are_what_is_held(distilled):
    own = s3gen(False)
    other = {"weights": s3gen(True)} if distilled else {}
    before = alive()
    ours = engine(own, "english", steps=1, **other)
    engines = alive() - before  # T3's own, and HiFT's weights, ready
    voice = voice_of(ours)
    given = sum(part.nbytes for part in voice.gen.values() if part is not None)
    list(ours.generate_stream("Hello there.", voice=voice, max_new_tokens=12, chunking="fixed", seed=0))
    ours.release()
    planned = ours.plan("Hello there.", voice=voice, max_chunk=25).vocoder
    vocoder = ours.vocoder
    loaded = held_by(own) + (held_by(s3gen(True)) if distilled else 0)
    assert planned.weights == loaded + held_by(vocoder.modules[-1])  # HiFT's weights, ready
    assert planned.voice == given + vocoder.nbytes
    assert vocoder.nbytes == 50 * 8 + 100 * 80 * 4 + 80 * 4
    # All that lives since: what is kept of the voice for T3, and tables of some kilobytes.
    rest = alive() - before - engines - planned.voice - ours.prefix_cache.store.nbytes
    assert abs(rest) < 2**20


@pytest.mark.audio
def test_a_plan_by_name_has_the_vocoder_in_it():
    s3gen(True)
    nano = subject("chatterbox-nano")
    without = plan(nano, Setting(), 600, process=0)
    small, large = (
        plan(nano, Setting(vocoder=VocoderSetting(reference_seconds=3, max_chunk=most)), 600, process=0)
        for most in (25, 100)
    )
    assert without.vocoder == without.parts["vocoder weights"] == 0
    assert small.vocoder == large.vocoder > 2**30
    assert without.moments == small.moments[:-1]
    assert small.moments[-1].name == "audio"
    assert small.moments[-1].static == without.moments[-1].static  # the caches are held meanwhile
    assert large.moments[-1].workspace > 1.5 * small.moments[-1].workspace
    assert small.total == sum(small.parts.values()) > without.total + 2**30
    told, made = 75 * 8 + 8 + 150 * 80 * 4 + 192 * 4, 75 * 8 + 150 * 80 * 4 + 80 * 4
    kept = 250 * 8 + 8 + 500 * 80 * 4 + 192 * 4  # the whole clip's, in the store, with T3's conditionals
    assert 0 <= small.prefixes - without.prefixes - told - made - kept < 2**13


@pytest.mark.audio
def test_distilled_weights_stand_beside_the_models_own_and_fewer_bits_beside_both():
    s3gen(False)
    english = subject("chatterbox-english")
    own, distilled, narrow = (
        english.footprint(Setting(vocoder=VocoderSetting(max_chunk=25, reference_seconds=1, **more)), 100, 10, "cpu")
        for more in ({}, {"weights": "meanflow"}, {"precision": "int8"})
    )
    from kvcache.tools import bytes_in

    sizes = [bytes_in(one.vocoder.modules) for one in (own, distilled, narrow)]
    assert sizes[1] > 1.9 * sizes[0]
    assert sizes[0] < sizes[2] < 1.2 * sizes[0]


def test_without_the_audio_stack_a_plan_says_so(monkeypatch):
    take_away_the_audio_stack(monkeypatch)
    with pytest.raises(InputError, match=r"the vocoder cannot be planned.*torchaudio.*chatterbox\.md"):
        plan(subject("chatterbox-nano"), Setting(vocoder=VocoderSetting()), 600, process=0)


@pytest.mark.audio
def test_weights_that_no_vocoder_has_are_refused():
    s3gen(True)
    with pytest.raises(InputError, match="vocoder 'best': give one of own, meanflow"):
        plan(subject("chatterbox-nano"), Setting(vocoder=VocoderSetting("best")), 600, process=0)


def test_of_a_vocoder_of_which_nothing_is_known_nothing_is_planned():
    ours = ChatterboxEngine(stand_in(tiny_t3("gpt")), prefix_cache=SpeakerCache(MemoryStore("32MiB")))
    assert ours.plan("Hello there.").vocoder is None


# ---------------------------------------------------------------------- nothing is left


def vocoders():
    return [
        pytest.param("tones", id="tones"),
        pytest.param("s3gen", id="s3gen", marks=pytest.mark.slow),
    ]


@pytest.mark.audio
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", vocoders())
def test_200_requests_of_which_many_are_cancelled_leave_nothing(kind):
    if kind == "tones":
        ours = ChatterboxEngine(stand_in(tiny_t3("gpt")), prefix_cache=SpeakerCache(MemoryStore("32MiB")))
        voice = ours.voice_of(None)
    else:
        ours = engine(short_s3gen(True), steps=1)
        voice = voice_of(ours, 1)
    ours.voices.add("sarah", voice)
    request = {"voice": "sarah", "max_new_tokens": 30, "first_chunk": 5, "max_chunk": 10}

    async def one(scheduler, number):
        stream = scheduler.submit("Hello there.", seed=number, **request)
        async for _ in stream:
            if number % 3 == 1:  # after its first audio
                break
        await stream.aclose()

    async def some(numbers):
        async with SpeechScheduler(ours, max_rows=4) as scheduler:
            tasks = [asyncio.ensure_future(one(scheduler, number)) for number in numbers]
            for number, task in zip(numbers, tasks, strict=True):
                if number % 3 == 2:  # wherever it is by then
                    await asyncio.sleep(0)
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def direct(number):
        stream = ours.generate_stream("Hello there.", seed=number, **request)
        next(stream)
        if number % 2:
            stream.close()
        else:
            list(stream)

    asyncio.run(some(range(4)))
    direct(1)
    direct(2)
    ours.release()
    held, kept = ours.vocoder.nbytes, ours.prefix_cache.store.nbytes
    with no_leaks(ours.t3):
        for first in range(0, 160, 40):
            asyncio.run(some(range(first, first + 40)))
        for number in range(40):
            direct(number)
        ours.release()
    assert (ours.vocoder.nbytes, ours.prefix_cache.store.nbytes) == (held, kept)
    ours.voices.remove("sarah")
    del voice
    gc.collect()
    assert ours.vocoder.nbytes == 0
