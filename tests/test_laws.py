"""The laws of `kvcache.testing`, each held to by every policy in every variant, against the oracle of a plain list.

Law 4 (save, load, fork) is in `test_prefix.py`; law 7 (a model's logits) is tested with the models. A new policy enters
by one line in `POLICIES`. `SEARCH=20 pytest tests/test_laws.py` searches twenty times as long, each run elsewhere.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import Phase, given
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from support.searching import search
from support.storages import STORAGES, exact_in

from kvcache import (
    CapacityError,
    GeometryError,
    KeepAll,
    KVLayer,
    MaxBytes,
    MaxTokens,
    Pinned,
    PolicyError,
    RollbackError,
    SizePolicy,
    SlidingWindow,
)
from kvcache.cache import Expected, short_ladder
from kvcache.cache import held_bytes as held_bytes_of
from kvcache.testing._laws import (
    HEADS,
    KEY_DIM,
    LAWS,
    VALUE_DIM,
    Pair,
    any_chunking,
    bytes_are_told,
    failed_call_changes_nothing,
    held_bytes,
    kept_is_named,
    layer_of,
    rows_commute,
    run,
    scenarios,
    state,
    tokens,
    truncate_then_append,
)

pytestmark = pytest.mark.one_release


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
VARIANTS = ("plain", "padded", "rerotated")


@dataclass(frozen=True)
class Kind:
    """A policy and a variant; makes layers, of a broken class where a mutant is asked for."""

    name: str
    variant: str
    layer: type[KVLayer] = KVLayer
    storage: str = "plain"

    @property
    def tolerance(self) -> float:
        """Pinned keys that are turned are quantized anew: what is attended to is off by half a scale."""
        return 1e-9 if self.storage != "plain" and self.variant == "rerotated" else 0.0

    def __str__(self) -> str:
        return f"{self.name}-{self.variant}-{self.storage}"

    def tokens(self, rows: int, count: int, seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
        queries, keys, values = tokens(rows, count, seed, dtype)
        storage = STORAGES[self.storage]
        return [queries, exact_in(storage, keys, "keys"), exact_in(storage, values, "values")]

    def policy(self, rows: int, dtype: torch.dtype = torch.float32, layers: int = 1) -> SizePolicy:
        policy = POLICIES[self.name]
        token = layers * rows * sum(held_bytes_of(STORAGES[self.storage], (HEADS, KEY_DIM, VALUE_DIM, dtype)))
        return policy(token) if callable(policy) else policy

    def __call__(self, padding: list[int], dtype: torch.dtype = torch.float32, layers: int = 1, **options) -> KVLayer:
        policy = self.policy(len(padding), dtype, layers)
        make = partial(self.layer, storage=STORAGES[self.storage])
        return layer_of(make, policy, self.variant, padding, dtype, layers, **options)


KINDS = [
    Kind(name, variant, storage=storage)
    for storage in STORAGES
    for name in POLICIES
    for variant in VARIANTS
    if variant != "rerotated" or name == "sinks" or (name.startswith("pinned") and name != "pinned-all")
]


def hold(law: Callable[..., None], kind: Kind, examples: int, **options) -> None:
    """Search for a scenario in which `kind` breaks `law`."""
    given(scenarios(kind.variant))(search(examples, **options)(lambda s: law(kind, s)))()


@pytest.fixture(autouse=True, scope="module")
def buffers_grow():
    with short_ladder():
        yield


@pytest.mark.search
@pytest.mark.grid(260)
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


@pytest.mark.search
def test_calls_in_any_order():
    run_state_machine_as_test(Interleaved, settings=search(150, stateful_step_count=12))


# ---------------------------------------------------------------------- what the matrix does not reach


def test_first_append_that_fails_takes_no_memory():
    layer = KVLayer(max_length=4, static=True, padding=torch.tensor([1, 0]), expected=Expected(rows=2))
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

    def _overwrite(self, *given):
        self._overwritten += 1
        result = super()._overwrite(*given)
        self._overwritten -= 1
        return result


class ForgetsSinks(KVLayer):
    """The ring runs over the pinned slots too."""

    def _overwrite(self, *given):
        policy, self.policy = self.policy, SlidingWindow(self.policy.limit)
        result = super()._overwrite(*given)
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
        return 0 if self._buffer is None else sum(t.nbytes for t in self._buffer.parts["keys"].values())


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
        hold(law, Kind(name, variant, mutant), max(20, LAWS[law]), whole=True, phases=[Phase.generate])
