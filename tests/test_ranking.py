"""Policies that rank tokens: what is refused, their settings, and the pyramid."""

import itertools
import math
import re
from dataclasses import dataclass, replace

import pytest
import torch
from support.families import FAMILIES, build, logits, tiny, token_ids
from support.inside import layers as inside
from support.inside.testing import held_bytes, state
from support.ranked_models import LIMITED, padded
from transformers import AttentionInterface

import kvcache.models as hf
from kvcache import (
    H2O,
    TOVA,
    ExpectedAttention,
    InputError,
    KeepAll,
    KeyDiff,
    KeyNorm,
    KVCacheManager,
    Pinned,
    PolicyError,
    PositionsError,
    RankingPolicy,
    RollbackError,
    SlidingWindow,
    SnapKV,
    pyramid_kv,
)
from kvcache.cache import RankedLayer, ScoringContext

pytestmark = pytest.mark.usefixtures("buffers_grow")

# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", LIMITED)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt"])
def test_plain_model_is_refused_before_anything_changed(family, name):
    model, ids = tiny(family), token_ids(2, 9)
    manager = KVCacheManager(model, LIMITED[name])
    cache = manager.new_cache(2)
    for seen in (0, 9):
        layers = hf.cache_layers(cache)
        before = [state(layer.kv) if hasattr(layer, "kv") else layer.get_seq_length() for layer in layers]
        with pytest.raises(PolicyError, match=r"manager\.observed_model"), torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True)
        assert [state(layer.kv) if hasattr(layer, "kv") else layer.get_seq_length() for layer in layers] == before
        assert cache.get_seq_length() == seen
        logits(manager.observed_model, ids, cache)


@pytest.mark.parametrize("name", ["heavy", "norm"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_masks_that_hide_more_than_known_pads_are_refused(family, name):
    """Heads that keep tokens of their own have masks of their own, in which nobody else's hole would be."""
    manager, ids = KVCacheManager(tiny(family), LIMITED[name]), token_ids(2, 10)
    hole, right, left = (torch.ones_like(ids) for _ in range(3))
    hole[:, 4:6], right[1, -2:], left[1, :3] = 0, 0, 0
    square = torch.ones(2, 1, 10, 10, dtype=torch.bool).tril()
    for mask in (hole, right, left, square):
        cache = manager.new_cache(2)
        before = [state(kv) for kv in hf.kv_layers(cache)]
        with pytest.raises(PolicyError, match="attention_mask"):
            logits(manager.observed_model, ids, cache, attention_mask=mask)
        assert [state(kv) for kv in hf.kv_layers(cache)] == before
        assert not inside.observing()
    for mask in (hole, right):
        with pytest.raises(PolicyError, match="attention_mask"):
            manager.generate(ids, attention_mask=mask, max_new_tokens=3)
    manager.generate(ids, attention_mask=left, max_new_tokens=3)
    for kept in (left, torch.ones_like(ids)):
        logits(manager.observed_model, ids, manager.new_cache(2, kept), [2, 5, 1, 1, 1], attention_mask=kept)


def test_what_cannot_tell_its_attention_is_refused():
    with pytest.raises(PolicyError, match="attn_implementation='sdpa'"):
        KVCacheManager(tiny("llama", "eager"), SnapKV(128))
    with pytest.raises(PolicyError, match="eager"):
        KVCacheManager(tiny("gemma2"), KeyNorm(64))
    KVCacheManager(tiny("llama", "eager"), SlidingWindow(8))
    for family in ("bart", "whisper-decoder"):  # their attention cannot be exchanged
        with pytest.raises(PolicyError, match="policy by age"):
            KVCacheManager(tiny(family), SnapKV(128))


@pytest.mark.parametrize("policy", [H2O(64), Pinned(2, KeyNorm(64))], ids=repr)
def test_rerotated_positions_are_refused(policy):
    with pytest.raises(PositionsError, match="positions='absolute'"):
        KVCacheManager(tiny("llama"), policy, positions="rerotated")


@pytest.mark.parametrize("family", ["t5", "bloom", "mpt", "falcon-alibi"])
@pytest.mark.parametrize("policy", [H2O(64), KeyNorm(64)], ids=repr)
def test_models_whose_tokens_cannot_leave_are_refused(family, policy):
    with pytest.raises(PositionsError, match="cannot be evicted"):
        KVCacheManager(tiny(family), policy)
    if FAMILIES[family].model.__name__ != "T5ForConditionalGeneration":
        with pytest.raises(PositionsError):
            KVCacheManager(tiny(family), [KeepAll(), policy])


@pytest.mark.parametrize("name", LIMITED)
def test_stream_falls_back_and_says_why(name):
    manager, ids = KVCacheManager(tiny("llama"), LIMITED[name]), token_ids(2, 15)
    given_ = {"max_new_tokens": 12, "do_sample": False}
    expected = manager.generate(ids, **given_)[:, 15:]
    assert torch.cat(list(manager.stream(ids, backend="eager", **given_)), 1).equal(expected)
    assert manager.report().fallback == "tokens are ranked on the host"
    assert manager.report().evicted > 0


def test_layers_of_their_own_fall_back_too():
    manager, ids = KVCacheManager(tiny("llama"), [KeepAll(), LIMITED["heavy"]]), token_ids(1, 15)
    assert len(torch.cat(list(manager.stream(ids, backend="eager", max_new_tokens=12, do_sample=False)), 1)[0]) == 12
    assert manager.report().fallback is not None


def test_pads_behind_a_prefix_are_refused():
    manager = KVCacheManager(tiny("llama"), LIMITED["heavy"])
    manager.add_prefix("p", token_ids(1, 5)[0])
    ids, mask, _ = padded([6, 4])
    with pytest.raises(InputError, match="padded behind a prefix"):
        manager.generate(ids, attention_mask=mask, prefix="p", max_new_tokens=2)


def test_managers_own_calls():
    """Truncating, trimming and reporting, of a whole cache."""
    manager, ids = KVCacheManager(tiny("llama"), LIMITED["heavy"]), token_ids(2, 22)
    cache = manager.new_cache(2)
    logits(manager.observed_model, ids, cache, [20, 1, 1])
    for kv in hf.kv_layers(cache):
        assert kv.nbytes == held_bytes(kv)
    assert manager.report(cache).nbytes == sum(held_bytes(kv) for kv in hf.kv_layers(cache))
    with pytest.raises(RollbackError):
        manager.truncate(cache, 21)
    with pytest.raises(PolicyError, match="give at least 6"):
        manager.trim(cache, 5)
    assert manager.trim(cache, 8) == manager.report(cache).layers[0].seen - 8 - 9
    assert manager.report(cache).stored == 8
    manager.truncate(cache, 0)
    assert cache.get_seq_length() == 0
    again = logits(manager.observed_model, ids, cache, [20, 1, 1])
    assert torch.equal(again, logits(manager.observed_model, ids, manager.new_cache(2), [20, 1, 1]))


# ---------------------------------------------------------------------- policies and the pyramid


@pytest.mark.parametrize("kind", [H2O, SnapKV, TOVA, ExpectedAttention, KeyNorm, KeyDiff])
@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": -5}, "limit"),
        ({"limit": 6, "sinks": 3, "window_size": 3}, "give at least 7"),
        ({"limit": 200.5}, "limit=200.5"),
        ({"limit": "200"}, "limit='200'"),
        ({"limit": True}, "limit"),
        ({"limit": 200, "sinks": -1}, "sinks"),
        ({"limit": 200, "sinks": 1.0}, "sinks"),
        ({"limit": 200, "window_size": 0}, "window_size"),
        ({"limit": 200, "window_size": 2.5}, "window_size"),
        ({"limit": 200, "low_water": 201}, "low_water"),
        ({"limit": 200, "low_water": 0}, "low_water"),
        ({"limit": 200, "sinks": 4, "window_size": 8, "low_water": 12}, "low_water"),
        ({"limit": 200, "low_water": 180.5}, "low_water"),
    ],
    ids=lambda x: repr(x) if isinstance(x, dict) else None,
)
def test_bad_policies_are_refused(kind, given_, message):
    with pytest.raises(PolicyError, match=re.escape(message)):
        kind(**given_)


def test_defaults():
    assert SnapKV(128).low_water == 112
    assert TOVA(8).low_water == 7
    assert TOVA(6).low_water == 6  # what is protected and one more
    assert H2O(64).low_water == 56
    assert Pinned(3, SnapKV(128)).keep(132) == 115
    assert RankedLayer(Pinned(3, TOVA(8))).policy.pinned == 7
    with pytest.raises(PolicyError, match="ranks no tokens"):
        RankedLayer(SlidingWindow(8))


@pytest.mark.parametrize("n_future_positions", [0, -1, 2.5, "5"])
def test_bad_futures_are_refused(n_future_positions):
    with pytest.raises(PolicyError, match="n_future_positions"):
        ExpectedAttention(128, n_future_positions=n_future_positions)


def test_what_cannot_be_turned_is_refused():
    manager = KVCacheManager(tiny("llama"), ExpectedAttention(64))
    manager.model.model.rotary_emb.rope_type = "dynamic"
    try:
        with pytest.raises(
            PositionsError, match=r"turns queries to positions to come.*'dynamic' RoPE.*rank by LongRangeAttention"
        ):
            manager.new_cache()
    finally:
        manager.model.model.rotary_emb.rope_type = "default"


@pytest.mark.parametrize("kernel", [0, -1, 2, 4, 5.0, "5"])
def test_bad_kernels_are_refused(kernel):
    with pytest.raises(PolicyError, match="kernel"):
        SnapKV(128, kernel=kernel)


@pytest.mark.grid(60)
@pytest.mark.parametrize("tokens", [None, 150, 1000])
@pytest.mark.parametrize("layers", [1, 2, 3, 7, 32])
@pytest.mark.parametrize("beta", [1, 1.5, 4, 20, 1e9, math.inf])
@pytest.mark.parametrize(
    "policy", [SnapKV(128), KeyNorm(100, low_water=100), TOVA(64, window_size=5), SnapKV(69)], ids=repr
)
def test_pyramid_keeps_the_mean(policy, layers, beta, tokens):
    policies = pyramid_kv(policy, layers, beta, tokens=tokens)
    protected, mean = policy.sinks + policy.window_size, policy.low_water
    lows = [one.low_water for one in policies]
    assert len(policies) == layers
    assert abs(sum(lows) / layers - mean) <= 0.5
    assert lows == sorted(lows, reverse=True)
    if mean / beta <= protected and (tokens is None or 2 * mean - tokens <= 0):
        assert set(policies) == {policy}
    elif layers > 1 and tokens is None:
        assert lows[-1] == round(mean / beta)
    if tokens is not None and len(set(policies)) > 1:
        assert lows[0] <= max(mean, tokens - protected)
    steps = [a - b for a, b in itertools.pairwise(lows)]
    assert not steps or max(steps) - min(steps) <= 1  # a straight line, within rounding
    for one in policies:
        assert replace(one, limit=policy.limit, low_water=policy.low_water) == policy
        assert protected < one.low_water <= one.limit
        assert abs(one.limit / one.low_water - policy.limit / mean) <= 0.5 / one.low_water + 1e-9


def test_a_pyramid_gives_no_layer_more_than_the_text_has():
    lows = [one.low_water for one in pyramid_kv(SnapKV(800, low_water=700), 5, tokens=1000)]
    assert lows == [932, 816, 700, 584, 468]
    assert pyramid_kv(SnapKV(800, low_water=700), 5, beta=4)[0].low_water > 1000


def test_pyramid_of_one_layer_is_the_policy():
    assert pyramid_kv(SnapKV(128), 1) == [SnapKV(128)]


@pytest.mark.parametrize(
    "given_",
    [
        (SnapKV(128), 0),
        (SnapKV(128), -1),
        (SnapKV(128), 2.5),
        (SnapKV(128), "2"),
        (SnapKV(128), True),
        (SnapKV(128), 4, 0.5),
        (SnapKV(128), 4, 0),
        (SnapKV(128), 4, -20),
        (SnapKV(128), 4, math.nan),
        (SnapKV(128), 4, "20"),
        (SlidingWindow(8), 4),
        (Pinned(3, SnapKV(128)), 4),
        (None, 4),
    ],
    ids=repr,
)
def test_bad_pyramids_are_refused(given_):
    with pytest.raises(PolicyError):
        pyramid_kv(*given_)


@pytest.mark.parametrize("tokens", [0, -1, 2.5, True])
def test_bad_lengths_of_a_text_are_refused(tokens):
    with pytest.raises(PolicyError, match="tokens"):
        pyramid_kv(SnapKV(128), 4, tokens=tokens)


def test_wrong_number_of_policies_is_refused():
    with pytest.raises(PolicyError, match="one for each of the 2 layers"):
        KVCacheManager(tiny("llama"), pyramid_kv(SnapKV(128), 3))


def test_a_new_policy_is_one_class_with_a_score():
    @dataclass(frozen=True)
    class LargeValues(RankingPolicy):
        def score(self, seen: ScoringContext) -> torch.Tensor:
            return seen.values.norm(dim=-1)

    layer = RankedLayer(LargeValues(8, sinks=1, window_size=2, low_water=6))
    values = torch.arange(12.0)[None, None, :, None].expand(1, 1, -1, 3).flip(2)
    layer.append(torch.zeros(1, 1, 12, 4), values)
    assert layer.positions().tolist() == [[[0, 1, 2, 3, 10, 11]]]


def test_an_attention_that_somebody_registered_is_refused(monkeypatch):
    model = build("llama")
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", lambda *args, **given: None)
    with pytest.raises(PolicyError, match="attends by 'sdpa', which is none of transformers' own"):
        hf.observed_copy(model)


@pytest.mark.parametrize("more", ["s_aux", "softcap", "sliding_window"])
def test_attention_that_is_told_more_than_heads_compute_is_refused(more):
    states = torch.zeros(1, 1, 1, 4)
    with inside.stored(object(), states, states), pytest.raises(PolicyError, match=f"depends on {more}, which heads"):
        inside.attend_stored(torch.nn.Module(), states, states, states, None, dropout=0.0, **{more: 0.5})
