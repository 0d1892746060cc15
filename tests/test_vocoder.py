"""The vocoder driven from outside against upstream's own S3Gen, with random weights: whole texts, chunks, batches, noise.

Tolerance: both run the same fp32 operators in another order or with other padding, and the waveform is at most 1; 1e-7 to 1e-6
was seen. What is padded changes the blocks in which products are summed.
"""

import copy
from functools import cache, partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.inside.speech import parts_of, source
from support.searching import search
from support.whole import reference, s3gen, short_s3gen

from kvcache_chatterbox.units import SAMPLES_PER_TOKEN
from kvcache_chatterbox.vocoder import (
    LEAD,
    Run,
    S3GenVocoder,
    SeededNoise,
    UpstreamNoise,
    VocoderOptions,
    vocoder_of,
    why_plain,
)
from kvcache_chatterbox.voices import Voice

pytestmark = [pytest.mark.audio, pytest.mark.filterwarnings("ignore")]  # of diffusers, librosa and torchaudio

CPU = torch.device("cpu")
CLOSE = partial(torch.testing.assert_close, atol=1e-4, rtol=0)
STEPS = 2  # of Euler's method: the real ten take as much longer and show no more


@cache
def voice(seconds=2, seed=0):
    return Voice(None, reference(seconds, seed))


@cache
def vocoder(meanflow, **options):
    return S3GenVocoder(short_s3gen(meanflow), VocoderOptions(steps=STEPS, **options))


def tokens_of(count, seed=0):
    return torch.randint(0, 6561, (count,), generator=torch.Generator().manual_seed(100 * count + seed))


def upstreams(meanflow, tokens, who):
    """Upstream's samples, under torch's global generator as it is."""
    audio, _ = short_s3gen(meanflow).inference(tokens, ref_dict=dict(who.gen), n_cfm_timesteps=STEPS)
    return audio[0]


@pytest.mark.parametrize("meanflow", [False, True])
@pytest.mark.parametrize("count", [1, 4, 37])
def test_a_whole_text_has_upstreams_samples(meanflow, count):
    torch.manual_seed(5)
    expected = upstreams(meanflow, tokens_of(count), voice())
    after = torch.randn(4)
    torch.manual_seed(5)
    [made] = vocoder(meanflow).waves([Run(tokens_of(count), voice(), UpstreamNoise(None, CPU, meanflow=meanflow))])
    assert made.audio.shape == expected.shape == (count * SAMPLES_PER_TOKEN,)
    CLOSE(made.audio, expected)
    assert torch.equal(torch.randn(4), after), "what is drawn next is not what upstream draws next"


@pytest.mark.parametrize("meanflow", [False, True])
def test_a_vocoder_of_full_size_runs_as_upstreams_by_default(meanflow):
    plain, tokens = S3GenVocoder(s3gen(meanflow), VocoderOptions()), tokens_of(5)
    torch.manual_seed(1)
    expected, _ = s3gen(meanflow).inference(tokens, ref_dict=dict(voice(1).gen))
    torch.manual_seed(1)
    [made] = plain.waves([Run(tokens, voice(1), UpstreamNoise(None, CPU, meanflow=meanflow))])
    CLOSE(made.audio, expected[0])


@search(40)
@given(
    known=st.integers(0, 30),
    new=st.integers(1, 60),
    lead=st.integers(0, LEAD),
    meanflow=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_chunk_is_what_upstream_makes_of_it_with_what_came_before(known, new, lead, meanflow, seed):
    """HiFT makes only what is asked for, and hears as much before it as it depends on."""
    lead = min(lead, known * SAMPLES_PER_TOKEN)
    tokens = tokens_of(known + new, seed)
    torch.manual_seed(seed)
    expected = upstreams(meanflow, tokens, voice())
    torch.manual_seed(seed)
    noise = UpstreamNoise(None, CPU, meanflow=meanflow)
    [made] = vocoder(meanflow).waves([Run(tokens, voice(), noise, known=known, lead=lead)])
    CLOSE(made.audio, expected[known * SAMPLES_PER_TOKEN - lead :])


runs = st.builds(
    lambda new, known, lead, place, ended, seed, who: Run(
        tokens_of(new + known, seed),
        voice(who, who),
        SeededNoise(seed),
        place,
        known,
        lead if known else 0,
        ended,
    ),
    st.integers(4, 40), st.integers(0, 25), st.sampled_from([0, 1, LEAD]), st.integers(0, 500), st.booleans(),
    st.integers(0, 2**40), st.sampled_from([1, 2, 3]),
)  # fmt: skip


@search(40)
@given(rows=st.lists(runs, min_size=2, max_size=4), meanflow=st.booleans())
def test_runs_together_are_runs_alone(rows, meanflow):
    """Of any lengths, voices and places, looking ahead or not."""
    ours = vocoder(meanflow)
    for run, made in zip(rows, ours.waves(rows), strict=True):
        [alone] = ours.waves([run])
        said = run.tokens.numel() - run.known - (0 if run.ended else ours.lookahead)
        assert made.audio.numel() == run.lead + said * SAMPLES_PER_TOKEN
        CLOSE(made.audio, alone.audio)
        CLOSE(made.turned, alone.turned)


@pytest.mark.parametrize("meanflow", [False, True])
def test_what_is_looked_ahead_at_is_not_said_and_is_heard(meanflow):
    ours, tokens, noise = vocoder(meanflow), tokens_of(20), SeededNoise(3)
    [open_] = ours.waves([Run(tokens, voice(), noise, ended=False)])
    other = torch.cat([tokens[:17], (tokens[17:] + 1) % 6561])
    [differs] = ours.waves([Run(other, voice(), noise, ended=False)])
    assert open_.audio.numel() == differs.audio.numel() == 17 * SAMPLES_PER_TOKEN
    assert float((open_.audio - differs.audio).abs().max()) > 1e-5
    at_once = S3GenVocoder(short_s3gen(meanflow), VocoderOptions(steps=2, lookahead=False))
    [said] = at_once.waves([Run(tokens, voice(), noise, ended=False)])
    [ended] = ours.waves([Run(tokens, voice(), noise)])
    CLOSE(said.audio, ended.audio)


def test_the_harmonics_of_a_chunk_go_on_from_the_one_before():
    """With the same pitch, the source of two chunks is the source of both in one."""
    hift, noise = parts_of(vocoder(True)).hift, SeededNoise(1)
    pitch = 120 + 80 * torch.rand(30, generator=torch.Generator().manual_seed(0))
    whole, turned = source(hift, pitch, noise, 0, None)
    begin, before = source(hift, pitch[:13], noise, 0, None)
    end, after = source(hift, pitch[13:], noise, 13, before[-1])
    CLOSE(torch.cat([begin, end], -1), whole)
    CLOSE(torch.cat([before, after]), turned)
    fresh, _ = source(hift, pitch[13:], noise, 13, None)
    assert float((fresh - end).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "options", [{"guidance": 0.0}, {"steps": 1}, {"reference_seconds": 1.0}, {"precision": "int8"}]
)
def test_a_setting_that_changes_the_sound_changes_it(options):
    tokens, noise = tokens_of(12), SeededNoise(0)
    [plain] = S3GenVocoder(short_s3gen(False), VocoderOptions(steps=2)).waves([Run(tokens, voice(), noise)])
    [other] = S3GenVocoder(short_s3gen(False), VocoderOptions(**{"steps": 2, **options})).waves(
        [Run(tokens, voice(), noise)]
    )
    assert other.audio.shape == plain.audio.shape
    assert bool(other.audio.isfinite().all()) and not torch.equal(other.audio, plain.audio)


def test_distilled_weights_speak_for_every_model():
    english, tokens = short_s3gen(False), tokens_of(9)
    ours = S3GenVocoder(english, VocoderOptions(weights=short_s3gen(True)))
    torch.manual_seed(2)
    expected, _ = short_s3gen(True).inference(tokens, ref_dict=dict(voice().gen))
    torch.manual_seed(2)
    [made] = ours.waves([Run(tokens, voice(), UpstreamNoise(None, CPU, meanflow=True))])
    CLOSE(made.audio, expected[0])
    assert ours.meanflow and not english.meanflow


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_fewer_bits_are_near(precision):
    """Far nearer than what another noise would have given, which is as right: random weights make no sound to judge by."""
    tokens, noise = tokens_of(12), SeededNoise(0)
    [plain] = vocoder(True).waves([Run(tokens, voice(), noise)])
    [other] = vocoder(True).waves([Run(tokens, voice(), SeededNoise(1))])
    [narrow] = S3GenVocoder(short_s3gen(True), VocoderOptions(steps=2, precision=precision)).waves(
        [Run(tokens, voice(), noise)]
    )
    rounded, unlike = (float((plain.audio - one.audio).pow(2).mean().sqrt()) for one in (narrow, other))
    assert 0 < rounded < 0.2 * unlike


def test_a_model_that_changes_is_followed():
    """Weights that are loaded, or set, after the first run."""
    mine = copy.deepcopy(short_s3gen(True))
    ours, run = S3GenVocoder(mine, VocoderOptions()), Run(tokens_of(5), voice(), SeededNoise(0))
    [before] = ours.waves([run])
    with torch.no_grad():
        mine.mel2wav.conv_post.bias.add_(0.1)
    [after] = ours.waves([run])
    [fresh] = S3GenVocoder(mine, VocoderOptions()).waves([run])
    assert not torch.equal(before.audio, after.audio)
    assert torch.equal(after.audio, fresh.audio)


def test_an_s3gen_that_does_more_is_run_by_its_own_inference():
    mine = copy.deepcopy(short_s3gen(True))
    assert why_plain(mine) is None and type(vocoder_of(mine, None, CPU)) is S3GenVocoder
    heard = []
    hook = mine.flow.encoder.register_forward_hook(lambda *args: heard.append(1))
    assert "hook" in why_plain(mine)
    plain = vocoder_of(mine, None, CPU)
    torch.manual_seed(0)
    [made] = plain.waves([Run(tokens_of(6), voice(), SeededNoise(0), known=2, lead=100)])
    assert heard and made.audio.numel() == 100 + 4 * SAMPLES_PER_TOKEN
    hook.remove()
    mine.inference = lambda *args, **given: None
    assert "inference" in why_plain(mine)


def test_neither_the_global_generator_nor_the_model_is_touched():
    mine = copy.deepcopy(short_s3gen(False))
    state, before = torch.get_rng_state(), {name: value.clone() for name, value in mine.state_dict().items()}
    gen = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in voice().gen.items()}
    who = Voice(None, gen)
    S3GenVocoder(mine, VocoderOptions(steps=1, precision="int8")).waves([Run(tokens_of(4), who, SeededNoise(1))])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())
    assert all(torch.equal(gen[name], value) for name, value in voice().gen.items() if isinstance(value, torch.Tensor))
