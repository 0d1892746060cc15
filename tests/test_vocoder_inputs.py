"""What a vocoder cannot do is said in one line, before anything runs: voices, settings, weights, chunks."""

import asyncio
import types

import pytest
import torch
from support.inside.models import HAS_HALF
from support.inside.speech import FILE, VOCODER_OF, check_reference, distilled, speak_by, speaker_of
from support.t3_models import tiny_t3
from support.whole import clip, reference, s3gen, take_away_the_audio_stack, whole

from kvcache import InputError, MemoryStore, MissingDependencyError, SpeakerCache
from kvcache_chatterbox import ChatterboxEngine, SpeechScheduler, VocoderOptions, random_conditionals, stand_in
from kvcache_chatterbox.audio import Chunking, chunking_of
from kvcache_chatterbox.vocoder import PlainVocoder, s3gen_module
from kvcache_chatterbox.voices import Voice

pytestmark = [pytest.mark.one_release, pytest.mark.filterwarnings("ignore")]  # of diffusers, librosa and torchaudio


class Hears(PlainVocoder):
    """A stand-in's vocoder that needs of a voice what S3Gen needs, and runs never."""

    def check(self, voice):
        check_reference(voice.gen)

    def waves(self, runs):
        raise AssertionError("it ran")


@pytest.fixture
def idle(monkeypatch):
    """An engine in which nothing may run: no T3, no vocoder."""
    ours = ChatterboxEngine(stand_in(tiny_t3("gpt")), prefix_cache=SpeakerCache(MemoryStore("32MiB")))
    monkeypatch.setattr(
        VOCODER_OF,
        lambda s3gen, options, device, programs, onednn: Hears(s3gen, device),
    )

    def runs(*args, **given):
        raise AssertionError("it ran")

    speak_by(ours, runs)
    return ours


def speak(ours, **request):
    """By each way that there is, all of which must refuse."""
    for way in (ours.generate_stream, ours.generate):
        if way == ours.generate and {"chunking", "first_chunk", "max_chunk"} & set(request):
            continue
        with pytest.raises(InputError) as error:
            way("Hello there.", **request)
    return str(error.value)


# ---------------------------------------------------------------------- voices


def without(*names):
    return {name: value for name, value in reference(3).items() if name not in names}


@pytest.mark.parametrize(
    ("gen", "says"),
    [
        ({}, "no reference for the vocoder"),
        (without("prompt_feat"), "prompt_feat of S3Gen's ref_dict is missing"),
        (without("prompt_token", "embedding"), "prompt_token, embedding of S3Gen's ref_dict is missing"),
        (reference(0.3), "0.32 s long, and the vocoder takes 1 to 30 s: encode a longer clip"),
        (
            reference(60),
            "60.00 s long, and the vocoder takes 1 to 30 s: encode a shorter clip, or set reference_seconds",
        ),
        ({**reference(3), "prompt_feat": torch.zeros(1, 20, 80)}, "0.40 s long"),
        ({**reference(3), "prompt_feat": torch.zeros(1, 150, 100)}, r"a mel [1, 150, 100]"),
        ({**reference(3), "prompt_token": torch.full((1, 75), 0.5)}, "tokens [1, 75] of torch.float32"),
        ({**reference(3), "prompt_token": torch.zeros(1, 0, dtype=torch.long)}, "tokens [1, 0]"),
        ({**reference(3), "embedding": torch.zeros(1, 0)}, "an embedding [1, 0]"),
    ],
    ids=range(10),
)
def test_a_voice_that_cannot_be_heard_is_refused_before_anything_runs(idle, gen, says):
    assert says in speak(idle, voice=Voice(random_conditionals(idle.t3), gen))


def test_a_voice_of_a_second_to_half_a_minute_is_heard():
    for seconds in (1, 3, 10, 30):
        check_reference(reference(seconds))
    check_reference(reference(60), seconds=5)  # of which the first ones are heard
    with pytest.raises(InputError, match=r"0\.32 s"):
        check_reference(reference(0.3), seconds=5)


def test_a_scheduler_refuses_such_a_voice(idle):
    async def submit():
        async with SpeechScheduler(idle) as scheduler:
            with pytest.raises(InputError, match=r"0\.32 s long"):
                await anext(scheduler.submit("Hello.", voice=Voice(random_conditionals(idle.t3), reference(0.3))))

    asyncio.run(submit())


@pytest.mark.audio
@pytest.mark.parametrize(
    ("kind", "says"), [("english", "is 0.30 s long, and a voice needs 1 s"), ("gpt", "0.30 s long")]
)
def test_a_clip_of_a_third_of_a_second_is_refused_before_it_is_encoded(kind, says, tmp_path, monkeypatch):
    model = whole(kind)
    monkeypatch.setattr(model.s3gen, "embed_ref", None)
    ours = ChatterboxEngine(model, prefix_cache=SpeakerCache(MemoryStore("32MiB")))
    file = clip(tmp_path / "short.wav", 0.3)
    with pytest.raises(InputError, match=says):
        ours.add_voice("short", file)
    with pytest.raises(InputError, match=says):
        ours.generate_stream("Hello.", audio_prompt_path=file)
    assert not ours.voices


@pytest.mark.audio
def test_a_clip_that_turbo_does_not_take_says_so(tmp_path):
    ours = ChatterboxEngine(whole("gpt"), prefix_cache=SpeakerCache(MemoryStore("32MiB")))
    with pytest.raises(InputError, match=r"clip.*longer than 5 seconds"):
        ours.add_voice("short", clip(tmp_path / "clip.wav", 3))


@pytest.mark.audio
def test_of_a_clip_of_a_minute_the_first_ten_seconds_are_heard(tmp_path):
    ours = ChatterboxEngine(whole("english"), prefix_cache=SpeakerCache(MemoryStore("32MiB")))
    voice = ours.add_voice("long", clip(tmp_path / "long.wav", 60))
    assert voice.gen["prompt_feat"].shape == (1, 500, 80)
    speaker_of(ours).checked(voice)


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "steps=0 must be a whole number from 1"),
        ({"steps": -1}, "steps=-1 must be"),
        ({"steps": True}, "steps=True must be"),
        ({"steps": 2.0}, "steps=2.0 must be"),
        ({"steps": 10**6}, "steps=1000000 must be"),
        ({"guidance": -0.1}, "guidance=-0.1 must be a number from 0"),
        ({"guidance": float("nan")}, "guidance=nan must be"),
        ({"guidance": "some"}, "guidance='some' must be"),
        ({"weights": "meanflow", "guidance": 0.7}, "distilled weights have it in them already"),
        ({"reference_seconds": 0.3}, "reference_seconds=0.3 must be at least 1 s"),
        ({"reference_seconds": float("inf")}, "reference_seconds=inf must be"),
        ({"precision": "int4"}, "precision='int4' must be one of 'fp32', 'bf16', 'fp16', 'int8'"),
        ({"compiled": 1}, "compiled=1 must be"),
        ({"lookahead": None}, "lookahead=None must be"),
        ({"weights": "distilled"}, "weights='distilled' must be 'own', 'meanflow', a file or folder that exists"),
        ({"weights": torch.nn.Linear(2, 2)}, "or an S3Gen(meanflow=True)"),
        ({"weights": None}, "weights=None must be"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(options, says):
    with pytest.raises(InputError) as error:
        VocoderOptions(**options)
    assert says in str(error.value)


def test_guidance_of_nothing_goes_with_distilled_weights():
    assert VocoderOptions(weights="meanflow", guidance=0).guidance == 0


@pytest.mark.parametrize("options", [{"steps": 5}, {"reference_seconds": 3}, {"precision": "int8"}], ids=str)
def test_a_vocoder_without_settings_is_given_none(options):
    options = VocoderOptions(**options)
    with pytest.raises(InputError, match="ToneVocoder is not upstream's S3Gen, which has no such settings"):
        ChatterboxEngine(stand_in(tiny_t3("gpt")), vocoder=options)
    with pytest.raises(InputError, match="a bare T3 has no vocoder"):
        ChatterboxEngine(tiny_t3("gpt"), vocoder=options)


@pytest.mark.audio
def test_a_precision_that_this_device_does_not_have_is_refused(monkeypatch):
    model = stand_in(tiny_t3("english"))
    model.s3gen = s3gen(False)
    monkeypatch.setattr(HAS_HALF, lambda precision: False)
    with pytest.raises(InputError, match="no fast bf16 arithmetic"):
        ChatterboxEngine(model, vocoder=VocoderOptions(precision="bf16"))


@pytest.mark.audio
def test_guidance_of_a_model_whose_weights_are_distilled_is_refused():
    model = stand_in(tiny_t3("gpt"))
    model.s3gen = s3gen(True)
    with pytest.raises(InputError, match="this model's weights have it in them already"):
        ChatterboxEngine(model, vocoder=VocoderOptions(guidance=0.7))


# ---------------------------------------------------------------------- what is not there


def test_without_the_audio_stack_the_error_says_what_to_install(monkeypatch):
    take_away_the_audio_stack(monkeypatch)
    with pytest.raises(MissingDependencyError, match=r"does not load \(No module named 'torchaudio'\).*chatterbox\.md"):
        s3gen_module()


OWN = types.SimpleNamespace(meanflow=False)
WAY = rf"fetch it once with `hf download ResembleAI/chatterbox-turbo {FILE}`"


def test_distilled_weights_that_are_not_there_are_refused_with_the_way_to_get_them(monkeypatch, tmp_path):
    def unreachable(*args, **given):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(InputError, match=rf"the hub did not give it \(ConnectionError\); {WAY}"):
        distilled("meanflow", OWN)
    with pytest.raises(InputError, match=rf"there is no {FILE} in this folder; {WAY}"):
        distilled(tmp_path, OWN)


@pytest.mark.audio
def test_weights_of_something_else_are_refused(tmp_path):
    own = s3gen(False)
    (tmp_path / FILE).write_bytes(b"what is no file of tensors")
    with pytest.raises(InputError, match=rf"holds no weights of upstream's S3Gen\(meanflow=True\).*{WAY}"):
        distilled(tmp_path, own)


@pytest.mark.audio
def test_an_engine_asks_for_the_weights_when_it_is_made(monkeypatch):
    model = stand_in(tiny_t3("english"))
    model.s3gen = s3gen(False)

    def unreachable(*args, **given):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(InputError, match=WAY):
        ChatterboxEngine(model, vocoder=VocoderOptions(weights="meanflow"))


# ---------------------------------------------------------------------- chunks


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"first_chunk": 0}, "first_chunk=0 must be a whole number of speech tokens, at least 1"),
        ({"max_chunk": 0}, "max_chunk=0 must be"),
        ({"chunking": [0]}, "chunking[0]=0 must be"),
        ({"chunking": [25, 0]}, "chunking[1]=0 must be"),
        ({"chunking": []}, "has no size"),
        ({"chunking": [2.5]}, "chunking[0]=2.5 must be"),
        ({"chunking": 0}, "chunking=0 must be 'auto', 'fixed' or a list"),
        ({"chunking": "small"}, "chunking='small' must be"),
        ({"chunking": "fixed", "first_chunk": 0}, "first_chunk=0 must be"),
        ({"chunking": "fixed", "max_chunk": 50}, "max_chunk=50 with chunking='fixed'"),
        ({"chunking": [25], "first_chunk": 10}, "both go with 'auto'"),
        ({"first_chunk": 50, "max_chunk": 25}, "first_chunk=50 is more than max_chunk=25"),
        ({"first_chunk": True}, "first_chunk=True must be"),
    ],
    ids=str,
)
def test_chunks_that_cannot_be_are_refused_before_anything_runs(idle, request_, says):
    with pytest.raises(InputError) as error:
        chunking_of(**request_)
    assert says in str(error.value)
    assert speak(idle, **request_) == str(error.value)


def test_a_chunking_is_checked_however_it_is_made():
    with pytest.raises(InputError, match=r"chunking\[0\]=0"):
        Chunking((0,))
    assert chunking_of(Chunking((7,))).step == 7
