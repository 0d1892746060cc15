"""Law 4 of prefixes: save -> load -> continue = continue, and a fork changes nothing but itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.families import build, cases, logits, tiny, token_ids
from support.inside.testing import BUFFERS, Pair, tokens
from support.prefixes import CLOSE, DECODERS, PREFIX, TEXT, after, all_bits, in_memory, manager, snapshot_of
from support.searching import search
from test_laws import KINDS, Kind
from transformers import DynamicCache, StaticCache

from kvcache import (
    CapacityError,
    GeometryError,
    InputError,
    KeepAll,
    KVCacheManager,
    KVLayer,
    MaxTokens,
    Pinned,
    PrefixKey,
    PrefixSnapshot,
    SizePolicy,
    SlidingWindow,
)
from kvcache import models as hf
from kvcache.cache import CacheSpec
from kvcache.models import ManagedCache, ManagedLayer

# ---------------------------------------------------------------------- law 4, on bare layers beside the oracle


@dataclass(frozen=True)
class Behind(Kind):
    """A kind whose policy is about what follows a pinned prefix, as the manager makes it."""

    prefix: int = 0

    def policy(self, rows: int, dtype: torch.dtype = torch.float32, layers: int = 1) -> SizePolicy:
        return Pinned(self.prefix, super().policy(rows, dtype, layers))


class Fork(Pair):
    """A layer that began with a snapshot, beside an oracle that was given all of it; a third layer was given all too."""

    def __init__(self, kind: Kind, snapshot: PrefixSnapshot, rows: int, buffer: str, dtype: torch.dtype, seed: int):
        super().__init__(kind, [0] * rows, dtype, **BUFFERS[buffer])
        self.snapshot, self.seed = snapshot, seed
        self.direct = kind([0] * rows, dtype, **BUFFERS[buffer])
        self.begin()

    def begin(self) -> None:
        rows, (keys, values) = len(self.oracle.padding), (t[0] for t in zip(*self.snapshot.layers, strict=True))
        self.snapshot.write_to(ManagedCache([ManagedLayer(self.layer)]), rows)
        keys, values = keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)
        self.direct.append(keys, values)
        self.oracle.append(torch.zeros_like(keys), keys, values)
        self.check()

    def append(self, count: int) -> None:
        fresh = self.make.tokens(len(self.oracle.padding), count, 1000 * self.seed + self.layer.seen, self.dtype)
        self.oracle.append(*fresh)
        ours, theirs = self.layer.append(*fresh[1:]).states, self.direct.append(*fresh[1:]).states
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))  # turned keys too: to the bit
        self.check()

    def truncate(self, length: int) -> None:
        if self.oracle.can_truncate(length):
            for layer in (self.layer, self.direct, self.oracle):
                layer.truncate(length)

    def trim(self, most: int) -> None:
        most = max(1, self.layer.policy.pinned, most)
        assert self.layer.trim(most) == self.direct.trim(most)
        self.oracle.drop(most)

    def reorder(self, first: int) -> None:
        rows = [(first + i) % len(self.oracle.padding) for i in range(len(self.oracle.padding))]
        self.layer.select(torch.tensor(rows))
        self.direct.select(torch.tensor(rows))
        self.oracle.select(rows)

    def begin_again(self, _: int) -> None:
        for layer in (self.layer, self.direct):
            layer.reset()
        self.oracle.truncate(0)
        self.begin()


STEPS: dict[str, Callable[[Fork, int], None]] = {
    "append": Fork.append,
    "one": lambda fork, n: [fork.append(1) for _ in range(n)] and None,
    "truncate": lambda fork, n: fork.truncate(max(0, fork.layer.seen - n)),
    "back": lambda fork, n: fork.truncate(len(fork.snapshot)),
    "trim": lambda fork, n: fork.trim(fork.layer.stored - n),
    "reorder": Fork.reorder,
    "begin again": Fork.begin_again,
}


@st.composite
def lives(draw: st.DrawFn, kind: Kind) -> dict[str, Any]:
    """A prefix, how it was computed, and what happens to two forks of it in turns."""
    chunks = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    pinned = "bytes" not in kind.name and draw(st.booleans())  # a budget in bytes would have to hold the prefix too
    steps = st.tuples(st.integers(0, 1), st.sampled_from(list(STEPS)), st.integers(1, 4))
    return {
        "kind": Behind(kind.name, kind.variant, storage=kind.storage, prefix=sum(chunks)) if pinned else kind,
        "chunks": chunks,
        "rows": draw(st.lists(st.integers(1, 3), min_size=2, max_size=2)),
        "buffers": draw(st.lists(st.sampled_from(["grown", "preallocated"]), min_size=2, max_size=2)),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "secret": draw(st.sampled_from([None, b"secret"])),
        "steps": draw(st.lists(steps, min_size=2, max_size=7)),
    }


def taken(kind: Kind, chunks: Sequence[int], dtype: torch.dtype, row: int = 0) -> PrefixSnapshot:
    """A snapshot of one row of a layer that was fed these chunks, and that goes on afterwards."""
    layer = KVLayer()
    for i, count in enumerate(chunks):
        layer.append(*kind.tokens(2, count, i, dtype)[1:])
    ids = torch.arange(sum(chunks))
    snapshot = PrefixSnapshot.of([layer], PrefixKey("model", ids), row=row, build_seconds=0.25)
    before = all_bits(snapshot)
    layer.append(*tokens(2, 1, dtype=dtype)[1:])
    layer.reset()
    layer.append(*tokens(2, 5, dtype=dtype)[1:])
    assert all_bits(snapshot) == before
    return snapshot


@pytest.mark.search
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.variant != "padded"], ids=str)
def test_law_4_saved_loaded_and_forked_is_as_if_all_had_been_appended(kind: Kind) -> None:
    def law(life: dict[str, Any]) -> None:
        saved = taken(life["kind"], life["chunks"], life["dtype"])
        loaded = PrefixSnapshot.from_bytes(saved.to_bytes(life["secret"]), life["secret"])
        before = all_bits(saved)
        assert all_bits(loaded) == before
        # One fork of each; rows and policies are their own, and what is done to the one is seen by neither.
        forks = [
            Fork(life["kind"], snapshot, life["rows"][i], life["buffers"][i], life["dtype"], seed=1 + i)
            for i, snapshot in enumerate((saved, loaded))
        ]
        forks.append(Fork(life["kind"], loaded, 2, "grown", life["dtype"], seed=3))
        for i, step, n in life["steps"]:
            if forks[i].layer.seen + n < 60:  # the buffers end at 64
                STEPS[step](forks[i], n)
            for fork in forks:
                fork.check()
        assert all_bits(saved) == all_bits(loaded) == before

    given(lives(kind))(search(6)(law))()


# ---------------------------------------------------------------------- law 4, through a model


POLICIES: dict[str, Any] = {
    "all": None,
    "window": SlidingWindow(6),
    "sinks": SlidingWindow(6, sinks=2),
    "max": MaxTokens(9, low_water=4),
    "pinned": Pinned(3, SlidingWindow(5)),
    "pinned-all": Pinned(3, KeepAll()),
    "per-layer": (SlidingWindow(7, sinks=1), KeepAll()),
}


def pinned(policy: Any, tokens_: int) -> Any:
    """What a manager's policy becomes behind a prefix, said by hand."""
    if policy is None:
        return None
    return Pinned(tokens_, policy) if isinstance(policy, SizePolicy) else [Pinned(tokens_, p) for p in policy]


@search(30)
@given(
    policy=st.sampled_from(list(POLICIES)),
    rows=st.integers(1, 3),
    length=st.integers(1, 20),
    chunks=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    rerotated=st.booleans(),
)
def test_law_4_a_model_goes_on_from_a_saved_prefix_as_from_its_own(
    policy: str, rows: int, length: int, chunks: list[int], rerotated: bool
) -> None:
    model, ids, more = tiny("llama"), token_ids(1, length, seed=length)[0], token_ids(rows, sum(chunks), seed=rows)
    positions = "rerotated" if rerotated else "absolute"
    kv = manager(model, POLICIES[policy], ids, positions=positions)
    computed = snapshot_of(kv, ids)
    loaded = PrefixSnapshot.from_bytes(computed.to_bytes())
    before = all_bits(loaded)
    kept = KVCacheManager(model, pinned(POLICIES[policy], length), positions=positions, prefix_cache=in_memory())
    whole, held = kept.new_cache(rows), kept.new_cache(rows)
    loaded.write_to(held, rows)
    with hf.exact_windows(model):
        expected = logits(model, after(ids, more), whole, [length, *chunks])[:, length:]
        # 1e-4 in fp32: the reference runs the prefix in all rows at once, which adds up in another order.
        assert (logits(model, more, held, chunks) - expected).abs().max() < CLOSE
        by_name = kv.new_cache(rows, prefix="p")
        assert (logits(model, more, by_name, chunks) - expected).abs().max() < CLOSE
        for again in (held, by_name):
            kv.truncate(again, length)  # back to the pinned prefix, and on
            assert (logits(model, more, again, chunks) - expected).abs().max() < CLOSE
            again.reset()
            loaded.write_to(again, rows)
            assert (logits(model, more, again, chunks) - expected).abs().max() < CLOSE
    assert all_bits(loaded) == all_bits(computed) == before


CACHES: dict[str, Callable[[Any], Any]] = {
    "ours": lambda model: hf.new_cache(model),
    "static-ours": lambda model: hf.new_cache(model, CacheSpec(max_length=64, static=True)),
    "dynamic": lambda model: DynamicCache(),
    "dynamic-of-config": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=64),
}


@pytest.mark.grid(40)
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize(("name", "attention"), cases(DECODERS))
def test_a_fork_goes_into_any_cache_and_changes_nothing_but_it(name: str, attention: str, kind: str) -> None:
    model, make = tiny(name, attention), CACHES[kind]
    snapshot = snapshot_of(manager(model))
    before, expected = all_bits(snapshot), logits(model, after(PREFIX))[:, len(PREFIX) :]
    if kind == "static" and not takes_a_static_cache(name, attention):
        pytest.skip("this release's own static cache does not work with this model")
    held, other = make(model), make(model)
    snapshot.write_to(held, 2)
    snapshot.write_to(other, 2)
    assert int(held.get_seq_length()) == len(PREFIX)
    assert (logits(model, TEXT, held, (4, 1, 1, 3)) - expected).abs().max() < CLOSE
    held.reset()
    # The other one goes on as if there were none beside it.
    assert (logits(model, TEXT, other) - expected).abs().max() < CLOSE
    if kind == "dynamic":
        other.crop(-5)
    assert all_bits(snapshot) == before


@cache
def takes_a_static_cache(name: str, attention: str) -> bool:
    model = tiny(name, attention)
    try:
        own = logits(model, TEXT, StaticCache(config=model.config, max_cache_len=64))
    except RuntimeError:
        return False
    return bool((own - logits(model, TEXT)).abs().max() < CLOSE)


@pytest.mark.parametrize("rows", [1, 3])
def test_what_a_fork_holds_is_the_snapshot_to_the_bit(rows: int) -> None:
    snapshot = snapshot_of(manager(tiny("llama")))
    for make in CACHES.values():
        held = make(tiny("llama"))
        snapshot.write_to(held, rows)
        for layer, states in zip(held.layers, snapshot.layers, strict=True):
            for ours, theirs in zip((layer.keys, layer.values), states, strict=True):
                assert torch.equal(ours[:, :, : len(PREFIX)], theirs.expand(rows, -1, -1, -1))
                assert ours.untyped_storage().data_ptr() != theirs.untyped_storage().data_ptr()


def test_a_fork_that_is_refused_changes_nothing() -> None:
    model = tiny("llama")
    snapshot = snapshot_of(manager(model))
    used, beside = hf.new_cache(model), hf.new_cache(model, CacheSpec((SlidingWindow(4), KeepAll()), max_length=12))
    logits(model, TEXT, used)
    refused = [
        (InputError, used, 2, "already holds 9 tokens.*reset"),
        (GeometryError, hf.new_cache(build("llama", num_hidden_layers=3)), 2, "2 layers, the cache 3"),
        (
            GeometryError,
            hf.new_cache(model, rows=3),
            2,
            r"made for 3 rows, got 2; make it with new_cache\(batch_size=2",
        ),
        (
            CapacityError,
            hf.new_cache(model, CacheSpec(max_length=12)),
            1,
            "cannot append 13 tokens: 0 of 12 slots used; raise",
        ),
        (CapacityError, beside, 1, "cannot append 13"),  # its first layer could take them
        (CapacityError, StaticCache(config=model.config, max_cache_len=12), 1, "13 tokens, the cache room for 12"),
    ]
    for error, held, rows, words in refused:
        before = [int(layer.get_seq_length()) for layer in held.layers]
        with pytest.raises(error, match=words):
            snapshot.write_to(held, rows)
        assert [int(layer.get_seq_length()) for layer in held.layers] == before
    snapshot.first(12).write_to(beside, 1)
    assert [layer.kv.stored for layer in beside.layers] == [4, 12]
