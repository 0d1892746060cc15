"""From tokens to audio: the joints, the lengths, and a whole Chatterbox model with a small deterministic vocoder."""

import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from t3_models import tiny_t3

from kvcache import InputError
from kvcache_chatterbox import ChatterboxEngine, byte_tokens, random_conditionals
from kvcache_chatterbox.audio import SAMPLES_PER_TOKEN, AudioStream


def tone(tokens):
    """A vocoder: each token sets a level that the sound glides to, so audio depends on the tokens just before."""
    levels = torch.nn.functional.pad((tokens.float() % 17) / 17, (3, 0)).unfold(0, 4, 1).mean(1)
    return levels.repeat_interleave(SAMPLES_PER_TOKEN)


@settings(max_examples=100, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 12), min_size=1, max_size=8), context=st.integers(6, 30), fade=st.integers(0, 2000)
)
def test_chunks_of_audio_are_together_the_whole(chunks, context, fade):
    tokens = torch.randint(0, 6561, (sum(chunks),), generator=torch.Generator().manual_seed(sum(chunks)))
    stream = AudioStream(tone, context, fade)
    parts = [stream.push(part) for part in tokens.split(chunks)]
    audio, whole = torch.cat([*parts, stream.finish()]), tone(tokens)
    # With a context longer than the vocoder's memory (3 tokens) and the fade (2.1 tokens), every joint fades between equal signals: fp32 rounding.
    torch.testing.assert_close(audio, whole, atol=1e-6, rtol=0)


def test_a_joint_without_enough_context_is_faded_and_not_a_click():
    tokens = torch.tensor([3, 16, 3, 16, 0, 16, 5, 9])
    jumps = {}
    for fade in (0, 480):
        stream = AudioStream(tone, 0, fade)
        stream._context = 1
        audio = torch.cat([*(stream.push(part) for part in tokens.split(2)), stream.finish()])
        assert audio.numel() == tokens.numel() * SAMPLES_PER_TOKEN
        joints = torch.arange(2, 8, 2) * SAMPLES_PER_TOKEN
        jumps[fade] = max(float((audio[j - 500 : j + 500].diff()).abs().max()) for j in joints.tolist())
    assert jumps[480] <= jumps[0]


class Vocoder:
    meanflow = False

    def inference(self, *, speech_tokens, ref_dict, n_cfm_timesteps=None):
        return tone(speech_tokens)[None] + ref_dict["voice"], None


class Watermarker:
    def apply_watermark(self, audio, sample_rate):
        assert sample_rate == 24000
        return audio + 1.0


class Conditionals:
    def __init__(self, t3, voice=0.0):
        self.t3, self.gen = t3, {"voice": voice}


class Tokenizer:
    def __init__(self, t3):
        self.t3 = t3

    def text_to_tokens(self, text, language_id=None):
        prefix = "" if language_id is None else f"[{language_id}]"
        return byte_tokens(self.t3, prefix + text)[:, 1:-1]

    def __call__(self, text, **_):
        return types.SimpleNamespace(input_ids=byte_tokens(self.t3, text))


class TTS:
    """What the engine uses of a `ChatterboxTTS`, around a real T3."""

    def __init__(self, kind):
        self.t3, self.s3gen, self.sr = tiny_t3(kind), Vocoder(), 24000
        self.tokenizer, self.watermarker = Tokenizer(self.t3), Watermarker()
        self.conds = Conditionals(random_conditionals(self.t3))

    def prepare_conditionals(self, path):
        if path == "missing.wav":
            raise FileNotFoundError(path)
        self.conds = Conditionals(random_conditionals(self.t3, seed=len(path)), voice=float(len(path)))


def tts(kind, monkeypatch):
    upstream = sys.modules[TTS.__module__]
    monkeypatch.setattr(upstream, "punc_norm", lambda text: text.strip() + ".", raising=False)
    monkeypatch.setattr(upstream, "SUPPORTED_LANGUAGES", {"en": "English", "fr": "French"}, raising=False)
    if kind == "gpt":
        monkeypatch.setattr(upstream, "S3GEN_SIL", 4299, raising=False)
    return TTS(kind)


@pytest.mark.parametrize("kind", ["english", "gpt", "multilingual"])
def test_streamed_audio_is_the_whole_audio(kind, monkeypatch):
    model = tts(kind, monkeypatch)
    engine = ChatterboxEngine(model)
    request = {"max_new_tokens": 40, "seed": 1, "language_id": "fr" if kind == "multilingual" else None}
    whole = engine.generate("Hello there", watermark=False, **request)
    chunks = list(engine.generate_stream("Hello there", watermark=False, chunk_size=7, **request))
    assert len(chunks) > 3
    torch.testing.assert_close(torch.cat(chunks, 1), whole, atol=1e-6, rtol=0)  # joints fade between equal signals
    text = model.tokenizer.text_to_tokens("Hello there.", request["language_id"])
    text = byte_tokens(model.t3, "Hello there.") if kind == "gpt" else torch.nn.functional.pad(text, (1, 1))
    if kind != "gpt":
        text[0, 0] = 255
    tokens = torch.cat(
        list(engine.inference_stream(t3_cond=model.conds.t3, text_tokens=text, max_new_tokens=40, seed=1)), 1
    )
    silent = 3 if kind == "gpt" else 0
    assert whole.shape == (1, (int((tokens < 6561).sum()) + silent) * SAMPLES_PER_TOKEN)


def test_the_watermark_is_applied_unless_switched_off(monkeypatch):
    engine = ChatterboxEngine(tts("gpt", monkeypatch))
    request = {"max_new_tokens": 10, "seed": 1}
    plain = engine.generate("Hello", watermark=False, **request)
    torch.testing.assert_close(engine.generate("Hello", **request), plain + 1)
    torch.testing.assert_close(
        torch.cat(list(engine.generate_stream("Hello", **request)), 1), plain + 1, atol=1e-6, rtol=0
    )


def test_voices_and_emotions_are_of_the_request_alone(monkeypatch):
    model = tts("english", monkeypatch)
    engine = ChatterboxEngine(model)
    voice, emotion = model.conds, model.conds.t3.emotion_adv
    emotions = []
    model.t3.cond_enc.emotion_adv_fc.register_forward_pre_hook(lambda module, inputs: emotions.append(float(inputs[0])))
    request = {"max_new_tokens": 10, "seed": 1, "watermark": False}
    mine = engine.generate("Hello", **request)
    other = engine.generate("Hello", audio_prompt_path="other.wav", **request)
    engine.generate("Hello", exaggeration=0.9, **request)
    assert float(other.min()) >= len("other.wav") > float(mine.max())
    assert emotions == pytest.approx([0.5, 0.5, 0.9])
    assert torch.equal(engine.generate("Hello", **request), mine)
    with pytest.raises(FileNotFoundError):
        engine.generate("Hello", audio_prompt_path="missing.wav", **request)
    assert model.conds is voice
    assert model.conds.t3.emotion_adv is emotion


def test_bad_texts_and_voices_are_refused(monkeypatch):
    engine = ChatterboxEngine(tts("multilingual", monkeypatch))
    with pytest.raises(InputError, match="text is empty"):
        engine.generate_stream("  ", language_id="fr")
    with pytest.raises(InputError, match="'xx' is not one of en, fr"):
        engine.generate_stream("Bonjour", language_id="xx")
    with pytest.raises(InputError, match="None is not one of en, fr"):
        engine.generate("Bonjour")
    engine._speaker._tts.conds = None
    with pytest.raises(InputError, match="there is no voice"):
        engine.generate("Bonjour", language_id="fr")
