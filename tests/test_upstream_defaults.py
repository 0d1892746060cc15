"""W14: what is not given to the engine's `generate` is as upstream's own `generate` has it, and so is what is said."""

import ast
import inspect
import logging
import sys
from pathlib import Path

import pytest
import torch
from support.inside.speech import S3GEN_SIL, SUPPORTED_LANGUAGES, StandIn, defaults_of_file, speaker_of
from support.t3_models import likely_end, tiny_t3

from kvcache import MemoryStore, SpeakerCache
from kvcache_chatterbox import ChatterboxEngine, random_conditionals, stand_in

pytestmark = pytest.mark.one_release

KINDS = ["english", "multilingual", "gpt"]
FILES = {"english": "tts.py", "multilingual": "mtl_tts.py", "gpt": "tts_turbo.py"}
TEXT = "hello there my friend, how are you today"


class NoMark:
    def apply_watermark(self, audio, sample_rate):
        return audio


def upstream_generate(kind, t3):
    """Upstream's method out of its source; its module imports an audio stack."""
    package = Path(next(iter(sys.modules["chatterbox"].__path__)))
    space = {
        "torch": torch,
        "F": torch.nn.functional,
        "T3Cond": type(random_conditionals(t3)),
        "S3GEN_SIL": S3GEN_SIL,
        "SUPPORTED_LANGUAGES": SUPPORTED_LANGUAGES,
        "logger": logging.getLogger("upstream"),
        "SOS": 6561,
        "EOS": 6562,
    }
    functions = {"punc_norm", "generate", "drop_invalid_tokens"}
    for file in ("models/s3tokenizer/__init__.py", FILES[kind]):
        nodes = ast.walk(ast.parse((package / file).read_text("utf-8")))
        found = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name in functions]
        exec(compile(ast.Module(found, []), file, "exec"), space)
    return space["generate"]


def peaked(kind):
    """A model that chooses among few tokens, as a trained one does, so that settings decide which."""
    t3 = likely_end(tiny_t3(kind), by=0.0)
    with torch.no_grad():
        t3.speech_head.weight.mul_(12)
    return t3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")  # from inside upstream's loop
def test_w14_generate_says_what_upstreams_generate_says(kind, monkeypatch):
    t3, most = peaked(kind), 60
    model = stand_in(t3)
    model.device, model.watermarker = "cpu", NoMark()
    model.conds.t3.emotion_adv = 0.9 * torch.ones(1, 1, 1)  # upstream's own default takes its place
    heard, vocode = [], model.s3gen.inference

    def spy(speech_tokens, ref_dict, **given):
        heard.append(speech_tokens.flatten())
        return vocode(speech_tokens=speech_tokens, ref_dict=ref_dict, **given)

    monkeypatch.setattr(model.s3gen, "inference", spy)
    loop, turbo = t3.inference, t3.inference_turbo
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(t3, "inference", lambda **given: loop(**{**given, "max_new_tokens": most}))
        patched.setattr(t3, "inference_turbo", lambda **given: turbo(**given, max_gen_len=most - 1))
        torch.manual_seed(0)
        upstream_generate(kind, t3)(model, TEXT, *(("en",) if kind == "multilingual" else ()))
    vars(t3).pop("inference", None), vars(t3).pop("inference_turbo", None)  # as they came: methods of the class
    expected = heard.pop()
    engine = ChatterboxEngine(model, prefix_cache=SpeakerCache(MemoryStore("8MiB")))
    torch.manual_seed(0)
    engine.generate(TEXT, language_id="en", max_new_tokens=most)
    mine = heard.pop()
    assert len(mine) > 30
    assert torch.equal(mine[mine < 6561], expected[expected < 6561])


class Newer(StandIn):
    """Of a release with other defaults."""

    def generate(self, text, *, temperature=0.3, top_p=0.6, min_p=0.11, top_k=7, repetition_penalty=1.9,
                 exaggeration=0.8, cfg_weight=0.25, watermark=True, more=None):  # fmt: skip
        raise NotImplementedError


class Wrapped(Newer):
    """A user's own, which hands on what it does not know."""

    def generate(self, text, *, temperature=0.45, **options):
        return super().generate(text, temperature=temperature, **options)


def asked(engine, **given):
    """How the engine would draw, and the emotion of who speaks."""
    [utterance] = engine.long_text("Hello.", engine.voice_of(None), language_id="en", **given).utterances
    return utterance.sampling, utterance.voice.emotion


def test_w14_the_defaults_follow_the_class_of_the_model():
    engine = ChatterboxEngine(Newer(tiny_t3("english"), 0), prefix_cache=SpeakerCache(MemoryStore("8MiB")))
    sampling, emotion = asked(engine)
    said = {name: one.default for name, one in inspect.signature(Newer.generate).parameters.items()}
    for name in ("temperature", "top_p", "min_p", "top_k", "repetition_penalty", "cfg_weight"):
        assert getattr(sampling, name) == said[name]
    assert emotion == pytest.approx(0.8)
    sampling, emotion = asked(engine, top_p=0.9, cfg_weight=0.0, exaggeration=0.4)
    assert (sampling.top_p, sampling.cfg_weight, sampling.min_p) == (0.9, 0.0, 0.11)
    assert emotion == pytest.approx(0.4)
    engine.add_voice("calm", conditionals=random_conditionals(engine.t3), exaggeration=0.2)
    assert engine.voice_of("calm").emotion == pytest.approx(0.2)  # a voice of one's own is as it was added


def test_w14_a_class_that_derives_from_it_has_its_defaults_but_where_it_says_others():
    engine = ChatterboxEngine(Wrapped(tiny_t3("english"), 0), prefix_cache=SpeakerCache(MemoryStore("8MiB")))
    sampling, emotion = asked(engine)
    assert (sampling.temperature, sampling.top_p, sampling.min_p) == (0.45, 0.6, 0.11)
    assert emotion == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("english", {"top_p": 1.0, "repetition_penalty": 1.2}),
        ("multilingual", {"top_p": 1.0, "repetition_penalty": 2.0}),
    ],
)
def test_w14_bare_tokens_are_drawn_as_by_t3(kind, expected):
    """`inference_stream` is T3's own `inference`, whose defaults differ from those of `generate`."""
    engine = ChatterboxEngine(stand_in(tiny_t3(kind)), prefix_cache=SpeakerCache(MemoryStore("8MiB")))
    sampling, _ = asked(engine)
    assert {name: getattr(sampling, name) for name in expected} == expected
    bare = engine.utterance(engine.voice_of(None), speaker_of(engine).tokenize("Hello.", "en")).sampling
    theirs = inspect.signature(type(engine.t3).inference).parameters
    for name in ("top_p", "min_p", "repetition_penalty", "cfg_weight", "temperature"):
        assert getattr(bare, name) == theirs[name].default


def test_w14_turbo_ignores_what_upstreams_turbo_ignores_and_says_so(caplog):
    engine = ChatterboxEngine(stand_in(tiny_t3("gpt")), prefix_cache=SpeakerCache(MemoryStore("8MiB")))
    plain = engine.generate("Hello.", seed=1, max_new_tokens=9)
    assert not caplog.records
    assert torch.equal(engine.generate("Hello.", seed=1, max_new_tokens=9, min_p=0.9, exaggeration=0.7), plain)
    assert "min_p, exaggeration" in caplog.text
    [segment] = engine.plan("Hello.").segments
    assert segment.most == inspect.signature(type(engine.t3).inference_turbo).parameters["max_gen_len"].default + 1


@pytest.mark.parametrize(
    ("given", "found"), [("self, text", {}), ("self, text, seed=3, *, late=4", {"seed": 3}), ("a=1, b=f()", {"a": 1})]
)
def test_a_generate_with_any_number_of_defaults_is_read(given, found, tmp_path):
    (tmp_path / "tts.py").write_text(f"class Model:\n    def generate({given}):\n        pass\n", "utf-8")
    assert defaults_of_file(tmp_path / "tts.py") == found
