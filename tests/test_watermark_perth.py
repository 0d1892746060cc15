"""Streams with Perth, the watermarker of Chatterbox's own classes: the mark of a stream is the mark of the whole.

Run by `make test-watermark`, which installs it; skipped where it is missing.
"""

import functools
import itertools

import pytest
import torch
from support import perth_net
from support.inside.speech import S3GEN_SIL, ToneVocoder, marked
from support.t3_models import tiny_t3

from kvcache import MemoryStore, SpeakerCache
from kvcache_chatterbox import ChatterboxEngine
from kvcache_chatterbox.testing import stand_in
from kvcache_chatterbox.units import SAMPLE_RATE, SAMPLES_PER_TOKEN

pytestmark = [
    pytest.mark.slow,
    pytest.mark.one_release,
    pytest.mark.skipif(perth_net.missing() is not None, reason=str(perth_net.missing())),
]

KINDS = ("english", "multilingual", "gpt")
TEXT = "The birch canoe slid on the smooth planks. Glue the sheet to the dark blue background. Rice is served in bowls."


@functools.cache
def perth():
    return perth_net.load()


class NoiseVocoder(ToneVocoder):
    """Unvoiced sound, levels that change by 40 dB from token to token, digital silence where Turbo is silent.

    Perth finds its mark in the stand-in's pure tones before they are marked (0.96 of 1), and none in this.
    """

    def inference(self, speech_tokens, ref_dict, n_cfm_timesteps=None):
        tokens = speech_tokens.flatten()
        noise = torch.randn(997, SAMPLES_PER_TOKEN, generator=torch.Generator().manual_seed(5))
        level = torch.where(tokens == S3GEN_SIL, 0.0, 0.2 * 10.0 ** (-2 * (tokens % 13) / 13))
        return (noise[tokens % 997] * level[:, None]).flatten()[None], None


@functools.cache
def engine(kind, sound="noise"):
    model = stand_in(tiny_t3(kind))
    model.watermarker = perth()
    if sound == "noise":
        model.s3gen = NoiseVocoder(model.s3gen.meanflow)
    return ChatterboxEngine(model, prefix_cache=SpeakerCache(MemoryStore("64MiB")))


def detected(audio, exactly=False):
    return float(perth().get_watermark(audio.numpy(), sample_rate=SAMPLE_RATE, round=not exactly))


def steepest(audio):
    return float(audio.diff().abs().max())


def compare(plain, chunks, sound):
    """What must hold of a stream's audio ``[samples]``, not marked and marked in chunks."""
    streamed, whole = torch.cat(chunks, 1)[0], marked(perth(), plain, SAMPLE_RATE)
    assert streamed.numel() == plain.numel() == whole.numel()
    assert detected(streamed) == detected(whole)
    assert detected(streamed, exactly=True) == pytest.approx(detected(whole, exactly=True), abs=1e-3)
    if sound == "noise":
        assert detected(plain) == 0
    joints = list(itertools.accumulate(chunk.shape[-1] for chunk in chunks))[:-1]
    jumps = [abs(float(streamed[j] - streamed[j - 1])) for j in joints if 0 < j < streamed.numel()]
    # The mark itself is up to 0.19, and 7e-3 on average. Perth does not repeat itself any closer: the same signal behind a
    # second of silence is marked by up to 6e-4 otherwise, where bins hold nothing but rounding, whose logarithm it reads.
    distance = (streamed - whole).abs()
    assert float(distance.max()) < 2e-3
    assert float(distance.mean()) < 2e-5
    assert max(jumps, default=0.0) <= steepest(whole) + 2 * float(distance.max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("size", "pause"),
    [(1, 0.2), (2, 0.0731), (5, 0.125), (25, 0.001), (50, 1 / 7), (100, 0)],
)
def test_watermark_in_streams_is_that_of_the_whole_signal(kind, size, pause):
    request = {"seed": 1, "max_new_tokens": 30, "segment_characters": 60, "language_id": "en", "chunking": [size]}
    plain = torch.cat(list(engine(kind).generate_stream(TEXT, pause=pause, watermark=False, **request)), 1)[0]
    chunks = list(engine(kind).generate_stream(TEXT, pause=pause, **request))
    assert detected(torch.cat(chunks, 1)[0]) == 1
    compare(plain, chunks, "noise")


@pytest.mark.parametrize("kind", ["english", "gpt"])  # multilingual's audio is made as English's
@pytest.mark.parametrize("sound", ["tones", "noise"])
def test_watermark_in_streams_holds_for_any_chunks(kind, sound):
    audio_of = engine(kind, sound).audio
    generator = torch.Generator().manual_seed(11)
    for count in (1, 2, 5, 9, 30, 130):
        tokens = torch.randint(0, 6561, (count,), generator=generator)
        tokens[count // 2 : count // 2 + count // 5] = S3GEN_SIL
        for size in sorted({1, 5, 25, 100, int(torch.randint(1, 101, (), generator=generator))}):
            pause = [0.2, 0.125, 0.001, 0.0731, 1.3][int(torch.randint(5, (), generator=generator))]
            heard = {}
            for mark in (False, True):
                audio = audio_of(None, mark, chunking=[size], pause=pause)
                pieces = [(i, piece) for i in range(3) for piece in tokens.split(size)]
                heard[mark] = [*(audio.push(i, piece) for i, piece in pieces), audio.finish()]
            compare(torch.cat(heard[False], 1)[0], heard[True], sound)


@pytest.mark.parametrize("kind", KINDS)
def test_watermark_of_the_shortest_stream_and_of_generate(kind):
    heard = {}
    for mark in (False, True):
        audio = engine(kind).audio(None, mark)
        heard[mark] = [audio.push(0, torch.tensor([[7]])), audio.finish()]
    plain = torch.cat(heard[False], 1)[0]
    assert plain.numel() == SAMPLES_PER_TOKEN * (4 if kind == "gpt" else 1)
    compare(plain, heard[True], "noise")
    request = {"seed": 1, "max_new_tokens": 20, "segment_characters": 60, "language_id": "en", "pause": 0.0731}
    plain = engine(kind).generate(TEXT, watermark=False, **request)
    whole = engine(kind).generate(TEXT, **request)
    assert whole.shape == plain.shape
    assert detected(whole[0]) == 1
    assert detected(plain[0]) == 0
