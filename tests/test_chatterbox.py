"""The Chatterbox adapter against upstream's own loops, token for token, on the real T3 classes (random weights)."""

import asyncio
import dataclasses
import gc
import importlib
import threading
import weakref
from functools import partial

import pytest
import torch
from support.inside import decoding as inside
from support.inside.speech import READS_HALF_CACHES, Stepper, pool_of, punc_norm, stepper_of
from support.searching import examples, steps
from support.t3_models import UPSTREAMS_WARNINGS, fingerprint, likely_end, tiny_t3
from support.upstream import model, upstream, voice

from kvcache import CapacityError, InputError, MaxBytes, MaxTokens, PolicyError, SlidingWindow
from kvcache.models import check_precision
from kvcache_chatterbox import ChatterboxEngine, byte_tokens, load_t3, stand_in

pytestmark = UPSTREAMS_WARNINGS

TEXT = "The birch canoe slid on the smooth planks."
LONG = steps(200)
SEEDS = range(5)


def ours(t3, text, tokens, seed, chunk_size=25, **settings):
    engine = ChatterboxEngine(t3)
    chunks = engine.inference_stream(
        t3_cond=voice(t3), text_tokens=text, max_new_tokens=tokens, seed=seed, chunk_size=chunk_size, **settings
    )
    return torch.cat([torch.zeros(1, 0, dtype=torch.long), *chunks], 1)


LLAMA = [
    {},
    {"cfg_weight": 0.8, "temperature": 1.0, "min_p": 0.1, "top_p": 0.7, "repetition_penalty": 2.0},
    {"cfg_weight": 0.3, "temperature": 0.6, "min_p": 0.0, "top_p": 1.0, "repetition_penalty": 1.0},
]
GPT = [
    {},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.7, "repetition_penalty": 1.0},
    {"temperature": 0.5, "top_k": 0, "top_p": 1.0},
]


@pytest.mark.grid(3, any_of=("seed",))
@pytest.mark.parametrize("settings", LLAMA, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.search
def test_english_tokens_are_upstreams(seed, settings):
    t3 = model("english")
    text = byte_tokens(t3, TEXT)
    expected = upstream(t3, text, LONG, seed, **settings)
    assert expected.shape == (1, LONG)
    assert torch.equal(ours(t3, text, LONG, seed, chunk_size=[1, 7, 25, 64, 1000][seed], **settings), expected)


@pytest.mark.grid(3, any_of=("seed",))
@pytest.mark.parametrize("settings", GPT, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.search
def test_turbo_tokens_are_upstreams(seed, settings):
    t3 = model("gpt")
    text = byte_tokens(t3, TEXT)
    expected = upstream(t3, text, LONG, seed, **settings)
    assert expected.shape == (1, LONG)
    assert torch.equal(ours(t3, text, LONG, seed, chunk_size=[1, 7, 25, 64, 1000][seed], **settings), expected)


@pytest.mark.grid(1, any_of=("seed",))
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.search
def test_multilingual_tokens_are_upstreams_and_no_hook_stays(seed):
    # Upstream leaves eager attention, hooks and an analyzer behind: it runs on a model of its own.
    expected = upstream(tiny_t3("multilingual"), byte_tokens(model("multilingual"), TEXT), LONG, seed)
    t3 = model("multilingual")
    before = fingerprint(t3)
    assert torch.equal(ours(t3, byte_tokens(t3, TEXT), LONG, seed, chunk_size=7 + seed), expected)
    assert fingerprint(t3) == before


@pytest.mark.parametrize("kind", ["english", "gpt"])
def test_the_end_of_speech_is_upstreams(kind):
    t3 = likely_end(tiny_t3(kind))
    text = byte_tokens(t3, TEXT)
    ended = 0
    for seed in range(6):
        expected = upstream(t3, text, 60, seed)
        assert torch.equal(ours(t3, text, 60, seed, chunk_size=9), expected)
        ended += expected.shape[1] < 60
        if kind == "english":
            assert bool(expected[0, -1] == t3.hp.stop_speech_token) == (expected.shape[1] < 60)
    assert ended >= 3


@pytest.mark.parametrize("kind", ["english", "gpt", "multilingual"])
def test_without_a_cache_the_tokens_are_the_same(kind):
    t3 = model(kind)
    text = byte_tokens(t3, TEXT)
    engine = ChatterboxEngine(t3)
    request = {"t3_cond": voice(t3), "text_tokens": text, "max_new_tokens": 40, "seed": 3}
    cached = torch.cat(list(engine.inference_stream(**request)), 1)
    assert engine.report().nbytes > 0
    engine.enabled = False
    assert not engine.enabled
    assert torch.equal(torch.cat(list(engine.inference_stream(**request)), 1), cached)
    assert not engine.report().enabled
    engine.enabled = True
    assert torch.equal(torch.cat(list(engine.inference_stream(**request)), 1), cached)
    assert engine.report().enabled


def test_without_guidance_one_row_runs():
    t3 = model("english")
    engine = ChatterboxEngine(t3)
    text = byte_tokens(t3, TEXT)
    request = {"t3_cond": voice(t3), "max_new_tokens": 30, "seed": 0, "cfg_weight": 0.0}
    one = torch.cat(list(engine.inference_stream(text_tokens=text, **request)), 1)
    bytes_of_one_row = engine.report().nbytes
    assert torch.equal(one, torch.cat(list(engine.inference_stream(text_tokens=torch.cat([text, text]), **request)), 1))
    list(engine.inference_stream(text_tokens=text[0], **{**request, "cfg_weight": 0.5}))
    assert engine.report().nbytes == 2 * bytes_of_one_row
    # Guidance of almost nothing is almost none: the same logits but for 1e-9 of their difference.
    two = torch.cat(list(engine.inference_stream(text_tokens=text, **{**request, "cfg_weight": 1e-9})), 1)
    assert torch.equal(one, two)


def test_greedy_needs_no_seed_and_touches_no_random_state():
    t3 = model("english")
    request = {"t3_cond": voice(t3), "text_tokens": byte_tokens(t3, TEXT), "max_new_tokens": 20}
    engine = ChatterboxEngine(t3)
    state = torch.random.get_rng_state()
    first = torch.cat(list(engine.inference_stream(**request, temperature=0.0)), 1)
    seeded = torch.cat(list(engine.inference_stream(**request, seed=5)), 1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, torch.cat(list(engine.inference_stream(**request, temperature=0.0)), 1))
    torch.manual_seed(5)
    assert torch.equal(seeded, torch.cat(list(engine.inference_stream(**request)), 1))


def test_the_callers_voice_is_never_changed_and_never_stale():
    t3 = model("english")
    mine = voice(t3)
    before = {f.name: getattr(mine, f.name) for f in dataclasses.fields(mine)}
    text = byte_tokens(t3, TEXT)
    engine = ChatterboxEngine(t3)
    fresh = torch.cat(list(engine.inference_stream(t3_cond=mine, text_tokens=text, max_new_tokens=20, seed=0)), 1)
    for name, value in before.items():
        assert getattr(mine, name) is value
    mine.cond_prompt_speech_emb = torch.zeros(1, 20, 128)  # what upstream may have left there, for another prompt
    again = torch.cat(list(engine.inference_stream(t3_cond=mine, text_tokens=text, max_new_tokens=20, seed=0)), 1)
    assert torch.equal(fresh, again)
    mine.emotion_adv = 0.5  # upstream's own default is a float, which its encoder cannot take
    assert torch.equal(
        fresh, torch.cat(list(engine.inference_stream(t3_cond=mine, text_tokens=text, max_new_tokens=20, seed=0)), 1)
    )


@pytest.mark.grid(3)
@pytest.mark.parametrize("policy", [SlidingWindow(16), MaxTokens(24, 12), MaxBytes("1MiB")], ids=str)
@pytest.mark.parametrize("kind", ["english", "gpt"])
@pytest.mark.search
def test_a_policy_keeps_the_prefix_and_bounds_the_speech(kind, policy):
    t3, count = model(kind), steps(600)
    text = byte_tokens(t3, TEXT)
    engine = ChatterboxEngine(t3, policy)
    prefix = 22 + text.shape[1] + 2 if kind == "english" else 21 + text.shape[1] + 1
    tokens = list(
        engine.inference_stream(t3_cond=voice(t3), text_tokens=text, max_new_tokens=count, seed=0, chunk_size=1)
    )
    assert len(tokens) == count
    report = engine.report()
    assert report.seen == prefix + count - 1
    if isinstance(policy, MaxBytes):
        assert report.nbytes <= 2**20
    else:
        assert prefix < report.stored <= prefix + policy.limit
    assert report.evicted == 4 * (report.seen - report.stored)
    # What fits in the window is untouched: the first tokens are those of an unbounded cache.
    free = ours(t3, text, 12, 0)
    assert torch.equal(torch.cat(tokens[:12], 1), free)


def test_a_window_longer_than_the_speech_changes_nothing_and_rerotation_runs():
    t3 = model("english")
    text = byte_tokens(t3, TEXT)
    free = ours(t3, text, 100, 0)
    for positions in ("absolute", "rerotated"):
        engine = ChatterboxEngine(t3, SlidingWindow(100), positions=positions)
        windowed = engine.inference_stream(t3_cond=voice(t3), text_tokens=text, max_new_tokens=100, seed=0)
        assert torch.equal(torch.cat(list(windowed), 1), free)
    rerotated = ChatterboxEngine(t3, SlidingWindow(20), positions="rerotated")
    out = torch.cat(
        list(rerotated.inference_stream(t3_cond=voice(t3), text_tokens=text, max_new_tokens=100, seed=0)), 1
    )
    assert out.shape == free.shape
    assert torch.equal(out[:, :20], free[:, :20])
    assert rerotated.report().evicted == 4 * 79  # of 99 speech tokens that were run, all but the window of 20


def test_async_twin_and_early_close():
    t3 = model("gpt")
    engine = ChatterboxEngine(t3)
    request = {
        "t3_cond": voice(t3),
        "text_tokens": byte_tokens(t3, TEXT),
        "max_new_tokens": 60,
        "seed": 2,
        "chunk_size": 10,
    }

    async def collect(limit):
        chunks = []
        stream = engine.ainference_stream(**request)
        async for chunk in stream:
            chunks.append(chunk)
            if len(chunks) == limit:
                break
        await stream.aclose()
        return torch.cat(chunks, 1)

    whole = torch.cat(list(engine.inference_stream(**request)), 1)
    assert torch.equal(asyncio.run(collect(100)), whole)
    assert torch.equal(asyncio.run(collect(2)), whole[:, :20])


def test_requests_in_threads_do_not_meet():
    t3 = model("multilingual")
    text = byte_tokens(t3, TEXT)
    alone = {seed: ours(t3, text, 25, seed, chunk_size=3) for seed in range(3)}
    found = {}
    threads = [
        threading.Thread(target=lambda s=s: found.update({s: ours(t3, text, 25, s, chunk_size=3)})) for s in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], alone[seed]) for seed in alone)


@pytest.mark.search
def test_three_hundred_requests_leave_nothing_behind():
    t3 = model("gpt")
    engine = ChatterboxEngine(t3)
    text, cond = byte_tokens(t3, "Hi."), voice(t3)
    before = fingerprint(t3)

    def request(i):
        stream = engine.inference_stream(t3_cond=cond, text_tokens=text, max_new_tokens=4, seed=i, chunk_size=1 + i % 5)
        if i % 3 == 0:
            next(stream)
            stream.close()
        else:
            list(stream)

    def tensors():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    request(1)  # what waits for the next request is there from now on
    held, threads = tensors(), threading.active_count()
    for i in range(examples(300)):
        request(i)
    assert tensors() <= held
    assert threading.active_count() == threads
    assert fingerprint(t3) == before


BAD = {
    "no start token": (lambda t: t[:, 1:], {}, "start token 255"),
    "no stop token": (lambda t: t[:, :-1], {}, "stop token 0"),
    "empty text": (lambda t: t[:, [0, -1]], {}, "empty"),
    "no tokens": (lambda t: t[:, :0], {}, "start token"),
    "three rows": (lambda t: t.expand(3, -1), {}, "one text in two rows"),
    "two texts": (lambda t: torch.cat([t, t.roll(1, 1)]), {}, "one text in two rows"),
    "two texts unguided": (lambda t: torch.cat([t, t.roll(1, 1)]), {"cfg_weight": 0.0}, "one request runs one text"),
    "floats": (lambda t: t.float(), {}, "token ids"),
    "foreign tokens": (lambda t: torch.cat([t[:, :1], t[:, 1:-1] * 10, t[:, -1:]], 1), {}, "the model knows 0 to 703"),
    "endless text": (lambda t: torch.cat([t[:, :1], t[:, 1:2].expand(1, 3000), t[:, -1:]], 1), {}, "2050 positions"),
    "temperature": (lambda t: t, {"temperature": -1.0}, "temperature=-1.0"),
    "top_p": (lambda t: t, {"top_p": 1.5}, "top_p=1.5"),
    "min_p": (lambda t: t, {"min_p": 2.0}, "min_p=2.0"),
    "penalty": (lambda t: t, {"repetition_penalty": 0.0}, "repetition_penalty"),
    "guidance": (lambda t: t, {"cfg_weight": -0.5}, "cfg_weight=-0.5"),
    "no tokens wanted": (lambda t: t, {"max_new_tokens": 0}, "max_new_tokens=0"),
    "no chunk": (lambda t: t, {"chunk_size": 0}, "chunk_size=0"),
    "too many tokens": (lambda t: t, {"max_new_tokens": 5000}, "4100 speech positions"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused_before_anything_runs(case):
    t3 = model("english")
    change, settings, words = BAD[case]
    engine = ChatterboxEngine(t3)
    before = fingerprint(t3)
    with pytest.raises(InputError, match=words):
        engine.inference_stream(t3_cond=voice(t3), text_tokens=change(byte_tokens(t3, TEXT)), **settings)
    assert fingerprint(t3) == before


def test_more_refusals():
    t3, gpt = model("english"), model("gpt")
    text = byte_tokens(t3, TEXT)
    with pytest.raises(CapacityError, match=r"may need 267 tokens \(68 of voice and text, 200 of speech\)"):
        ChatterboxEngine(t3, max_cache_length=200).inference_stream(
            t3_cond=voice(t3), text_tokens=text, max_new_tokens=200
        )
    with pytest.raises(PolicyError, match=r"\(max_cache_length\) is 200"):
        ChatterboxEngine(t3, SlidingWindow(180), max_cache_length=200).inference_stream(
            t3_cond=voice(t3), text_tokens=text
        )
    with pytest.raises(InputError, match="the GPT-2 variants have no guidance"):
        ChatterboxEngine(gpt).inference_stream(t3_cond=voice(gpt), text_tokens=byte_tokens(gpt, TEXT), cfg_weight=0.5)
    with pytest.raises(InputError, match="is empty"):
        ChatterboxEngine(gpt).inference_stream(t3_cond=voice(gpt), text_tokens=torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(InputError, match="no Chatterbox model"):
        ChatterboxEngine(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="bare T3 has no vocoder"):
        ChatterboxEngine(t3).generate("Hello.")
    no_emotion = voice(t3)
    no_emotion.emotion_adv = None
    with pytest.raises(InputError, match="emotion_adv is None"):
        ChatterboxEngine(t3).inference_stream(t3_cond=no_emotion, text_tokens=text)
    with pytest.raises(InputError, match="is not one of english"):
        load_t3("klingon")


def test_suspended_streams_leave_the_caller_out_of_inference_mode():
    t3 = model("gpt")
    stream = ChatterboxEngine(t3).inference_stream(
        t3_cond=voice(t3), text_tokens=byte_tokens(t3, TEXT), max_new_tokens=9, chunk_size=3
    )
    next(stream)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    stream.close()


def spoken(engine, text, tokens, seed, who=0, chunk_size=25, **settings):
    chunks = engine.inference_stream(
        t3_cond=voice(engine.t3, who),
        text_tokens=text,
        max_new_tokens=tokens,
        seed=seed,
        chunk_size=chunk_size,
        **settings,
    )
    return torch.cat(list(chunks), 1)


@pytest.mark.grid(3)
@pytest.mark.parametrize("backend", ["off", "eager", "graph"])
@pytest.mark.parametrize("kind", ["english", "gpt"])
def test_every_backend_says_upstreams_tokens(kind, backend):
    t3 = model(kind)
    text = byte_tokens(t3, TEXT)
    cases = list(enumerate(LLAMA if kind == "english" else GPT))
    expected = [upstream(t3, text, 80, seed, **settings) for seed, settings in cases]
    before = fingerprint(t3)  # upstream leaves hooks
    engine = ChatterboxEngine(t3, backend=backend)
    for seed, settings in cases:
        assert torch.equal(spoken(engine, text, 80, seed, chunk_size=[1, 7, 64][seed], **settings), expected[seed])
    report = engine.report()
    assert (report.backend, report.fallback) == (None if backend == "off" else backend, None)
    assert fingerprint(t3) == before


@pytest.mark.slow  # in the fast set the same of fewer tokens
@pytest.mark.parametrize("kind", ["english", "gpt"])
def test_five_hundred_greedy_tokens_on_every_backend(kind, monkeypatch):
    # torch's compiler without its slow half, which test_decode_full.py has
    monkeypatch.setattr(inside.COMPILED, partial(inside.Compiled, compiler="aot_eager"))
    t3 = model(kind)
    text = byte_tokens(t3, TEXT)
    said = {
        backend: spoken(ChatterboxEngine(t3, backend=backend), text, 500, 0, temperature=0.0)
        for backend in ("off", "eager", "graph", "compile")
    }
    assert said["off"].shape[1] == 500
    assert all(torch.equal(tokens, said["off"]) for tokens in said.values())


@pytest.mark.parametrize("backend", ["eager", "graph"])
def test_every_backend_says_upstreams_tokens_without_guidance(backend):
    # Upstream has no loop of one row: what looks at the host for every token, tested above, is the reference.
    t3 = model("english")
    text = byte_tokens(t3, TEXT)
    off, engine = (ChatterboxEngine(t3, backend=name) for name in ("off", backend))
    for settings in ({"cfg_weight": 0.0}, {"cfg_weight": 0.0, "temperature": 0.0}, {}):
        assert torch.equal(spoken(engine, text, 60, 4, **settings), spoken(off, text, 60, 4, **settings))
    assert engine.report().fallback is None


@pytest.mark.grid(2)
@pytest.mark.parametrize("backend", ["eager", "graph"])
@pytest.mark.parametrize("kind", ["english", "gpt"])
def test_every_backend_ends_where_upstream_ends(kind, backend):
    t3 = likely_end(tiny_t3(kind), by=2.8 if kind == "english" else 6.0)
    text = byte_tokens(t3, TEXT)
    engine = ChatterboxEngine(t3, backend=backend)
    ends = set()
    for seed in range(5):
        expected = upstream(t3, text, 60, seed)
        for size in (1, 9, 60):
            found = [torch.zeros(1, 0, dtype=torch.long)]
            found += engine.inference_stream(
                t3_cond=voice(t3), text_tokens=text, max_new_tokens=60, seed=seed, chunk_size=size
            )
            assert torch.equal(torch.cat(found, 1), expected)
        ends.add(expected.shape[1])
    assert len(ends) > 1


def precise(name):
    try:
        check_precision(name, torch.device("cpu"))
    except InputError:
        return False
    return True


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize(
    ("backend", "precision", "half"),
    [
        ("eager", "int8", None),
        ("compile", "int8", True),
        ("compile", "fp32", False),
        ("compile", None, False),
        ("eager", None, False),
    ],
)
def test_the_cache_is_in_bf16_where_that_is_read_faster(backend, precision, half, tiles, monkeypatch):
    """Compiled steps read it as it is held; torch's attention is fast at it with AMX, and slower than in fp32 without."""
    monkeypatch.setattr(READS_HALF_CACHES, lambda: tiles)
    engine = ChatterboxEngine(model("english"), backend=backend, precision=precision)
    wide = stepper_of(ChatterboxEngine(model("english"))).token_bytes
    assert stepper_of(engine).token_bytes == (wide / 2 if (tiles if half is None else half) else wide)


@pytest.mark.grid(2)
@pytest.mark.parametrize(
    "precision",
    [
        pytest.param(name, marks=pytest.mark.skipif(not precise(name), reason=f"this CPU has no fast {name}"))
        for name in ("int8", "bf16")
    ],
)
@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("kind", ["english", "gpt"])
def test_fewer_bits_are_close_and_keep_requests_apart(kind, precision, tiles, monkeypatch):
    monkeypatch.setattr(READS_HALF_CACHES, lambda: tiles)
    t3 = model(kind)
    before = fingerprint(t3)
    seen = []
    chunks = Stepper.chunks
    monkeypatch.setattr(
        Stepper, "chunks", lambda self, begun, *rest: seen.append(begun.logits) or chunks(self, begun, *rest)
    )
    texts = [byte_tokens(t3, text) for text in (TEXT, "Hi.", TEXT * 3)]
    engine = ChatterboxEngine(t3, precision=precision)
    for i, text in enumerate(texts):  # one engine after another voice and length, a new engine, and one in fp32
        said = spoken(engine, text, 20, i, who=i)
        assert torch.equal(said, spoken(ChatterboxEngine(t3, precision=precision), text, 20, i, who=i))
        spoken(ChatterboxEngine(t3), text, 1, i, who=i)
        ours, again, exact = seen[-3:]
        assert torch.equal(ours, again)
        assert not torch.equal(ours, exact)
        for row in range(len(ours)):
            assert torch.corrcoef(torch.stack([ours[row], exact[row]]))[0, 1] > 0.99
    wide = ChatterboxEngine(t3)
    engine.release()  # what waits from a longer text has more slots
    for one in (engine, wide):
        spoken(one, texts[0], 5, 0)
    # In bf16 where the CPU reads that as fast.
    assert (2 if tiles else 1) * engine.report().nbytes == wide.report().nbytes
    assert fingerprint(t3) == before


def test_an_unknown_backend_is_refused_before_anything():
    with pytest.raises(InputError, match=r"backend='fast' must be one of 'eager', .* 'auto' or 'off'"):
        ChatterboxEngine(model("english"), backend="fast")
    with pytest.raises(InputError, match="precision='int4' must be one of"):
        ChatterboxEngine(model("english"), precision="int4")


def test_what_the_engine_cannot_decode_falls_back_and_says_why():
    rerotated = ChatterboxEngine(model("english"), SlidingWindow(9), backend="graph", positions="rerotated")
    spoken(rerotated, byte_tokens(model("english"), TEXT), 5, 0)
    assert "re-rotated" in rerotated.report().fallback


def test_release_lets_go_of_what_waits():
    t3 = model("gpt")
    text = byte_tokens(t3, TEXT)
    engine = ChatterboxEngine(t3, backend="graph")
    said = spoken(engine, text, 10, 0)
    [waiting] = inside.idle(pool_of(engine)).values()
    held = weakref.ref(waiting)
    del waiting
    engine.release()
    gc.collect()
    assert inside.idle(pool_of(engine)) == {}
    assert held() is None
    assert torch.equal(spoken(engine, text, 10, 0), said)
    ChatterboxEngine(t3, backend="off").release()  # there is nothing to do


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["english", "multilingual", "turbo", "nano"])
def test_full_size_tokens_are_upstreams(variant):
    t3 = load_t3(variant)
    upstream_t3 = importlib.import_module("chatterbox.models.t3.t3")
    upstream_t3.tqdm = lambda steps, **_: steps
    text = byte_tokens(t3, TEXT)
    mine = ours(t3, text, 60, 0)
    assert torch.equal(mine, upstream(t3, text, 60, 0))


@pytest.mark.parametrize("text", [" hello there", "\nhello there", "hello ", "hello", "  a b. " * 40])
def test_white_space_before_a_text_is_normalized_as_upstream_does(text):
    """Upstream capitalises the first character, be it white space; the first segment is what a text begins with."""
    t3 = tiny_t3("english")
    model = stand_in(t3)
    engine = ChatterboxEngine(model)
    first, *_ = engine.long_text(text, engine.voice_of(None)).utterances
    spoken = bytes(first.text[0, 1:-1].tolist()).decode()
    assert punc_norm(text).startswith(spoken.rstrip("."))
    assert len(text) > 200 or spoken == punc_norm(text)
