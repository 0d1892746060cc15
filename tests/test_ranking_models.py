"""Policies that rank tokens, through real models: the reference takes the place of their attention."""

import threading
from dataclasses import replace

import pytest
import torch
from support.families import build, dynamic_cache, logits, tiny, token_ids
from support.inside import layers as inside
from support.ranked_models import (
    CHUNKINGS,
    EXACT,
    LIMITED,
    MODELS,
    padded,
    places,
    reference_logits,
    reference_of,
)

import kvcache.models as hf
from kvcache import H2O, TOVA, KeepAll, KeyDiff, KeyNorm, KVCacheManager, Pinned, SlidingWindow, SnapKV, pyramid_kv

pytestmark = pytest.mark.usefixtures("buffers_grow")

# ---------------------------------------------------------------------- through models


EACH = [(family, name, chunks) for family in ("llama", "gemma3") for name in LIMITED for chunks in CHUNKINGS]
EACH += [
    (family, *of)
    for family in MODELS
    for of in (("heavy", "chunks"), ("expected", "chunks"), ("pinned", "decode"))
    if family not in ("llama", "gemma3")
]


@pytest.mark.grid(25)
@pytest.mark.parametrize(("family", "name", "chunks"), EACH)
def test_beyond_the_limit_a_model_computes_what_the_policy_says(family, name, chunks):
    policy, chunked = LIMITED[name], CHUNKINGS[chunks]
    ids, mask, pads = padded([sum(chunked), sum(chunked) - 5], seed=3)
    manager = KVCacheManager(tiny(family), policy)
    cache = manager.new_cache(2, mask)
    mine = logits(manager.observed_model, ids, cache, chunked, attention_mask=mask, position_ids=places(mask))
    expected = reference_logits(family, policy, ids, mask, pads, chunked)
    real = mask.bool()
    torch.testing.assert_close(mine[real], expected[real], atol=EXACT, rtol=0)
    whole = logits(tiny(family), ids, attention_mask=mask, position_ids=places(mask))
    assert (mine[real] - whole[real]).abs().max() > 50 * EXACT, "nothing was evicted that mattered"
    assert all(kv.stored <= policy.limit and kv.evicted for kv in hf.kv_layers(cache))


@pytest.mark.parametrize("family", MODELS)
def test_within_the_limit_nothing_changes(family):
    model, (ids, mask, _) = tiny(family), padded([12, 9])
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    for policy in (H2O(64), SnapKV(128), TOVA(64), KeyNorm(64), KeyDiff(64), Pinned(3, H2O(64))):
        manager = KVCacheManager(model, policy)
        assert manager.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False).equal(expected)
        report = manager.report()
        assert report.stored == 31 or family == "gemma3"


# Not KeyNorm of llama: a generated token that comes again has a first key of the same length; which one stays is chance.
@pytest.mark.parametrize(
    ("family", "name"),
    [(family, name) for family in ("llama", "gpt2") for name in LIMITED if (family, name) != ("llama", "norm")],
)
def test_generated_tokens_are_the_references(family, name):
    ids, mask, pads = padded([15, 11], seed=5)
    given_ = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
    manager = KVCacheManager(tiny(family), LIMITED[name])
    mine = manager.generate(ids, **given_)
    model, cache = reference_of(family, LIMITED[name], pads)
    assert mine.equal(model.generate(ids, past_key_values=cache, **given_))
    assert manager.report().evicted > 0
    assert torch.cat(list(manager.stream(ids, chunk_size=5, **given_)), 1).equal(mine[:, ids.shape[1] :])


@pytest.mark.parametrize("name", ["heavy", "snapkv", "norm"])
def test_beams(name):
    ids = token_ids(2, 10, seed=6)
    given_ = {"max_new_tokens": 14, "do_sample": False, "num_beams": 3}
    model = tiny("llama")
    wide = replace(LIMITED[name], limit=64, low_water=None)
    assert KVCacheManager(model, wide).generate(ids, **given_).equal(model.generate(ids, **given_))
    mine = KVCacheManager(model, LIMITED[name]).generate(ids, **given_)
    played, cache = reference_of("llama", LIMITED[name], [0] * 6)
    assert mine.equal(played.generate(ids, past_key_values=cache, **given_))


@pytest.mark.parametrize("name", LIMITED)
def test_prefix_is_pinned(name):
    model, policy = tiny("llama"), LIMITED[name]
    prefix, rest = token_ids(1, 7, seed=8), token_ids(2, 9, seed=9)
    manager = KVCacheManager(model, policy)
    manager.add_prefix("p", prefix[0])
    cache = manager.new_cache(2, prefix="p")
    more = torch.cat([rest, token_ids(2, 14, seed=10)], 1)
    chunks = [9, 1, 1, 8, 1, 1, 1, 1]
    mine = []
    with torch.no_grad():
        for part in more.split(chunks, 1):
            mine.append(manager.observed_model(part, past_key_values=cache, use_cache=True).logits)  # noqa: PERF401
    whole = torch.cat([prefix.expand(2, -1), more], 1)
    pinned = Pinned(7, policy)
    if isinstance(policy, Pinned):
        pinned = Pinned(7 + policy.count, policy.policy)
    expected = reference_logits("llama", pinned, whole, torch.ones_like(whole), [0, 0], [7, *chunks])[:, 7:]
    torch.testing.assert_close(torch.cat(mine, 1), expected, atol=EXACT, rtol=0)
    for kv in hf.kv_layers(cache):
        assert kv.evicted > 0
        assert (kv.positions()[:, :, :7] == torch.arange(7)).all()
    wide = KVCacheManager(model, H2O(64), prefix_cache=manager.prefix_cache)
    wide.add_prefix("p", prefix[0])
    given_ = {"max_new_tokens": 12, "do_sample": False}
    together = torch.cat([prefix.expand(2, -1), rest], 1)
    assert wide.generate(rest, prefix="p", **given_).equal(model.generate(together, **given_))


MIXTURES = {
    "llama": [
        pyramid_kv(SnapKV(16, sinks=1, window_size=4), 2, beta=2),
        [KeepAll(), H2O(12, sinks=1, window_size=3)],
        [H2O(12, sinks=1, window_size=3), KeepAll()],
        [TOVA(12), KeyDiff(17, window_size=3, sinks=0)],
    ],
    "gemma3": [[KeepAll()] * 5 + [TOVA(12)], pyramid_kv(KeyNorm(14, sinks=1, window_size=3), 6, beta=2)],
}


@pytest.mark.parametrize(
    ("family", "which"),
    [(family, i) for family in MIXTURES for i in range(len(MIXTURES[family]))],
)
def test_layers_may_differ(family, which):
    policies, chunks = MIXTURES[family][which], [11, 6, 1, 1, 1, 8, 1, 1, 1]
    ids, mask, pads = padded([31, 27], seed=11)
    manager = KVCacheManager(tiny(family), policies)
    cache = manager.new_cache(2, mask)
    with hf.exact_windows(manager.observed_model):
        mine = logits(manager.observed_model, ids, cache, chunks, attention_mask=mask, position_ids=places(mask))
    expected = reference_logits(family, policies, ids, mask, pads, chunks)
    torch.testing.assert_close(mine[mask.bool()], expected[mask.bool()], atol=EXACT, rtol=0)
    assert manager.report(cache).evicted > 0


def test_window_beside_ranking():
    """A layer by age and one by rank in one cache: each is what it is in a cache of its own kind."""
    ids, chunks = token_ids(2, 30, seed=12), [13, 6, 1, 1, 1, 8]
    window, ranked = SlidingWindow(6, sinks=2), H2O(12, sinks=1, window_size=3)
    for policies in ([window, ranked], [ranked, window]):
        manager = KVCacheManager(tiny("llama"), policies)
        cache = manager.new_cache(2)
        with hf.exact_windows(manager.observed_model):
            mine = logits(manager.observed_model, ids, cache, chunks)
        # The reference keeps all; of the window's layer a mask says what it has.
        expected = windowed_reference(policies, ids, chunks)
        torch.testing.assert_close(mine, expected, atol=EXACT, rtol=0)
        assert all(kv.stored <= policy.limit for kv, policy in zip(hf.kv_layers(cache), policies, strict=True))


def windowed_reference(policies, ids, chunks):
    model, cache = reference_of("llama", policies, [0] * ids.shape[0])

    def see_window(module, args, kwargs):
        policy = policies[module.layer_idx]
        if policy.ranking is not None:
            return args, kwargs
        fresh, seen = kwargs["hidden_states"].shape[1], cache.layers[module.layer_idx].get_seq_length()
        query, key = torch.arange(seen, seen + fresh)[:, None], torch.arange(seen + fresh)
        mask = (key <= query) & ((key < policy.sinks) | (key > query - policy.window))
        return args, {**kwargs, "attention_mask": mask[None, None]}

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(see_window, with_kwargs=True)
    return logits(model, ids, cache, chunks)


@pytest.mark.parametrize("name", ["snapkv", "tova", "heavy", "norm", "diff"])
def test_padded_row_is_the_row_alone(name):
    """Where every step ranks to the same mark, and the prompt is past it: pads are gone before anything is compared."""
    policy = LIMITED[name]
    policy = replace(policy, low_water=policy.limit)
    ids, mask, pads = padded([30, 24], seed=14)
    manager = KVCacheManager(tiny("llama"), policy)
    chunks = [22] + [1] * 8
    together = logits(
        manager.observed_model, ids, manager.new_cache(2, mask), chunks, attention_mask=mask, position_ids=places(mask)
    )
    alone = logits(manager.observed_model, ids[1:, pads[1] :], manager.new_cache(1), [22 - pads[1]] + [1] * 8)
    assert 22 - pads[1] >= policy.limit
    torch.testing.assert_close(together[1, pads[1] :], alone[0], atol=EXACT, rtol=0)


# ---------------------------------------------------------------------- the model stays what it was


def everything(model) -> dict:
    """What there is of a model: its config, hooks, methods and tensors."""
    return {
        "config": repr(model.config),
        "attention": model.config._attn_implementation,
        "configs": [id(m.__dict__.get("config")) for m in model.modules()],
        "attentions": [getattr(m.__dict__.get("config"), "_attn_implementation", None) for m in model.modules()],
        "hooks": [[len(v) for k, v in vars(m).items() if k.endswith("_hooks")] for m in model.modules()],
        "names": [sorted(vars(m)) for m in model.modules()],
        "modules": [id(m) for m in model.modules()],
        "tensors": {name: (t.data_ptr(), t.clone()) for name, t in model.state_dict(keep_vars=True).items()},
    }


def same(a, b) -> bool:
    tensors = a.pop("tensors"), b.pop("tensors")
    for x, y in zip(*(t.items() for t in tensors), strict=True):
        if x[0] != y[0] or x[1][0] != y[1][0] or not torch.equal(x[1][1], y[1][1]):
            return False
    return a == b


@pytest.mark.parametrize("family", MODELS)
def test_model_is_left_as_it_was(family):
    model, ids = build(family), token_ids(1, 12)
    before, output = everything(model), logits(model, ids)
    manager = KVCacheManager(model, H2O(10, sinks=1, window_size=3))
    manager.generate(ids, max_new_tokens=8)
    assert same(before, everything(model))
    assert manager.observed_model is not model
    with pytest.raises(IndexError), torch.no_grad():
        manager.observed_model(ids + 1000, past_key_values=manager.new_cache())  # a forward that fails
    assert not inside.observing()
    assert torch.equal(logits(model, ids), output)
    assert {t.data_ptr() for t in manager.observed_model.parameters()} == {t.data_ptr() for t in model.parameters()}
    assert logits(model, ids, dynamic_cache(model), [5, 7]).allclose(output, atol=1e-5)
    # Weights that change later are the runner's, too.
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    assert torch.allclose(logits(manager.observed_model, ids), logits(model, ids), atol=1e-5)
    assert not torch.allclose(logits(model, ids), output, atol=1e-3)


@pytest.mark.parametrize("name", ["heavy", "snapkv", "tova"])
def test_two_threads_share_a_manager(name):
    manager = KVCacheManager(tiny("llama"), LIMITED[name])
    prompts = [token_ids(1, 13, seed=20), token_ids(2, 17, seed=21)]
    given_ = {"max_new_tokens": 24, "do_sample": False}
    alone = [manager.generate(ids, **given_) for ids in prompts]
    found: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    start = threading.Barrier(2)

    def work(i: int) -> None:
        start.wait()
        for _ in range(2):
            found[i].append(manager.generate(prompts[i], **given_))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, results in found.items():
        assert len(results) == 2
        assert all(result.equal(alone[i]) for result in results)
