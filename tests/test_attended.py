"""The attention over spans, beside one softmax over all that they hold; and what storages and policies do together."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.families import logits, tiny, token_ids
from support.searching import search
from support.storages import STORAGES, Halves

import kvcache.models as hf
from kvcache import (
    CacheSpec,
    CorruptError,
    InputError,
    KeepAll,
    KVCacheManager,
    KVQuantization,
    MaxBytes,
    PerHead,
    PolicyError,
    SlidingWindow,
    SnapKV,
)
from kvcache.cache import Expected, Span, attend

pytestmark = pytest.mark.one_release

DIM, VALUE_DIM = 8, 6


def whole(queries, keys, values, visible, scaling):
    """One softmax in float64, head by head."""
    groups = queries.shape[1] // keys.shape[1]
    keys, values, visible = (t.repeat_interleave(groups, 1) for t in (keys.double(), values.double(), visible))
    scores = (queries.double() @ keys.transpose(2, 3) * scaling).masked_fill(~visible, -torch.inf)
    return scores.softmax(3) @ values


@search(60)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 2),
    groups=st.integers(1, 3),
    fresh=st.integers(1, 5),
    cuts=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    divided=st.booleans(),
    masked=st.booleans(),
    scaling=st.sampled_from([None, 0.1]),
)
def test_spans_are_one_attention(seed, rows, groups, fresh, cuts, divided, masked, scaling):
    draw = torch.Generator().manual_seed(seed)
    heads, older = 3, sum(cuts)
    total = older + fresh
    keys, values = (torch.randn(rows, heads, total, dim, generator=draw) for dim in (DIM, VALUE_DIM))
    queries = torch.randn(rows, heads * groups, fresh, DIM, generator=draw)
    visible = (torch.arange(total) <= torch.arange(older, total)[:, None]).expand(rows, heads, fresh, total).clone()
    if masked:  # by row and head; each token still sees itself
        visible[..., :older] &= torch.rand(rows, heads, fresh, older, generator=draw) > 0.4
    told = []
    spans, start = [], 0
    for own in [[0, 1, 2]] if not divided else [[0, 2], [1]]:
        start = 0
        for i, cut in enumerate([*cuts, fresh]):
            end, newest = start + cut, i == len(cuts)
            mask = None if newest and not masked else visible[:, own, :, start:end]
            observe = (lambda q, s, own=own: told.append((own, q.shape[1], s))) if newest else None
            spans.append(Span(own, keys[:, own, start:end], values[:, own, start:end], mask, observe))
            start = end
    found = attend(queries, spans, scaling)
    scale = DIM**-0.5 if scaling is None else scaling
    torch.testing.assert_close(found.double(), whole(queries, keys, values, visible, scale), atol=1e-5, rtol=1e-5)
    assert told == [(own, len(own) * groups, scale) for own in ([[0, 1, 2]] if not divided else [[0, 2], [1]])]


@pytest.mark.parametrize("fresh", [1, 2, 4])
def test_a_span_without_a_mask_is_causal_at_its_end(fresh):
    keys, values, queries = torch.randn(1, 2, 7, DIM), torch.randn(1, 2, 7, VALUE_DIM), torch.randn(1, 4, fresh, DIM)
    visible = (torch.arange(7) <= torch.arange(7 - fresh, 7)[:, None]).expand(1, 2, fresh, 7)
    one = attend(queries, [Span([0, 1], keys, values)])
    torch.testing.assert_close(one.double(), whole(queries, keys, values, visible, DIM**-0.5), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- storages and policies together, on a model

EVERY = {
    "all": KeepAll(),
    "window": SlidingWindow(12, sinks=2),
    "snapkv": SnapKV(20, window_size=8),
    "per-head": PerHead((KeepAll(), SlidingWindow(12, sinks=2))),
}


@pytest.mark.parametrize("name", EVERY)
def test_a_storage_that_loses_nothing_changes_no_token(name):
    model, ids = tiny("llama"), token_ids(2, 15)
    given_ = {"max_new_tokens": 20, "do_sample": False}
    plain, halves = (KVCacheManager(model, EVERY[name], storage=one) for one in (None, Halves()))
    assert plain.generate(ids, **given_).equal(halves.generate(ids, **given_))
    assert plain.report().nbytes == halves.report().nbytes
    beams = {"max_new_tokens": 9, "do_sample": False, "num_beams": 3}
    assert plain.generate(ids, **beams).equal(halves.generate(ids, **beams))
    assert "host" in (halves.explain(ids, backend="eager").reason or "") or name == "per-head"


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", EVERY)
def test_law_4_saved_loaded_and_forked_goes_on_the_same(name, storage):
    model, ids = tiny("llama"), token_ids(1, 30)
    manager = KVCacheManager(model, EVERY[name], storage=STORAGES[storage])
    cache = manager.new_cache(1)
    logits(manager.observed_model, ids[:, :20], cache)
    others = [manager.fork(cache), manager.load(manager.save(cache))]
    expected = logits(manager.observed_model, ids[:, 20:], cache, [1] * 10)
    for other in others:
        assert torch.equal(logits(manager.observed_model, ids[:, 20:], other, [1] * 10), expected)
        assert [kv.nbytes for kv in hf.kv_layers(other)] == [kv.nbytes for kv in hf.kv_layers(cache)]


def test_law_9_a_copy_follows_its_model_whatever_the_storage():
    from support.families import build

    model, ids = build("llama"), token_ids(1, 20)
    for name, storage in (("snapkv", "int8"), ("window", "int4"), ("per-head", "halves")):
        manager = KVCacheManager(model, EVERY[name], storage=STORAGES[storage])
        before = manager.generate(ids, max_new_tokens=8, do_sample=False)
        with torch.no_grad():
            model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
        fresh = KVCacheManager(model, EVERY[name], storage=STORAGES[storage])
        after = manager.generate(ids, max_new_tokens=8, do_sample=False)
        assert after.equal(fresh.generate(ids, max_new_tokens=8, do_sample=False)) and not after.equal(before)


def test_a_fork_behind_a_prefix_keeps_it():
    manager = KVCacheManager(tiny("llama"), SlidingWindow(8))
    manager.add_prefix("system", token_ids(1, 12, seed=1))
    cache = manager.new_cache(prefix="system")
    ids = token_ids(1, 20, seed=2)
    logits(manager.observed_model, ids[:, :5], cache)
    other = manager.fork(cache)
    assert [kv.policy for kv in hf.kv_layers(other)] == [kv.policy for kv in hf.kv_layers(cache)]
    assert torch.equal(
        logits(manager.observed_model, ids[:, 5:], other, [1] * 15),
        logits(manager.observed_model, ids[:, 5:], cache, [1] * 15),
    )
    with pytest.raises(InputError, match="fork it with the manager that made it"):
        KVCacheManager(tiny("llama"), SlidingWindow(8), storage=KVQuantization(8)).fork(cache)


# ---------------------------------------------------------------------- what is refused


def saved(policy, storage):
    manager = KVCacheManager(tiny("llama"), policy, storage=storage)
    cache = manager.new_cache(1)
    logits(manager.observed_model, token_ids(1, 9), cache)
    return manager, cache


def test_another_storage_does_not_load():
    manager, cache = saved(SnapKV(20, window_size=8), KVQuantization(8))
    other = KVCacheManager(tiny("llama"), SnapKV(20, window_size=8), storage=KVQuantization(4))
    with pytest.raises(InputError, match="saved under"):
        other.load(manager.save(cache))


def test_a_file_does_not_say_how_large_a_token_is():
    _, cache = saved(SnapKV(20, window_size=8), KVQuantization(8))
    tensors, counts = hf.kv_layers(cache)[0].state()
    for like in (torch.empty(1, 2, 3, 16), torch.empty(1, 2, 16)):
        empty = KVCacheManager(tiny("llama"), SnapKV(20, window_size=8), storage=KVQuantization(8)).new_cache(1)
        with pytest.raises(CorruptError):
            hf.kv_layers(empty)[0].restore({**tensors, "keys.like": like}, counts)
    from kvcache.cache import check_states

    geometry = hf.geometry_of(tiny("llama"))
    with pytest.raises(CorruptError, match="heads of"):
        check_states({"0.keys.like": torch.empty(1, 1, 0, 2**30)}, geometry)
    with pytest.raises(CorruptError, match="finite"):
        check_states({"0.1.keys": torch.full((1, 1, 2, 16), torch.nan)}, geometry)


def test_a_budget_after_a_reset_is_that_of_the_rows_that_come():
    storage = KVQuantization(8, group_size=8)
    layer = CacheSpec(MaxBytes(20_000), storage=storage).layer(expected=Expected(None, (2, 8, 8, torch.float32)))
    layer.append(torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8))
    layer.reset()
    with pytest.raises(PolicyError, match="too late"):
        layer.append(torch.randn(8, 2, 300, 8), torch.randn(8, 2, 300, 8))
    assert layer.seen == 0


@pytest.mark.parametrize("storage", STORAGES)
def test_rows_may_be_chosen_in_inference_mode(storage):
    for policy in (SlidingWindow(6, sinks=1), SnapKV(20, window_size=8)):
        layer = CacheSpec(policy, storage=STORAGES[storage]).layer(expected=Expected(None, (2, 8, 8, torch.float32)))
        states = torch.randn(2, 2, 5, 8)
        with torch.inference_mode():
            for span in layer.append(states, states).spans:
                span.observe(states, 1.0)
            layer.select(torch.tensor([1]))
        layer.append(states[1:, :, :1], states[1:, :, :1])
        assert layer.stored == 6


def test_heads_that_wait_to_be_observed_let_no_other_change():
    policy = PerHead((SlidingWindow(8), SnapKV(20, window_size=8)))
    layer = CacheSpec(policy).layer(expected=Expected(2, (2, 8, 8, torch.float32)))
    layer.append(torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8))
    for call in (partial(layer.select, torch.tensor([0])), layer.trim):
        with pytest.raises(PolicyError, match="observation"):
            call()
        assert [(part.rows, part.stored) for _, part in layer.parts()] == [(2, 8), (2, 9)]


def test_a_spec_is_given_whole_and_a_keyword_that_is_none_is_told():
    model = tiny("llama")
    spec = CacheSpec(SlidingWindow(8), 20, storage=KVQuantization(8))
    assert KVCacheManager(model, spec).spec == spec
    with pytest.raises(InputError, match="in it, and not beside it"):
        KVCacheManager(model, spec, static=True)
    with pytest.raises(InputError, match=r"no setting 'storag'; did you mean storage\?"):
        KVCacheManager(model, storag=KVQuantization(8))
    for wrong in ({"policy": 5}, {"policy": None}):
        with pytest.raises(PolicyError, match="must be one SizePolicy"):
            CacheSpec(**wrong)
    with pytest.raises(InputError, match="storage=None"):
        CacheSpec(storage=None)
