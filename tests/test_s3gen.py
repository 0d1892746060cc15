"""Audio in chunks and segments from upstream's own S3Gen, with random weights: its lengths, its joints, its tail.

S3Gen draws noise in every run (the flow's start, the phases and the breath of its source), and a run hears the tokens after
a chunk only if they are in it. So chunked audio is not that of one whole run, and is not compared with it: what can be said
exactly is how long it is, and that it is made of the runs it is said to be made of, faded into one another.
"""

import importlib
import warnings

import pytest
import torch
from t3_models import tiny_t3

from kvcache_chatterbox.audio import SAMPLES_PER_TOKEN, AudioStream, Speaker
from kvcache_chatterbox.loading import upstream_t3
from kvcache_chatterbox.standin import stand_in

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of diffusers, librosa and torchaudio

FADE = 480  # samples
SILENCED = 480  # samples at the start of every run of S3Gen, which are zero, and as many that rise


@pytest.fixture(scope="module", params=["english", "gpt"])
def model(request):
    """A stand-in that has the real S3Gen of the variant, and a voice that this encoded."""
    upstream_t3()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            upstream = importlib.import_module("chatterbox.models.s3gen")
    except (ImportError, OSError) as error:
        pytest.skip(f"S3Gen's own imports are missing or do not load, see docs/chatterbox.md: {error}")
    tts = stand_in(tiny_t3(request.param))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tts.s3gen = upstream.S3Gen(meanflow=request.param == "gpt").eval()
        clip = 0.1 * torch.randn(2 * 16_000)
        tts.conds.gen = tts.s3gen.embed_ref(clip, 16_000)
    return tts


def tokens_of(count):
    return torch.randint(0, 6561, (1, count), generator=torch.Generator().manual_seed(count))


def runs_of(model):
    """The vocoder as the engine runs it, seeded, and what it was given and gave in each run."""
    speaker, runs = Speaker(model), []
    voice = speaker.builtin()

    def vocode(tokens):
        torch.manual_seed(len(runs))
        audio = speaker._vocode(tokens, voice)
        runs.append((tokens, audio))
        return audio

    return vocode, runs


@pytest.mark.parametrize("count", [1, 2, 3, 30])
def test_s3gen_drops_no_token(model, count):
    vocode, _ = runs_of(model)
    audio = vocode(tokens_of(count)[0])
    assert audio.shape == (count * SAMPLES_PER_TOKEN,)
    assert audio.isfinite().all()
    assert not audio[:SILENCED].any()
    assert audio[-10:].any()


def test_one_chunk_is_the_whole(model):
    vocode, _ = runs_of(model)
    stream, tokens = AudioStream(vocode), tokens_of(20)[0]
    streamed = torch.cat([stream.push(tokens), stream.finish()])
    again, _ = runs_of(model)
    assert torch.equal(streamed, again(tokens))


def test_chunks_are_their_runs_faded_into_one_another(model):
    vocode, runs = runs_of(model)
    chunks = tokens_of(61)[0].split([1, 25, 2, 13, 20])
    stream = AudioStream(vocode)
    heard = torch.cat([*(stream.push(chunk) for chunk in chunks), stream.finish()])
    assert heard.shape == (61 * SAMPLES_PER_TOKEN,)
    assert heard.isfinite().all()
    assert [tokens.numel() for tokens, _ in runs] == [1, 26, 25 + 2, 25 + 13, 25 + 20]
    share = torch.arange(1, FADE + 1) / (FADE + 1)
    at = 0  # sample in `heard` where the chunk's own tokens begin
    for i, (chunk, (_, run)) in enumerate(zip(chunks, runs, strict=True)):
        length = chunk.numel() * SAMPLES_PER_TOKEN
        last = i == len(chunks) - 1
        own = run[run.numel() - length :]
        assert torch.equal(heard[at : at + length - (0 if last else FADE)], own[: length - (0 if last else FADE)])
        if i:
            before, after = runs[i - 1][1][-FADE:], run[run.numel() - length - FADE : run.numel() - length]
            torch.testing.assert_close(heard[at - FADE : at], before * (1 - share) + after * share, atol=1e-6, rtol=0)
        if i > 1:  # the context's silenced start is never heard; the second run begins with the first's own
            assert heard[at - FADE : at + SILENCED].square().mean() > 0.1 * heard.square().mean()
        at += length
    # Between two waves a fade adds at most their distance over its samples.
    steepest = max(float(run.diff().abs().max()) for _, run in runs)
    loudest = max(float(run.abs().max()) for _, run in runs)
    assert float(heard.diff().abs().max()) <= steepest + 2 * loudest / (FADE + 1)


@pytest.mark.parametrize(("pause", "joined"), [(0.1, False), (0, True)])
def test_streamed_segments_are_as_long_as_whole_ones(model, pause, joined):
    speaker = Speaker(model)
    voice = speaker.builtin()
    segments, cuts = [tokens_of(count) for count in (7, 0, 12, 1)], [[3, 4], [0], [1, 9, 2], [1]]
    pieces = [
        (i, part) for i, (tokens, cut) in enumerate(zip(segments, cuts, strict=True)) for part in tokens.split(cut, 1)
    ]
    streamed = torch.cat(list(speaker.speak(pieces, voice, False, pause=pause, joined=joined)), 1)
    whole = speaker.say(enumerate(segments), voice, False, pause=pause, joined=joined)
    silent = 0 if not model.t3.is_gpt else 3 if joined else 9
    assert streamed.shape == whole.shape == (1, (20 + silent) * SAMPLES_PER_TOKEN + 2 * round(pause * 24_000))
    assert streamed.isfinite().all()
    assert whole.isfinite().all()
    assert streamed[0, -10:].any()
    assert whole[0, -10:].any()
