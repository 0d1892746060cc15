"""Whole caches, saved and loaded under every kind of policy: they go on bit for bit, share nothing, and are checked."""

import copy

import pytest
import torch
from support.families import build, tiny, token_ids

from kvcache import (
    H2O,
    TOVA,
    AdaKV,
    CorruptError,
    ExpectedAttention,
    GeometryError,
    InputError,
    KeepAll,
    KeyDiff,
    KVCacheManager,
    KVQuantization,
    LongRangeAttention,
    MaxBytes,
    MaxTokens,
    PerHead,
    SlidingWindow,
    SnapKV,
)
from kvcache.cache import pack, unpack

POLICIES = {
    "all": KeepAll(),
    "window": SlidingWindow(12, sinks=2),
    "max": MaxTokens(20),
    "bytes": MaxBytes("24KiB"),
    "snapkv": SnapKV(30, window_size=8),
    "heavy": H2O(24, window_size=4),
    "far": LongRangeAttention(24, window_size=4, near=4),
    "expected": ExpectedAttention(48, window_size=8),
    "tova": TOVA(20),
    "keydiff": KeyDiff(24, window_size=4),
    "per-head": PerHead((KeepAll(), SlidingWindow(10, sinks=2))),
    "ranked-heads": PerHead((TOVA(20), H2O(24, window_size=4))),
    "adaptive": AdaKV(SnapKV(24, window_size=4)),
}
KINDS = {name: (policy, None, "absolute") for name, policy in POLICIES.items()}
KINDS |= {
    f"{name}-int8": (POLICIES[name], KVQuantization(8, group_size=8), "absolute")
    for name in ("all", "window", "max", "bytes")
}
KINDS |= {
    "all-int4": (KeepAll(), KVQuantization(4, group_size=8), "absolute"),
    "turned": (POLICIES["window"], None, "rerotated"),
}


def manager_of(kind, model=None):
    policy, storage, positions = KINDS[kind]
    return KVCacheManager(tiny("llama") if model is None else model, policy, storage=storage, positions=positions)


@torch.no_grad()
def run(manager, cache, ids, chunk):
    from kvcache.models import exact_windows

    with exact_windows(manager.observed_model):
        return torch.cat(
            [manager.observed_model(part, past_key_values=cache).logits for part in ids.split(chunk, 1)], 1
        )


def same(one, other):
    """Whether two files say the same, to the last bit; safetensors sorts their fields anew each time."""
    (tensors, header), (others, second) = unpack(one), unpack(other)
    return (
        header == second
        and tensors.keys() == others.keys()
        and all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    )


@pytest.mark.grid(57)
@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("tokens", [0, 5, 47])
@pytest.mark.parametrize("kind", KINDS)
def test_goes_on_bit_for_bit(kind, tokens, chunk):
    manager = manager_of(kind)
    cache = manager.new_cache(2)
    if tokens:
        run(manager, cache, token_ids(2, tokens), 11)
    data = manager.save(cache)
    assert same(data, manager.save(cache))
    loaded, forked = manager_of(kind).load(data), manager.fork(cache)
    before = manager.report(loaded)
    assert before.seen == tokens
    assert [layer.stored for layer in before.layers] == [layer.stored for layer in manager.report(cache).layers]
    more = token_ids(2, 30, seed=1)
    expected = run(manager, cache, more, chunk)
    assert torch.equal(run(manager, loaded, more, chunk), expected)
    assert same(manager.save(loaded), manager.save(cache))
    # The fork has not moved while the others did, and goes on as they did.
    assert manager.report(forked).seen == tokens
    assert torch.equal(run(manager, forked, more, chunk), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_tampered_with_is_refused(kind):
    manager = manager_of(kind)
    cache = manager.new_cache(2)
    run(manager, cache, token_ids(2, 40), 11)
    data = manager.save(cache)
    with pytest.raises(CorruptError):
        manager.load(data[:-1])
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    with pytest.raises(CorruptError):
        manager.load(bytes(flipped))
    tensors, header = unpack(data)
    for name, tensor in tensors.items():
        with pytest.raises(CorruptError):
            manager.load(pack({other: t for other, t in tensors.items() if other != name}, header))
        wrong = tensor.reshape(-1)[:-1] if tensor.numel() > 1 else torch.tensor([torch.nan])
        with pytest.raises(CorruptError):
            manager.load(pack({**tensors, name: wrong}, header))
    for change in (
        {"counts": header["counts"][:-1]},
        {"counts": [{**c, "seen": 7} for c in header["counts"]]},
        {"counts": [{**c, "seen": -1} for c in header["counts"]]},
        {"counts": [{**c, "seen": "40"} for c in header["counts"]]},
        {"counts": [{} for c in header["counts"]]},
        {"counts": None},
        {"rows": 0},
        {"rows": "two"},
        {"version": 2},
        {"format": "kvcache-prefix"},
    ):
        with pytest.raises(CorruptError):
            manager.load(pack(tensors, {**header, **change}))
    with pytest.raises(CorruptError):
        manager.load(pack({**tensors, "0.more": torch.zeros(1)}, header))


def test_positions_out_of_order_are_refused():
    manager = manager_of("snapkv")
    cache = manager.new_cache(1)
    run(manager, cache, token_ids(1, 60), 60)
    tensors, header = unpack(manager.save(cache))
    tensors["1.at"] = tensors["1.at"].flip(2)
    with pytest.raises(CorruptError, match="not in order"):
        manager.load(pack(tensors, header))


def test_another_model_policy_or_secret_is_refused():
    manager = manager_of("snapkv")
    cache = manager.new_cache(1)
    run(manager, cache, token_ids(1, 40), 40)
    data = manager.save(cache, secret=b"s")
    with pytest.raises(CorruptError):
        manager.load(data)
    assert manager.report(manager.load(data, secret=b"s")).seen == 40
    with pytest.raises(InputError, match="saved under SnapKV"):
        manager_of("tova").load(data, secret=b"s")
    other = build("llama", vocab_size=101)
    with pytest.raises(InputError, match="another model"):
        manager_of("snapkv", other).load(data, secret=b"s")


def test_pads_and_layers_of_the_models_own_are_refused():
    manager = manager_of("window")
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with pytest.raises(GeometryError, match="padded"):
        manager.save(manager.new_cache(2, attention_mask=mask))
    hybrid = KVCacheManager(tiny("gemma3"))
    with pytest.raises(GeometryError, match="own way"):
        hybrid.save(hybrid.new_cache())


@pytest.mark.parametrize("copied", [None, "fork", "deepcopy"])
def test_what_the_model_was_before_it_changed_is_not_saved_as_what_it_is(copied):
    model = build("llama")
    manager = KVCacheManager(model)
    cache = manager.new_cache()
    run(manager, cache, token_ids(1, 20), 20)
    held = {None: lambda: cache, "fork": lambda: manager.fork(cache), "deepcopy": lambda: copy.deepcopy(cache)}[
        copied
    ]()
    assert manager.save(held)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.neg_()
    with pytest.raises(InputError, match="changed since this cache was made"):
        manager.save(held)
    assert manager.report(manager.fork(held)).seen == 20  # in this process it may go on
    again = manager.new_cache()
    run(manager, again, token_ids(1, 20), 20)
    assert manager.report(manager.load(manager.save(again))).seen == 20
