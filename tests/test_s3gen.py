"""Audio in chunks and segments from upstream's own S3Gen, with random weights: its lengths, its joints, its tail.

The flow attends to all that a run goes over, both ways, so a token sounds a little different in each run that it is in, and
chunked audio is not compared with that of one whole run. What can be said exactly is how long it is, that it is made of the
runs it is said to be made of, faded into one another, and that neither the noise nor the harmonics begin anew in a run.
"""

import warnings

import pytest
import torch
from support.inside.speech import AudioStream
from support.t3_models import tiny_t3

from kvcache import MemoryStore, MissingDependencyError, SpeakerCache
from kvcache_chatterbox import ChatterboxEngine, Chunking
from kvcache_chatterbox.audio import CONTEXT, Speaker, heard
from kvcache_chatterbox.testing import stand_in
from kvcache_chatterbox.units import SAMPLES_PER_TOKEN
from kvcache_chatterbox.vocoder import LEAD, Run, S3GenVocoder, SeededNoise, VocoderOptions, random_s3gen

pytestmark = [
    pytest.mark.slow,
    pytest.mark.audio,
    pytest.mark.filterwarnings("ignore"),
]  # of diffusers, librosa and torchaudio

SILENCED = 480  # samples at the start of every text, which are zero, and as many that rise
AHEAD = 3  # tokens
NOISE = SeededNoise(5)


@pytest.fixture(scope="module", params=["english", "gpt"])
def model(request):
    """A stand-in that has the real S3Gen of the variant, and a voice that this encoded."""
    tts = stand_in(tiny_t3(request.param))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tts.s3gen = random_s3gen(meanflow=request.param == "gpt")
    except MissingDependencyError as error:
        pytest.skip(str(error))
    clip = 0.1 * torch.randn(2 * 16_000, generator=torch.Generator().manual_seed(0))
    tts.conds.gen = tts.s3gen.embed_ref(clip, 16_000)
    return tts


def tokens_of(count):
    return torch.randint(0, 6561, (1, count), generator=torch.Generator().manual_seed(count))


class Watched:
    """The engine's vocoder, and what it was given and gave in each run."""

    def __init__(self, vocoder):
        self._vocoder, self.runs = vocoder, []

    def __getattr__(self, name):
        return getattr(self._vocoder, name)

    def waves(self, runs):
        made = self._vocoder.waves(runs)
        self.runs += zip(runs, [one.audio.clone() for one in made], made, strict=True)
        return made


@pytest.fixture
def watched(model):
    speaker = Speaker(model)
    assert type(speaker.vocoder) is S3GenVocoder
    assert speaker.vocoder.lookahead == AHEAD
    return Watched(speaker.vocoder), speaker.builtin()


@pytest.mark.parametrize("count", [1, 2, 3, 30])
def test_s3gen_drops_no_token(watched, count):
    vocoder, voice = watched
    [made] = vocoder.waves([Run(tokens_of(count)[0], voice, NOISE)])
    assert made.audio.shape == (count * SAMPLES_PER_TOKEN,)
    assert made.audio.isfinite().all()
    assert not made.audio[:SILENCED].any()
    assert made.audio[-10:].any()


def test_one_chunk_is_the_whole(watched):
    vocoder, voice = watched
    stream, tokens = AudioStream(vocoder, voice, NOISE), tokens_of(20)[0]
    streamed = torch.cat([stream.push(tokens, ended=True), stream.flush()])
    assert torch.equal(streamed, vocoder.waves([Run(tokens, voice, NOISE)])[0].audio)
    streamed *= 0.5  # nothing that only inference may change
    assert len(vocoder.runs) == 2


def test_chunks_are_their_runs_faded_into_one_another(watched):
    vocoder, voice = watched
    state = torch.get_rng_state()
    tokens = tokens_of(61)[0]
    stream = AudioStream(vocoder, voice, NOISE)
    parts = [stream.push(chunk) for chunk in tokens.split([1, 25, 2, 13, 20])]
    audio = torch.cat([*parts, stream.flush()])
    assert torch.equal(torch.get_rng_state(), state)  # noise is drawn by place, from generators of its own
    assert audio.shape == (61 * SAMPLES_PER_TOKEN,)
    assert audio.isfinite().all()
    runs = [run for run, _, _ in vocoder.runs]
    # The first token alone is only looked ahead at; the last three are said when nothing comes behind them.
    assert [(run.place, run.tokens.numel(), run.known) for run in runs] == [
        (0, 26, 0), (0, 28, 23), (0, 41, CONTEXT), (13, 48, CONTEXT), (33, 28, CONTEXT),
    ]  # fmt: skip
    assert [run.ended for run in runs] == [False] * 4 + [True]
    assert [run.lead for run in runs] == [0] + [LEAD] * 4
    for run in runs:
        assert torch.equal(run.tokens, tokens[run.place : run.place + run.tokens.numel()])
        assert run.noise is NOISE
    for i in (3, 4):  # the harmonics go on from where they were, by the first token that is run again
        gone = runs[i].place - runs[i - 1].place
        assert torch.equal(runs[i].turned, vocoder.runs[i - 1][2].turned[2 * gone - 1])
    assert [run.turned for run in runs[:3]] == [None] * 3
    share = torch.arange(1, LEAD + 1) / (LEAD + 1)
    at = 0  # sample in `audio` where the run's own tokens begin
    for i, (run, made, _) in enumerate(vocoder.runs):
        own = made[run.lead :]
        kept = own.numel() - (LEAD if i < len(runs) - 1 else 0)
        assert torch.equal(audio[at : at + kept], own[:kept])
        if i:
            before = vocoder.runs[i - 1][1][-LEAD:]
            faded = before * (1 - share) + made[:LEAD] * share
            torch.testing.assert_close(audio[at - LEAD : at], faded, atol=1e-6, rtol=0)
            # A run's silenced start is that of the text, and heard once.
            assert audio[at - LEAD : at + SILENCED].square().mean() > 0.1 * audio.square().mean()
        at += own.numel()
    # Between two waves a fade adds at most their distance over its samples.
    steepest = max(float(made.diff().abs().max()) for _, made, _ in vocoder.runs)
    loudest = max(float(made.abs().max()) for _, made, _ in vocoder.runs)
    assert float(audio.diff().abs().max()) <= steepest + 2 * loudest / (LEAD + 1)


@pytest.mark.parametrize(("pause", "joined"), [(0.1, False), (0, True)])
def test_streamed_segments_are_as_long_as_whole_ones(model, pause, joined):
    speaker = Speaker(model)
    voice = speaker.builtin()
    segments, cuts = [tokens_of(count) for count in (7, 0, 12, 1)], [[3, 4], [0], [1, 9, 2], [1]]
    pieces = [
        (i, part) for i, (tokens, cut) in enumerate(zip(segments, cuts, strict=True)) for part in tokens.split(cut, 1)
    ]
    options = {"pause": pause, "joined": joined}
    said = speaker.segmented(voice, False, lambda index, tokens: SeededNoise(index), chunking=Chunking((5,)), **options)
    streamed = torch.cat(list(heard(said, pieces)), 1)
    whole = speaker.say(enumerate(segments), voice, False, **options)
    silent = 0 if not model.t3.is_gpt else 3 if joined else 9
    assert streamed.shape == whole.shape == (1, (20 + silent) * SAMPLES_PER_TOKEN + 2 * round(pause * 24_000))
    assert streamed.isfinite().all()
    assert whole.isfinite().all()
    assert streamed[0, -10:].any()
    assert whole[0, -10:].any()


def test_a_seed_gives_the_same_samples_whoever_else_draws(model):
    engine = ChatterboxEngine(model, prefix_cache=SpeakerCache(MemoryStore("8MiB")))
    given = {"max_new_tokens": 12, "watermark": False, "chunking": [5]}
    said = []
    for seed, other in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(other)
        said.append(torch.cat(list(engine.generate_stream("Hello.", seed=seed, **given)), 1))
    torch.testing.assert_close(said[0], said[1], atol=1e-6, rtol=0)
    assert said[0].shape != said[2].shape or not torch.allclose(said[0], said[2], atol=1e-3)


def test_without_lookahead_all_of_a_chunk_is_said_at_once(model):
    speaker = Speaker(model, VocoderOptions(lookahead=False))
    vocoder = Watched(speaker.vocoder)
    stream = AudioStream(vocoder, speaker.builtin(), NOISE)
    parts = [stream.push(chunk) for chunk in tokens_of(9)[0].split([1, 6, 2])]
    assert [part.numel() for part in [*parts, stream.flush()]] == [480, 6 * 960, 2 * 960, 480]
    assert [run.known for run, _, _ in vocoder.runs] == [0, 1, 7]
