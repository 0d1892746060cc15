"""Drafts by n-gram lookup: what is said is what would be said without them, whatever was guessed."""

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.decoders import DRAWING, GREEDY, begin, decoding_of
from support.families import build, tiny, token_ids
from support.inside import decoding as inside
from support.inside.decoding import Drafting, looked_up, said_at_once
from support.searching import search

from kvcache import InputError, KeepAll, KVCacheManager, MaxTokens, SlidingWindow
from kvcache.decoding import RECORDERS, Drafts, Sampling, TextEnd, chunks_of

ALWAYS = Drafts(4, 2, cost=0.0)

# ---------------------------------------------------------------------- guesses


def guessed_plainly(ids, drafts):
    best, place = 0, len(ids) - 2
    for i in range(len(ids) - 1):
        alike = 0
        while alike < drafts.longest and i >= alike and ids[i - alike] == ids[-1 - alike]:
            alike += 1
        if alike >= max(1, best):
            best, place = alike, i
    follow = ids[place + 1 : place + 1 + drafts.tokens]
    return best, follow + [ids[-1]] * (drafts.tokens - len(follow))


@search(150)
@given(
    texts=st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=30), min_size=1, max_size=4),
    tokens=st.integers(1, 5),
    longest=st.integers(1, 4),
)
def test_a_guess_is_what_followed_the_last_place_with_most_alike(texts, tokens, longest):
    drafts, room = Drafts(tokens, longest), max(map(len, texts)) + 3
    ids = torch.tensor([text + [7] * (room - len(text)) for text in texts])
    found = looked_up(ids, torch.tensor([len(text) for text in texts]), drafts)
    for row, text in enumerate(texts):
        alike, expected = guessed_plainly(text, drafts)
        if alike:
            assert found[row].tolist() == expected


@search(60)
@given(text=st.lists(st.integers(0, 4), min_size=1, max_size=90), tokens=st.integers(1, 4))
def test_what_drafts_would_have_brought_is_counted_as_they_are_judged(text, tokens):
    drafts, begin_at = Drafts(tokens, 2), max(1, len(text) - 64)
    at, steps = begin_at, 0
    while at < len(text):
        guess = looked_up(torch.tensor([text[:at]]), torch.tensor([at]), drafts)[0].tolist()
        right = 0
        while right < tokens and at + right < len(text) and guess[right] == text[at + right]:
            right += 1
        at, steps = at + right + 1, steps + 1
    expected = 1.0 if steps == 0 else (len(text) - begin_at) / steps
    assert said_at_once(text, drafts) == pytest.approx(expected)


def test_what_comes_again_pays_and_what_does_not_does_not():
    drafts = Drafts(7, 3)
    assert said_at_once(list(range(8)) * 20, drafts) > 7
    assert said_at_once(list(range(200)), drafts) == 1
    assert said_at_once([5], drafts) == 1


# ---------------------------------------------------------------------- what is said


def said(model, policy, ids, sampling, tokens, backend="eager", drafts=None, size=13, ends=(), spare=0):
    manager = KVCacheManager(model, policy)
    slots = policy.limit or ids.shape[1] + tokens
    decoding = decoding_of(model, 1, slots + (drafts.tokens if drafts else spare), backend)
    begin(decoding, manager, ids, sampling, [torch.Generator().manual_seed(3)])
    text = [*ids[0].tolist(), int(decoding.token[0])]
    drafting = drafts and Drafting(decoding, drafts, text, len(text) + tokens)
    chunks = list(chunks_of(decoding, TextEnd(ends, tokens), size, more=drafting and drafting.chunk))
    assert all(chunk.shape[1] == size for chunk in chunks[:-1])
    assert decoding.fallback is None
    return torch.cat(chunks, 1), decoding


POLICIES = [KeepAll(), SlidingWindow(20, sinks=3), MaxTokens(24, 15)]
SETTINGS = {
    "greedy": GREEDY,
    "penalized": Sampling(temperature=0, repetition_penalty=1.4),
    "drawn": DRAWING,
    "cold": Sampling(temperature=0.05, top_p=1, repetition_penalty=1),
}


@pytest.mark.parametrize("backend", ["eager", "graph"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_tokens_are_those_without_drafts(name, policy, backend):
    model = tiny(name)
    for case, sampling in enumerate(SETTINGS.values()):
        for drafts in (ALWAYS, Drafts(7, 3, cost=0.0), Drafts(1, 1, cost=0.0)):
            ids = token_ids(1, 9, seed=case).repeat(1, 2)
            expected, _ = said(model, policy, ids, sampling, 120)
            found, decoding = said(model, policy, ids, sampling, 120, backend, drafts)
            assert torch.equal(found, expected)
            assert all(steps.ran > 5 for steps in decoding.beside.values())
            report = decoding.report().layers[0]
            assert 137 <= report.seen <= 137 + drafts.tokens  # the last step may say more than was wanted


@search(40)
@given(
    ends=st.lists(st.integers(0, 127), max_size=6),
    size=st.integers(1, 40),
    tokens=st.integers(1, 60),
    guess=st.integers(1, 6),
    sampling=st.sampled_from(list(SETTINGS.values())),
    seed=st.integers(0, 5),
)
def test_ends_and_chunks_are_those_without_drafts(ends, size, tokens, guess, sampling, seed):
    ids = token_ids(1, 7, seed=seed).repeat(1, 2)
    expected, _ = said(tiny("llama"), KeepAll(), ids, sampling, tokens, size=size, ends=ends)
    drafts = Drafts(guess, 2, cost=0.0)
    found, _ = said(tiny("llama"), KeepAll(), ids, sampling, tokens, "eager", drafts, size, ends)
    assert torch.equal(found, expected)


def test_a_step_with_drafts_says_several_tokens():
    ids = torch.tensor([[5, 6, 7, 8] * 6])
    manager, model = KVCacheManager(tiny("llama")), tiny("llama")
    decoding = decoding_of(model, 1, 160)
    begin(decoding, manager, ids, GREEDY)
    text = [*ids[0].tolist(), int(decoding.token[0])]
    drafting = Drafting(decoding, ALWAYS, text, 160)
    ran = [drafting.chunk(8).shape[1] for _ in range(12)]  # a tiny model says the same few tokens again and again
    (steps,) = decoding.beside.values()
    assert sum(ran) > 2 * steps.ran, ran
    assert decoding.kv.seen == [24 + sum(ran)]


def test_drafts_that_do_not_pay_are_not_made():
    ids = token_ids(1, 20)
    manager, model = KVCacheManager(tiny("llama")), tiny("llama")
    decoding = decoding_of(model, 1, 160)
    begin(decoding, manager, ids, GREEDY)
    text = [*ids[0].tolist(), int(decoding.token[0])]
    drafting = Drafting(decoding, Drafts(4, 2, cost=100.0), text, 160)
    assert [drafting.chunk(8).shape[1] for _ in range(5)] == [8] * 5


# ---------------------------------------------------------------------- by the manager


@pytest.mark.parametrize("backend", ["eager", "graph"])
@pytest.mark.parametrize("options", [{}, {"policy": SlidingWindow(20, sinks=3)}, {"max_cache_length": 90}], ids=str)
def test_generates_own_setting_turns_them_on(options, backend):
    manager = KVCacheManager(tiny("llama"), **options)
    manager.add_prefix("before", token_ids(1, 8, seed=4))
    for draws in (
        {"do_sample": False},
        {"do_sample": False, "no_repeat_ngram_size": 4, "repetition_penalty": 1.1},
        {"do_sample": True},
    ):
        for prefix in (None, "before"):
            ids = token_ids(1, 6).repeat(1, 3)
            torch.manual_seed(0)
            given_ = {"max_new_tokens": 60, "prefix": prefix, **draws}
            expected = torch.cat(list(manager.stream(ids, backend="eager", **given_)), 1)
            torch.manual_seed(0)
            found = torch.cat(list(manager.stream(ids, backend=backend, prompt_lookup_num_tokens=5, **given_)), 1)
            assert torch.equal(found, expected)
            assert (manager.report().backend, manager.report().fallback) == (backend, None)


@pytest.mark.parametrize(("rows", "given_"), [(2, {}), (1, {"typical_p": 0.9, "do_sample": True})])
def test_where_nothing_can_be_guessed_it_is_said_without(rows, given_):
    manager = KVCacheManager(tiny("llama"))
    given_ = {"backend": "eager", "max_new_tokens": 20, "pad_token_id": 0, **given_}
    assert manager.explain(token_ids(rows, 9), prompt_lookup_num_tokens=4, **given_).backend == "eager"
    found = []
    for more in ({}, {"prompt_lookup_num_tokens": 4}):
        torch.manual_seed(0)
        found.append(torch.cat(list(manager.stream(token_ids(rows, 9), **given_, **more)), 1))
    assert torch.equal(*found)


@pytest.mark.parametrize(("prompt", "new"), [(246, 9), (240, 15), (250, 5)])
def test_a_guess_is_made_only_where_the_text_has_room_for_it(prompt, new):
    model = build("llama", max_position_embeddings=600)
    ids = torch.cat([token_ids(1, prompt - 40), torch.tensor([[5, 6, 7, 8] * 10])], 1)
    expected, _ = said(model, KeepAll(), ids, GREEDY, new)
    found, _ = said(model, KeepAll(), ids, GREEDY, new, drafts=Drafts(7, 3, cost=0.0), size=64)
    assert torch.equal(found, expected)


def test_one_by_one_is_no_longer_asked_whether_drafts_pay_at_every_token():
    ids = torch.tensor([[5, 6, 7, 8] * 6])
    expected, _ = said(tiny("llama"), KeepAll(), ids, GREEDY, 60, size=1)
    found, _ = said(tiny("llama"), KeepAll(), ids, GREEDY, 60, drafts=ALWAYS, size=1)
    assert torch.equal(found, expected)


def test_a_prefix_and_drafts_are_refused_before_generate_runs():
    manager = KVCacheManager(tiny("llama"))
    manager.add_prefix("before", token_ids(1, 8, seed=4))
    with pytest.raises(InputError, match="give prefix or prompt_lookup_num_tokens"):
        manager.stream(token_ids(1, 9), prefix="before", prompt_lookup_num_tokens=4, max_new_tokens=5)


def test_released_memory_does_not_wait_for_a_collection():
    manager = KVCacheManager(build("llama"), max_cache_length=90)
    ids = torch.tensor([[5, 6, 7, 8] * 6])
    list(manager.stream(ids, backend="eager", prompt_lookup_num_tokens=4, max_new_tokens=40, do_sample=False))
    (waiting,) = inside.idle(inside.pool_of(manager)).values()
    gone = weakref.ref(waiting.kv)
    gc.disable()
    try:
        del waiting
        manager.release()
        assert gone() is None
    finally:
        gc.enable()


def test_what_generate_refuses_beside_drafts_is_refused():
    manager, given_ = KVCacheManager(tiny("llama")), {"num_return_sequences": 2, "do_sample": True}
    with pytest.raises(InputError, match="num_return_sequences has to be 1"):
        manager.explain(token_ids(1, 9), backend="eager", prompt_lookup_num_tokens=4, **given_)


def test_an_empty_guess_is_refused():
    with pytest.raises(InputError, match="tokens=0"):
        Drafts(0)


def test_steps_with_drafts_wait_for_the_next_request_and_leave_nothing_to_it():
    manager = KVCacheManager(tiny("llama"), max_cache_length=200)
    for seed in range(4):
        ids = token_ids(1, 6, seed=seed).repeat(1, 3)
        expected, _ = said(tiny("llama"), KeepAll(), ids, GREEDY, 50)
        given_ = {"max_new_tokens": 50, "do_sample": False, "backend": "graph", "prompt_lookup_num_tokens": 5}
        assert torch.equal(torch.cat(list(manager.stream(ids, **given_)), 1), expected)


def test_a_backend_that_fails_on_a_guess_is_left_for_the_eager_one(monkeypatch, caplog):
    def fail(step, restore):
        raise RuntimeError("out of memory")

    ids = torch.tensor([[5, 6, 7, 8] * 6])
    expected, _ = said(tiny("llama"), KeepAll(), ids, GREEDY, 40)
    monkeypatch.setitem(RECORDERS, "cpu", fail)
    model, manager = tiny("llama"), KVCacheManager(tiny("llama"))
    decoding = decoding_of(model, 1, 80, "graph")
    begin(decoding, manager, ids, GREEDY)
    text = [*ids[0].tolist(), int(decoding.token[0])]
    drafting = Drafting(decoding, ALWAYS, text, 80)
    found = torch.cat(list(chunks_of(decoding, TextEnd((), 40), 9, more=drafting.chunk)), 1)
    assert torch.equal(found, expected)
    assert "out of memory" in decoding.report().fallback
    assert "decoding goes on in eager mode" in caplog.text


@pytest.mark.slow  # torch's compiler
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own, at the compiler's import
def test_a_compiled_step_judges_a_guess():
    ids = token_ids(1, 9).repeat(1, 2)
    for policy in POLICIES[:2]:
        for sampling in (GREEDY, DRAWING):
            expected, _ = said(tiny("llama"), policy, ids, sampling, 60)
            found, decoding = said(tiny("llama"), policy, ids, sampling, 60, "compile", ALWAYS)
            assert torch.equal(found, expected)
            assert decoding.backend == "compile"


@pytest.mark.slow  # torch's compiler
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own, at the compiler's import
def test_a_compiled_step_that_judges_is_kept_for_the_next_process(monkeypatch, tmp_path):
    monkeypatch.setenv("KVCACHE_HOME", str(tmp_path))
    ids = torch.tensor([[5, 6, 7, 8] * 12])
    given_ = {"max_new_tokens": 60, "do_sample": False}
    manager = KVCacheManager(tiny("llama"), max_cache_length=200)
    expected = torch.cat(list(manager.stream(ids, backend="eager", **given_)), 1)
    found = torch.cat(list(manager.stream(ids, backend="compile", prompt_lookup_num_tokens=4, **given_)), 1)
    assert torch.equal(found, expected)
    assert (manager.report().backend, manager.report().fallback) == ("compile", None)
    assert len(list((tmp_path / "programs").iterdir())) in (1, 2)  # with guesses, and where it came to that without
