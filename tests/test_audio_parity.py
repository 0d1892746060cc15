"""Whole audio against upstream's own `generate`, sample by sample, and streams against themselves: the real S3Gen, short.

Tolerance: see tests/test_vocoder.py.
"""

import asyncio
import copy
from functools import partial

import pytest
import torch
from support.t3_models import likely_end, tiny_t3
from support.whole import reference, short_s3gen, whole

from kvcache import MemoryStore, SpeakerCache
from kvcache_chatterbox import ChatterboxEngine, SpeechScheduler, VocoderOptions
from kvcache_chatterbox.testing import stand_in
from kvcache_chatterbox.tools import endless

pytestmark = [pytest.mark.audio, pytest.mark.filterwarnings("ignore")]  # of diffusers, librosa and torchaudio

TEXT = "Hello there, this is one sentence."
LONG = "The birch canoe slid on the smooth planks. Glue the sheet to the dark blue background. It is easy to tell."
CLOSE = partial(torch.testing.assert_close, atol=1e-4, rtol=0)


class Unmarked:
    """In the place of upstream's watermarker, which changes samples."""

    def apply_watermark(self, wav, sample_rate):
        return wav


def _few_sounds(t3):
    """The same T3, which knows 64 sounds, and so comes to its end after 33 tokens or so."""
    with torch.no_grad():
        stop, bias = t3.hp.stop_speech_token, t3.speech_head.bias
        bias[64:stop] = bias[stop + 1 :] = -1e4
    return t3


@pytest.fixture(scope="module", params=["english", "gpt"])
def tts(request):
    """Upstream's class around a tiny T3 and a short S3Gen, with a voice."""
    made = whole(request.param)
    made.t3 = _few_sounds(likely_end(made.t3, by=0.7))
    made.s3gen = short_s3gen(request.param == "gpt")
    made.conds = copy.deepcopy(stand_in(made.t3).conds)
    made.conds.gen = reference(1.5)
    made.watermarker = Unmarked()
    return made


def engine(tts, **options):
    return ChatterboxEngine(tts, prefix_cache=SpeakerCache(MemoryStore("32MiB")), **options)


@pytest.mark.parametrize(("backend", "seed"), [("off", 0), ("eager", 7)])
def test_a_seed_gives_the_samples_of_upstreams_generate(tts, backend, seed):
    torch.manual_seed(seed)
    expected = tts.generate(TEXT)
    state = torch.get_rng_state()
    ours = engine(tts, backend=backend)
    made = ours.generate(TEXT, seed=seed)
    assert made.shape == expected.shape and expected.numel() > 0
    CLOSE(made, expected)
    assert torch.equal(torch.get_rng_state(), state), "a request with a seed has drawn from the caller's generator"
    torch.manual_seed(seed)
    CLOSE(ours.generate(TEXT), expected)
    assert torch.equal(torch.get_rng_state(), state), (
        "without a seed, what is drawn next is not what upstream draws next"
    )


def streamed(ours, text, **options):
    return torch.cat(list(ours.generate_stream(text, max_new_tokens=40, **options)), 1)


def test_a_seed_gives_the_same_samples_whatever_runs_beside(tts):
    """One stream, and many at once in a scheduler, in chunks of given sizes."""
    ours = engine(tts)
    options = {"chunking": [7, 11, 30], "segment_characters": 50}
    alone = [streamed(ours, LONG, seed=seed, **options) for seed in range(4)]
    assert len({round(float(one.abs().sum()), 3) for one in alone}) == 4
    CLOSE(streamed(ours, LONG, seed=2, **options), alone[2])

    async def one(scheduler, seed):
        stream = scheduler.submit(LONG, seed=seed, max_new_tokens=40, **options)
        return torch.cat([chunk async for chunk in stream], 1)

    async def all_at_once():
        async with SpeechScheduler(ours, max_rows=3) as scheduler:
            return await asyncio.gather(*(one(scheduler, seed) for seed in range(4)))

    for expected, found in zip(alone, asyncio.run(all_at_once()), strict=True):
        CLOSE(found, expected)


def test_any_chunks_are_as_long_as_the_whole_and_sound_near_it(tts):
    """The tokens are the same, and the noise by place: what differs is what a chunk can hear."""
    ours = engine(tts)
    whole_ = ours.generate(TEXT, seed=3, max_new_tokens=60)
    for options in ({}, {"chunking": "fixed"}, {"chunking": [4]}, {"first_chunk": 5, "max_chunk": 9}):
        chunks = list(ours.generate_stream(TEXT, seed=3, max_new_tokens=60, **options))
        assert torch.cat(chunks, 1).shape == whole_.shape


def test_settings_reach_the_vocoder(tts):
    options = VocoderOptions(steps=1, reference_seconds=1.0)
    assert not torch.equal(engine(tts, vocoder=options).generate(TEXT, seed=0), engine(tts).generate(TEXT, seed=0))


def test_distilled_weights_under_every_model():
    made = stand_in(endless(tiny_t3("english")))
    made.s3gen, made.conds.gen = short_s3gen(False), reference(1.5)
    fast = engine(made, vocoder=VocoderOptions(weights=short_s3gen(True)))
    audio = streamed(fast, TEXT, seed=0)
    assert audio.shape == streamed(engine(made), TEXT, seed=0).shape and audio.numel() > 20 * 960
