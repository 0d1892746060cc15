"""Speech that comes to its most tokens without an end says so: an event, the report, the chunk and the stream."""

import asyncio

import pytest
import torch
from support.inside.speech import speaker_of
from support.t3_models import likely_end, tiny_t3

from kvcache import MemoryStore, SpeakerCache
from kvcache.events import subscribe
from kvcache_chatterbox import ChatterboxEngine, SpeechScheduler, stand_in

pytestmark = pytest.mark.one_release

TEXT = "Hello there. It is a fine day."
GIVEN = {"language_id": "en", "segment_characters": 20, "seed": 3}


def engine(kind, ends, **options):
    """By 30 every token is the stop token, by -30 none is."""
    t3 = likely_end(tiny_t3(kind), by=ends)
    return ChatterboxEngine(stand_in(t3), prefix_cache=SpeakerCache(MemoryStore("8MiB")), **options)


def watched(run):
    told = []
    with subscribe(told.append, ["cut_off"]):
        run()
    return [(event.numbers["segment"], event.numbers["tokens"]) for event in told]


@pytest.mark.parametrize("options", [{}, {"max_rows": 1}, {"carry": "tail"}], ids=str)
@pytest.mark.parametrize("kind", ["english", "gpt"])
def test_what_is_cut_off_is_told_and_reported(kind, options):
    for backend in ("eager", "off"):
        ours = engine(kind, -30.0, backend=backend)
        run = lambda: list(ours.generate_stream(TEXT, max_new_tokens=6, chunking=[4], **GIVEN, **options))  # noqa: E731, B023
        assert watched(run) == [(0, 6), (1, 6)]
        assert ours.report().cut_off == (0, 1)
        assert "cut off, segments: 0, 1" in repr(ours.report())
        assert ours.report().to_dict()["cut_off"] == [0, 1]
        ended = engine(kind, 30.0, backend=backend)
        assert watched(lambda: list(ended.generate_stream(TEXT, max_new_tokens=6, **GIVEN, **options))) == []  # noqa: B023
        assert ended.report().cut_off == ()


def test_an_end_in_the_very_last_token_is_an_end():
    ours = engine("english", 0.0)
    with torch.no_grad():
        ours.t3.speech_head.weight.mul_(12)
    tokens = speaker_of(ours).tokenize("Hello.", None)
    given = {"text_tokens": tokens, "voice": ours.voice_of(None), "temperature": 0.0}
    [said] = ours.inference_stream(**given, max_new_tokens=4, chunk_size=9)
    assert ours.report().cut_off == (0,)
    ours.t3.hp.stop_speech_token = int(said[0, -1])
    if int(said[0, -1]) not in said[0, :-1].tolist():
        for backend in ("eager", "off"):
            ends = ChatterboxEngine(ours.t3, backend=backend, prefix_cache=SpeakerCache(MemoryStore("8MiB")))
            assert watched(lambda: list(ends.inference_stream(**given, max_new_tokens=4))) == []  # noqa: B023
            assert ends.report().cut_off == ()


def test_a_schedulers_stream_says_which_segments_were_cut_off():
    async def run(ours):
        async with SpeechScheduler(ours, max_rows=2, slots=200) as scheduler:
            stream = scheduler.submit(TEXT, max_new_tokens=6, **GIVEN)
            assert [part async for part in stream]
            return stream.cut_off

    told = []
    assert watched(lambda: told.extend(asyncio.run(run(engine("english", -30.0))))) == [(0, 6), (1, 6)]
    assert told == [0, 1]
