"""The mark of a stream: that of the whole signal, as long, whatever the pieces; and what becomes of watermarkers that fail."""

import asyncio
import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.inside.speech import StreamMarker, WatermarkError, marked
from support.searching import search
from support.t3_models import tiny_t3

from kvcache import InputError
from kvcache_chatterbox import ChatterboxEngine, Chunking, SpeechScheduler
from kvcache_chatterbox.audio import Speaker, heard
from kvcache_chatterbox.testing import stand_in
from kvcache_chatterbox.units import SAMPLE_RATE, SAMPLES_PER_TOKEN

pytestmark = pytest.mark.one_release

DELAY = round(0.18 * SAMPLE_RATE)


class Spectral:
    """Marks as Perth does: in a spectrum of 64 ms every 10 ms, by what is 0.1 s around, where a frame is above 5 % of the
    loudest. As Perth's, its audio ends with the last whole 10 ms, and 32 ms are too short."""

    def apply_watermark(self, wav, sample_rate):
        hop, size = sample_rate // 100, sample_rate * 64 // 1000
        window = torch.hann_window(size)
        spectrum = torch.stft(torch.from_numpy(wav), size, hop, window=window, return_complex=True)
        level = 1 + spectrum.abs().clip(1e-9).log10() / 9  # 0 where there is nothing
        loud = level.sum(0) > 0.05 * level.sum(0).max()
        near = torch.nn.functional.avg_pool1d(level[:128], 21, 1, 10, count_include_pad=False)
        spectrum[:128] *= 1 + 0.5 * torch.sin(9 * near + torch.arange(128)[:, None]) * loud
        return torch.istft(spectrum, size, hop, window=window).numpy()


class Louder:
    """Marks each sample by itself, in the array that it is given."""

    def apply_watermark(self, wav, sample_rate):
        wav += 1
        return wav


class Rounding:
    """As Perth's `DummyWatermarker`; gives another type than it was given."""

    def apply_watermark(self, wav, sample_rate):
        return np.round(wav, 5).astype(np.float64)


class Counting:
    """A mark that depends on where in what it is given a sample stands, so that no stream can have that of the whole."""

    def apply_watermark(self, wav, sample_rate):
        return torch.from_numpy(wav + 0.01 * np.sin(np.arange(len(wav)) / 50 + len(wav))).float()[None]


def sound(samples, seed=0):
    """Noise with levels that change every 20 ms, with digital silence between, and a step at its end."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(samples // 480 + 1, generator=generator) ** 4
    level[level < 0.01] = 0
    audio = (0.3 * torch.randn(len(level), 480, generator=generator) * level[:, None]).flatten()[:samples]
    audio[-1:] = 0.2
    return audio


def streamed(watermarker, audio, sizes):
    marker = StreamMarker(watermarker, SAMPLE_RATE)
    pieces = list(audio.split(sizes))
    return torch.cat([marker.push(piece, last=i == len(pieces) - 1) for i, piece in enumerate(pieces)])


def steepest(audio):
    return float(audio.diff().abs().max())


@search(100)
@given(sizes=st.lists(st.sampled_from([1, 7, 239, 240, 241, 960, 1753, 4800, 9999, 24000]), min_size=1, max_size=20))
def test_watermark_in_streams_is_the_mark_of_the_whole(sizes):
    sizes = [1500, *sizes]
    audio = sound(sum(sizes), len(sizes))
    whole = marked(Spectral(), audio, SAMPLE_RATE)
    together = streamed(Spectral(), audio, sizes)
    assert together.numel() == whole.numel() == audio.numel()
    # fp32 rounding in two transforms, and what a tapered window still hears beyond 0.175 s.
    torch.testing.assert_close(together, whole, atol=1e-5, rtol=0)
    assert steepest(together) <= steepest(whole) + 1e-5
    assert not torch.allclose(together, audio, atol=1e-3)
    for each in (Louder(), Rounding()):
        torch.testing.assert_close(streamed(each, audio, sizes), marked(each, audio, SAMPLE_RATE), atol=1e-6, rtol=1e-6)
    # Of no use in a stream, and still no click: between two windows the fade adds their distance, 0.02, over its 120 samples.
    other = streamed(Counting(), audio, sizes)
    assert other.numel() == audio.numel()
    assert steepest(other) <= steepest(audio) + 0.01 / 50 + 0.02 / 121 + 1e-6


t3 = functools.cache(tiny_t3)


def tts(kind, watermarker):
    model = stand_in(t3(kind))
    model.watermarker = watermarker
    return model


@functools.cache
def speaker(kind):
    return Speaker(tts(kind, Spectral()))


@search(40)
@given(
    kind=st.sampled_from(["english", "gpt"]),
    counts=st.lists(st.sampled_from([0, 1, 5, 13, 40, 110]), min_size=1, max_size=2).filter(any),
    size=st.integers(1, 100),
    pause=st.sampled_from([0, 0.2, 0.125, 0.001, 0.0731]),
    joined=st.booleans(),
)
def test_watermark_in_streams_has_as_many_samples_for_any_chunks_and_pause(kind, counts, size, pause, joined):
    one = speaker(kind)
    voice, options = one.builtin(), {"pause": pause, "joined": joined}
    tokens = [torch.randint(0, 6561, (1, count), generator=torch.Generator().manual_seed(count)) for count in counts]
    pieces = [(i, piece) for i, segment in enumerate(tokens) for piece in segment.split(size, 1) if segment.numel()]
    plain, chunks = (
        list(heard(one.segmented(voice, mark, chunking=Chunking((size,)), **options), pieces)) for mark in (False, True)
    )
    plain = torch.cat(plain, 1)
    assert all(chunk.numel() for chunk in chunks)
    together = torch.cat(chunks, 1)
    whole = marked(Spectral(), plain[0], SAMPLE_RATE)
    assert together.shape == plain.shape
    torch.testing.assert_close(
        together[0], whole, atol=1e-4, rtol=0
    )  # tones: phases of empty bins turn with fp32 rounding
    assert steepest(together) <= steepest(whole) + 1e-4
    assert one.say(enumerate(tokens), voice, True, **options).shape == plain.shape


def test_watermark_of_a_stream_of_one_token():
    one = speaker("english")
    voice, pieces = one.builtin(), [(0, torch.tensor([[7]]))]
    [chunk] = heard(one.segmented(voice, True), pieces)
    assert chunk.shape == (1, SAMPLES_PER_TOKEN)
    torch.testing.assert_close(chunk, one.say(iter(pieces), voice, True))


def test_the_mark_makes_audio_18_hundredths_of_a_second_later():
    one = speaker("english")
    for size in (1, 2, 5, 25):
        given = {mark: one.segmented(one.builtin(), mark, chunking=Chunking((size,))) for mark in (False, True)}
        told = {False: 0, True: 0}
        for _ in range(12):
            for mark, audio in given.items():
                told[mark] += audio.push(0, torch.full((1, size), 5)).shape[1]
            assert told[True] == max(0, told[False] - DELAY)


def test_a_marker_serves_one_signal_after_another():
    audio, marker = sound(30_000), StreamMarker(Spectral(), SAMPLE_RATE)
    first = torch.cat([marker.push(audio[:9000]), marker.push(audio[9000:], last=True)])
    again = torch.cat([marker.push(audio[:20000]), marker.push(audio[20000:], last=True)])
    torch.testing.assert_close(again, first, atol=1e-5, rtol=0)


@pytest.mark.parametrize("watermarker", [None, Rounding()])
def test_a_model_without_a_watermarker_or_with_a_dummy_speaks(watermarker):
    engine = ChatterboxEngine(tts("gpt", watermarker))
    request = {"max_new_tokens": 10, "seed": 1}
    for speak in (engine.generate, lambda text, **given: torch.cat(list(engine.generate_stream(text, **given)), 1)):
        plain = speak("Hello", watermark=False, **request)
        torch.testing.assert_close(speak("Hello", **request), plain, atol=6e-6, rtol=0)


def test_what_is_no_watermarker_is_refused_before_anything_runs():
    engine = ChatterboxEngine(tts("gpt", lambda wav, sample_rate: wav))
    for speak in (engine.generate_stream, engine.audio, engine.generate):
        with pytest.raises(InputError, match=r"is a function, which has no apply_watermark\(wav, sample_rate=\)"):
            speak(*([None] if speak == engine.audio else ["Hello"]), watermark=True)
    assert engine.generate("Hello", watermark=False, max_new_tokens=3, seed=1).numel()


# ------------------------------------------------------------------ what fails


class Failing:
    """A watermarker, or a vocoder, that fails from its n-th call on."""

    def __init__(self, works, then):
        self.works, self.then, self.calls = works, then, 0

    def _fails(self):
        self.calls += 1
        return self.calls > self.works

    def apply_watermark(self, wav, sample_rate):
        if not self._fails():
            return wav + 1
        return self.then(wav)

    def inference(self, speech_tokens, ref_dict, **_):
        audio = torch.zeros(1, speech_tokens.numel() * SAMPLES_PER_TOKEN)
        return (self.then(audio) if self._fails() else audio), None


def broken(audio):
    raise RuntimeError("the device is lost")


def halved(audio):
    return audio[: len(audio) // 2]


@pytest.mark.parametrize(("then", "error"), [(broken, "device is lost"), (halved, r"gave \d+ samples for \d+")])
@pytest.mark.parametrize("works", [0, 2])
def test_a_watermarker_that_fails_ends_the_stream_and_nothing_is_handed_out_unmarked(then, error, works):
    model = tts("english", Failing(works, then))
    engine = ChatterboxEngine(model)
    heard = []
    with pytest.raises(RuntimeError if then is broken else WatermarkError, match=error):
        heard.extend(engine.generate_stream("Hello", max_new_tokens=60, seed=1, chunking=[10]))
    assert len(heard) == works
    assert all(bool((chunk > 0.5).all()) for chunk in heard)
    with pytest.raises(RuntimeError, match=error):
        engine.generate("Hello", max_new_tokens=10, seed=1)
    audio = engine.audio(None, chunking=[20])
    for _ in range(2):  # one who goes on after an error is still given nothing
        with pytest.raises(RuntimeError, match=error):
            audio.push(0, torch.zeros(1, 20, dtype=torch.long))


@pytest.mark.parametrize("part", ["watermarker", "s3gen"])
@pytest.mark.parametrize("works", [0, 2])
def test_a_vocoder_or_watermarker_that_fails_is_heard_of_by_the_client(part, works):
    model = tts("english", None)
    setattr(model, part, Failing(works, broken))
    engine = ChatterboxEngine(model)

    async def main():
        async with SpeechScheduler(engine, max_rows=2) as scheduler:
            stream = scheduler.submit("Hello", max_new_tokens=30, seed=1, chunking=[10])
            with pytest.raises(RuntimeError, match="device is lost"):
                async for _ in stream:
                    pass
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            assert scheduler.metrics().running == scheduler.metrics().waiting == 0

    asyncio.run(main())
