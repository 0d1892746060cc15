"""Voices of Chatterbox: what is reused equals what upstream computes, files are checked, and nobody gets another's voice."""

import asyncio
import os
import pickle
import tempfile
import threading
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.inside.speech import new_cache as cache_of
from support.searching import search, steps
from support.speech import tts
from support.t3_models import UPSTREAMS_WARNINGS, fingerprint, tiny_t3
from support.upstream import MODELS, model, upstream

from kvcache import CorruptError, DiskStore, InputError, MemoryStore, SlidingWindow, SpeakerCache, TieredStore
from kvcache.cache import pack, unpack
from kvcache.models import looks_on, new_cache
from kvcache_chatterbox import ChatterboxEngine, Voice, byte_tokens, load_t3, random_conditionals
from kvcache_chatterbox.prefill import check_text, condition, prefill
from kvcache_chatterbox.speech import Decoder
from kvcache_chatterbox.voices import VoiceReuse

pytestmark = UPSTREAMS_WARNINGS
KINDS = ["english", "multilingual", "gpt"]
LONG = steps(200)


def memory():
    return SpeakerCache(MemoryStore("256MiB"))


def engine(kind, prefix_cache=None, **options):
    made = ChatterboxEngine(model(kind), prefix_cache=memory() if prefix_cache is None else prefix_cache, **options)
    made.add_voice("sarah", conditionals=random_conditionals(model(kind)))
    return made


def text(kind, length=40, seed=0):
    letters = torch.randint(97, 122, (length,), generator=torch.Generator().manual_seed(seed))
    return byte_tokens(model(kind), bytes(letters.tolist()).decode())


def tokens(made, words, count=60, **options):
    chunks = made.inference_stream(text_tokens=words, max_new_tokens=count, **{"seed": 0, **options})
    return torch.cat([torch.zeros(1, 0, dtype=torch.long), *chunks], 1)


def spoken(kind, words, count=60, exaggeration=None, who=0, **options):
    """The same, with everything run anew and nothing stored."""
    voice = Voice.of(model(kind), random_conditionals(model(kind), who))
    voice = voice if exaggeration is None else voice.with_emotion(exaggeration)
    plain = ChatterboxEngine(model(kind), reuse="none", onednn=False)
    return tokens(plain, words, count, t3_cond=voice.t3, **options)


def run_tokens(t3):
    """How many tokens each forward pass of the backbone ran, rows times length."""
    seen = []
    count = looks_on(lambda module, args, given: seen.append(given["inputs_embeds"].shape[:2].numel()))
    hook = t3.tfmr.register_forward_pre_hook(count, with_kwargs=True)
    return seen, hook


# ---------------------------------------------------------------------- agreement


@pytest.mark.grid(3, any_of=("seed",))
@pytest.mark.parametrize("reuse", ["all", "conditioning"])
@pytest.mark.parametrize("kind", ["english", "gpt"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.search
def test_a_known_voice_draws_upstreams_tokens(kind, seed, reuse):
    made = engine(kind, reuse=reuse)
    words = text(kind, 30 + 20 * seed, seed)
    expected = upstream(model(kind), words, LONG, seed)
    assert expected.shape == (1, LONG)
    for _ in range(2):  # at first with a shorter text's, then with its own
        assert torch.equal(tokens(made, words, LONG, voice="sarah", seed=seed), expected)


@pytest.mark.grid(1, any_of=("reuse",))
@pytest.mark.parametrize("reuse", ["all", "conditioning"])
@pytest.mark.search
def test_a_known_multilingual_voice_is_aligned_as_upstream_does(reuse):
    # Upstream leaves eager attention, hooks and an analyzer behind: it runs on a model of its own.
    words = text("multilingual")
    expected = upstream(tiny_t3("multilingual"), words, LONG, 3)
    made, before = engine("multilingual", reuse=reuse), fingerprint(model("multilingual"))
    assert torch.equal(tokens(made, words, LONG, voice="sarah", seed=3), expected)
    assert fingerprint(model("multilingual")) == before


@pytest.mark.grid(4)
@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 0.0, "cfg_weight": 0.0}, {"seed": 5}], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.search
def test_another_emotion_gives_what_it_gives_without_reuse(kind, options):
    if kind == "gpt":
        options = {name: value for name, value in options.items() if name != "cfg_weight"}
    made = engine(kind)
    count = 60 if kind == "multilingual" else LONG
    for length, exaggeration in ((20, 0.1), (70, None), (40, 0.9)):  # a longer text than any before, then a cut
        words = text(kind, length)
        ours = tokens(made, words, count, voice="sarah", exaggeration=exaggeration, **options)
        assert torch.equal(ours, spoken(kind, words, count, exaggeration, **options))


@pytest.mark.parametrize("reuse", ["all", "conditioning"])
@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_a_full_prefill(kind, weight, reuse):
    t3 = model(kind)
    guided = weight > 0 and not t3.is_gpt
    voice = Voice.of(t3, random_conditionals(t3))
    made = VoiceReuse(t3, memory(), reuse)
    for length in (10, 90, 50):
        request = prefill(t3, condition(t3, voice.t3), check_text(t3, text(kind, length), guided))
        ours = cache_of(ChatterboxEngine(t3, prefix_cache=memory()), request.embeds, 50)
        whole = cache_of(ChatterboxEngine(t3, prefix_cache=memory()), request.embeds, 50)
        with torch.inference_mode():
            first = made.start(request, ours).hidden
            expected = t3.tfmr(inputs_embeds=request.embeds, past_key_values=whole, use_cache=True)[0][:, -1]
            # fp32, other blocking of the same matrix products: a few units in the last place of numbers of size 10.
            torch.testing.assert_close(t3.speech_head(first), t3.speech_head(expected), atol=1e-4, rtol=0)
            for mine, theirs in zip(ours.layers, whole.layers, strict=True):
                torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-4, rtol=0)
                torch.testing.assert_close(mine.values, theirs.values, atol=1e-4, rtol=0)


@pytest.mark.parametrize("positions", ["absolute", "rerotated"])
@pytest.mark.parametrize("kind", ["english", "gpt"])
def test_under_a_window_the_known_prefix_is_pinned_like_any(kind, positions):
    if kind == "gpt" and positions == "rerotated":
        pytest.skip("GPT-2 has no rotary keys")
    options = {"policy": SlidingWindow(16), "positions": positions}
    words = text(kind)
    plain = ChatterboxEngine(model(kind), reuse="none", **options)
    expected = tokens(plain, words, 80, t3_cond=random_conditionals(model(kind)))
    assert torch.equal(tokens(engine(kind, **options), words, 80, voice="sarah"), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize("variant", ["english", "multilingual", "turbo", "nano"])
def test_full_size_models_agree_over_200_greedy_tokens(variant):
    t3 = load_t3(variant)
    voice = Voice.of(t3, random_conditionals(t3))
    words = byte_tokens(t3, "The birch canoe slid on the smooth planks.")
    made = ChatterboxEngine(t3, prefix_cache=memory())
    made.add_voice("sarah", conditionals=voice)
    for exaggeration in (None, 0.9):
        changed = voice if exaggeration is None else voice.with_emotion(exaggeration)
        plain = tokens(
            ChatterboxEngine(t3, reuse="none", onednn=False), words, 200, t3_cond=changed.t3, temperature=0.0
        )
        ours = tokens(made, words, 200, voice="sarah", exaggeration=exaggeration, temperature=0.0)
        assert plain.shape[1] > 1 and torch.equal(ours, plain)
    sampled = tokens(ChatterboxEngine(t3, reuse="none", onednn=False), words, 60, t3_cond=voice.t3, seed=3)
    assert torch.equal(tokens(made, words, 60, voice="sarah", seed=3), sampled)


# ---------------------------------------------------------------------- what is run, and what not


def test_a_request_runs_only_what_its_voice_has_not():
    made = engine("english")
    t3 = model("english")
    words = text("english", 40)
    conditioning, length = 22, words.shape[1]  # speaker, 20 prompt tokens (no perceiver), emotion
    seen, hook = run_tokens(t3)
    try:
        next(made.inference_stream(text_tokens=words, voice="sarah", chunk_size=1, max_new_tokens=2, seed=0))
        assert seen == [length + 2 + 2]  # the text and both starts of speech; the other row's starts of speech
        del seen[:]
        next(made.inference_stream(text_tokens=words, voice="sarah", exaggeration=0.9, chunk_size=1, max_new_tokens=2))
        assert seen == [1 + 64, length + 4]  # the emotion and the unconditional text
        del seen[:]
        next(made.inference_stream(text_tokens=words, voice="sarah", exaggeration=0.9, chunk_size=1, max_new_tokens=2))
        assert seen == [length + 4]  # the last two emotions are remembered
        del seen[:]
        next(made.inference_stream(text_tokens=text("english", 100), voice="sarah", chunk_size=1, max_new_tokens=2))
        assert seen == [64, 102 + 4]  # the next 64 tokens of unconditional text
        del seen[:]
        options = {"voice": "sarah", "chunk_size": 1, "max_new_tokens": 2, "cfg_weight": 0.0}
        next(made.inference_stream(text_tokens=words, **options))
        assert seen == [length + 2]
        del seen[:]
        next(ChatterboxEngine(t3, reuse="none").inference_stream(
            text_tokens=words, t3_cond=random_conditionals(t3), chunk_size=1, max_new_tokens=2
        ))  # fmt: skip
        assert seen == [2 * (conditioning + length + 2)]
    finally:
        hook.remove()


def test_the_voice_of_gpt_is_all_but_text_and_start():
    made, words = engine("gpt"), text("gpt", 30)
    seen, hook = run_tokens(model("gpt"))
    try:
        next(made.inference_stream(text_tokens=words, voice="sarah", chunk_size=1, max_new_tokens=2, seed=0))
        assert seen == [30 + 1]
    finally:
        hook.remove()


def test_another_process_finds_the_voice_on_disk(tmp_path):
    prefix_cache = SpeakerCache(TieredStore(MemoryStore(), DiskStore(tmp_path)))
    expected = tokens(engine("english", prefix_cache), text("english"), voice="sarah")
    prefix_cache.close()
    fresh = SpeakerCache(TieredStore(MemoryStore(), DiskStore(tmp_path)))
    assert torch.equal(tokens(engine("english", fresh), text("english"), voice="sarah"), expected)
    stats = fresh.stats()
    assert (stats.built, stats.extended, stats.hits["disk"]) == (0, 0, 1)


def test_raw_conditionals_are_run_as_they_are_and_nothing_is_stored():
    prefix_cache = memory()
    made = ChatterboxEngine(model("english"), prefix_cache=prefix_cache)
    tokens(made, text("english"), 5, t3_cond=random_conditionals(model("english")))
    assert prefix_cache.stats().built == 0 and prefix_cache.store.nbytes == 0


def test_without_a_cache_a_voice_gives_the_same_tokens():
    made = engine("english")
    expected = tokens(made, text("english"), 10, voice="sarah")
    made.enabled = False
    assert torch.equal(tokens(made, text("english"), 10, voice="sarah"), expected)


def test_pinned_voices_stay_and_others_leave():
    made = ChatterboxEngine(model("english"), prefix_cache=SpeakerCache(MemoryStore("1MiB")))
    made.add_voice("first", conditionals=random_conditionals(model("english"), 0), pin=True)
    for seed in range(1, 8):
        made.add_voice(f"voice {seed}", conditionals=random_conditionals(model("english"), seed))
        assert made.prefix_cache.store.nbytes <= 2**20
    built = made.prefix_cache.stats().built
    tokens(made, text("english"), 2, voice="first")
    assert made.prefix_cache.stats().built == built
    tokens(made, text("english"), 2, voice="voice 1")
    assert made.prefix_cache.stats().built == built + 1


def test_16_threads_that_want_a_cold_voice_build_it_once():
    made = engine("gpt", prefix_cache=SpeakerCache(MemoryStore()))
    made.voices.add("cold", Voice.of(model("gpt"), random_conditionals(model("gpt"), 9)))
    words, results = text("gpt"), []
    together = threading.Barrier(16)

    def ask():
        together.wait()
        results.append(tokens(made, words, 5, voice="cold"))

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made.prefix_cache.stats().built == 2  # sarah and this one
    expected = spoken("gpt", words, 5, who=9)
    assert len(results) == 16 and all(torch.equal(result, expected) for result in results)


def test_an_event_loop_takes_voices_too():
    made, words = engine("gpt"), text("gpt")

    async def run():
        chunks = made.ainference_stream(text_tokens=words, voice="sarah", max_new_tokens=20, seed=0)
        return torch.cat([chunk async for chunk in chunks], 1)

    assert torch.equal(asyncio.run(run()), tokens(made, words, 20, voice="sarah"))


# ---------------------------------------------------------------------- never another's voice


def began(t3, voice, words, weight, reuse=None):
    """The cache that a request begins with, as one tensor of all keys and values: its prefix, voice and text."""
    request = prefill(t3, condition(t3, voice.t3), check_text(t3, words, weight > 0 and not t3.is_gpt))
    cache = new_cache(t3.tfmr)
    with torch.inference_mode():
        if reuse is None:
            t3.tfmr(inputs_embeds=request.embeds, past_key_values=cache, use_cache=True)
        else:
            reuse.start(request, cache)
    return torch.cat([states.flatten() for layer in cache.layers for states in (layer.keys, layer.values)])


def off_by(mine, expected):
    return float((mine - expected).abs().max()) if mine.shape == expected.shape else torch.inf


# fp32, other blocking of the same matrix products: a few units in the last place of numbers below 10.
SAME = 1e-4


def one_weight_apart():
    """A model that differs from `model("english")` in one weight of its first layer."""
    if "other" not in MODELS:
        MODELS["other"] = tiny_t3("english")
        with torch.no_grad():
            MODELS["other"].tfmr.layers[0].self_attn.v_proj.weight[3, 3] += 1.0
    return MODELS["other"]


VOICES = st.tuples(
    st.sampled_from(["english", "other", "gpt"]),  # models
    st.integers(0, 3),  # whose voice
    st.sampled_from([0.2, 0.5, 0.8]),  # emotion
    st.integers(1, 140),  # letters of text
    st.sampled_from([0.0, 0.5]),  # guidance
)


@search(40)
@given(
    requests=st.lists(VOICES, min_size=2, max_size=10),
    budget=st.sampled_from(["200KB", "1MB", "64MB"]),
    mode=st.sampled_from(["all", "conditioning"]),
)
def test_whatever_was_asked_before_each_gets_its_own_voice(requests, budget, mode):
    one_weight_apart()
    with (
        tempfile.TemporaryDirectory() as folder,
        TieredStore(MemoryStore(budget), DiskStore(folder, "2MB")) as store,
    ):
        reuse = {kind: VoiceReuse(model(kind), SpeakerCache(store), mode) for kind in ("english", "other", "gpt")}
        for kind, who, emotion, length, weight in requests:
            t3, words = model(kind), text(kind, length, seed=length)
            voice = Voice.of(t3, random_conditionals(t3, who)).with_emotion(emotion)
            assert off_by(began(t3, voice, words, weight, reuse[kind]), began(t3, voice, words, weight)) < SAME


def test_that_comparison_would_see_another_voice_emotion_or_weight():
    t3, words = model("english"), text("english")
    voice = Voice.of(t3, random_conditionals(t3))
    mine = began(t3, voice, words, 0.5)
    another = Voice.of(t3, random_conditionals(t3, 1))
    assert off_by(began(t3, another, words, 0.5), mine) > 100 * SAME
    assert off_by(began(t3, voice.with_emotion(0.51), words, 0.5), mine) > 2 * SAME
    assert off_by(began(one_weight_apart(), voice, words, 0.5), mine) > 100 * SAME


def test_a_changed_weight_is_noticed_by_the_next_request():
    t3 = tiny_t3("gpt", seed=3)
    reuse, words, voice = VoiceReuse(t3, memory(), "all"), text("gpt"), Voice.of(t3, random_conditionals(t3))
    before = began(t3, voice, words, 0, reuse)
    with torch.no_grad():
        t3.tfmr.h[1].attn.c_attn.weight.mul_(1.5)
    after = began(t3, voice, words, 0, reuse)
    assert off_by(after, began(t3, voice, words, 0)) < SAME < off_by(after, before)
    with torch.no_grad():
        t3.cond_enc.spkr_enc.bias.add_(1.0)
    assert off_by(began(t3, voice, words, 0, reuse), began(t3, voice, words, 0)) < SAME


def test_a_voice_is_a_copy_of_what_it_was_made_from():
    made, given = engine("english"), random_conditionals(model("english"), 4)
    voice = made.add_voice("mine", conditionals=given)
    given.speaker_emb.zero_()
    assert torch.equal(voice.t3.speaker_emb, random_conditionals(model("english"), 4).speaker_emb)


# ---------------------------------------------------------------------- files


def upstreams_file(path, t3, gen=None):
    voice = random_conditionals(t3, 5)
    torch.save({"t3": vars(voice), "gen": {"prompt_token": torch.arange(5)} if gen is None else gen}, path)
    return voice


@pytest.mark.parametrize("kind", KINDS)
def test_upstreams_conds_are_read(kind, tmp_path):
    made = engine(kind)
    upstreams_file(tmp_path / "conds.pt", model(kind))
    voice = made.add_voice("file", conditionals=tmp_path / "conds.pt")
    assert torch.equal(voice.gen["prompt_token"], torch.arange(5))
    assert torch.equal(tokens(made, text(kind), 10, voice="file"), spoken(kind, text(kind), 10, who=5))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_in_a_file_is_executed(tmp_path):
    made, target = engine("gpt"), str(tmp_path / "executed")
    files = {"torch.pt": tmp_path / "torch.pt", "plain.pt": tmp_path / "plain.pt"}
    torch.save({"t3": Bomb(target), "gen": {}}, files["torch.pt"])
    files["plain.pt"].write_bytes(pickle.dumps({"t3": Bomb(target), "gen": {}}))
    for file in files.values():
        with pytest.raises(InputError, match=r"is no conds\.pt"):
            made.add_voice("bomb", conditionals=file)
        with pytest.raises(CorruptError):
            made.voices.load(file)
    assert not os.path.exists(target) and list(made.voices) == ["sarah"]


@pytest.mark.parametrize("computed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_voice_speaks_the_same_elsewhere(kind, computed, tmp_path):
    made = engine(kind)
    gen = {"prompt_token": torch.arange(7)[None], "prompt_feat_len": None, "rate": 24000}
    voice = types.SimpleNamespace(t3=random_conditionals(model(kind), 6), gen=gen)
    made.add_voice("Zoë / ../x", conditionals=voice, exaggeration=0.7)
    file = tmp_path / "zoe.safetensors"
    made.voices.export("Zoë / ../x", file, computed=computed)
    assert [path.name for path in tmp_path.iterdir()] == ["zoe.safetensors"]

    other = ChatterboxEngine(model(kind), prefix_cache=memory())
    assert other.voices.load(file, computed=True) == "Zoë / ../x"
    assert other.prefix_cache.stats().built == (0 if computed else 1)
    words = text(kind)
    assert torch.equal(tokens(other, words, 40, voice="Zoë / ../x"), spoken(kind, words, 40, 0.7, 6))
    again = other.voices["Zoë / ../x"].gen
    assert torch.equal(again["prompt_token"], gen["prompt_token"])
    assert (again["prompt_feat_len"], again["rate"]) == (None, 24000)
    assert other.voices.load(file, "renamed") == "renamed" and set(other.voices) == {"Zoë / ../x", "renamed"}


def test_what_another_model_computed_is_not_used(tmp_path):
    made = engine("english")
    made.voices.export("sarah", tmp_path / "sarah.safetensors")
    t3 = tiny_t3("english", seed=1)
    other = ChatterboxEngine(t3, prefix_cache=memory())
    other.voices.load(tmp_path / "sarah.safetensors", computed=True)
    assert other.prefix_cache.stats().built == 1
    words = text("english")
    plain = ChatterboxEngine(t3, reuse="none")
    assert torch.equal(
        tokens(other, words, voice="sarah"), tokens(plain, words, t3_cond=random_conditionals(model("english")))
    )


def test_a_voice_replaces_no_folder(tmp_path):
    made, folder = engine("gpt"), tmp_path / "voices"
    folder.mkdir()
    (folder / "anna.voice").write_text("x")
    with pytest.raises(InputError, match="voices is a folder, not a file"):
        made.voices.export("sarah", folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["voices", "anna.voice"]


@pytest.mark.parametrize("secret", [None, b"our secret"])
def test_what_a_strangers_file_says_was_computed_reaches_nobody(secret, tmp_path):
    def sharing():
        disk = DiskStore(tmp_path / "shared", secret=secret)
        return SpeakerCache(TieredStore(MemoryStore("64MiB"), disk, write_behind=False))

    file, words = tmp_path / "gift.safetensors", text("gpt")
    engine("gpt").voices.export("sarah", file)
    parts, header = unpack(file.read_bytes())
    for name in parts:
        if name.startswith(("prefix.keys", "prefix.values")):
            parts[name] = 100 * torch.randn(parts[name].shape, generator=torch.Generator().manual_seed(1))
    file.write_bytes(pack(parts, header))  # the checksum fits

    taken = ChatterboxEngine(model("gpt"), prefix_cache=sharing())
    taken.voices.load(file, "gift")
    other = engine("gpt", sharing())  # another process, with the same voice by its own name
    honest = spoken("gpt", words, 20)
    assert torch.equal(tokens(taken, words, 20, voice="gift"), honest)
    assert torch.equal(tokens(other, words, 20, voice="sarah"), honest)
    vouched = ChatterboxEngine(model("gpt"), prefix_cache=memory())
    vouched.voices.load(file, "gift", computed=True)
    assert not torch.equal(tokens(vouched, words, 20, voice="gift"), honest)  # what it would have done


def test_a_voice_file_with_one_wrong_byte_is_refused(tmp_path):
    made, file = engine("gpt"), tmp_path / "voice.safetensors"
    made.voices.export("sarah", file)
    data = file.read_bytes()
    places = torch.randint(0, len(data), (200,), generator=torch.Generator().manual_seed(0)).tolist()
    for place in [*range(0, 400, 4), *places]:
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(CorruptError):
            made.voices.load(file, "broken")
    assert list(made.voices) == ["sarah"]
    file.write_bytes(data)
    assert made.voices.load(file, "whole") == "whole"


@pytest.mark.parametrize(
    ("tensors", "fields", "error", "said"),
    [
        ({}, {"prefix": 5}, CorruptError, "does not name its voice"),
        ({}, {"prefix": [1]}, CorruptError, "does not name its voice"),
        ({}, {"gen": [1]}, CorruptError, "does not name its voice"),
        ({}, {"gen": 5}, CorruptError, "does not name its voice"),
        ({}, {"name": 5}, CorruptError, "does not name its voice"),
        ({}, {"prefix": {}}, CorruptError, "'kvcache-prefix'"),
        ({}, {"gen": {"rate": "24000"}}, InputError, r"gen\['rate'\]='24000' must be a tensor"),
        ({}, {"gen": {"rate": float("nan")}}, InputError, r"gen\['rate'\] is not finite"),
        ({"gen.embedding": torch.full((1, 192), torch.nan)}, {}, InputError, r"gen\['embedding'\] is not finite"),
        ({"t3.clap_emb": torch.zeros(3)}, {}, InputError, "clap_emb is given"),
        ({"t3.other": torch.zeros(3)}, {}, CorruptError, "T3 conditionals"),
    ],
    ids=str,
)
def test_a_voice_file_that_is_intact_and_says_what_none_says_is_refused(tensors, fields, error, said, tmp_path):
    made, file = engine("gpt"), tmp_path / "voice.safetensors"
    made.voices.export("sarah", file)
    parts, header = unpack(file.read_bytes())
    file.write_bytes(pack({**parts, **tensors}, {**header, **fields}))
    with pytest.raises(error, match=said):
        made.voices.load(file, "broken")
    assert list(made.voices) == ["sarah"]


def test_a_prefix_is_no_voice_and_a_voice_for_another_variant_does_not_fit(tmp_path):
    made = engine("gpt")
    snapshot = made.prefix_cache.get(VoiceReuse(model("gpt"), made.prefix_cache, "all").key(made.voices["sarah"].t3))
    (tmp_path / "prefix.safetensors").write_bytes(snapshot.to_bytes())
    with pytest.raises(CorruptError, match="'kvcache-prefix' of version 1, this reads version 1 of 'kvcache-voice'"):
        made.voices.load(tmp_path / "prefix.safetensors")
    with pytest.raises(FileNotFoundError):
        made.voices.load(tmp_path / "gone.safetensors")


# ---------------------------------------------------------------------- bad input


def spoiled(kind, **parts):
    voice = random_conditionals(model(kind))
    for name, value in parts.items():
        setattr(voice, name, value)
    return voice


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"speaker_emb": torch.zeros(1, 7)}, "speaker_emb must be one embedding of 256 numbers, got torch.float32 .1, 7."),
        ({"speaker_emb": torch.full((1, 256), torch.nan)}, "speaker_emb is not finite"),
        ({"cond_prompt_speech_tokens": torch.tensor([[1, 10**6]])}, "ids below 8194, got 2 from 1 to 1000000"),
        ({"cond_prompt_speech_tokens": torch.tensor([[-1, 1]])}, "got 2 from -1 to 1"),
        ({"cond_prompt_speech_tokens": torch.zeros(1, 0, dtype=torch.long)}, "got 0"),
        ({"cond_prompt_speech_tokens": torch.zeros(2, 3, dtype=torch.long)}, r"must be token ids \[1, tokens\]"),
        ({"cond_prompt_speech_tokens": torch.zeros(1, 5000, dtype=torch.long)}, "must be 1 to 4100 ids"),
        ({"emotion_adv": torch.ones(3)}, "emotion_adv must be one number"),
        ({"emotion_adv": torch.tensor(torch.inf)}, "emotion_adv is not finite"),
    ],
    ids=str,
)  # fmt: skip
def test_a_voice_that_does_not_fit_is_refused(parts, said):
    made = engine("english")
    with pytest.raises(InputError, match=said):
        made.add_voice("bad", conditionals=spoiled("english", **parts))
    assert list(made.voices) == ["sarah"]


def test_names_and_choices_are_checked():
    made, words = engine("english"), text("english")
    voice = random_conditionals(model("english"))
    for name in ("", "  ", "a\nb", "x" * 201, 7):
        with pytest.raises(InputError, match="1 to 200 printable characters"):
            made.add_voice(name, conditionals=voice)
    with pytest.raises(InputError, match=r"no voice 'tom' \(known: 'sarah'\); add it with add_voice"):
        made.inference_stream(text_tokens=words, voice="tom")
    for both in ({}, {"voice": "sarah", "t3_cond": voice}):
        with pytest.raises(InputError, match="give either voice"):
            made.inference_stream(text_tokens=words, **both)
    with pytest.raises(InputError, match="either audio_prompt_path or conditionals"):
        made.add_voice("both")
    with pytest.raises(InputError, match="is no voice"):
        made.add_voice("number", conditionals=3)
    with pytest.raises(InputError, match="reuse='some' must be"):
        ChatterboxEngine(model("english"), reuse="some")
    with pytest.raises(InputError, match="bare T3"):
        made.add_voice("clip", "clip.wav")
    made.voices.remove("sarah")
    with pytest.raises(InputError, match=r"known: none yet"):
        made.voices.remove("sarah")
    assert made.voices.get("sarah") is None
    assert len(made.voices) == 0 and "sarah" not in made.voices and repr(made.voices) == "Voices()"


# ---------------------------------------------------------------------- audio


@pytest.mark.parametrize("kind", ["english", "gpt", "multilingual"])
def test_audio_of_a_named_voice_is_that_of_its_clip(kind, monkeypatch, tmp_path):
    loaded = tts(kind)
    made = ChatterboxEngine(loaded, prefix_cache=memory())
    clip, builtin = tmp_path / "clip.wav", loaded.conds
    clip.write_bytes(b"a clip")
    encoded = []
    prepare = type(loaded).prepare_conditionals
    counted = types.MethodType(lambda self, path: (encoded.append(path), prepare(self, path)), loaded)
    monkeypatch.setattr(loaded, "prepare_conditionals", counted)
    options = {"max_new_tokens": 12, "seed": 0, **({"language_id": "en"} if kind == "multilingual" else {})}
    made.add_voice("sarah", clip)
    named = made.generate("Hello there", voice="sarah", **options)
    direct = made.generate("Hello there", audio_prompt_path=clip, **options)
    assert torch.equal(named, direct) and len(encoded) == 1  # the clip is encoded once
    assert loaded.conds is builtin
    parts = torch.cat(list(made.generate_stream("Hello there", voice="sarah", chunking=[4], **options)), 1)
    assert parts.shape == named.shape
    assert not torch.equal(made.generate("Hello there", **options), named)  # the voice it was loaded with
    clip.write_bytes(b"another clip")  # under the same name
    made.generate("Hello there", audio_prompt_path=clip, **options)
    assert len(encoded) == 2
    with pytest.raises(InputError, match="not both"):
        made.generate("Hello there", voice="sarah", audio_prompt_path=clip)


def test_a_voice_the_model_is_given_later_is_the_one_that_speaks(tmp_path):
    loaded = tts("english")
    made = ChatterboxEngine(loaded, prefix_cache=memory())
    first = made.generate("Hello there", max_new_tokens=12, seed=0)
    another = tmp_path / "another.wav"
    another.write_bytes(b"a clip")
    loaded.prepare_conditionals(str(another))
    second = made.generate("Hello there", max_new_tokens=12, seed=0)
    assert not torch.equal(first, second)
    plain = ChatterboxEngine(loaded, reuse="none")
    assert torch.equal(second, plain.generate("Hello there", max_new_tokens=12, seed=0))


def test_while_a_clip_is_encoded_the_model_keeps_the_voice_it_has_or_is_given(monkeypatch, tmp_path):
    loaded = tts("english")
    made, inside = ChatterboxEngine(loaded, prefix_cache=memory()), []
    (tmp_path / "clip.wav").write_bytes(b"a clip")
    own, given = made.voice_of(None), types.SimpleNamespace(t3=random_conditionals(loaded.t3, 9), gen=loaded.conds.gen)
    prepare = type(loaded).prepare_conditionals

    def midway(self, path):
        prepare(self, path)
        inside.append(made.voice_of(None))  # as another thread would ask
        loaded.conds = given

    monkeypatch.setattr(type(loaded), "prepare_conditionals", midway)
    clip = made.voice_of(None, tmp_path / "clip.wav")
    assert torch.equal(inside[0].t3.speaker_emb, own.t3.speaker_emb) and loaded.conds is given
    assert not torch.equal(clip.t3.speaker_emb, own.t3.speaker_emb)
    assert not torch.equal(clip.t3.speaker_emb, given.t3.speaker_emb)


def test_what_would_write_a_clips_voice_into_the_model_is_refused_before_it_runs(monkeypatch, tmp_path):
    loaded = tts("english")
    (tmp_path / "clip.wav").write_bytes(b"a clip")
    before, prepare = loaded.conds, loaded.prepare_conditionals
    monkeypatch.setattr(loaded, "prepare_conditionals", lambda path: prepare(path))
    with pytest.raises(InputError, match=r"set it on the model's class, or as types\.MethodType"):
        ChatterboxEngine(loaded, prefix_cache=memory()).add_voice("v", tmp_path / "clip.wav")
    assert loaded.conds is before


def test_the_first_pass_is_the_decoders_own_where_nothing_is_reused():
    t3 = model("gpt")
    request = prefill(t3, condition(t3, random_conditionals(t3)), check_text(t3, text("gpt"), False))
    from kvcache_chatterbox.speech import sampling_of

    plain = Decoder(t3, request, sampling_of(True, {}), 5, None, torch.Generator().manual_seed(0))
    known = ChatterboxEngine(t3, reuse="none")
    expected = tokens(known, text("gpt"), 5, t3_cond=random_conditionals(t3), seed=0)
    assert torch.equal(torch.cat(list(plain.tokens()))[None], expected)
