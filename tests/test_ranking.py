"""Policies that rank tokens, each beside a plain list of tokens that is ranked by the formulas of its paper.

The reference keeps Python floats and knows no tensors, masks or slots. First it stands beside single layers, then it takes
the place of the attention inside real models whose cache keeps everything.
"""

import cmath
import copy
import itertools
import math
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import pytest
import torch
from hypothesis import Phase, given
from hypothesis import strategies as st
from support.families import FAMILIES, build, dynamic_cache, logits, tiny, token_ids
from support.inside.testing import held_bytes, state
from support.searching import search
from support.storages import STORAGES, exact_in
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import kvcache.cache._slots
import kvcache.models as hf
from kvcache import (
    H2O,
    TOVA,
    ExpectedAttention,
    GeometryError,
    InputError,
    KeepAll,
    KeyDiff,
    KeyNorm,
    KeyRotation,
    KVCacheManager,
    KVLayer,
    LayerCache,
    Pinned,
    PolicyError,
    PositionsError,
    RankingPolicy,
    RollbackError,
    SizePolicy,
    SlidingWindow,
    SnapKV,
    Storage,
    pyramid_kv,
)
from kvcache.cache import RankedLayer, ScoringContext, attend
from kvcache.models import _attention as attention

KEY_DIM, VALUE_DIM = 4, 3
CLOSE = 1e-5  # fp32 sums of some forty numbers of size one; a wrong token shows as 0.01 and more


# ---------------------------------------------------------------------- the reference


@dataclass
class Token:
    """What one KV head of one row holds of a token."""

    position: int
    key: list[float]
    value: list[float]
    mass: float = 0.0


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def looks(query: Sequence[float], held: Sequence[Token], scaling: float) -> list[float]:
    """Softmax attention of a query over what it may see."""
    scores = [dot(query, token.key) * scaling for token in held]
    highest = max(scores, default=0.0)
    powers = [math.exp(score - highest) for score in scores]
    return [power / sum(powers) for power in powers]


def ahead(query: Sequence[float], distance: int, n_future_positions: int, frequencies: Sequence[float]) -> list[float]:
    """The mean of a query turned to each of the next positions; its first channels are the real parts, then the imaginary ones."""
    found, half = list(query), len(frequencies)
    for i, frequency in enumerate(frequencies):
        turns = [cmath.exp(1j * frequency * (distance + further)) for further in range(n_future_positions)]
        turned = complex(query[i], query[half + i]) * sum(turns) / n_future_positions
        found[i], found[half + i] = turned.real, turned.imag
    return found


class Reference:
    """One layer: for each row and KV head the list of its tokens, oldest first, pads among them."""

    def __init__(
        self,
        policy: SizePolicy,
        padding: Sequence[int],
        heads: int,
        groups: int,
        scaling: float,
        frequencies: Sequence[float] = (),
    ) -> None:
        self.frequencies = frequencies
        more = policy.count if isinstance(policy, Pinned) else 0
        self.how = policy.policy if isinstance(policy, Pinned) else policy
        self.pinned, self.limit, self.low = self.how.sinks + more, self.how.limit + more, self.how.low_water + more
        self.padding, self.heads, self.groups, self.scaling = list(padding), heads, groups, scaling
        self.rows: list[list[list[Token]]] = [[[] for _ in range(heads)] for _ in padding]
        self.queries: list[list[list[list[float]]]] = [[] for _ in padding]  # by row and token: one of each head
        self.seen = 0

    def append(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, choose: Callable | None = None):
        """Append a chunk; what its queries attend to, ``[row][head][token]``, None for pads. Then rank.

        Of tokens that score alike, `choose` says which stay: it must be a right choice.
        """
        given_queries, given_keys, given_values = queries.tolist(), keys.tolist(), values.tolist()
        fresh = keys.shape[2]
        outputs = []
        for b, row in enumerate(self.rows):
            outputs.append([[None] * fresh for _ in range(self.heads * self.groups)])
            for h, held in enumerate(row):
                for t in range(fresh):
                    held.append(Token(self.seen + t, given_keys[b][h][t], given_values[b][h][t]))
                    if self.seen + t < self.padding[b]:
                        continue
                    real = [token for token in held if token.position >= self.padding[b]]
                    for head in range(h * self.groups, (h + 1) * self.groups):
                        weights = looks(given_queries[b][head][t], real, self.scaling)
                        for token, weight in zip(real, weights, strict=True):
                            token.mass += weight
                        columns = zip(*(token.value for token in real), strict=True)
                        outputs[b][head][t] = [dot(weights, column) for column in columns]
            # What only pinned tokens looked at decides nothing, and of a prefix it is not known.
            if self.seen + fresh > self.pinned:
                self.queries[b] += [[one[t] for one in given_queries[b]] for t in range(fresh)]
        self.seen += fresh
        if len(self.rows[0][0]) > self.limit:
            self.rank(self.low, choose)
        return outputs

    def rank(self, stay: int, choose: Callable | None = None) -> None:
        for b, row in enumerate(self.rows):
            scores = [self.scores(b, h) for h in range(self.heads)]
            if isinstance(self.how, TOVA):  # all heads keep the same
                scores = [[sum(of) / self.heads for of in zip(*scores, strict=True)]] * self.heads
            for h, held in enumerate(row):
                order = sorted(range(len(held)), key=lambda i: (-self.stays(b, held[i]), -scores[h][i], i))
                kept = {held[i].position for i in order[:stay]}
                if choose is not None:
                    mine, kept = kept, set(choose(b, h))
                    worst = {1: math.inf, 2: math.inf, 0: math.inf}
                    assert len(kept) == len(mine) == stay
                    of = {token.position: (self.stays(b, token), scores[h][i]) for i, token in enumerate(held)}
                    assert kept <= set(of), "a token came from nowhere"
                    for position in kept:
                        worst[of[position][0]] = min(worst[of[position][0]], of[position][1])
                    for position in set(of) - kept:
                        group, score = of[position]
                        assert group < 2, f"{position} is pinned or recent and left"
                        assert group == 0 or all(of[p][0] > 0 for p in kept), "a pad outlives a token"
                        assert group == 0 or score <= worst[1] + CLOSE, f"{position} left, and a worse one stays"
                row[h] = [token for token in held if token.position in kept]

    def stays(self, b: int, token: Token) -> int:
        """2: never leaves; 1: is ranked; 0: a pad."""
        own = token.position - self.padding[b]
        if own < 0:
            return 0
        return 2 if own < self.pinned or token.position >= self.seen - self.how.window_size else 1

    def scores(self, b: int, h: int) -> list[float]:
        held, how = self.rows[b][h], self.how
        real = [token for token in held if self.stays(b, token)]
        if isinstance(how, H2O):
            return [token.mass / (self.seen - token.position if how.average else 1) for token in held]
        if isinstance(how, KeyNorm):
            return [-math.sqrt(dot(token.key, token.key)) for token in held]
        if isinstance(how, KeyDiff):
            units = [[x / math.sqrt(dot(token.key, token.key)) for x in token.key] for token in real]
            mean = [sum(column) / len(real) for column in zip(*units, strict=True)] if real else [1.0]
            size = math.sqrt(dot(mean, mean))
            return [
                -dot(token.key, mean) / size / math.sqrt(dot(token.key, token.key)) if self.stays(b, token) else 0.0
                for token in held
            ]
        if isinstance(how, ExpectedAttention):
            return self.expected(b, h)
        assert isinstance(how, SnapKV | TOVA)
        latest = self.queries[b][-how.query_window :]
        found = [0.0] * len(held)
        for back, heads in enumerate(reversed(latest)):
            at = self.seen - 1 - back
            if at < self.padding[b]:
                continue
            sees = [i for i, token in enumerate(held) if self.padding[b] <= token.position <= at]
            for head in range(h * self.groups, (h + 1) * self.groups):
                for i, weight in zip(sees, looks(heads[head], [held[i] for i in sees], self.scaling), strict=True):
                    found[i] += weight / self.groups / len(latest)
        if isinstance(how, TOVA):
            return found
        found = [0.0 if t.position >= self.seen - how.window_size else x for x, t in zip(found, held, strict=True)]
        half = how.kernel // 2
        return [sum(found[max(0, i - half) : i + half + 1]) / how.kernel for i in range(len(found))]

    def expected(self, b: int, h: int) -> list[float]:
        held, how, found = self.rows[b][h], self.how, [0.0] * len(self.rows[b][h])
        ranked = [i for i, token in enumerate(held) if token.position - self.padding[b] >= how.sinks]
        latest = list(enumerate(self.queries[b]))[-how.query_window :]
        first = self.seen - len(self.queries[b])  # the position of the first query that is known
        for head in range(h * self.groups, (h + 1) * self.groups):
            coming = [
                ahead(heads[head], self.seen - first - i, how.n_future_positions, self.frequencies)
                for i, heads in latest
                if first + i >= self.padding[b]
            ]
            count = max(1, len(coming))
            mean = [sum(query[d] for query in coming) / count for d in range(len(held[0].key))]
            scores = []
            for i in ranked:
                spread = sum((dot(query, held[i].key) - dot(mean, held[i].key)) ** 2 for query in coming) / count
                scores.append(self.scaling * dot(mean, held[i].key) + self.scaling**2 * spread / 2)
            powers = [math.exp(score - max(scores)) for score in scores]
            for i, power in zip(ranked, powers, strict=True):
                value = math.sqrt(dot(held[i].value, held[i].value))
                found[i] += power / sum(powers) / self.groups * value
        return found

    def select(self, rows: Sequence[int]) -> None:
        self.rows = [copy.deepcopy(self.rows[i]) for i in rows]
        self.queries = [list(self.queries[i]) for i in rows]
        self.padding = [self.padding[i] for i in rows]


# ---------------------------------------------------------------------- a layer beside it


@dataclass(frozen=True)
class FewQueries(SnapKV):
    """SnapKV that looks at what some four queries look at, so that a short text has more."""

    query_window: ClassVar[int] = 4


@dataclass(frozen=True)
class MoreQueries(SnapKV):
    """One that looks back as far as to pads."""

    query_window: ClassVar[int] = 12


@dataclass(frozen=True)
class FewExpected(ExpectedAttention):
    """Of so few queries that most have left."""

    query_window: ClassVar[int] = 5


RANKINGS: dict[str, Callable[..., RankingPolicy]] = {
    "heavy-average": H2O,
    "heavy-sum": partial(H2O, average=False),
    "snapkv": partial(FewQueries, kernel=3),
    "snapkv-wide": partial(MoreQueries, kernel=5),
    "snapkv-unsmoothed": partial(FewQueries, kernel=1),
    "tova": TOVA,
    "expected": partial(FewExpected, n_future_positions=3),
    "norm": KeyNorm,
    "diff": KeyDiff,
}
FREQUENCIES = [1.0, 0.1]  # of the layers' keys, for what turns them
NAMES = [f"{pinned}{name}" for name in RANKINGS for pinned in ("", "pinned-")]
WATCHING = [name for name in NAMES if "norm" not in name and "diff" not in name]


@dataclass(frozen=True)
class Scenario:
    """What a layer is, and what is done to it."""

    padding: list[int]
    heads: int
    groups: int
    sinks: int
    window_size: int
    beside: int  # tokens of the limit that are neither
    low: int  # below the limit
    chunks: list[int]
    more: list[int]
    rows: list[int]
    seed: int

    def policy(self, name: str) -> SizePolicy:
        limit = self.sinks + self.window_size + self.beside
        low = max(self.sinks + self.window_size + 1, limit - self.low)
        make = RANKINGS[name.removeprefix("pinned-")]
        policy = make(limit, sinks=self.sinks, window_size=self.window_size, low_water=low)
        return Pinned(3, policy) if name.startswith("pinned-") else policy


def chunkings(most: int = 4) -> st.SearchStrategy[list[int]]:
    piece = st.integers(1, 12).map(lambda n: [n]) | st.integers(2, 7).map(lambda n: [1] * n)
    return st.lists(piece, min_size=1, max_size=most).map(lambda pieces: [n for piece in pieces for n in piece])


SCENARIOS = st.builds(
    Scenario,
    padding=st.lists(st.integers(0, 5), min_size=1, max_size=2) | st.lists(st.just(0), min_size=1, max_size=2),
    heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    sinks=st.integers(0, 2),
    window_size=st.integers(1, 4),
    beside=st.integers(1, 8),
    low=st.integers(0, 4),
    chunks=chunkings(),
    more=chunkings(2),
    rows=st.lists(st.integers(0, 1), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)


def forward(
    layer: LayerCache, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None = None
) -> torch.Tensor:
    """Append and attend as a model does it, ``[batch, heads, tokens, value_dim]``."""
    return attend(queries, layer.append(keys, values).spans, scaling)


class Pair:
    """A layer and the reference, fed the same tokens and compared after each call."""

    def __init__(self, make: type[RankedLayer], name: str, s: Scenario) -> None:
        # A name may say how tokens are held: "snapkv/int4".
        self.s, self.make, (self.name, self.storage) = s, make, divided(name)
        self.history: list[torch.Tensor] = self.fresh(0)
        self.begin()

    def begin(self) -> None:
        self.policy = self.s.policy(self.name)
        turn = KeyRotation(torch.tensor(FREQUENCIES))
        self.layer = self.make(self.policy, self.storage, padding=torch.tensor(self.s.padding), turn=turn)
        self.reference = Reference(self.policy, self.s.padding, self.s.heads, self.s.groups, KEY_DIM**-0.5, FREQUENCIES)

    def fresh(self, count: int, rows: int | None = None) -> list[torch.Tensor]:
        """Queries, keys and values; some keys attract, so that scores lie apart."""
        seed = self.s.seed + 1000 * (self.history[0].shape[2] if hasattr(self, "history") else 0)
        generator = torch.Generator().manual_seed(seed)
        rows = rows if rows is not None else len(self.s.padding)
        sizes = ((self.s.heads * self.s.groups, KEY_DIM), (self.s.heads, KEY_DIM), (self.s.heads, VALUE_DIM))
        drawn = [torch.randn(rows, heads, count, dim, generator=generator) for heads, dim in sizes]
        return [drawn[0], exact_in(self.storage, drawn[1] * 1.5, "keys"), exact_in(self.storage, drawn[2], "values")]

    def append(self, count: int) -> None:
        rows = self.history[0].shape[0]
        fresh = self.fresh(count, rows)
        self.history = [torch.cat(both, 2) for both in zip(self.history, fresh, strict=True)]
        outputs = forward(self.layer, *fresh)
        held = self.layer.positions()
        assert held.shape == (rows, self.s.heads, self.layer.stored)
        expected = self.reference.append(*fresh, choose=lambda b, h: held[b, h].tolist())
        for b, row in enumerate(expected):
            for h, head in enumerate(row):
                for t, output in enumerate(head):
                    if output is not None:
                        off = (outputs[b, h, t] - torch.tensor(output)).abs().max()
                        assert off < CLOSE, f"what token {t} of the chunk attends to is {float(off):.2g} off"
        self.check()

    def check(self) -> None:
        layer, reference = self.layer, self.reference
        assert layer.seen == reference.seen
        assert layer.stored == len(reference.rows[0][0]) <= reference.limit
        assert layer.evicted == layer.seen - layer.stored
        if layer.seen == 0:
            return
        positions = layer.positions()
        rows, heads = torch.arange(positions.shape[0])[:, None, None], torch.arange(self.s.heads)[None, :, None]
        kept = [[[token.position for token in held] for held in row] for row in reference.rows]
        assert positions.tolist() == kept  # ascending, as the reference's are
        assert torch.equal(layer.keys, self.history[1][rows, heads, positions])
        assert torch.equal(layer.values, self.history[2][rows, heads, positions])
        for b, row in enumerate(kept):
            pads = reference.padding[b]
            first = set(range(pads, min(pads + reference.pinned, layer.seen)))
            last = set(range(max(pads, layer.seen - reference.how.window_size), layer.seen))
            assert all(first | last <= set(held) for held in row)

    def select(self, rows: list[int]) -> None:
        self.layer.select(torch.tensor(rows))
        self.selected(rows)

    def selected(self, rows: list[int]) -> None:
        self.reference.select(rows)
        self.history = [t[rows] for t in self.history]
        self.check()


def divided(name: str) -> tuple[str, Storage]:
    """A policy's name, and how its tokens are held."""
    policy, _, storage = name.partition("/")
    return policy, STORAGES[storage or "plain"]


def run(make: type[RankedLayer], name: str, s: Scenario) -> Pair:
    pair = Pair(make, name, s)
    for count in s.chunks:
        pair.append(count)
    return pair


# ---------------------------------------------------------------------- the laws


def keeps_what_the_paper_says(make: type[RankedLayer], name: str, s: Scenario) -> None:
    """After every append the kept tokens are those of the reference, and so is what its chunk attends to."""
    run(make, name, s)


def rows_commute(make: type[RankedLayer], name: str, s: Scenario) -> None:
    """Rows may be reordered, dropped and repeated between appends."""
    pair = run(make, name, s)
    pair.select([i % len(s.padding) for i in s.rows])
    for count in s.more:
        pair.append(count)
    pair.layer.repeat(2)
    pair.selected([i for i in range(len(s.rows)) for _ in range(2)])
    pair.append(s.more[0])


def reset_is_fresh(make: type[RankedLayer], name: str, s: Scenario) -> None:
    """A reset layer is a new one."""
    pair = run(make, name, s)
    layer = pair.layer
    layer.reset()
    pair.begin()
    pair.layer, pair.history = layer, [t[:, :, :0] for t in pair.history]
    pair.check()
    for count in s.more:
        pair.append(count)


def truncates_or_refuses(make: type[RankedLayer], name: str, s: Scenario) -> None:
    """Rolled back is never appended; where that cannot be, it is refused."""
    pair = run(make, name, s)
    layer, watches = pair.layer, pair.policy.ranking.observes
    before = state(layer)
    for length in range(-1, layer.seen + 2):
        possible = length in (0, layer.seen) or (not watches and floor(pair, s) <= length <= layer.seen)
        if not possible:
            with pytest.raises(RollbackError):
                layer.truncate(length)
            assert state(layer) == before
    length = min(layer.seen, max(floor(pair, s), layer.seen - s.rows[0] - 1)) if not watches else layer.seen
    layer.truncate(length)
    assert layer.nbytes == held_bytes(layer)
    pair.history = [t[:, :, :length] for t in pair.history]
    for row in pair.reference.rows:
        for h, held in enumerate(row):
            row[h] = [token for token in held if token.position < length]
    pair.reference.seen = length
    pair.check()
    for count in s.more:
        pair.append(count)


def floor(pair: Pair, s: Scenario) -> int:
    """The length at which tokens last left."""
    stored = seen = last = 0
    for count in s.chunks:
        stored, seen = stored + count, seen + count
        if stored > pair.reference.limit:
            stored, last = pair.reference.low, seen
    return last


def trims(make: type[RankedLayer], name: str, s: Scenario) -> None:
    """A trim ranks at once, down to what is asked for, or to the policy's own mark."""
    pair = run(make, name, s)
    layer, reference = pair.layer, pair.reference
    protected = reference.pinned + reference.how.window_size
    before = state(layer)
    for refused in (-1, 0, protected - 1):
        with pytest.raises(PolicyError, match=f"give at least {protected}"):
            layer.trim(refused)
    assert state(layer) == before
    for most in (None, protected + s.rows[0], protected):
        stay = min(layer.stored, reference.low if most is None else most)
        left = layer.stored - stay
        assert layer.trim(most) == left
        held = layer.positions()
        if left:
            reference.rank(stay, lambda b, h, held=held: held[b, h].tolist())
        pair.check()
    assert layer.nbytes == held_bytes(layer)
    for count in s.more:
        pair.append(count)


def failed_call_changes_nothing(make: type[RankedLayer], name: str, s: Scenario) -> None:
    """After a call that failed, all is as before, to the bit, and goes on as before."""
    pair = run(make, name, s)
    layer, rows = pair.layer, len(s.padding)
    _, k, v = pair.fresh(2)
    _, k_more, v_more = pair.fresh(2, rows + 1)
    wrong = [
        (k[:, 0], v),
        (k, v[None]),
        (k, v[:, :, :1]),
        (k_more, v_more),
        (torch.cat([k, k], 1), torch.cat([v, v], 1)),
        (k[..., :-1], v),
        (k, v[..., :-1]),
        (k.double(), v),
        (k, v.half()),
        (k.to("meta"), v.to("meta")),
    ]
    calls = [(GeometryError, partial(layer.append, *one)) for one in wrong]
    calls += [(RollbackError, partial(layer.truncate, n)) for n in (-1, layer.seen + 1)]
    calls += [(PolicyError, partial(layer.trim, n)) for n in (-1, 0, layer.policy.pinned)]
    calls += [((IndexError, RuntimeError), partial(layer.select, torch.tensor([0] * (rows - 1) + [rows])))]
    calls += [(GeometryError, partial(layer.select, torch.tensor([], dtype=torch.long)))]
    before = state(layer)
    for error, call in calls:
        with pytest.raises(error):
            call()
        assert state(layer) == before, call
    for count in s.more:
        pair.append(count)


def forgotten_observation_is_refused(make: type[RankedLayer], name: str, s: Scenario) -> None:
    """What needs to see the queries goes no further without them; what does not, does."""
    pair = run(make, name, s)
    layer = pair.layer
    fresh = pair.fresh(s.more[0])
    layer.append(*fresh[1:])
    waits = pair.policy.ranking.observes and layer.seen > pair.reference.pinned
    calls = [partial(layer.append, *fresh[1:]), partial(layer.trim, layer.stored), partial(layer.trim, None)]
    calls += [partial(layer.select, torch.tensor([0]))]
    before = state(layer)
    for call in calls if waits else ():
        with pytest.raises(PolicyError, match=r"observe\(\)|observation"):
            call()
        assert state(layer) == before
    if waits:
        layer.observe(fresh[0], KEY_DIM**-0.5)
    layer.append(*fresh[1:])


def bytes_are_told(make: type[RankedLayer], name: str, s: Scenario) -> None:
    """Bytes reported are those of all tensors held, positions and what is known of attention among them."""
    pair = Pair(make, name, s)
    assert pair.layer.nbytes == held_bytes(pair.layer) == 0
    for count in s.chunks:
        pair.append(count)
        assert pair.layer.nbytes == held_bytes(pair.layer)
    pair.select([i % len(s.padding) for i in s.rows])
    assert pair.layer.nbytes == held_bytes(pair.layer)
    pair.layer.reset()
    assert pair.layer.nbytes == held_bytes(pair.layer)


def within_the_limit_nothing_is_touched(make: type[RankedLayer], name: str, s: Scenario) -> None:
    """Up to its limit a layer is one that keeps everything, bit by bit."""
    pair, plain = Pair(make, name, s), KVLayer(KeepAll())
    for count in s.chunks:
        if pair.layer.seen + count > pair.reference.limit:
            break
        _, keys, values = pair.fresh(count)
        pair.append(count)
        plain.append(keys, values)
        assert torch.equal(pair.layer.keys, plain.keys)
        assert torch.equal(pair.layer.values, plain.values)
        assert pair.layer.evicted == 0


LAWS = {
    keeps_what_the_paper_says: 25,
    rows_commute: 6,
    reset_is_fresh: 3,
    truncates_or_refuses: 8,
    trims: 8,
    failed_call_changes_nothing: 3,
    forgotten_observation_is_refused: 4,
    bytes_are_told: 4,
    within_the_limit_nothing_is_touched: 5,
}  # with the number of scenarios that each policy is tried on


def hold(law: Callable[..., None], name: str, examples: int, make: type[RankedLayer] = RankedLayer, **options) -> None:
    given(SCENARIOS)(search(examples, **options)(lambda s: law(make, name, s)))()


@pytest.fixture(autouse=True, scope="module")
def short_ladder():
    """Buffers of 4, 6, 9, 13 … slots, so that they grow within a few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvcache.cache._slots, "_FIRST_SLOTS", 4)
        yield


@pytest.mark.search
@pytest.mark.grid(144)
@pytest.mark.parametrize("name", [name if held == "plain" else f"{name}/{held}" for held in STORAGES for name in NAMES])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law, name):
    hold(law, name, LAWS[law])


@pytest.mark.parametrize("name", RANKINGS)
def test_pads_change_no_score(name):
    """What tokens are worth to each other does not depend on the pads before them."""
    s = Scenario([0], 2, 2, 1, 2, 60, 0, [], [], [], seed=3)
    alone, padded = Pair(RankedLayer, name, s), Pair(RankedLayer, name, replace(s, padding=[5]))
    fresh = alone.fresh(9)
    forward(alone.layer, *fresh)
    forward(padded.layer, *(torch.cat([torch.randn(1, t.shape[1], 5, t.shape[3]), t], 2) for t in fresh))
    scores = [
        pair.policy.score(pair.layer.seen_all()).expand(1, 2, -1)[..., -9:] * len_queries(pair)
        for pair in (alone, padded)
    ]
    torch.testing.assert_close(*scores, atol=CLOSE, rtol=CLOSE)


def len_queries(pair: Pair) -> int:
    """SnapKV takes the mean over queries, of pads too: a factor that no order depends on."""
    return pair.layer._latest.shape[2] if isinstance(pair.policy, SnapKV) else 1


def test_of_equal_scores_the_older_stay():
    layer = RankedLayer(KeyNorm(6, sinks=1, window_size=2, low_water=6))
    layer.append(torch.ones(1, 1, 9, 4), torch.ones(1, 1, 9, 4))
    assert layer.positions().tolist() == [[[0, 1, 2, 3, 7, 8]]]


def test_low_precision_and_many_queries_at_once(monkeypatch):
    """Weights are taken few queries at a time; bf16 keys are ranked in fp32."""
    s = Scenario([2], 2, 2, 1, 3, 6, 2, [], [], [], seed=5)
    fresh = Pair(RankedLayer, "heavy-sum", s).fresh(23)
    layers = []
    for at_once in (128, 5):
        monkeypatch.setattr("kvcache.cache._ranking._QUERIES_AT_ONCE", at_once)
        layers.append(Pair(RankedLayer, "heavy-sum", s).layer)
        forward(layers[-1], *fresh)
    assert torch.equal(layers[0].positions(), layers[1].positions())
    torch.testing.assert_close(layers[0]._mass, layers[1]._mass)
    half = Pair(RankedLayer, "heavy-sum", s).layer
    forward(half, *(t.bfloat16() for t in fresh))
    assert half.keys.dtype == torch.bfloat16
    assert half.stored == s.policy("heavy-sum").low_water
    assert half._mass.dtype == torch.float32


# ---------------------------------------------------------------------- mutants: broken layers that the laws must catch


class ForgetsTheRecent(RankedLayer):
    """Recent tokens are ranked like all others."""

    def _scores(self, seen):
        ranking, self.ranking = self.ranking, copy.copy(self.ranking)
        object.__setattr__(self.ranking, "recent", 0)
        result = super()._scores(seen)
        self.ranking = ranking
        return result


class TakesPadsForSinks(RankedLayer):
    """Sinks are the first tokens of the batch, not of the row."""

    def _scores(self, seen):
        return super()._scores(replace(seen, padding=torch.zeros_like(seen.padding)))


class LooksAhead(RankedLayer):
    """When tokens are ranked, each query is taken for the one after it."""

    def _seen(self, *given):
        seen = super()._seen(*given)
        return replace(seen, length=seen.length + 1)


class ChunksSeeAll(RankedLayer):
    """The tokens of a chunk attend to those after them."""

    def _mask(self, columns, fresh, device):
        return torch.ones(1, 1, fresh, columns)


class MaskIsOneShort(RankedLayer):
    """Each token of a chunk misses itself, but for the first."""

    def _mask(self, columns, fresh, device):
        column = torch.arange(columns)
        return (column <= (column[-fresh:, None] - 1).clamp_min(columns - fresh))[None, None]


class AttentionStaysBehind(RankedLayer):
    """Tokens move to the front, what they received does not."""

    def _rank(self, keys, values, at, stay):
        self._count(keys, values, at)
        before = self._mass
        super()._rank(keys, values, at, stay)
        self._mass = before[:, :, :stay]


class ForgetsOlderQueries(RankedLayer):
    """Only the queries of the last append are known."""

    def _keep_queries(self, queries):
        self._queries = None
        super()._keep_queries(queries)


class CountsPositionsByColumn(RankedLayer):
    """After tokens have left, positions are those of the slots."""

    def _seen(self, *given):
        seen = super()._seen(*given)
        return replace(seen, positions=torch.arange(seen.keys.shape[2]).expand_as(seen.positions))


class BlindQueriesLookEverywhere(RankedLayer):
    """A query that sees nothing of what is left, a pad's among them, looks at all alike."""

    def _seen(self, *given):
        seen = super()._seen(*given)
        object.__setattr__(seen, "parts", partial(_uniform_where_blind, seen))
        return seen


def _uniform_where_blind(seen):
    for weights, at in ScoringContext.parts(seen):
        yield weights + (weights.sum(-1, keepdim=True) == 0) / weights.shape[-1], at


class KeepsThemByScore(RankedLayer):
    """Tokens stay, but not in order."""

    def _rank(self, keys, values, at, stay):
        super()._rank(keys.flip(2), values.flip(2), at.flip(2), stay)


class ObservesOtherHeads(RankedLayer):
    """Query heads are dealt out to KV heads in turn, not side by side."""

    def observe(self, queries, scaling):
        dealt = queries.unflatten(1, (-1, self.keys.shape[1])).transpose(1, 2).flatten(1, 2)
        super().observe(dealt, scaling)


class SelectsTokensAlone(RankedLayer):
    """Rows move, what they have looked at does not."""

    def select(self, rows):
        mass = self._mass
        super().select(rows)
        if mass is not None and len(rows) <= mass.shape[0]:
            self._mass = mass[: len(rows)]


class CountsTokensAlone(RankedLayer):
    """Positions and attention are not counted as bytes."""

    @property
    def nbytes(self):
        return 0 if self._buffer is None else self._buffer.nbytes


class ForgetsItsPadding(RankedLayer):
    """Padding is lost when rows cannot be selected."""

    def select(self, rows):
        padding, self.padding = self.padding, None
        super().select(rows)
        self.padding = None if padding is None else padding[rows]


MUTANTS = [
    (ForgetsTheRecent, keeps_what_the_paper_says, "norm"),
    (ForgetsTheRecent, keeps_what_the_paper_says, "heavy-average"),
    (TakesPadsForSinks, keeps_what_the_paper_says, "diff"),
    (LooksAhead, keeps_what_the_paper_says, "heavy-sum"),
    (LooksAhead, keeps_what_the_paper_says, "snapkv"),
    (ChunksSeeAll, keeps_what_the_paper_says, "norm"),
    (MaskIsOneShort, keeps_what_the_paper_says, "diff"),
    (AttentionStaysBehind, keeps_what_the_paper_says, "heavy-average"),
    (AttentionStaysBehind, keeps_what_the_paper_says, "heavy-sum"),
    (ForgetsOlderQueries, keeps_what_the_paper_says, "snapkv-unsmoothed"),
    (CountsPositionsByColumn, keeps_what_the_paper_says, "heavy-average"),
    (BlindQueriesLookEverywhere, keeps_what_the_paper_says, "heavy-average"),
    (KeepsThemByScore, keeps_what_the_paper_says, "norm"),
    (ObservesOtherHeads, keeps_what_the_paper_says, "snapkv"),
    (ObservesOtherHeads, keeps_what_the_paper_says, "pinned-heavy-sum"),
    (SelectsTokensAlone, rows_commute, "heavy-sum"),
    (CountsTokensAlone, bytes_are_told, "norm"),
    (ForgetsItsPadding, failed_call_changes_nothing, "norm"),
]


@pytest.mark.parametrize(("mutant", "law", "name"), MUTANTS, ids=lambda x: getattr(x, "__name__", x))
def test_laws_catch(mutant, law, name):
    with pytest.raises((AssertionError, RuntimeError)):  # wrong, or so wrong that the shapes no longer fit
        hold(law, name, 60, mutant, whole=True, phases=[Phase.generate])


# ---------------------------------------------------------------------- through models


REFERENCE = "ranking_reference"
PLACES: dict[int, Reference | None] = {}  # by layer; None where the model's own attention is right
PLAYED: list = [None, None, ()]  # policies, padding and rotary frequencies that the next reference model is run with


def _reference_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The attention of a model whose cache keeps all, over what a `Reference` for each layer says is still there."""
    policies, padding, frequencies = PLAYED
    policy = policies[module.layer_idx]
    if getattr(module, "is_sliding", False) or policy.ranking is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rows, heads, fresh, _ = query.shape
    if module.layer_idx not in PLACES:
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        PLACES[module.layer_idx] = Reference(policy, padding, key.shape[1], heads // key.shape[1], scale, frequencies)
    found = PLACES[module.layer_idx].append(query, key[:, :, -fresh:], value[:, :, -fresh:])
    out = torch.zeros(rows, fresh, heads, value.shape[3])
    for b in range(rows):
        for h in range(heads):
            for t in range(fresh):
                if found[b][h][t] is not None:
                    out[b, t, h] = torch.tensor(found[b][h][t])
    return out.to(query.dtype), None


AttentionInterface.register(REFERENCE, _reference_attention)
AttentionMaskInterface.register(REFERENCE, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


class _Beams(DynamicCache):
    """Keeps everything; where beams are reordered, so are the references."""

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        for place in PLACES.values():
            place.select(beam_idx.tolist())


def reference_of(family: str, policy, padding: Sequence[int]):
    """A model like `tiny(family)` that plays a policy by hand, and the cache that it needs."""
    model = build(family)
    layers = model.config.get_text_config().num_hidden_layers
    rotary = [module for name, module in model.named_modules() if name.endswith("rotary_emb")]
    frequencies = [getattr(one, "inv_freq", getattr(one, "full_attention_inv_freq", None)) for one in rotary[:1]]
    PLAYED[:] = [
        [policy] * layers if isinstance(policy, SizePolicy) else list(policy),
        list(padding),
        frequencies[0].tolist() if frequencies else [],
    ]
    PLACES.clear()
    model.set_attn_implementation(REFERENCE)
    return model, _Beams(config=model.config)


MODELS = ["llama", "qwen3", "mistral", "gpt2", "gpt-neox", "phi3", "gemma3", "opt"]
LIMITED: dict[str, SizePolicy] = {
    "heavy": H2O(14, sinks=2, window_size=4, low_water=11),
    "heavy-sum": H2O(14, sinks=0, window_size=3, average=False),
    "snapkv": SnapKV(16, sinks=1, window_size=6, kernel=3, low_water=16),
    "tova": TOVA(12, sinks=1, low_water=12),
    "expected": FewExpected(14, sinks=2, window_size=4, n_future_positions=6, low_water=14),
    "norm": KeyNorm(13, sinks=2, window_size=4),
    "diff": KeyDiff(13, sinks=2, window_size=4, low_water=13),
    "pinned": Pinned(3, SnapKV(12, sinks=1, window_size=4, kernel=5)),
}
EXACT = 2e-4  # the reference sums in fp64; what another kept token costs is 0.01 and more: see the test of that


def padded(lengths: Sequence[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Rows of these lengths padded on the left: ids, mask, pads."""
    most, generator = max(lengths), torch.Generator().manual_seed(seed)
    # No token twice: a rotary key of the first layer is as long wherever its token stands, and KeyNorm could not tell.
    ids = torch.stack([torch.randperm(90, generator=generator)[:most] + 3 for _ in lengths])
    pads = [most - length for length in lengths]
    mask = (torch.arange(most) >= torch.tensor(pads)[:, None]).long()
    return ids * mask, mask, pads


def places(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)


def reference_logits(family: str, policy, ids, mask, pads, chunks) -> torch.Tensor:
    model, cache = reference_of(family, policy, pads)
    return logits(model, ids, cache, chunks, attention_mask=mask, position_ids=places(mask))


CHUNKINGS = {"decode": [18] + [1] * 16, "chunks": [7, 12, 1, 9, 1, 1, 3]}


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
    assert not attention.observing()
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
        with pytest.raises(PolicyError, match=r"manager\.runner"), torch.no_grad():
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
        assert not attention.observing()
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
        ({"limit": 6, "sinks": 3, "recent": 3}, "give at least 7"),
        ({"limit": 200.5}, "limit=200.5"),
        ({"limit": "200"}, "limit='200'"),
        ({"limit": True}, "limit"),
        ({"limit": 200, "sinks": -1}, "sinks"),
        ({"limit": 200, "sinks": 1.0}, "sinks"),
        ({"limit": 200, "recent": 0}, "recent"),
        ({"limit": 200, "recent": 2.5}, "recent"),
        ({"limit": 200, "low_water": 201}, "low_water"),
        ({"limit": 200, "low_water": 0}, "low_water"),
        ({"limit": 200, "sinks": 4, "recent": 8, "low_water": 12}, "low_water"),
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


@pytest.mark.parametrize("following", [0, -1, 2.5, "5"])
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
        attention.observed_copy(model)


@pytest.mark.parametrize("more", ["s_aux", "softcap", "sliding_window"])
def test_attention_that_is_told_more_than_heads_compute_is_refused(more):
    states = torch.zeros(1, 1, 1, 4)
    token = attention._stored.set((object(), states, states))
    try:
        with pytest.raises(PolicyError, match=f"depends on {more}, which heads"):
            attention._attend(torch.nn.Module(), states, states, states, None, dropout=0.0, **{more: 0.5})
    finally:
        attention._stored.reset(token)
