"""Where T3's time and memory go, with and without a vocoder; and once in full size, beside torch's own account."""

import sys
import weakref
from pathlib import Path

import pytest
import torch
from support.clocks import Ticking
from support.inside.speech import remember_caches
from support.inside.tools import AUDIO
from support.t3_models import UPSTREAMS_WARNINGS, fingerprint, tiny_t3

from kvcache.decoding import Setting
from kvcache.tools import profile
from kvcache_chatterbox import ChatterboxEngine, byte_tokens, random_conditionals
from kvcache_chatterbox.testing import stand_in
from kvcache_chatterbox.tools import LoadedTarget

pytestmark = [*UPSTREAMS_WARNINGS, pytest.mark.one_release]
CONTEXT, TOKENS = 70, 20


def profiled(model, backend="eager", **settings):
    return profile(LoadedTarget(model), Setting(backend=backend, **settings), CONTEXT, TOKENS, rounds=1)


@pytest.mark.parametrize("backend", ["off", "eager"])
@pytest.mark.parametrize("kind", ["english", "gpt"])
def test_a_bare_t3_is_all_but_its_vocoder(kind, backend):
    t3 = tiny_t3(kind)
    before = fingerprint(t3)
    found = profiled(t3, backend)
    assert fingerprint(t3) == before
    # A GPT-2 has no rotary turns, but its queries and keys are shaped where these would be.
    assert all(seconds > 0 for part, seconds in found.step.parts.items() if part not in AUDIO)
    assert found.step.parts["vocoder"] == found.memory.parts["vocoder_weights"] == 0
    assert "There is no vocoder in this model." in found.sentences()
    assert found.memory.parts["attention_weights"] == sum(
        p.nbytes for name, p in t3.named_parameters() if ".self_attn." in name or ".attn." in name
    )
    assert found.memory.parts["prefixes"] > 0  # the voice
    assert not any("known saves at most the prefill" in sentence for sentence in found.sentences())
    assert any("runs behind a beginning that is known already" in sentence for sentence in found.sentences())
    assert found.memory.parts["mlp_weights"] == sum(p.nbytes for name, p in t3.named_parameters() if ".mlp." in name)


def test_a_vocoder_has_its_share(monkeypatch):
    clock = Ticking()
    monkeypatch.setattr("time.perf_counter", clock)
    model = stand_in(tiny_t3("english"))
    speak = model.s3gen.inference

    def slow(speech_tokens, **given):
        clock.go_on(0.002 * 25)  # two milliseconds a token of a chunk of 25
        return speak(speech_tokens, **given)

    model.s3gen.inference = slow
    found = profiled(model)
    assert found.step.parts["vocoder"] == pytest.approx(0.002, rel=0.01)
    assert not any("no vocoder" in sentence for sentence in found.sentences())


def test_the_weights_of_a_vocoder_are_counted():
    model = stand_in(tiny_t3("english"))
    tones = model.s3gen

    class Neural(torch.nn.Linear):
        meanflow = False

        def inference(self, *args, **given):
            return tones.inference(*args, **given)

    model.s3gen = Neural(300, 100)
    assert profiled(model).memory.parts["vocoder_weights"] == 4 * (300 * 100 + 100)


def test_a_head_in_fewer_bits_is_still_a_head():
    found = profiled(tiny_t3("english"), precision="int8")
    assert found.step.parts["head"] > 0
    assert found.memory.parts["unused_weights"] > found.memory.parts["mlp_weights"] > 0


def test_what_was_prefilled_is_let_go_while_the_engine_decodes():
    t3, made = tiny_t3("english"), []
    engine = ChatterboxEngine(t3, backend="eager")
    remember_caches(engine, lambda cache: made.append(weakref.ref(cache)))
    text, voice = byte_tokens(t3, "The birch canoe slid."), random_conditionals(t3)
    chunks = engine.inference_stream(text_tokens=text, t3_cond=voice, max_new_tokens=20, chunk_size=5, seed=0)
    next(chunks)
    next(chunks)
    assert [cache() for cache in made] == [None]
    chunks.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # of the profiler's and of upstream's own
def test_t3_in_full_size_beside_torchs_own_account():
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
    import profile_shares

    threads = 2
    # A process that others push aside may see a pause on one side of its clock only.
    for _ in range(3):
        found = profile_shares.apart(
            profile_shares.told, "chatterbox-english", profile_shares.EAGER, 300, 12, 1, threads
        )
        if abs(found.step.total / found.step.wall - 1) <= 0.03:
            break
    assert abs(found.step.total / found.step.wall - 1) <= 0.03
    assert sum(found.memory.parts.values()) == found.memory.total
    seen = profile_shares.apart(profile_shares.recorded, "chatterbox-english", 300, threads)
    assert found.memory.parts["attention_weights"] == seen["attention"]
    row = profile_shares.row("English", found, None, seen)
    # Torch's account has a little more in it: the noise of the draws, and what the engine notes of each request.
    assert abs(row["difference, %"]) < 1
