"""Where tokens are evicted: what fails changes nothing; rolling back, trimming, starting again."""

import copy
from typing import Any

import pytest
import torch
from support.families import EVICTING, FAMILIES, SEQ2SEQ, build, dynamic_cache, logits, tiny, token_ids
from support.windows import (
    CLOSE,
    LENGTH,
    POLICIES,
    as_given,
    assert_unchanged,
    close,
    expected,
    positions_of,
    reference,
    snapshot,
)

from kvcache import (
    CapacityError,
    KeepAll,
    KeyDiff,
    KVCacheError,
    KVCacheManager,
    KVQuantization,
    Pinned,
    PolicyError,
    RollbackError,
    SizePolicy,
    SlidingWindow,
)
from kvcache import models as hf

# ---------------------------------------------------------------------- what fails changes nothing


LEARNED = {
    "gpt2": "n_positions",
    "opt": "max_position_embeddings",
    "whisper-decoder": "max_target_positions",
    "bart": "max_position_embeddings",
}


@pytest.mark.parametrize("fresh", [1, 5])
@pytest.mark.parametrize("policy", [None, SlidingWindow(8)], ids=["keeping", "evicting"])
@pytest.mark.parametrize("name", LEARNED)
def test_past_a_learned_table_nothing_changes(name: str, policy: SizePolicy | None, fresh: int) -> None:
    """Evicting tokens gives no positions back."""
    model = build(name, **{LEARNED[name]: 32})
    held = KVCacheManager(model, policy).new_cache(1)
    start = 33 - fresh
    with hf.exact_windows(model):
        logits(model, token_ids(1, start), held, (start - 1, 1))
        before = snapshot(held)
        # Some models look into their table before they ask the cache, and find nothing there.
        with pytest.raises((CapacityError, IndexError)):
            logits(model, token_ids(1, fresh), held)
        assert_unchanged(held, before)
        if fresh > 1:
            logits(model, token_ids(1, fresh - 1), held)  # up to the last one it goes on


@pytest.mark.parametrize("prompt", [20, 40])
@pytest.mark.parametrize("policy", [None, SlidingWindow(8, sinks=2)], ids=["keeping", "evicting"])
@pytest.mark.parametrize("name", LEARNED)
def test_generate_past_a_learned_table_says_so(name: str, policy: SizePolicy | None, prompt: int) -> None:
    kv = KVCacheManager(build(name, **{LEARNED[name]: 32}), policy)
    if name in SEQ2SEQ:
        ids, most = token_ids(1, 9), 32  # from one start token
    else:
        ids, most = token_ids(1, prompt), 33 - prompt
    with pytest.raises(CapacityError, match="32 positions"):
        kv.generate(ids, max_new_tokens=max(1, most + 1), do_sample=False)
    assert kv.report().seen <= 32
    if most > 0:  # the last new token is run by nobody, so it needs no position
        kv.generate(ids, max_new_tokens=most, do_sample=False)
        assert kv.report().seen == 32


@pytest.mark.grid(38)
@pytest.mark.parametrize("static", [False, True], ids=["growing", "preallocated"])
@pytest.mark.parametrize("fresh", [1, 4])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mistral-own-window"])
def test_a_full_cache_refuses_before_any_layer_changed(name: str, fresh: int, static: bool) -> None:
    model = tiny(name)
    held = KVCacheManager(model, max_cache_length=24, static=static).new_cache(2)
    start = 25 - fresh
    logits(model, token_ids(2, start), held, (9, start - 9))
    before = snapshot(held)
    with pytest.raises(CapacityError, match="24 slots"):
        logits(model, token_ids(2, fresh), held)
    assert_unchanged(held, before)
    if fresh > 1:  # up to the last slot it goes on, as if nothing had been asked
        ids, theirs = token_ids(2, fresh - 1), dynamic_cache(model)
        logits(model, token_ids(2, start), theirs, (9, start - 9))
        assert torch.equal(logits(model, ids, held), logits(model, ids, theirs))


def test_a_first_chunk_that_is_too_long_is_refused() -> None:
    for name in ("llama", "gemma3", "bart"):
        held = KVCacheManager(tiny(name), max_cache_length=24).new_cache(2)
        with pytest.raises(CapacityError, match="24 slots"):
            logits(tiny(name), token_ids(2, 25), held)
        assert all(layer.get_seq_length() == 0 for layer in hf.cache_layers(held))
        logits(tiny(name), token_ids(2, 24), held)


@pytest.mark.parametrize(
    "order", [(SlidingWindow(8), KeepAll()), (KeepAll(), SlidingWindow(8))], ids=["evicting-first", "keeping-first"]
)
def test_a_full_layer_behind_one_that_evicts_refuses_first(order: tuple[SizePolicy, ...]) -> None:
    model = tiny("llama")
    held = KVCacheManager(model, order, max_cache_length=24).new_cache(2)
    logits(model, token_ids(2, 24), held, (8, *(1,) * 16))
    before = snapshot(held)
    with pytest.raises(CapacityError, match="24 slots"):
        logits(model, token_ids(2, 1), held)
    assert_unchanged(held, before)


@pytest.mark.parametrize("name", ["llama", "gemma3", "bart"])
def test_another_batch_size_is_refused(name: str) -> None:
    model = tiny(name)
    held = KVCacheManager(model).new_cache(2)
    with pytest.raises(KVCacheError, match="2 rows"):
        logits(model, token_ids(3, 4), held)
    assert all(layer.keys is None for layer in hf.cache_layers(held) if isinstance(layer, hf.ManagedLayer))


# ---------------------------------------------------------------------- rolling back, trimming, starting again


@pytest.mark.grid(34)
@pytest.mark.parametrize("kind", [{}, {"max_cache_length": 64, "static": True}], ids=["growing", "static"])
@pytest.mark.parametrize("length", [0, 7, 20])
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.hybrid])
def test_rolled_back_is_never_appended(name: str, length: int, kind: dict[str, Any]) -> None:
    model, ids, kv = tiny(name), token_ids(2, 30), KVCacheManager(tiny(name), **kind)
    held, theirs, chunks = kv.new_cache(2), kv.new_cache(2), (4, 1, 1, 1)
    wrong = torch.cat((ids[:, :length], token_ids(2, 9, seed=1)), 1)
    logits(model, wrong, held, (length, 8, 1) if length else (9,))
    kv.truncate(held, length)
    if length:
        logits(model, ids[:, :length], theirs)
    following = ids[:, length : length + 7]
    assert torch.equal(logits(model, following, held, chunks), logits(model, following, theirs, chunks))
    assert_unchanged(held, snapshot(theirs))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "opt"])
def test_a_window_rolls_back_while_nothing_has_left(name: str) -> None:
    model, ids, kv = tiny(name), token_ids(2, LENGTH), KVCacheManager(tiny(name), SlidingWindow(20, sinks=4))
    held = kv.new_cache(2)
    logits(model, torch.cat((ids[:, :12], token_ids(2, 9, seed=1)), 1), held)
    kv.truncate(held, 12)
    ours = logits(model, ids[:, 12:], held, (1,) * (LENGTH - 12))
    assert close(ours, reference(model, ids, SlidingWindow(20, sinks=4))[:, 12:])
    before = snapshot(held)
    with pytest.raises(RollbackError, match="evicted"):
        kv.truncate(held, 30)
    assert_unchanged(held, before)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_a_hybrid_rolls_back_all_layers_or_none(name: str) -> None:
    model, ids, kv = tiny(name), token_ids(2, LENGTH), KVCacheManager(tiny(name))
    held, theirs = kv.new_cache(2), dynamic_cache(model)
    logits(model, ids[:, :7], held)  # within the model's own window of 8
    kv.truncate(held, 4)
    logits(model, ids[:, :4], theirs)
    assert close(
        logits(model, ids[:, 4:], held, (1,) * (LENGTH - 4)), logits(model, ids[:, 4:], theirs, (1,) * (LENGTH - 4))
    )
    before = snapshot(held)
    with pytest.raises(RollbackError, match="own sliding layers"):
        kv.truncate(held, 20)
    with pytest.raises(RollbackError):
        kv.truncate(held, LENGTH + 1)
    assert_unchanged(held, before)
    kv.truncate(held, 0)
    assert close(logits(model, ids, held), logits(model, ids, dynamic_cache(model)))


@pytest.mark.parametrize("name", [name for name in EVICTING if not FAMILIES[name].hybrid])
def test_a_pinned_prefix_is_returned_to_without_new_memory(name: str) -> None:
    """A voice, or a system prompt: computed once, then every request starts from it."""
    model, kv = tiny(name), KVCacheManager(tiny(name), Pinned(6, SlidingWindow(8)))
    ids = token_ids(2, LENGTH)
    held = kv.new_cache(2)
    first = logits(model, ids, held, (6, *(1,) * 38))
    addresses = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in hf.kv_layers(held)]
    kv.truncate(held, 6)
    other = torch.cat((ids[:, :6], token_ids(2, 24, seed=1)), 1)
    fresh = logits(model, other, kv.new_cache(2), (6, *(1,) * 24))[:, 6:]
    assert torch.equal(logits(model, other[:, 6:], held, (1,) * 24), fresh)
    kv.truncate(held, 6)
    assert torch.equal(logits(model, ids[:, 6:], held, (1,) * 38), first[:, 6:])
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in hf.kv_layers(held)] == addresses


def test_a_pinned_prefix_is_returned_to_after_rerotation() -> None:
    """Its keys have been turned meanwhile; they come back as they were."""
    model, kv = tiny("llama"), KVCacheManager(tiny("llama"), Pinned(6, SlidingWindow(8)), positions="rerotated")
    ids, held = token_ids(2, LENGTH), kv.new_cache(2)
    first = logits(model, ids, held, (6, *(1,) * 38))
    address = hf.kv_layers(held)[0].keys.data_ptr()  # type: ignore[union-attr]
    kv.truncate(held, 6)
    assert torch.equal(logits(model, ids[:, 6:], held, (1,) * 38), first[:, 6:])
    assert hf.kv_layers(held)[0].keys.data_ptr() == address  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mistral-own-window"])
def test_reset_is_fresh_without_new_memory(name: str) -> None:
    model, kv = tiny(name), KVCacheManager(tiny(name), max_cache_length=64, static=True)
    held = kv.new_cache(2)
    fresh = logits(model, token_ids(), kv.new_cache(2), (7, 13))
    logits(model, token_ids(2, 30, seed=1), held)
    addresses = [layer.keys.data_ptr() for layer in hf.kv_layers(held)]
    kv.truncate(held, 0)
    assert torch.equal(logits(model, token_ids(), held, (7, 13)), fresh)
    if not FAMILIES[name].hybrid and name not in SEQ2SEQ:  # whose other layers are transformers', and so is their reset
        held.reset()
        assert torch.equal(logits(model, token_ids(), held, (7, 13)), fresh)
    assert [layer.keys.data_ptr() for layer in hf.kv_layers(held)] == addresses


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "whisper-decoder", "bart"])
def test_trimmed_tokens_are_gone_for_what_follows(name: str, attention: str) -> None:
    model, ids = tiny(name, attention), token_ids(2, 30)
    kv = KVCacheManager(model)
    held = kv.new_cache(2)
    logits(model, ids[:, :20], held)
    assert kv.trim(held, 9) == 11
    assert kv.trim(held, 9) == 0
    assert [layer.get_seq_length() for layer in hf.cache_layers(held)] == [20] * len(hf.cache_layers(held))
    mask = torch.ones(30, 30, dtype=torch.bool).tril()
    mask[20:, :11] = False
    theirs = logits(
        model, ids, attention_mask=as_given(model, mask.expand(2, 1, 30, 30)), **positions_of(model, tokens=30)
    )
    ours = logits(model, ids[:, 20:], held, (4, *(1,) * 6))
    assert close(ours, theirs[:, 20:])
    assert (ours - logits(model, ids)[:, 20:]).abs().max() > 500 * CLOSE


def test_trim_keeps_what_is_pinned_and_refuses_less() -> None:
    model, kv = tiny("llama"), KVCacheManager(tiny("llama"), Pinned(4, SlidingWindow(16)))
    held = kv.new_cache(2)
    logits(model, token_ids(), held)
    before = snapshot(held)
    for fewer in (3, 0, -1):
        with pytest.raises(PolicyError, match=f"trim to {fewer}"):
            kv.trim(held, fewer)
    assert_unchanged(held, before)
    assert kv.trim(held, 7) == 13
    assert hf.kv_layers(held)[0].positions().tolist() == [[0, 1, 2, 3, 17, 18, 19]]


def test_a_cache_that_is_not_ours_is_refused() -> None:
    kv, theirs = KVCacheManager(tiny("llama")), dynamic_cache(tiny("llama"))
    for use in (lambda: kv.trim(theirs, 8), lambda: kv.truncate(theirs, 0)):
        with pytest.raises(KVCacheError, match="new_cache"):
            use()


@pytest.mark.parametrize("policy", ["sinks", "hysteresis", "pinned-sinks"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bart"])
def test_a_fork_goes_on_by_itself(name: str, policy: str) -> None:
    """A copy and its original continue alike, and neither touches the other."""
    model, ids = tiny(name), token_ids(2, LENGTH)
    held = KVCacheManager(model, POLICIES[policy]).new_cache(2)
    logits(model, ids[:, :20], held, (9, *(1,) * 11))
    fork = copy.deepcopy(held)
    logits(model, token_ids(2, 15, seed=1), fork, (1,) * 15)
    again = copy.deepcopy(held)
    one = logits(model, ids[:, 20:], held, (1,) * (LENGTH - 20))
    assert torch.equal(logits(model, ids[:, 20:], again, (1,) * (LENGTH - 20)), one)
    assert close(one, expected(name, FAMILIES[name].attention[0], POLICIES[policy])[:, 20:])


@pytest.mark.parametrize("operation", ["reorder", "select", "select-by-mask", "repeat"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "whisper-decoder"])
def test_rows_move_with_their_tokens(name: str, operation: str) -> None:
    """What beam search and leaving requests do to a cache, in the midst of evicting."""
    model, ids = tiny(name), token_ids(3, LENGTH)
    policy = POLICIES["hysteresis"]
    kv = KVCacheManager(model, policy)
    held = kv.new_cache(3)
    logits(model, ids[:, :30], held, (9, *(1,) * 21))
    if operation == "reorder":
        order = [2, 2, 0]
        held.reorder_cache(torch.tensor(order))
    elif operation == "select":
        order = [2, 0]
        held.batch_select_indices(torch.tensor(order))
    elif operation == "select-by-mask":
        order = [0, 2]
        held.batch_select_indices(torch.tensor([True, False, True]))
    else:
        order = [0, 0, 1, 1, 2, 2]
        held.batch_repeat_interleave(2)
    ours = logits(model, ids[order, 30:], held, (1,) * (LENGTH - 30))
    assert close(ours, reference(model, ids[order], policy)[:, 30:])


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"policy": SlidingWindow(250, sinks=3)},
        {"policy": SlidingWindow(250, sinks=3), "positions": "rerotated"},
        {"policy": KeyDiff(290)},
        {"storage": KVQuantization(8, group_size=16)},
        {"policy": SlidingWindow(250), "storage": KVQuantization(4, group_size=16)},
    ],
    ids=str,
)
def test_trimming_gives_memory_back_and_changes_nothing_else(given: dict[str, Any]) -> None:
    """As large as a cache that never held more; what follows is what follows without it, to the bit."""
    model = tiny("llama")
    kv = KVCacheManager(model, **given)
    held, same = kv.new_cache(2), kv.new_cache(2)
    ids = token_ids(2, 300)
    for one in (held, same):
        logits(kv.observed_model, ids, one)
    left = kv.trim(held, 64)
    assert max(layer.trim(64) for layer in hf.kv_layers(same)) == left > 0
    after = kv.report(held).nbytes
    assert after < 0.6 * kv.report(same).nbytes
    if kv.positions != "rerotated" and kv.observed_model is model:  # which keep more than keys and values
        assert after <= kv.estimate(64 + 16, 2)
    more = token_ids(2, 200, seed=3)
    for i in range(0, 200, 40):
        assert torch.equal(
            logits(kv.observed_model, more[:, i : i + 40], held), logits(kv.observed_model, more[:, i : i + 40], same)
        )
    assert kv.report(held).nbytes <= kv.report(same).nbytes


def test_trimming_keeps_what_was_preallocated() -> None:
    model = tiny("llama")
    kv = KVCacheManager(model, max_cache_length=200, static=True)
    held = kv.new_cache(2)
    logits(model, token_ids(2, 100), held)
    before = kv.report(held).nbytes
    assert kv.trim(held, 10) == 90
    assert kv.report(held).nbytes == before == kv.estimate(200, 2)
