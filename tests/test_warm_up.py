"""`ChatterboxEngine.warm_up` and `kvcache warm`: what a first request would wait for."""

import json

import pytest
import torch
from support.families import build, token_ids
from support.inside.decoding import PROGRAMS_COMPILED, PROGRAMS_FAILED, PROGRAMS_LOADED
from support.inside.speech import speaker_of
from support.t3_models import tiny_t3

from kvcache import InputError, KVCacheManager, subscribe
from kvcache.cli import main
from kvcache_chatterbox import ChatterboxEngine, byte_tokens, random_conditionals
from kvcache_chatterbox.testing import stand_in


def tokens(engine):
    given = {"text_tokens": byte_tokens(engine.t3, "Hello."), "t3_cond": random_conditionals(engine.t3)}
    return torch.cat(list(engine.inference_stream(max_new_tokens=12, seed=3, **given)), 1)


@pytest.mark.parametrize("kind", ["english", "gpt"])
def test_a_warm_engine_says_what_a_cold_one_says(kind):
    t3 = tiny_t3(kind)
    expected = tokens(ChatterboxEngine(t3, backend="off"))
    for background in (False, True):
        engine, told = ChatterboxEngine(t3), []
        state = torch.get_rng_state()
        warming = engine.warm_up(max_new_tokens=20, background=background, told=told.append).wait(60)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(tokens(engine), expected)
        assert told == ["decoding the first tokens"]
        assert warming.over
        assert warming.seconds > 0
        assert warming.made == ()


def test_the_vocoder_is_run_at_sizes_that_tell_what_its_runs_take():
    engine, told = ChatterboxEngine(stand_in(tiny_t3("gpt"))), []
    cost = speaker_of(engine).cost
    assert cost.of(100) == 0
    engine.warm_up(max_new_tokens=20, told=told.append)
    assert cost.of(100) > 0
    assert told == ["decoding the first tokens", *(f"making audio of {size} tokens" for size in (25, 50, 100, 200))]


def test_the_watermarker_is_run_once_as_its_first_run_may_take_long():
    model, told, marked = stand_in(tiny_t3("gpt")), [], []

    class Marker:
        def apply_watermark(self, wav, sample_rate):
            marked.append(len(wav) / sample_rate)
            return wav

    model.watermarker = Marker()
    ChatterboxEngine(model).warm_up(max_new_tokens=20, told=told.append)
    assert told[-1] == "marking audio"
    assert marked == [200 / 25]


@pytest.mark.parametrize(
    "marker", [object(), type("Broken", (), {"apply_watermark": lambda self, wav, sample_rate: 1 / 0})()]
)
def test_a_watermarker_that_cannot_mark_is_no_error_of_the_warm_up(marker):
    """Who serves without a mark is not concerned, and who wants one is told."""
    model = stand_in(tiny_t3("gpt"))
    model.watermarker = marker
    assert ChatterboxEngine(model).warm_up(max_new_tokens=20).over


def test_what_speaks_at_once_is_warmed_together():
    engine, told = ChatterboxEngine(stand_in(tiny_t3("english"))), []
    engine.warm_up(max_new_tokens=20, requests=3, told=told.append)
    assert told == [
        "decoding the first tokens",
        *(f"decoding the first tokens of {n} at once" for n in (1, 2, 3)),
        "making audio of 25 and 25 tokens at once",
        "making audio of 25 and 50 tokens at once",
        *(f"making audio of {size} tokens" for size in (25, 50, 100, 200)),
    ]
    with pytest.raises(InputError, match="requests=0 must"):
        engine.warm_up(requests=0)
    with pytest.raises(InputError, match="one utterance at a time"):
        ChatterboxEngine(stand_in(tiny_t3("english")), backend="off").warm_up(requests=2)
    with pytest.raises(InputError, match="bare T3"):
        ChatterboxEngine(tiny_t3("english")).warm_up(requests=2)


@pytest.mark.slow
def test_what_is_compiled_for_one_request_serves_one_of_a_batch_too(monkeypatch, tmp_path):
    """Its inputs lie alike, however many places there are: where they did not, each took the other's program for spoilt."""
    monkeypatch.setenv("KVCACHE_HOME", str(tmp_path / "home"))
    for made in (["compiled"] * 2, ["loaded"] * 2):
        monkeypatch.setattr(PROGRAMS_LOADED, {})
        engine, fell_back = ChatterboxEngine(stand_in(tiny_t3("gpt")), backend="compile"), []
        with subscribe(fell_back.append, ["fell_back"]):
            warming = engine.warm_up(max_new_tokens=20, requests=3)
        assert [one.how for one in warming.made] == made  # one, and all
        assert fell_back == []


def test_what_cannot_be_warmed_is_said_before_anything_runs():
    engine = ChatterboxEngine(tiny_t3("gpt"))
    with pytest.raises(InputError, match="nobody"):
        engine.warm_up(voice="nobody")
    with pytest.raises(InputError, match="max_new_tokens"):
        engine.warm_up(max_new_tokens=0, background=True)


def test_a_manager_that_was_warmed_in_a_thread_never_waits_for_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("KVCACHE_HOME", str(tmp_path))
    monkeypatch.setattr(PROGRAMS_FAILED, {})
    monkeypatch.setattr(PROGRAMS_COMPILED, _no_compiler)
    manager = KVCacheManager(build("llama"), max_cache_length=64)
    given = {"max_new_tokens": 12, "do_sample": False}
    expected = torch.cat(list(manager.stream(token_ids(1, 9), backend="eager", **given)), 1)
    manager.warm_up(token_ids(1, 9), backend="compile", background=True, **given).wait(60)
    assert torch.equal(torch.cat(list(manager.stream(token_ids(1, 9), backend="compile", **given)), 1), expected)


def _no_compiler(function, args):
    raise RuntimeError("there is no compiler")


def test_the_command_says_what_it_made_or_why_not(monkeypatch, tmp_path, capsys):
    build("llama").save_pretrained(tmp_path / "model")
    monkeypatch.setenv("KVCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(PROGRAMS_FAILED, {})
    monkeypatch.setattr(PROGRAMS_COMPILED, _no_compiler)
    monkeypatch.setattr(torch, "compile", _no_compiler_either)
    arguments = ["warm", str(tmp_path / "model"), "--context", "9", "--tokens", "12"]
    assert main([*arguments, "--json"]) == 1
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert answer["made"] == []
    assert answer["files"] == 0
    assert "there is no compiler" in answer["reasons"][0]
    assert "nothing was compiled: " in captured.err


def _no_compiler_either(*args, **given):
    raise RuntimeError("nor this one")


def test_the_command_is_for_what_a_model_has(tmp_path, capsys):
    build("llama").save_pretrained(tmp_path / "model")
    for arguments, said in (
        (["--requests", "2"], "decodes its requests one by one"),
        (["--vocoder", "own"], "is no model that speaks"),
        (["--vocoder-precision", "bf16"], "goes with a vocoder"),
    ):
        assert main(["warm", str(tmp_path / "model"), *arguments]) == 2
        assert said in capsys.readouterr().err
