"""The laws of a cache layer, each held to by every policy in every variant, against the oracle of a plain list.

Law 4 (save, load, fork) is in `test_prefix.py`; law 7 (a model's logits) is tested with the models. A new policy enters
by one line in `POLICIES`. `LAW_SEARCH=20 pytest tests/test_laws.py` searches twenty times as long, each run elsewhere.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from oracle import Oracle

import kvcache.slots
from kvcache import (
    CacheGeometry,
    CapacityError,
    GeometryError,
    KeepAll,
    KeyRotation,
    KVLayer,
    MaxBytes,
    MaxTokens,
    Pinned,
    PolicyError,
    RollbackError,
    SizePolicy,
    SlidingWindow,
    estimate_bytes,
)

HEADS, KEY_DIM, VALUE_DIM, MAX_LENGTH = 2, 6, 3, 64
FREQUENCIES = torch.tensor([1.0, 0.1])  # four of the six key channels are rotary
PHASES = {"phases": [Phase.generate, Phase.shrink]}  # explaining a failure takes longer than finding it
LONGER = int(os.environ.get("LAW_SEARCH", "1"))


def search(examples: int, **options) -> settings:
    """So many examples, the same on every run; with LAW_SEARCH, so many times as many, new on every run."""
    options = PHASES | options
    return settings(max_examples=examples * LONGER, derandomize=LONGER == 1, deadline=None, database=None, **options)


# ---------------------------------------------------------------------- what is tested: policy x variant


@dataclass(frozen=True)
class Halving(SizePolicy):
    """A user's own policy, as the documentation writes it."""

    limit: int

    def keep(self, count: int) -> int:
        return count if count <= self.limit else self.limit // 2


POLICIES = {
    "all": KeepAll(),
    "window": SlidingWindow(5),
    "one": SlidingWindow(1),
    "sinks": SlidingWindow(4, sinks=2),
    "max": MaxTokens(8),
    "max-low": MaxTokens(9, low_water=3),
    "max-one": MaxTokens(4, low_water=1),
    "max-full": MaxTokens(6, low_water=6),
    "own": Halving(7),
    "bytes": lambda token: MaxBytes(14 * token),  # of the bytes of a token in all rows and layers
    "bytes-low": lambda token: MaxBytes(12 * token + 1, low_water=0.5),
}
POLICIES |= {
    f"pinned-{name}": (lambda token, p=p: Pinned(3, p(token))) if callable(p) else Pinned(3, p)
    for name, p in POLICIES.items()
}
BUFFERS = {
    "grown": {},
    "static": {"max_length": MAX_LENGTH},
    "preallocated": {"max_length": MAX_LENGTH, "preallocate": True},
}
VARIANTS = ("plain", "padded", "rerotated")


@dataclass(frozen=True)
class Kind:
    """A policy and a variant; makes layers, of a broken class where a mutant is asked for."""

    name: str
    variant: str
    layer: type[KVLayer] = KVLayer

    def __str__(self) -> str:
        return f"{self.name}-{self.variant}"

    def policy(self, rows: int, dtype: torch.dtype = torch.float32, layers: int = 1) -> SizePolicy:
        policy = POLICIES[self.name]
        token = layers * rows * HEADS * (KEY_DIM + VALUE_DIM) * dtype.itemsize
        return policy(token) if callable(policy) else policy

    def __call__(self, padding: list[int], dtype: torch.dtype = torch.float32, layers: int = 1, **options) -> KVLayer:
        rotation = KeyRotation(FREQUENCIES) if self.variant == "rerotated" else None
        return self.layer(
            self.policy(len(padding), dtype, layers),
            padding=torch.tensor(padding),
            rotation=rotation,
            layers=layers,
            rows=len(padding),
            token_bytes=(HEADS * KEY_DIM * dtype.itemsize, HEADS * VALUE_DIM * dtype.itemsize),
            **options,
        )


KINDS = [
    Kind(name, variant)
    for name in POLICIES
    for variant in VARIANTS
    if variant != "rerotated" or name == "sinks" or (name.startswith("pinned") and name != "pinned-all")
]


@dataclass(frozen=True)
class Scenario:
    """What is done to a layer. Each law takes from it what it needs."""

    padding: list[int]
    chunks: list[int]
    more: list[int]
    cut: int
    rows: list[int]
    buffer: str
    dtype: torch.dtype


def scenarios(variant: str) -> st.SearchStrategy[Scenario]:
    # Chunks, and runs of single tokens long enough to go round a ring; 60 tokens at most, fewer than MAX_LENGTH.
    piece = st.integers(1, 9).map(lambda n: [n]) | st.integers(2, 12).map(lambda n: [1] * n)
    return st.builds(
        Scenario,
        padding=st.lists(st.integers(0, 12) if variant == "padded" else st.just(0), min_size=1, max_size=3),
        chunks=st.lists(piece, min_size=1, max_size=4).map(lambda pieces: [n for piece in pieces for n in piece]),
        more=piece,
        cut=st.integers(-12, 8),  # from the start, or from the end: about the pinned tokens and the last eviction
        rows=st.lists(st.integers(0, 2), min_size=1, max_size=4),
        buffer=st.sampled_from(list(BUFFERS)),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    )


# ---------------------------------------------------------------------- a layer beside its oracle


def turn(key: torch.Tensor, delta: int) -> torch.Tensor:
    """A rotary key ``[H, D]`` some positions on, by complex numbers: nothing shared with `KeyRotation`."""
    n = len(FREQUENCIES)
    pairs = torch.complex(key[:, :n].double(), key[:, n : 2 * n].double()) * torch.exp(
        1j * FREQUENCIES.double() * delta
    )
    return torch.cat((pairs.real, pairs.imag, key[:, 2 * n :].double()), 1)


def tokens(rows: int, count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Queries, keys and values of `count` tokens."""
    generator = torch.Generator().manual_seed(seed)
    dims = (KEY_DIM, KEY_DIM, VALUE_DIM)
    return [torch.randn(rows, HEADS, count, dim, generator=generator).to(dtype) for dim in dims]


class Pair:
    """A layer and the oracle, fed the same tokens and compared after each call."""

    def __init__(self, make: Callable[..., KVLayer], padding: list[int], dtype: torch.dtype = torch.float32, **options):
        self.layer, self.dtype = make(padding, dtype, **options), dtype
        self.oracle = Oracle(self.layer.policy, padding, turn if self.layer.rotation else None)
        self.history = tokens(len(padding), 0, dtype=dtype)

    def append(self, count: int) -> None:
        fresh = tokens(len(self.oracle.padding), count, seed=1 + self.layer.seen, dtype=self.dtype)
        self.history = [torch.cat(both, 2) for both in zip(self.history, fresh, strict=True)]
        expected, start = self.oracle.append(*fresh), self.layer.seen
        mask = self.layer.mask(count)
        keys, values = self.layer.append(*fresh[1:])
        if self.dtype == torch.float32:
            outputs = torch.nn.functional.scaled_dot_product_attention(fresh[0], keys, values, attn_mask=mask)
            real = torch.arange(start, start + count) >= torch.tensor(self.oracle.padding)[:, None]
            # fp32 softmax over some twenty keys of unit size rounds by 1e-6; a wrong token would show as 0.1.
            difference = (outputs - expected).abs().amax((1, 3))[real]
            assert difference.numel() == 0 or difference.max() < 1e-5, "attention differs from the oracle's"
        self.check()

    def check(self) -> None:
        """The layer holds what the oracle holds: bit by bit, each token by its own position."""
        layer, oracle = self.layer, self.oracle
        assert layer.seen == oracle.seen
        assert layer.stored == len(oracle.rows[0])
        assert layer.evicted == oracle.seen - len(oracle.rows[0])
        assert layer.policy.limit is None or layer.stored <= layer.policy.limit
        if layer.seen == 0 and layer.keys is None:
            return
        assert layer.keys.shape[2] == layer.values.shape[2] == layer.stored <= layer.capacity
        positions = layer.positions().expand(len(oracle.rows), -1).tolist()
        for b, (pads, row) in enumerate(zip(oracle.padding, oracle.rows, strict=True)):
            held = sum(token[0] < pads for token in row)
            # What is left of the padding is the first slots, as the caller's own mask has it; which pads is all one.
            assert all(position < pads for position in positions[b][:held])
            real = row[held:]
            assert sorted(positions[b][held:]) == [position for position, _, _ in real]
            if real:
                slots = [positions[b].index(position, held) for position, _, _ in real]
                assert torch.equal(layer.values[b, :, slots], torch.stack([value for _, _, value in real], 1))
                # Pinned keys may be turned: what is seen of them is compared in `append`.
                turned = layer.policy.pinned if layer.rotation else 0
                for slot, (_, key, _) in zip(slots[turned:], real[turned:], strict=True):
                    assert torch.equal(layer.keys[b, :, slot], key)

    def select(self, rows: list[int]) -> None:
        self.layer.select(torch.tensor(rows))
        self.selected(rows)

    def selected(self, rows: list[int]) -> None:
        self.oracle.select(rows)
        self.history = [t[rows] for t in self.history]
        self.oracle.policy = self.layer.policy  # a budget in bytes holds fewer tokens of more rows
        if self.layer.policy.limit is not None:
            self.oracle.drop(self.layer.policy.limit)
        self.check()


def run(make: Callable[..., KVLayer], s: Scenario, **options) -> Pair:
    pair = Pair(make, s.padding, **options, **BUFFERS[s.buffer])
    for count in s.chunks:
        pair.append(count)
    return pair


def state(layer: KVLayer) -> dict:
    """All that a layer is: its tensors by their bytes (free slots too), anything else by value."""

    def bits(x):
        return (x.shape, x.dtype, x.contiguous().view(-1).view(torch.uint8).tolist()) if torch.is_tensor(x) else x

    return {name: bits(value) for name, value in vars(layer).items()}


def held_bytes(layer: KVLayer) -> int:
    """Bytes of the storages behind all keys and values of a layer."""
    held = [x.untyped_storage() for x in vars(layer).values() if torch.is_tensor(x) and x.dim() == 4]
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


# ---------------------------------------------------------------------- the laws


def any_chunking(make: Callable[..., KVLayer], s: Scenario) -> None:
    """Law 1: any chunking of the same tokens gives the attention outputs, and keeps the tokens, of one by one.

    Re-rotated keys are the exception by definition: a chunk sees its pinned keys directly before the retained tail as
    its *first* query attends to it. A chunk that evicts within itself therefore differs from its tokens one by one, and
    is compared with the oracle, which has the same definition, in its own chunking.
    """
    run(make, s)


def truncate_then_append(make: Callable[..., KVLayer], s: Scenario) -> None:
    """Law 2: what was truncated was never appended; a roll back over evicted tokens is refused."""
    pair = run(make, s)
    seen, capacity = pair.layer.seen, pair.layer.capacity
    length = max(0, seen + s.cut) if s.cut < 0 else min(seen, s.cut)
    if pair.oracle.can_truncate(length):
        pair.layer.truncate(length)
        history, old = [t[:, :, :length] for t in pair.history], pair.oracle
        pair.oracle, pair.history = Oracle(old.policy, old.padding, old.turn), history
        if length:
            pair.oracle.append(*history)
        assert pair.layer.capacity == capacity
    else:
        before = state(pair.layer)
        with pytest.raises(RollbackError):
            pair.layer.truncate(length)
        assert state(pair.layer) == before
    pair.check()
    for count in s.more:
        pair.append(count)


def reset_then_append(make: Callable[..., KVLayer], s: Scenario) -> None:
    """Law 2: a reset layer is a fresh one that has its memory already."""
    pair = run(make, s)
    capacity = pair.layer.capacity
    pair.layer.reset()
    pair.oracle = Oracle(pair.oracle.policy, pair.oracle.padding, pair.oracle.turn)
    pair.check()
    assert pair.layer.capacity == capacity
    for count in s.more:
        pair.append(count)


def kept_is_named(make: Callable[..., KVLayer], s: Scenario) -> None:
    """Law 3: kept are the row's pinned tokens and its most recent ones, as many as the policy says, in any dtype."""
    pair = Pair(make, s.padding, s.dtype, **BUFFERS[s.buffer])
    layer, stored = pair.layer, 0
    pinned, limit = layer.policy.pinned, layer.policy.limit
    for count in s.chunks:
        pair.append(count)
        for _ in range(count):
            stored = layer.policy.keep(stored + 1)
        assert layer.stored == stored
        for pads, row in zip(s.padding, layer.positions().expand(len(s.padding), -1), strict=True):
            real = sorted(int(p) for p in row if p >= pads)
            left = max(0, pads - (layer.seen - stored)) if layer.seen > pads else stored  # pads still held
            first = range(pads, min(pads + pinned, layer.seen))
            assert len(real) == stored - left
            assert real[: len(first)] == list(first)
            assert real[len(first) :] == list(range(layer.seen - len(real) + len(first), layer.seen))
        if limit is None or layer.seen <= limit:  # untouched, in order
            assert torch.equal(layer.keys, pair.history[1])
            assert torch.equal(layer.values, pair.history[2])


def failed_call_changes_nothing(make: Callable[..., KVLayer], s: Scenario) -> None:
    """Law 5: after a call that failed, all is as before, to the bit, and goes on as before."""
    pair = run(make, s)
    layer, rows = pair.layer, len(s.padding)
    _, k, v = tokens(rows, 2)
    _, k_more, v_more = tokens(rows + 1, 2)
    wrong = {
        "no heads": (k[:, 0], v),
        "one dimension more": (k, v[None]),
        "tokens of values": (k, v[:, :, :1]),
        "rows": (k_more, v_more),
        "heads": (k[:, :1], v[:, :1]),
        "key size": (k[..., :-1], v),
        "value size": (k, v[..., :-1]),
        "dtype of keys": (k.double(), v),
        "dtype of values": (k, v.half()),
        "device": (k.to("meta"), v.to("meta")),
    }
    calls = [(GeometryError, partial(layer.append, *given)) for given in wrong.values()]
    calls += [(PolicyError, partial(layer.trim, n)) for n in (-1, 0, layer.policy.pinned - 1)]
    refused = [n for n in range(layer.seen) if not pair.oracle.can_truncate(n)]
    calls += [(RollbackError, partial(layer.truncate, n)) for n in (-1, layer.seen + 1, *refused)]
    calls += [((IndexError, RuntimeError), partial(layer.select, torch.tensor([0] * (rows - 1) + [rows])))]
    if layer.max_length is not None and not layer.policy.evicts:
        calls += [(CapacityError, partial(layer.append, *tokens(rows, MAX_LENGTH - layer.stored + 1)[1:]))]
    before = state(layer)
    for error, call in calls:
        with pytest.raises(error):
            call()
        assert state(layer) == before
    for count in s.more:
        pair.append(count)


def rows_commute(make: Callable[..., KVLayer], s: Scenario) -> None:
    """Law 6: rows may be reordered, dropped and repeated before or after tokens are appended."""
    pair = run(make, s)
    rows = [i % len(s.padding) for i in s.rows][: 2 * len(s.padding)]  # of more rows, a budget would not hold a token
    pair.select(rows)
    for count in s.more:
        pair.append(count)
    if len(rows) <= len(s.padding):
        pair.layer.repeat(2)
        pair.selected([i for i in range(len(rows)) for _ in range(2)])
        for count in s.more[:1]:
            pair.append(count)


def bytes_are_told(make: Callable[..., KVLayer], s: Scenario) -> None:
    """Law 8: bytes reported = bytes held = bytes estimated; and a budget in bytes holds them."""
    rows, options, layers = len(s.padding), BUFFERS[s.buffer], 2
    pair = [make(s.padding, s.dtype, layers=layers, **options) for _ in range(layers)]
    assert sum(layer.nbytes for layer in pair) == 0
    geometry = CacheGeometry(layers, HEADS, KEY_DIM, VALUE_DIM, s.dtype)
    policy = make.policy(rows, s.dtype, layers)
    budget = policy.policy if isinstance(policy, Pinned) else policy
    for count in s.chunks:
        for layer in pair:
            layer.append(*tokens(rows, count, dtype=s.dtype)[1:])
        held = sum(held_bytes(layer) for layer in pair)
        assert sum(layer.nbytes for layer in pair) == held
        rerotate = pair[0].rotation is not None
        assert held == estimate_bytes(geometry, pair[0].seen, rows=rows, policy=policy, rerotate=rerotate, **options)
        assert not isinstance(budget, MaxBytes) or held <= budget.budget


LAWS = {
    any_chunking: 6,
    truncate_then_append: 20,
    reset_then_append: 4,
    kept_is_named: 8,
    failed_call_changes_nothing: 4,
    rows_commute: 10,
    bytes_are_told: 20,
}  # with the number of scenarios that each policy in each variant is tried on


def hold(law: Callable[..., None], kind: Kind, examples: int, **options) -> None:
    """Search for a scenario in which `kind` breaks `law`."""
    given(scenarios(kind.variant))(search(examples, **options)(lambda s: law(kind, s)))()


@pytest.fixture(autouse=True, scope="module")
def short_ladder():
    """Buffers of 4, 6, 9, 13 … slots, so that they grow within a few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvcache.slots, "_FIRST_SLOTS", 4)
        yield


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law, kind):
    hold(law, kind, LAWS[law])


# ---------------------------------------------------------------------- all calls in any order


class Interleaved(RuleBasedStateMachine):
    """Laws 1 to 3, 5 and 6 of a layer that is used in any order of calls."""

    @initialize(kind=st.sampled_from(KINDS), data=st.data())
    def make(self, kind: Kind, data: st.DataObject) -> None:
        s = data.draw(scenarios(kind.variant))
        self.pair = run(kind, s)
        # So many rows does a budget in bytes still hold beside what is pinned.
        self.most_rows = 2 * len(s.padding) if "bytes" in kind.name else 4

    @rule(count=st.integers(2, 9))
    def append_one_by_one(self, count: int) -> None:
        for _ in range(count):
            self.append_chunk(1)

    @rule(count=st.integers(1, 9))
    def append(self, count: int) -> None:
        self.append_chunk(count)

    def append_chunk(self, count: int) -> None:
        layer = self.pair.layer
        if layer.max_length is not None and not layer.policy.evicts and layer.stored + count > layer.max_length:
            with pytest.raises(CapacityError):
                layer.append(*tokens(len(self.pair.oracle.padding), count)[1:])
        else:
            self.pair.append(count)

    @rule(to=st.integers(-9, 8))
    def truncate(self, to: int) -> None:
        seen = self.pair.layer.seen
        length = max(0, seen + to) if to < 0 else min(seen, to)
        if self.pair.oracle.can_truncate(length):
            self.pair.layer.truncate(length)
            self.pair.oracle.truncate(length)
        else:
            with pytest.raises(RollbackError):
                self.pair.layer.truncate(length)

    @rule(most=st.integers(0, 12))
    def trim(self, most: int) -> None:
        layer, before = self.pair.layer, self.pair.layer.stored
        if most < max(1, layer.policy.pinned):
            with pytest.raises(PolicyError):
                layer.trim(most)
        else:
            left = layer.trim(most)
            self.pair.oracle.drop(most)
            assert left == before - min(before, most)

    @rule()
    def trim_as_the_policy_does(self) -> None:
        policy, before = self.pair.layer.policy, self.pair.layer.stored
        left = self.pair.layer.trim()
        most = before if policy.limit is None else max(policy.pinned, policy.keep(policy.limit + 1))
        self.pair.oracle.drop(most)
        assert left == before - min(before, most)

    @rule(rows=st.lists(st.integers(0, 3), min_size=1, max_size=4))
    def select(self, rows: list[int]) -> None:
        self.pair.select([i % len(self.pair.oracle.padding) for i in rows[: self.most_rows]])

    @rule()
    def reset(self) -> None:
        self.pair.layer.reset()
        self.pair.oracle.truncate(0)

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "pair"):
            self.pair.check()


def test_calls_in_any_order():
    run_state_machine_as_test(Interleaved, settings=search(150, stateful_step_count=12))


# ---------------------------------------------------------------------- what the matrix does not reach


def test_first_append_that_fails_takes_no_memory():
    layer = KVLayer(max_length=4, preallocate=True, padding=torch.tensor([1, 0]), rows=2)
    before = state(layer)
    _, keys, values = tokens(2, 5)
    three = tokens(3, 2)[1:]
    refused = [(CapacityError, (keys, values)), (GeometryError, three), (GeometryError, (keys[:, :, :2], values))]
    for error, given_ in [*refused, (GeometryError, (keys[0, 0], values[0, 0]))]:
        with pytest.raises(error):
            layer.append(*given_)
        assert state(layer) == before
    with pytest.raises(GeometryError, match="padding is known for 2 rows, got 3"):
        KVLayer(padding=torch.tensor([1, 0])).append(*three)


def test_rows_that_a_budget_does_not_hold_are_refused_before_anything_changed():
    token = HEADS * (KEY_DIM + VALUE_DIM) * 4
    layer = KVLayer(Pinned(2, MaxBytes(8 * token)))
    layer.append(*tokens(1, 7)[1:])
    before = state(layer)
    for refused in (partial(layer.repeat, 4), partial(layer.select, torch.zeros(3, dtype=torch.long))):
        with pytest.raises(PolicyError, match="does not hold one token"):
            refused()
        assert state(layer) == before
    with pytest.raises(GeometryError, match="at least one"):
        layer.select(torch.tensor([], dtype=torch.long))
    assert state(layer) == before


def test_budget_holds_whatever_the_rows():
    token = HEADS * (KEY_DIM + VALUE_DIM) * 4
    layer = KVLayer(MaxBytes(64 * token), max_length=40)
    layer.append(*tokens(2, 60)[1:])
    for rows in ([0, 1, 0, 1], [3], [0] * 8, [1, 2]):
        layer.select(torch.tensor(rows))
        assert held_bytes(layer) <= 64 * token
        for count in (1, 30, 1, 1):
            layer.append(*tokens(len(rows), count)[1:])
            assert held_bytes(layer) <= 64 * token
            assert sorted(layer.positions()[0].tolist()) == list(range(layer.seen - layer.stored, layer.seen))


@pytest.mark.parametrize("make", [Kind("sinks", "padded"), Kind("bytes", "plain")], ids=str)
def test_rows_may_change_before_the_first_token(make):
    padding = [2, 0] if make.variant == "padded" else [0, 0]
    for change, rows in (
        (lambda layer: layer.select(torch.tensor([1, 0])), [1, 0]),
        (lambda layer: layer.select(torch.tensor([1])), [1]),
        (lambda layer: layer.repeat(2), [0, 0, 1, 1]),
    ):
        pair = Pair(make, padding)
        change(pair.layer)
        pair.selected(rows)
        pair.append(20)
        pair.append(1)


def test_inference_mode_may_end_between_calls():
    make = Kind("bytes", "plain")
    with torch.inference_mode():
        pair = Pair(make, [0])
        pair.append(20)
        pair.select([0, 0])
    pair.append(1)
    pair.append(9)
    pair.select([0])
    pair.append(9)


def test_no_gradient_flows_through_the_cache():
    layer = KVLayer(SlidingWindow(4))
    for count in (3, 1, 1, 6):
        _, keys, values = (t.requires_grad_() for t in tokens(1, count))
        layer.append(keys, values)
        assert not layer.keys.requires_grad
        assert not layer.values.requires_grad


# ---------------------------------------------------------------------- mutants: broken layers that the laws must catch


class OverwritesOneFurther(KVLayer):
    """The ring starts one slot late, so the oldest token outlives the next."""

    def _overwrite(self, keys, values):
        self._overwritten += 1
        result = super()._overwrite(keys, values)
        self._overwritten -= 1
        return result


class ForgetsSinks(KVLayer):
    """The ring runs over the pinned slots too."""

    def _overwrite(self, keys, values):
        policy, self.policy = self.policy, SlidingWindow(self.policy.limit)
        result = super()._overwrite(keys, values)
        self.policy = policy
        return result


class BringsTrimmedTokensBack(KVLayer):
    """Truncating lowers the counter alone."""

    def truncate(self, length):
        self.check_truncate(length)
        self.seen = length


class CountsBeforeItChecks(KVLayer):
    """Appending counts its tokens before it looks at them."""

    def append(self, keys, values):
        self.seen += keys.shape[2]
        self._check_shapes(keys, values)
        self.seen -= keys.shape[2]
        return super().append(keys, values)


class SelectsWithoutPadding(KVLayer):
    """Rows move, their padding does not."""

    def select(self, rows):
        padding = self.padding
        super().select(rows)
        self.padding = padding


class LetsAChunkSeeAll(KVLayer):
    """A causal mask: later tokens of a chunk see those that left during it."""

    def mask(self, fresh):
        width = self.retained + fresh
        return torch.ones(1, 1, fresh, width, dtype=torch.bool).tril(width - fresh)


class CountsKeysAlone(KVLayer):
    """The bytes of the values are not counted."""

    @property
    def nbytes(self):
        return sum(t.nbytes for t in (self._keys, self._pinned_keys) if t is not None)


MUTANTS = [
    (OverwritesOneFurther, any_chunking, "window", "plain"),
    (OverwritesOneFurther, kept_is_named, "sinks", "padded"),
    (ForgetsSinks, kept_is_named, "pinned-window", "plain"),
    (BringsTrimmedTokensBack, truncate_then_append, "all", "plain"),
    (CountsBeforeItChecks, failed_call_changes_nothing, "max", "plain"),
    (SelectsWithoutPadding, rows_commute, "sinks", "padded"),
    (LetsAChunkSeeAll, any_chunking, "max-low", "plain"),
    (CountsKeysAlone, bytes_are_told, "all", "plain"),
]


@pytest.mark.parametrize(("mutant", "law", "name", "variant"), MUTANTS, ids=lambda x: getattr(x, "__name__", x))
def test_laws_catch(mutant, law, name, variant):
    with pytest.raises((AssertionError, RuntimeError)):  # wrong, or so wrong that the shapes no longer fit
        hold(law, Kind(name, variant, mutant), max(20, LAWS[law]), phases=[Phase.generate])
