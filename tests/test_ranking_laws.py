"""Layers that rank tokens, each beside a plain list of tokens that is ranked by the formulas of its paper."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import Phase, given
from support.inside import layers as inside
from support.inside.testing import held_bytes, state
from support.ranking import CLOSE, KEY_DIM, NAMES, RANKINGS, SCENARIOS, Pair, Scenario, forward, run
from support.searching import search
from support.storages import STORAGES

from kvcache import GeometryError, KeepAll, KeyNorm, KVLayer, PolicyError, RollbackError, SnapKV
from kvcache.cache import RankedLayer, ScoringContext

pytestmark = pytest.mark.usefixtures("buffers_grow")

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
    return inside.latest_queries(pair.layer).shape[2] if isinstance(pair.policy, SnapKV) else 1


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
        monkeypatch.setattr(inside.QUERIES_AT_ONCE, at_once)
        layers.append(Pair(RankedLayer, "heavy-sum", s).layer)
        forward(layers[-1], *fresh)
    assert torch.equal(layers[0].positions(), layers[1].positions())
    torch.testing.assert_close(*map(inside.cumulative_attention, layers))
    half = Pair(RankedLayer, "heavy-sum", s).layer
    forward(half, *(t.bfloat16() for t in fresh))
    assert half.keys.dtype == torch.bfloat16
    assert half.stored == s.policy("heavy-sum").low_water
    assert inside.cumulative_attention(half).dtype == torch.float32


# ---------------------------------------------------------------------- mutants: broken layers that the laws must catch


class ForgetsTheRecent(RankedLayer):
    """Recent tokens are ranked like all others."""

    def _scores(self, seen):
        ranking, self.ranking = self.ranking, copy.copy(self.ranking)
        object.__setattr__(self.ranking, "window_size", 0)
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
