"""KV heads with budgets of their own, beside plain lists of the tokens that each head still has.

The references keep everything and mask, head by head; or they score all tokens as the papers say, and sort them together.
"""

import json
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.families import build, logits, tiny, token_ids
from support.inside.testing import held_bytes
from support.searching import search
from support.storages import STORAGES, exact_in
from test_ranking import CHUNKINGS, CLOSE, EXACT, KEY_DIM, RANKINGS, VALUE_DIM, Reference, forward, padded, places
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import kvcache.models as hf
from kvcache import (
    H2O,
    TOVA,
    AdaKV,
    CapacityError,
    CorruptError,
    GeometryError,
    InputError,
    KeepAll,
    KeyDiff,
    KeyNorm,
    KVCacheManager,
    KVzip,
    MaxBytes,
    MaxTokens,
    PerHead,
    Pinned,
    PolicyError,
    PositionsError,
    RetrievalHeadProfile,
    RollbackError,
    SlidingWindow,
    SnapKV,
    model_fingerprint,
    profile_retrieval_heads,
)
from kvcache.cache import CacheSpec, Expected, RankedLayer

WINDOW = SlidingWindow(6, sinks=2)
HEAVY = H2O(12, sinks=1, window_size=3)


# ---------------------------------------------------------------------- a model whose heads are masked by hand


NAME = "heads_reference"
MASKS: dict[int, torch.Tensor] = {}  # by layer: [rows, KV heads, all tokens, all tokens], True for "sees"
RANKED: dict[int, list[tuple[list[int], Reference]]] = {}  # by layer: the heads that rank, and what they still have


def _masked(module, query, key, value, attention_mask, scaling=None, **kwargs):
    rows, heads, fresh, dim = query.shape
    groups, total = heads // key.shape[1], key.shape[2]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * (dim**-0.5 if scaling is None else scaling)
    sees = MASKS[module.layer_idx][:, :, total - fresh : total, :total].repeat_interleave(groups, 1)
    weights = scores.masked_fill(~sees, -torch.inf).softmax(-1).nan_to_num(0.0)
    out = weights @ value.repeat_interleave(groups, 1)
    for own, reference in RANKED.get(module.layer_idx, ()):
        asked = [head * groups + i for head in own for i in range(groups)]
        found = reference.append(query[:, asked], key[:, own, -fresh:], value[:, own, -fresh:])
        for b in range(rows):
            for i, head in enumerate(asked):
                for t in range(fresh):
                    if found[b][i][t] is not None:
                        out[b, head, t] = torch.tensor(found[b][i][t])
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, _masked)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@cache
def masked_model(family):
    model = build(family)
    model.set_attn_implementation(NAME)
    return model


def sees_by_age(policy, pads, total):
    """What each token sees under a policy by age, as single tokens come: pads leave first, then the oldest not pinned."""
    held, sees = [], torch.zeros(total, total, dtype=torch.bool)
    for t in range(total):
        held.append(t)
        while len(held) > policy.keep(len(held)) and len(held) > getattr(policy, "limit", 0):
            stay = policy.keep(len(held))
            for _ in range(len(held) - stay):
                pinned = 0 if held[0] < pads else policy.pinned
                held.pop(pinned)
        sees[t, [p for p in held if p >= pads]] = True
    return sees


def reference_logits(family, policy, ids, mask, pads, chunks):
    model, total = masked_model(family), ids.shape[1]
    scale, config = None, model.config
    scale = (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) ** -0.5
    MASKS.clear()
    RANKED.clear()
    kv_heads = len(policy.heads)
    for layer in range(config.num_hidden_layers):
        MASKS[layer] = torch.zeros(len(pads), kv_heads, total, total, dtype=torch.bool)
        RANKED[layer] = []
        for one in dict.fromkeys(policy.heads):
            own = [h for h, other in enumerate(policy.heads) if other == one]
            if one.ranking is None:
                for b, pad in enumerate(pads):
                    sees = torch.ones(total, total).tril().bool()
                    sees[:, :pad] = False
                    MASKS[layer][b, own] = sees_by_age(one, pad, total) if one.evicts else sees
            else:
                groups = config.num_attention_heads // kv_heads
                RANKED[layer].append((own, Reference(one, pads, len(own), groups, scale)))
    store = DynamicCache(config=config)
    return logits(model, ids, store, chunks, attention_mask=mask, position_ids=places(mask))


PER_HEAD = {
    "duo": (KeepAll(), WINDOW),
    "window-first": (WINDOW, KeepAll()),
    "windows": (WINDOW, SlidingWindow(9)),
    "tova": (TOVA(12, sinks=1, low_water=12), WINDOW),
    "heavy": (KeepAll(), HEAVY),
    "ranked": (HEAVY, TOVA(10, low_water=8)),
    "low-water": (MaxTokens(13, low_water=7), KeepAll()),
    "pinned": (Pinned(3, SlidingWindow(4, sinks=1)), Pinned(3, HEAVY)),
    "same": (WINDOW, WINDOW),
}
FOUR = {
    "dealt": (WINDOW, KeepAll(), WINDOW, TOVA(11)),
    "tova-pair": (TOVA(11), WINDOW, TOVA(11), KeepAll()),
    "duo": (KeepAll(), WINDOW, WINDOW, KeepAll()),
}
MODELS = [("llama", name, chunks) for name in PER_HEAD for chunks in CHUNKINGS]
MODELS += [("qwen3", name, "chunks") for name in ("duo", "tova", "ranked")]
MODELS += [("gpt2", name, chunks) for name in FOUR for chunks in CHUNKINGS]


def heads_of(family, name):
    return (FOUR if family == "gpt2" else PER_HEAD)[name]


@pytest.mark.parametrize(("family", "name", "chunks"), MODELS)
def test_each_head_sees_what_its_policy_says(family, name, chunks):
    policy, lengths = PerHead(heads_of(family, name)), CHUNKINGS[chunks]
    ids, mask, pads = padded([sum(lengths), sum(lengths) - 5], seed=3)
    manager = KVCacheManager(tiny(family), policy)
    store = manager.new_cache(2, mask)
    given_ = {"attention_mask": mask, "position_ids": places(mask)}
    mine = logits(manager.observed_model, ids, store, lengths, **given_)
    expected, real = reference_logits(family, policy, ids, mask, pads, lengths), mask.bool()
    torch.testing.assert_close(mine[real], expected[real], atol=EXACT, rtol=0)
    whole = logits(tiny(family), ids, **given_)
    assert (mine[real] - whole[real]).abs().max() > 20 * EXACT, "nothing left that mattered"


@pytest.mark.parametrize("name", PER_HEAD)
def test_report_counts_heads_and_bytes(name):
    policy = PerHead(PER_HEAD[name])
    manager = KVCacheManager(tiny("llama"), policy)
    store, ids = manager.new_cache(2), token_ids(2, 40)
    with torch.no_grad():
        for part in ids.split([15, 1, 1, 4, 1, 17, 1], 1):
            manager.observed_model(part, past_key_values=store)
            report = manager.report(store)
            for layer, kv in zip(report.layers, hf.kv_layers(store), strict=True):
                assert layer.nbytes == held_bytes(kv)
                assert layer.stored == max(layer.heads)
                for count, one in zip(layer.heads, policy.heads, strict=True):
                    assert count == layer.seen if not one.evicts else count <= one.limit
    for layer in manager.report(store).layers:
        counts = {}
        for one in policy.heads:
            part = made(one, heads=1)
            for n in (15, 1, 1, 4, 1, 17, 1):
                forward(part, *drawn(n, 1, 1, 1, n)) if part.by_head else part.append(*drawn(n, 1, 1, 1, n)[1:])
            counts[one] = part.stored
        assert layer.heads == tuple(counts[one] for one in policy.heads)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "policy",
    [
        PerHead((KeepAll(), SlidingWindow(60, sinks=2))),
        PerHead((TOVA(60), SlidingWindow(60))),
        AdaKV(SnapKV(80)),
        AdaKV(KeyNorm(60)),
    ],
    ids=repr,
)
def test_within_the_budget_tokens_are_the_models(family, policy):
    model, (ids, mask, _) = tiny(family), padded([12, 9])
    given_ = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    manager = KVCacheManager(model, policy)
    assert manager.generate(ids, **given_).equal(model.generate(ids, **given_))
    assert manager.report().evicted == 0


def drawn(seed, rows, heads, groups, count, storage="plain"):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads * groups, KEY_DIM), (heads, KEY_DIM), (heads, VALUE_DIM))
    queries, keys, values = (torch.randn(rows, n, count, dim, generator=generator) for n, dim in sizes)
    held = STORAGES[storage]
    return queries, exact_in(held, keys * 1.5, "keys"), exact_in(held, values, "values")


def made(policy, storage="plain", *, heads=2, rows=None, padding=None, max_length=None):
    """A layer as a cache has it."""
    expected = Expected(rows, (heads, KEY_DIM, VALUE_DIM, torch.float32))
    return CacheSpec(max_length=max_length, storage=STORAGES[storage]).layer(policy, padding=padding, expected=expected)


LAYERS = {name: PerHead(heads) for name, heads in PER_HEAD.items()}
LAYERS |= {"adaptive-heavy": AdaKV(HEAVY), "adaptive-norm": AdaKV(KeyNorm(12, sinks=1, window_size=3))}


def dump(layer):
    """All that a layer is, its tensors by value, but for what is in free slots."""
    tensors, counts = layer.state()
    return {name: t.tolist() for name, t in tensors.items()}, counts, layer.seen, layer.stored, layer.rows, layer.nbytes


@pytest.mark.parametrize("padding", [None, [3, 0]])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", LAYERS)
def test_rows_commute(storage, name, padding):
    """Rows chosen and repeated between appends are these rows from the start."""
    # A share is the same in all rows, so it depends on which there are: there they are only swapped.
    rows = torch.tensor([1, 0] if name.startswith("adaptive") else [1, 0, 1, 1])
    pads = None if padding is None else torch.tensor(padding)
    chosen = made(LAYERS[name], storage, padding=pads, rows=2)
    other = made(LAYERS[name], storage, padding=None if pads is None else pads[rows], rows=len(rows))
    for i, count in enumerate([9, 1, 8]):
        fresh = drawn(i, 2, 2, 2, count, storage)
        forward(chosen, *fresh)
        forward(other, *(t[rows] for t in fresh))
    chosen.select(rows)
    assert chosen.rows == len(rows)
    for i, count in enumerate([1, 7, 1]):
        fresh = drawn(10 + i, len(rows), 2, 2, count, storage)
        torch.testing.assert_close(forward(chosen, *fresh), forward(other, *fresh), atol=CLOSE, rtol=0)
    assert (chosen.padding is None) == (pads is None)
    assert pads is None or chosen.padding.tolist() == pads[rows].tolist()
    chosen.repeat(2)
    assert chosen.rows == 2 * len(rows)
    fresh = drawn(20, len(rows), 2, 2, 1, storage)
    twice = forward(chosen, *(t.repeat_interleave(2, 0) for t in fresh))
    torch.testing.assert_close(twice, forward(other, *fresh).repeat_interleave(2, 0), atol=CLOSE, rtol=0)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", LAYERS)
def test_rows_before_the_first_token(storage, name):
    pads = torch.tensor([3, 0])
    layer = made(LAYERS[name], storage, padding=pads, rows=2)
    with pytest.raises(GeometryError, match="no rows"):
        layer.select(torch.tensor([], dtype=torch.long))
    layer.repeat(2)
    assert layer.rows == 4
    other = made(LAYERS[name], storage, padding=pads.repeat_interleave(2), rows=4)
    fresh = drawn(0, 4, 2, 2, 17, storage)
    assert forward(layer, *fresh).equal(forward(other, *fresh))


def test_mask_is_checked_against_the_rows_that_are_left():
    ids, mask, _ = padded([9, 5])
    manager = KVCacheManager(tiny("llama"), PerHead((KeepAll(), WINDOW)))
    store = manager.new_cache(2, mask)
    logits(manager.observed_model, ids, store, attention_mask=mask, position_ids=places(mask))
    store.batch_select_indices(torch.tensor([1]))
    more = torch.cat([mask[1:], torch.ones(1, 1, dtype=torch.long)], 1)
    with torch.no_grad():
        manager.observed_model(
            ids[1:, -1:], past_key_values=store, attention_mask=more, position_ids=torch.tensor([[5]])
        )
    with pytest.raises(PolicyError, match="hides more"), torch.no_grad():
        manager.observed_model(ids[1:, -1:], past_key_values=store, attention_mask=torch.ones(1, 11).tril(9))


def fed(policy, length, storage):
    layer, start = made(policy, storage), 0
    for count in (6, 9, 2):
        part = [t[:, :, start : min(start + count, length)] for t in drawn(0, 1, 2, 1, 17, storage)]
        if part[0].shape[2]:
            forward(layer, *part)
        start += count
    return layer


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", LAYERS)
def test_truncate_is_refused_or_right(storage, name):
    policy = LAYERS[name]
    layer, back = fed(policy, 17, storage), 0
    before = dump(layer)
    for length in (-1, 18):
        with pytest.raises(RollbackError):
            layer.truncate(length)
    for length in range(18):
        layer = fed(policy, 17, storage)
        try:
            layer.truncate(length)
        except RollbackError:
            assert 0 < length < 17
            assert dump(layer) == before
            continue
        back += 1
        other = fed(policy, length, storage)
        assert (layer.seen, layer.heads) == (length, other.heads) or length == 0 == layer.stored
        for count in (1, 5):
            fresh = drawn(length, 1, 2, 1, count, storage)
            torch.testing.assert_close(forward(layer, *fresh), forward(other, *fresh), atol=CLOSE, rtol=0)
    assert back >= 2
    if name == "low-water":
        assert back == 5, "all that came since tokens left can be taken back"


def test_truncate_before_anything_left():
    layer, other = (made(PerHead((KeepAll(), WINDOW, KeyNorm(12, sinks=1, window_size=3))), heads=3) for _ in range(2))
    fresh, more = drawn(0, 1, 3, 2, 7), drawn(1, 1, 3, 2, 9)
    forward(layer, *fresh)
    layer.truncate(5)
    forward(other, *(t[:, :, :5] for t in fresh))
    assert layer.heads == (5, 5, 5)
    torch.testing.assert_close(forward(layer, *more), forward(other, *more), atol=CLOSE, rtol=0)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", LAYERS)
def test_failed_append_changes_nothing(storage, name, begun):
    layer, other = (made(LAYERS[name], storage, rows=1) for _ in range(2))
    if begun:
        for one in (layer, other):
            forward(one, *drawn(0, 1, 2, 2, 9, storage))
    _, keys, values = drawn(1, 1, 2, 2, 3, storage)
    wrong = [
        (keys[0], values[0]),
        (keys, values[:, :1]),
        (keys[:, :, :2], values),
        (keys.repeat(2, 1, 1, 1), values.repeat(2, 1, 1, 1)),
    ]
    wrong += [(keys.repeat(1, 2, 1, 1), values.repeat(1, 2, 1, 1)), (keys[:, :1], values[:, :1])]
    if begun:
        wrong += [(keys.double(), values.double()), (keys[..., :2], values)]
    before = dump(layer)
    for one in wrong:
        with pytest.raises(GeometryError):
            layer.append(*one)
        assert dump(layer) == before
    assert forward(layer, *drawn(2, 1, 2, 2, 8, storage)).equal(forward(other, *drawn(2, 1, 2, 2, 8, storage)))


def test_a_head_that_is_full_stops_all():
    layer = made(PerHead((WINDOW, KeepAll(), HEAVY)), heads=3, max_length=14)
    forward(layer, *drawn(0, 1, 3, 1, 12))
    before = dump(layer)
    with pytest.raises(CapacityError):
        layer.append(*drawn(1, 1, 3, 1, 3)[1:])
    assert dump(layer) == before
    forward(layer, *drawn(1, 1, 3, 1, 2))
    assert layer.heads == (8, 14, 10)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", LAYERS)
def test_no_token_is_no_change(storage, name):
    layer = made(LAYERS[name], storage, padding=torch.tensor([2]))
    assert layer.positions().numel() == 0
    assert layer.keys is None
    layer.append(*(t[:, :, :0] for t in drawn(0, 1, 2, 1, 1, storage)[1:]))
    assert (layer.seen, layer.stored, layer.initialized) == (0, 0, True)
    forward(layer, *drawn(0, 1, 2, 1, 5, storage))
    assert layer.seen == 5
    assert layer.keys.shape == (1, 2, 5, KEY_DIM)


# ---------------------------------------------------------------------- heads that share a budget


def check_shared(name, storage, seed, rows, heads, groups, beside, floor, chunks, first):
    policy = RANKINGS[name](4 + beside, sinks=1, window_size=2, low_water=4 + beside // 2)
    adaptive = AdaKV(policy, alpha_safeguard=floor)
    layer = made(Pinned(first, adaptive) if first else adaptive, storage, heads=heads)
    endless = replace(policy, limit=10**6, low_water=10**6)
    endless = Pinned(first, endless) if first else endless
    lists = [Reference(endless, [0] * rows, 1, groups, KEY_DIM**-0.5) for _ in range(heads)]
    for i, count in enumerate(chunks):
        queries, keys, values = drawn(seed + i, rows, heads, groups, count, storage)
        mine = forward(layer, queries, keys, values)
        for h, reference in enumerate(lists):
            own = slice(h * groups, (h + 1) * groups)
            expected = torch.tensor(reference.append(queries[:, own], keys[:, h : h + 1], values[:, h : h + 1]))
            torch.testing.assert_close(mine[:, own], expected, atol=CLOSE, rtol=0)
        counts = [len(reference.rows[0][0]) for reference in lists]
        if sum(counts) > (policy.limit + first) * heads:
            share_by_hand(lists, policy.low_water + first, floor)
        counts = tuple(len(reference.rows[0][0]) for reference in lists)
        assert layer.heads == counts
        assert sum(counts) <= (policy.limit + first) * heads
        seen, least = layer.seen, max(first + 3, int(floor * (policy.low_water + first)))
        assert all(held >= min(least, seen) for held in counts)
        for reference, (_, part) in zip(lists, layer.parts(), strict=True):
            kept = [[token.position for token in row[0]] for row in reference.rows]
            assert part.positions()[:, 0].tolist() == kept
            always = {p for p in range(seen) if p < first + 1 or p >= seen - 2}
            assert all(always <= set(row) for row in kept)
        assert layer.nbytes == held_bytes(layer)


def share_by_hand(lists, mean, floor):
    """All tokens of all heads, sorted together; a head's share is by the mean over rows of its n-th best score."""
    orders = []
    for one in lists:
        one.order = []
        for b in range(len(one.rows)):
            held, scores = one.rows[b][0], one.scores(b, 0)
            worth = [math.inf if one.stays(b, token) == 2 else score for token, score in zip(held, scores, strict=True)]
            one.order.append(sorted(zip(worth, held, strict=True), key=lambda pair: (-pair[0], pair[1].position)))
        orders.append([sum(pair[0] for pair in nth) / len(nth) for nth in zip(*one.order, strict=True)])
    least = max(lists[0].pinned + lists[0].how.window_size, int(floor * mean))
    sure = [min(least, len(order)) for order in orders]
    rest = sorted(((worth, h) for h, order in enumerate(orders) for worth in order[sure[h] :]), reverse=True)
    chosen = [h for _, h in rest[: mean * len(lists) - sum(sure)]]
    for h, one in enumerate(lists):
        stay = sure[h] + chosen.count(h)
        for b, order in enumerate(one.order):
            kept = {token.position for _, token in order[:stay]}
            one.rows[b][0] = [token for token in one.rows[b][0] if token.position in kept]


@pytest.mark.search
@pytest.mark.parametrize("name", RANKINGS)
def test_shares_are_those_of_a_sort_by_hand(name):
    @search(16)
    @given(
        storage=st.sampled_from(list(STORAGES)),
        seed=st.integers(0, 1000),
        rows=st.integers(1, 2),
        heads=st.integers(1, 3),
        groups=st.integers(1, 2),
        beside=st.integers(1, 6),
        floor=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
        chunks=st.lists(st.integers(1, 9) | st.just(1), min_size=1, max_size=6),
        first=st.sampled_from([0, 0, 2]),
    )
    def law(**drawn_):
        check_shared(name, **drawn_)

    law()


@pytest.mark.parametrize("name", RANKINGS)
def test_a_single_head_is_a_ranked_layer(name):
    policy = RANKINGS[name](10, sinks=1, window_size=2, low_water=8)
    shared, plain = made(AdaKV(policy), heads=1), RankedLayer(policy)
    for i, count in enumerate([6, 5, 1, 1, 1, 9, 1, 1]):
        fresh = drawn(i, 1, 1, 2, count)
        assert forward(shared, *fresh).equal(forward(plain, *fresh))
        assert shared.positions().equal(plain.positions())
        assert shared.keys.equal(plain.keys)
        assert shared.values.equal(plain.values)


@pytest.mark.parametrize("policy", [H2O(12, sinks=1, window_size=3), KeyDiff(12, sinks=1, window_size=3)], ids=repr)
def test_shares_through_a_model(policy):
    """Heads come to differ, never hold more than allowed, and a bound of the manager is no bound of one head."""
    manager = KVCacheManager(tiny("llama"), AdaKV(policy, alpha_safeguard=0), max_cache_length=20)
    store, ids = manager.new_cache(1), token_ids(1, 60)
    counts = set()
    with torch.no_grad():
        for part in ids.split([30, *[1] * 12, 9, *[1] * 9], 1):
            manager.observed_model(part, past_key_values=store)
            for layer in manager.report(store).layers:
                assert sum(layer.heads) <= 2 * policy.limit
                counts |= set(layer.heads)
    assert len(counts) > 3
    with pytest.raises(PolicyError, match="max_length"):
        KVCacheManager(tiny("llama"), AdaKV(policy), max_cache_length=11)


def test_trim_between_append_and_observation_is_refused():
    layer = made(AdaKV(HEAVY))
    layer.append(*drawn(0, 1, 2, 1, 9)[1:])
    with pytest.raises(PolicyError, match=r"observe\(\)"):
        layer.trim(5)


# ---------------------------------------------------------------------- a second reading


REHEARSED = KVzip(64, sinks=2, window_size=3)


def filled(policy, rows=1, tokens=24):
    manager = KVCacheManager(tiny("llama"), policy)
    store, ids = manager.new_cache(rows), token_ids(rows, tokens, seed=5)
    logits(manager.observed_model, ids, store)
    return manager, store, ids


def looks_by_hand(ids, instruction):
    """The most that a token is looked at in one long forward, ``[layers][KV heads][tokens]``."""
    again = ids if instruction is None else torch.cat([instruction, ids], 1)
    with torch.no_grad():
        found = tiny("llama", "eager")(torch.cat([ids, again], 1), output_attentions=True, use_cache=False).attentions
    n = ids.shape[1]
    return [layer[0, :, n:, :n].amax(1).unflatten(0, (2, -1)).amax(1).tolist() for layer in found]


def kept_by_hand(looks, tokens, most, together, floor=0.2, sinks=2, window_size=3):
    stays = {p for p in range(tokens) if p < sinks or p >= tokens - window_size}
    orders = {
        (i, h): sorted(range(tokens), key=lambda p, head=head: (p not in stays, -head[p]))
        for i, layer in enumerate(looks)
        for h, head in enumerate(layer)
    }
    sure = max(len(stays), int(floor * most)) if together else most
    kept = {at: set(order[:sure]) for at, order in orders.items()}
    if together:
        rest = sorted(((looks[i][h][p], i, h, p) for (i, h), o in orders.items() for p in o[sure:]), reverse=True)
        for _, i, h, p in rest[: (most - sure) * len(orders)]:
            kept[i, h].add(p)
    return kept


def kept_of(store):
    result = {}
    for i, kv in enumerate(hf.kv_layers(store)):
        for heads, part in kv.parts():
            which = heads or range(part.positions().shape[1])
            result |= {(i, h): set(held.tolist()) for h, held in zip(which, part.positions()[0], strict=True)}
    return result


@pytest.mark.parametrize("instruct", [False, True])
@pytest.mark.parametrize("most", [5, 9, 16, 23])
@pytest.mark.parametrize("together", [False, True])
def test_second_reading_keeps_what_it_looked_at(together, most, instruct):
    instruction = token_ids(1, 4, seed=9) if instruct else None
    manager, store, ids = filled(AdaKV(REHEARSED) if together else REHEARSED)
    assert manager.compress(store, ids, most, instruction=instruction) == 24 - most
    kept = kept_of(store)
    assert kept == kept_by_hand(looks_by_hand(ids, instruction), 24, most, together)
    assert manager.report(store).seen == 24
    # What comes next stands where it would have, and sees in each head what is left.
    more = token_ids(1, 3, seed=6)
    MASKS.clear()
    RANKED.clear()
    for i in range(2):
        MASKS[i] = torch.ones(27, 27).tril().bool().repeat(1, 2, 1, 1)
        for h in range(2):
            MASKS[i][0, h, 24:, [p for p in range(24) if p not in kept[i, h]]] = False
    expected = logits(masked_model("llama"), torch.cat([ids, more], 1))[:, 24:]
    torch.testing.assert_close(logits(manager.observed_model, more, store, [2, 1]), expected, atol=EXACT, rtol=0)


def test_compressing_what_fits_changes_nothing():
    for policy in (REHEARSED, AdaKV(REHEARSED)):
        manager, store, ids = filled(policy)
        assert manager.compress(store, ids, 24) == manager.compress(store, ids, 30) == 0
        assert all(held == set(range(24)) for held in kept_of(store).values())


@pytest.mark.parametrize("policy", [REHEARSED, AdaKV(REHEARSED)], ids=["plain", "adaptive"])
def test_compress_refuses(policy):
    manager, store, ids = filled(policy, rows=2)
    before = [dump(kv) for kv in hf.kv_layers(store)]
    for wrong in (ids[:, :-1], torch.cat([ids, ids], 1), ids[0], ids.tolist()):
        with pytest.raises(InputError, match="that the cache has seen"):
            manager.compress(store, wrong, 10)
    with pytest.raises((InputError, GeometryError)):
        manager.compress(store, ids[:1], 10)
    with pytest.raises(PolicyError, match="at least 5"):
        manager.compress(store, ids, 4)
    assert [dump(kv) for kv in hf.kv_layers(store)] == before
    manager.compress(store, ids, 10)
    with pytest.raises(InputError, match="left this cache already"):
        manager.compress(store, ids, 8)
    for other in (KeepAll(), TOVA(64), PerHead((KeepAll(), WINDOW))):
        manager, store, ids = filled(other, tokens=6)
        with pytest.raises(PolicyError, match="KVzip"):
            manager.compress(store, ids, 5)


def test_compress_refuses_where_the_fullest_head_keeps_all():
    """In each layer one head holds everything and the other has lost tokens: they cannot be ranked again."""
    manager, store, ids = filled(AdaKV(REHEARSED))
    for kv in hf.kv_layers(store):
        [*kv.parts()][1][1].rank_to(9)
    assert [kv.heads for kv in hf.kv_layers(store)] == [(24, 9)] * 2
    with pytest.raises(InputError, match="left this cache already"):
        manager.compress(store, ids, 12)


def fail(*args, **kwargs):
    raise MemoryError("full")


def interrupted(policy, where, monkeypatch):
    """A cache whose second reading failed, and one that was never read again."""
    manager, store, ids = filled(policy)
    with monkeypatch.context() as patch:
        if where == "between layers":
            patch.setattr(manager.observed_model.model.layers[1], "forward", fail)
        else:
            patch.setattr("kvcache.cache._attended._one", fail)
        with pytest.raises(MemoryError):
            manager.compress(store, ids, 9)
    return manager, store, filled(policy)[1], ids


IN_THE_ATTENTION = pytest.param(
    "in the attention",
)


@pytest.mark.parametrize("where", ["between layers", IN_THE_ATTENTION])
@pytest.mark.parametrize("policy", [REHEARSED, AdaKV(REHEARSED)], ids=["plain", "adaptive"])
def test_a_cache_goes_on_after_a_failed_second_reading(policy, where, monkeypatch):
    manager, store, other, _ = interrupted(policy, where, monkeypatch)
    assert not any(kv.rehearsing for kv in hf.kv_layers(store))
    assert not any(part.rehearsing for kv in hf.kv_layers(store) for _, part in kv.parts())
    more = token_ids(1, 4, seed=6)
    assert logits(manager.observed_model, more, store, [3, 1]).equal(
        logits(manager.observed_model, more, other, [3, 1])
    )


@pytest.mark.parametrize("policy", [REHEARSED, AdaKV(REHEARSED)], ids=["plain", "adaptive"])
def test_a_failed_second_reading_leaves_nothing(policy, monkeypatch):
    manager, store, other, ids = interrupted(policy, "between layers", monkeypatch)
    more = token_ids(1, 4, seed=6)
    both = torch.cat([ids, more], 1)
    for one in (store, other):
        logits(manager.observed_model, more, one)
    for one in (store, other):
        manager.compress(one, both, 9)
    assert kept_of(store) == kept_of(other)


# ---------------------------------------------------------------------- which heads look far


def far_by_hand(ids, sinks, window):
    with torch.no_grad():
        found = tiny("llama", "eager")(ids, output_attentions=True, use_cache=False).attentions
    shares = []
    for layer in found:
        sums, count = [0.0, 0.0], 0
        for row in layer.tolist():
            for t in range(sinks + window, ids.shape[1]):
                count += 1
                for head, weights in enumerate(row):
                    sums[head // 2] += sum(weights[t][sinks : t - window + 1]) / 2
        shares.append([value / count for value in sums])
    return torch.tensor(shares)


def test_measured_shares_are_those_of_eager_attention():
    one, two = token_ids(2, 20, seed=1), token_ids(1, 31, seed=2)
    profile = profile_retrieval_heads(tiny("llama"), [one], sinks=2, window=6)
    torch.testing.assert_close(torch.tensor(profile.far), far_by_hand(one, 2, 6), atol=CLOSE, rtol=0)
    assert (profile.model, profile.tokens) == (model_fingerprint(tiny("llama")), 40)
    both = profile_retrieval_heads(tiny("llama"), [one, two], sinks=0, window=9)
    expected = (far_by_hand(one, 0, 9) * 40 + far_by_hand(two, 0, 9) * 31) / 71
    torch.testing.assert_close(torch.tensor(both.far), expected, atol=CLOSE, rtol=0)
    assert 0.01 < min(map(min, both.far)) < max(map(max, both.far)) < 1


def test_samples_that_are_too_short_are_refused():
    for batches in ([], [token_ids(1, 8)], [token_ids(1, 20), token_ids(1, 8)], [token_ids(1, 20)[0]]):
        with pytest.raises(InputError, match="more than 8"):
            profile_retrieval_heads(tiny("llama"), batches, sinks=2, window=6)
    assert profile_retrieval_heads(tiny("llama"), [token_ids(1, 9)], sinks=2, window=6).tokens == 9
    with pytest.raises(PolicyError):
        profile_retrieval_heads(tiny("llama"), [token_ids(1, 20)], sinks=2, window=0)
    with pytest.raises(PolicyError):
        profile_retrieval_heads(tiny("llama", "eager"), [token_ids(1, 20)], sinks=2, window=6)


PROFILE = RetrievalHeadProfile("m", 2, 6, 100, ((0.5, 0.1), (0.0, 0.9), (0.3, 0.2)))


def test_profile_is_saved_and_loaded(tmp_path):
    path = tmp_path / "heads.json"
    PROFILE.save(path)
    assert RetrievalHeadProfile.load(path) == RetrievalHeadProfile.load(str(path), model="m") == PROFILE
    with pytest.raises(InputError, match="another model"):
        RetrievalHeadProfile.load(path, model="n")
    with pytest.raises(FileNotFoundError):
        RetrievalHeadProfile.load(tmp_path / "none.json")


CHANGES = {
    "format": ["kvcache-prefix", None, 1],
    "version": [2, 0, "1", None, True, 1.0],
    "model": [None, 7, ["m"]],
    "sinks": [-1, 1.5, True, "2", None],
    "window": [0, -6, 6.0, False, None],
    "tokens": [-1, 0, 1.5, True, None],
    "far": [None, [], {}, "01", 7, [[]], [[], []], [[0.5], [0.1, 0.2]], [0.5, 0.5], ["01", "10"]]
    + [[[wrong, 0.1]] for wrong in (-0.1, 1.1, math.nan, math.inf, True, "0.5", None, [0.1], 10**400)],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in CHANGES for value in CHANGES[name]])
def test_changed_profiles_are_refused(tmp_path, name, value):
    path = tmp_path / "heads.json"
    PROFILE.save(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, name: value}))
    with pytest.raises(CorruptError):
        RetrievalHeadProfile.load(path)


@pytest.mark.parametrize("name", ["format", "version", "model", "sinks", "window", "tokens", "far"])
def test_a_profile_without_a_field_or_with_more_is_refused(tmp_path, name):
    path = tmp_path / "heads.json"
    PROFILE.save(path)
    content = json.loads(path.read_text())
    for wrong in ({key: value for key, value in content.items() if key != name}, {**content, name + "s": 1}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(CorruptError):
            RetrievalHeadProfile.load(path)


def test_what_is_no_profile_is_refused(tmp_path):
    path = tmp_path / "heads.json"
    PROFILE.save(path)
    whole = path.read_bytes()
    cut = [whole[:n] for n in range(0, len(whole) - 2, 7)]
    deep = b"[" * 100_000, b'{"far":' * 100_000, b"1" * 10_000, b"[]", b"null", b"7", b'"x"', b"\xff\xfe\x00", b"{}"
    for content in (*cut, *deep):
        path.write_bytes(content)
        with pytest.raises(CorruptError):
            RetrievalHeadProfile.load(path)


def test_policies_are_of_the_heads_that_look_furthest():
    near, far = SlidingWindow(6, sinks=2), KeepAll()
    assert PROFILE.policies(0) == [near] * 3
    assert PROFILE.policies(1) == [far] * 3
    assert PROFILE.policies(1 / 6) == [near, PerHead((near, far)), near]
    assert PROFILE.policies(0.5) == [PerHead((far, near)), PerHead((near, far)), PerHead((far, near))]
    assert PROFILE.policies(5 / 6) == [far, PerHead((near, far)), far]
    assert PROFILE.policies(0.5, far=HEAVY)[1] == PerHead((near, HEAVY))
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="share"):
            PROFILE.policies(wrong)
    with pytest.raises(PolicyError):
        PROFILE.policies(0.5, far=MaxBytes("1KiB"))


def test_measured_policies_run():
    model = tiny("llama")
    policies = profile_retrieval_heads(model, [token_ids(1, 30)], sinks=2, window=6).policies(0.5)
    manager = KVCacheManager(model, policies)
    manager.generate(token_ids(1, 20), max_new_tokens=4, do_sample=False)
    held = [count for layer in manager.report().layers for count in layer.heads or [layer.stored] * 2]
    assert sorted(held) == [8, 8, 23, 23]


# ---------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    "heads",
    [
        (),
        (KeepAll(), None),
        (KeepAll, KeepAll()),
        (KeepAll(), MaxBytes("1KiB")),
        (KeepAll(), PerHead((WINDOW,))),
        (KeepAll(), PerHead((KeepAll(),))),
        (KeepAll(), AdaKV(HEAVY)),
        (KeepAll(), Pinned(2, AdaKV(HEAVY))),
        (Pinned(2, Pinned(1, PerHead((KeepAll(),)))), WINDOW),
    ],
    ids=repr,
)
def test_heads_that_cannot_be(heads):
    with pytest.raises(PolicyError):
        PerHead(heads)


@pytest.mark.parametrize("policy", [KeepAll(), WINDOW, Pinned(2, HEAVY), AdaKV(HEAVY), PerHead((WINDOW,)), None])
def test_only_rankings_are_shared(policy):
    with pytest.raises(PolicyError, match="ranks no tokens"):
        AdaKV(policy)


@pytest.mark.parametrize("floor", [-0.1, 1.1, math.nan])
def test_floors_are_shares(floor):
    with pytest.raises(PolicyError, match="alpha_safeguard"):
        AdaKV(HEAVY, alpha_safeguard=floor)


@pytest.mark.parametrize(
    "policy",
    [
        PerHead((WINDOW,) * 3),
        PerHead((WINDOW,)),
        pytest.param(
            [KeepAll(), PerHead((WINDOW,) * 3)],
        ),
    ],
    ids=["three", "one", "in the second layer"],
)
def test_another_number_of_heads_is_refused(policy):
    with pytest.raises(GeometryError, match="KV heads"):  # noqa: PT012
        manager = KVCacheManager(tiny("llama"), policy)
        store = manager.new_cache()
        try:
            logits(manager.observed_model, token_ids(1, 5), store)
        finally:
            assert [kv.seen for kv in hf.kv_layers(store)] == [0, 0]
            assert not any(kv.initialized for kv in hf.kv_layers(store))


@pytest.mark.parametrize("policy", [PerHead((KeepAll(), WINDOW)), AdaKV(HEAVY)], ids=["per head", "adaptive"])
def test_turned_heads_are_refused(policy):
    for one in (policy, Pinned(3, policy)):
        with pytest.raises(PositionsError, match="absolute"):
            hf.new_cache(tiny("llama"), CacheSpec(one, positions="rerotated"))
    with pytest.raises(PolicyError):
        KVCacheManager(tiny("llama"), policy).estimate(10)


@pytest.mark.parametrize("policy", [PerHead((KeepAll(), WINDOW)), AdaKV(HEAVY)], ids=["per head", "adaptive"])
def test_the_model_itself_is_refused(policy):
    store = KVCacheManager(tiny("llama"), policy).new_cache()
    with pytest.raises(PolicyError, match=r"manager\.runner"):
        logits(tiny("llama"), token_ids(1, 5), store)
    assert all(kv.seen == 0 for kv in hf.kv_layers(store))
