"""Prefixes under policies, prefixes that begin alike, and what serves them."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.clocks import Clock
from support.families import FAMILIES, build, logits, tiny, token_ids
from support.inside.stores import CACHE_CLOCK
from support.prefixes import (
    CLOSE,
    DECODERS,
    FEW,
    GREEDY,
    MODES,
    PREFIX,
    TEXT,
    after,
    all_bits,
    assert_holds,
    forwarded,
    in_memory,
    manager,
    plain,
    some,
    voice,
)

from kvcache import (
    InputError,
    KeepAll,
    KVCacheManager,
    MaxBytes,
    MaxTokens,
    MemoryStore,
    Pinned,
    PrefixKey,
    PrefixSnapshot,
    SlidingWindow,
    SpeakerCache,
)
from kvcache import models as hf

EVICTING = [name for name in DECODERS if FAMILIES[name].evicts]
ROTATING = [name for name in DECODERS if FAMILIES[name].rope]


# ---------------------------------------------------------------------- policies: the prefix is pinned


LEAVING: dict[str, Any] = {
    "window": SlidingWindow(6),
    "sinks": SlidingWindow(6, sinks=2),
    "max": MaxTokens(9, low_water=4),
    "bytes": MaxBytes("30KB"),  # of a llama's 1 KiB a token in two rows: 29 of them, of which 13 are pinned
    "pinned": Pinned(3, SlidingWindow(5)),
}


@pytest.mark.grid(25)
@pytest.mark.parametrize("positions", ["absolute", "rerotated"])
@pytest.mark.parametrize("policy", LEAVING)
@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gemma3", "opt", "whisper-decoder"])
def test_a_policy_is_about_what_follows_the_prefix(name: str, policy: str, positions: str) -> None:
    """The reference: all of the prompt in a cache whose policy pins as many tokens, in the same two chunks."""
    if positions == "rerotated" and name not in ROTATING:
        pytest.skip("its keys cannot be turned")
    if policy == "bytes" and name != "llama":
        pytest.skip("the budget is a llama's")
    model, rule = tiny(name), LEAVING[policy]
    kv = manager(model, rule, positions=positions)
    kept = KVCacheManager(model, Pinned(len(PREFIX), rule), positions=positions, prefix_cache=in_memory())
    ours, theirs = kv.new_cache(2, prefix="p"), kept.new_cache(2)
    more = token_ids(2, 20, seed=4)
    chunks = [9, *[1] * 8, 3]
    with hf.exact_windows(model):
        expected = logits(model, after(PREFIX, more), theirs, [len(PREFIX), *chunks])[:, len(PREFIX) :]
        got = logits(model, more, ours, chunks)
    assert (got - expected).abs().max() < CLOSE
    for a, b in zip(hf.kv_layers(ours), hf.kv_layers(theirs), strict=True):
        assert a.policy == b.policy
        assert torch.equal(a.positions(), b.positions())
        assert a.positions()[0].tolist()[: len(PREFIX)] == list(range(len(PREFIX)))
        assert a.evicted == b.evicted > 0
        assert (a.keys - b.keys).abs().max() < CLOSE
        assert (a.values - b.values).abs().max() < CLOSE
    if not FAMILIES[name].hybrid:  # whose own layers cannot go back
        kv.trim(ours, 20)
        kv.truncate(ours, len(PREFIX))  # the pinned prefix can be returned to
        with hf.exact_windows(model):
            assert (logits(model, more, ours, chunks) - expected).abs().max() < CLOSE


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, mode) for name in EVICTING for mode in ("greedy", "beams", "several") if mode == "greedy" or name in FEW],
)
def test_generating_under_a_policy_is_as_with_the_prompt_pinned(name: str, mode: str) -> None:
    model, rule, given_ = tiny(name), SlidingWindow(7, sinks=1), {**GREEDY, **MODES.get(mode, {})}
    kept = KVCacheManager(model, Pinned(len(PREFIX), rule), prefix_cache=in_memory())
    torch.manual_seed(5)
    expected = kept.generate(after(PREFIX), **given_)
    kv = manager(model, rule)
    torch.manual_seed(5)
    assert torch.equal(kv.generate(TEXT, prefix="p", **given_), expected)
    assert kv.report() == kept.report()
    assert any(layer.evicted for layer in kv.report().layers)


@pytest.mark.parametrize("name", ROTATING)
def test_generating_with_positions_that_move_along(name: str) -> None:
    # The text fits into the window beside the prefix: a chunk that evicts sees its pinned keys where its first query
    # does, so a prompt in one chunk would by definition be another thing than in two.
    model, rule = tiny(name), SlidingWindow(10, sinks=1)
    options = {"positions": "rerotated", "prefix_cache": in_memory()}
    expected = KVCacheManager(model, Pinned(len(PREFIX), rule), **options).generate(after(PREFIX), **GREEDY)
    assert torch.equal(manager(model, rule, **options).generate(TEXT, prefix="p", **GREEDY), expected)
    assert not torch.equal(expected, plain(name))  # what left is missed


def test_a_policy_for_each_layer() -> None:
    model, rules = tiny("llama"), [SlidingWindow(4), KeepAll()]
    kept = KVCacheManager(model, [Pinned(len(PREFIX), rule) for rule in rules], prefix_cache=in_memory())
    kv = manager(model, rules)
    assert torch.equal(kv.generate(TEXT, prefix="p", **GREEDY), kept.generate(after(PREFIX), **GREEDY))
    assert [layer.stored for layer in kv.report().layers] == [17, 33]


# ---------------------------------------------------------------------- shared beginnings


@pytest.mark.parametrize("kind", ["ids", "embeddings"])
def test_only_what_is_new_is_computed(kind: str) -> None:
    model = tiny("llama")
    kv = KVCacheManager(model, prefix_cache=in_memory())
    a = PREFIX if kind == "ids" else voice(model)
    other = token_ids(1, 13, seed=9)[0] if kind == "ids" else voice(model, seed=9)
    asked = [
        ("a", a, [13]),
        ("again", a.clone(), []),
        ("beginning", a[:6], []),
        ("longer", torch.cat((a, other[:4])), [4]),
        ("branch", torch.cat((a[:8], other[:5])), [5]),
        ("branch of the branch", torch.cat((a[:8], other[:3], a[:2])), [2]),
        ("other", other, [13]),
        ("inside", a[1:], [12]),  # what is the same is not at the beginning
    ]
    for name, content_, runs in asked:
        with forwarded(model) as counts:
            kv.add_prefix(name, content_)
        assert counts == runs, name
    with forwarded(model) as counts:
        for name, content_, _ in asked:
            assert_holds(kv, name, content_)
    assert counts == [len(content_) for _, content_, _ in asked]  # the references; ours ran nothing
    stats = kv.prefix_cache.stats()
    assert (stats.built, stats.extended, stats.refused) == (3, 3, 0)
    assert kv.prefixes == tuple(name for name, _, _ in asked)


@pytest.mark.parametrize("name", DECODERS)
def test_a_prefix_that_begins_like_another_says_what_the_model_says(name: str) -> None:
    model, kv = tiny(name), manager(tiny(name))
    longer = torch.cat((PREFIX[:10], token_ids(1, 6, seed=8)[0]))
    with forwarded(model) as counts:
        kv.add_prefix("longer", longer)
    assert counts == [6]
    assert torch.equal(kv.generate(TEXT, prefix="longer", **GREEDY), model.generate(after(longer), **GREEDY))
    assert torch.equal(kv.generate(TEXT, prefix="p", **GREEDY), plain(name))


def test_managers_share_what_a_store_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCACHE_HOME", str(tmp_path))
    first, second = build("llama"), build("llama")
    kv = KVCacheManager(first, MaxTokens(64))  # by itself in memory over disk
    kv.add_prefix("p", PREFIX)
    kv.prefix_cache.close()
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    later = KVCacheManager(second, SlidingWindow(20))  # as another process would
    with forwarded(second) as counts:
        later.add_prefix("voice", PREFIX[None])
        again = KVCacheManager(second, prefix_cache=later.prefix_cache)
        again.add_prefix("the same", PREFIX)
    assert counts == []
    assert later.prefix_cache.stats().hits == {"memory": 1, "disk": 1}
    for served, name in ((later, "voice"), (again, "the same")):
        assert_holds(served, name, PREFIX)
    later.prefix_cache.close()


def test_names_are_replaced_and_forgotten() -> None:
    model, other = tiny("llama"), token_ids(1, 5, seed=9)[0]
    kv = manager(model)
    kv.add_prefix("q", PREFIX)
    kv.add_prefix("p", other)
    assert kv.prefixes == ("p", "q")
    assert torch.equal(kv.generate(TEXT, prefix="p", **GREEDY), model.generate(after(other), **GREEDY))
    assert torch.equal(kv.generate(TEXT, prefix="q", **GREEDY), plain("llama"))
    kv.remove_prefix("p")
    assert kv.prefixes == ("q",)
    with pytest.raises(InputError, match=r"no prefix 'p' \(known: 'q'\); add it with add_prefix\(\)"):
        kv.generate(TEXT, prefix="p", **GREEDY)
    with forwarded(model) as counts:
        kv.add_prefix("p", other)  # the store has it still
    assert counts == []


def test_what_is_pinned_stays_until_its_last_name_is_removed() -> None:
    model = tiny("llama")
    kv = KVCacheManager(model, prefix_cache=SpeakerCache(MemoryStore("20KB")))  # two of 13 tokens, not three
    kv.add_prefix("voice", PREFIX, pin=True)
    kv.add_prefix("the same", PREFIX)
    kv.remove_prefix("the same")

    def runs_after_others() -> list[int]:
        for seed in range(20, 23):
            kv.add_prefix("other", token_ids(1, 13, seed=seed)[0])
        with forwarded(model) as counts:
            kv.add_prefix("again", PREFIX)
        kv.remove_prefix("again") if "voice" not in kv.prefixes else None
        return counts

    assert runs_after_others() == []
    kv.remove_prefix("voice")
    kv.add_prefix("again", PREFIX)  # without a pin
    assert runs_after_others() == [13]


# ---------------------------------------------------------------------- what serves them


@pytest.fixture
def key() -> PrefixKey:
    return PrefixKey("model", torch.arange(6))


def never(*_: Any) -> PrefixSnapshot:
    raise AssertionError("nothing was to be computed")


def test_what_is_served_is_counted(key: PrefixKey, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix_cache, clock = in_memory(), Clock()
    monkeypatch.setattr(CACHE_CLOCK, clock)
    whole = some(key, seconds=6.0)
    starts: list[int | None] = []

    def extend(key_: PrefixKey, start: PrefixSnapshot | None) -> PrefixSnapshot:
        starts.append(None if start is None else len(start))
        clock.now += 3
        return some(key_, seconds=12.0)

    assert prefix_cache.get(key) is None
    built = prefix_cache.get_or_build(key, lambda: whole)
    assert all_bits(built) == all_bits(whole)
    assert all_bits(prefix_cache.get_or_build(key, never)) == all_bits(whole)
    assert all_bits(prefix_cache.get_or_extend(key, never)) == all_bits(whole)
    assert len(prefix_cache.get_or_extend(key.first(4), never)) == 4
    longer = PrefixKey("model", torch.arange(12))
    assert prefix_cache.get(longer) is None  # half of it is not it
    assert len(prefix_cache.get_or_extend(longer, partial(extend, longer))) == 12
    branch = PrefixKey("model", torch.tensor([0, 1, 2, 9]))
    assert len(prefix_cache.get_or_build(branch, lambda: some(branch))) == 4  # a beginning is known, and of no use
    other = PrefixKey("another model", torch.arange(6))
    prefix_cache.get_or_extend(other, partial(extend, other))
    assert starts == [6, None]
    stats = prefix_cache.stats()
    assert (stats.built, stats.extended, stats.refused) == (3, 1, 0)
    # 6 twice, 4 of 6, and the 6 with which the longer one began
    assert stats.seconds_saved == pytest.approx(6.0 + 6.0 + 4.0 + 6.0)
    assert stats.build_seconds == 6.0  # of the two that took their time
    assert stats.hits == {"memory": 3}
    assert stats.nbytes == {"memory": prefix_cache.store.nbytes}


class Lying(MemoryStore):
    """A store that gives what it was told to, whatever it is asked for."""

    said: PrefixSnapshot | None = None

    def get(self, key: PrefixKey) -> PrefixSnapshot | None:
        return self.said


@pytest.mark.parametrize(
    "lie",
    [
        PrefixKey("another model", torch.arange(6)),
        PrefixKey("model", torch.tensor([0, 1, 2, 3, 4, 7])),
        PrefixKey("model", torch.arange(7)),
        PrefixKey("model", torch.tensor([0, 1, 7])),
        PrefixKey("model", torch.zeros(6, 8)),
    ],
    ids=["model", "last-token", "longer", "branch", "embeddings"],
)
def test_no_store_is_trusted(key: PrefixKey, lie: PrefixKey) -> None:
    store = Lying()
    prefix_cache, store.said = SpeakerCache(store), some(lie)
    assert prefix_cache.get(key) is None
    assert prefix_cache.stats().refused == 1
    starts: list[Any] = []
    assert prefix_cache.get_or_extend(key, lambda start: starts.append(start) or some(key)).key == key
    assert starts == [None]
    assert prefix_cache.get_or_build(key, lambda: some(key)).key == key
    assert prefix_cache.stats().refused == 3
    assert prefix_cache.stats().seconds_saved == 0
