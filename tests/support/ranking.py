"""Policies that rank tokens, each beside a plain list of tokens that is ranked by the formulas of its paper.

The reference keeps Python floats and knows no tensors, masks or slots.
"""

import cmath
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeAlias, cast

import torch
from hypothesis import strategies as st

from kvcache import (
    H2O,
    TOVA,
    ExpectedAttention,
    KeyDiff,
    KeyNorm,
    KeyRotation,
    LayerCache,
    Pinned,
    RankingPolicy,
    SizePolicy,
    SnapKV,
    Storage,
)
from kvcache.cache import RankedLayer, attend
from support.storages import STORAGES, exact_in

KEY_DIM, VALUE_DIM = 4, 3
CLOSE = 1e-5  # fp32 sums of some forty numbers of size one; a wrong token shows as 0.01 and more
Choose: TypeAlias = Callable[[int, int], Any]  # of a row and a head, the positions that stay


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


def ahead(query: Sequence[float], distance: int, following: int, frequencies: Sequence[float]) -> list[float]:
    """The mean of a query turned to each of the next positions; its first channels are the real parts, then the imaginary ones."""
    found, half = list(query), len(frequencies)
    for i, frequency in enumerate(frequencies):
        turns = [cmath.exp(1j * frequency * (distance + further)) for further in range(following)]
        turned = complex(query[i], query[half + i]) * sum(turns) / following
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
        self.how = cast(Any, policy.policy if isinstance(policy, Pinned) else policy)
        self.pinned, self.limit, self.low = self.how.sinks + more, self.how.limit + more, self.how.low_water + more
        self.padding, self.heads, self.groups, self.scaling = list(padding), heads, groups, scaling
        self.rows: list[list[list[Token]]] = [[[] for _ in range(heads)] for _ in padding]
        self.queries: list[list[list[list[float]]]] = [[] for _ in padding]  # by row and token: one of each head
        self.seen = 0

    def append(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, choose: Choose | None = None
    ) -> list[list[list[Any]]]:
        """Append a chunk; what its queries attend to, ``[row][head][token]``, None for pads. Then rank.

        Of tokens that score alike, `choose` says which stay: it must be a right choice.
        """
        given_queries, given_keys, given_values = queries.tolist(), keys.tolist(), values.tolist()
        fresh = keys.shape[2]
        outputs: list[list[list[Any]]] = []
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

    def rank(self, stay: int, choose: Choose | None = None) -> None:
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
        outputs = forward(self.layer, fresh[0], fresh[1], fresh[2])
        held = self.layer.positions()
        assert held.shape == (rows, self.s.heads, self.layer.stored)
        expected = self.reference.append(fresh[0], fresh[1], fresh[2], lambda b, h: held[b, h].tolist())
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
        assert layer.keys is not None and layer.values is not None
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
