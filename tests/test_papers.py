"""Methods do what their papers do: PyramidKV's budgets, KVzip's parts, attention that is asked for."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.families import logits, tiny, token_ids
from support.inside.models import REHEARSED, REHEARSED_LEAD
from support.searching import search
from torch import Tensor

from kvcache import AdaKV, KVCacheManager, KVzip, PolicyError, RankingPolicy, SnapKV, pyramid_kv
from kvcache import models as hf
from kvcache.cache import ScoringContext

# ---------------------------------------------------------------------- D3: PyramidKV


def test_d3_the_last_layer_keeps_one_more_than_what_is_protected() -> None:
    """137 / 2 rounds to the 68 that are protected, which is no limit that anybody gave."""
    lows = [policy.low_water for policy in pyramid_kv(SnapKV(157), 4, 2.0)]
    assert lows == [206, 160, 114, 69]


@given(
    limit=st.integers(70, 4000),
    low=st.none() | st.integers(69, 4000),
    layers=st.integers(1, 80),
    beta=st.sampled_from([1, 1.1, 1.3, 1.5, 1.7, 1.9, 2.0, 2.3, 4, 7.0, 20.0, 1e6]) | st.floats(1, 1e9),
    tokens=st.none() | st.integers(1, 6000),
)
@search(300)
def test_d3_budgets_are_a_line_around_the_mean_for_any_setting(
    limit: int, low: int | None, layers: int, beta: float, tokens: int | None
) -> None:
    """Against exact fractions: equal budgets where, and only where, the last layer would keep no more than is protected."""
    low = None if low is None else min(low, limit)
    policy = SnapKV(limit, low_water=low)
    protected, mean = 68, policy.keep(limit + 1)
    policies = pyramid_kv(policy, layers, beta, tokens=tokens)
    lows = [one.keep(one.limit + 1) for one in policies]
    least = Fraction(mean) / Fraction(beta)
    if tokens is not None:
        least = max(least, Fraction(2 * mean - max(mean, tokens - protected)))
    if least <= protected or layers == 1:
        assert policies == [policy] * layers
        return
    for i, one in enumerate(lows):
        exact = 2 * mean - least - Fraction(2 * i, layers - 1) * (mean - least)
        assert abs(one - exact) <= (Fraction(1, 2) if exact >= protected + Fraction(1, 2) else 1)
    assert all(a >= b > protected for a, b in itertools.pairwise(lows))
    assert all(protected < one.keep(one.limit + 1) <= one.limit for one in policies)


def test_d3_a_quotient_that_rounds_to_what_is_protected_is_more_than_it() -> None:
    """119 / 1.7 is 70.0 to a float, and more than 70 exactly."""
    policy = SnapKV(119, low_water=119, window_size=66)
    assert policy.low_water / 1.7 == 70.0 == policy.sinks + policy.window_size
    assert Fraction(119) / Fraction(1.7) > 70
    assert [one.low_water for one in pyramid_kv(policy, 3, 1.7)] == [168, 119, 71]


# ---------------------------------------------------------------------- D4: KVzip


Part = tuple[int, int]


def looks(ids: Tensor, parts: Sequence[Part], lead: int, sinks: int | None) -> list[list[list[float]]]:
    """The most that each token is looked at while its part is repeated, ``[layers][KV heads][tokens]``.

    By the rule of the paper's own code and kvpress: divided among the sinks, the part and its repetition. A softmax over
    some keys is a softmax over all, divided by what these keys get of it. `sinks` None divides among all that is held.
    """
    n, found = ids.shape[1], None
    for start, stop in parts:
        again = ids[:, max(0, start - lead) : stop]
        with torch.no_grad():
            given = tiny("llama", "eager")(
                torch.cat([ids, again], 1), output_attentions=True, use_cache=False
            ).attentions
        among = torch.zeros(n + again.shape[1], dtype=torch.bool)
        among[n:] = among[start:stop] = True
        among[: n if sinks is None else min(sinks, start)] = True
        if found is None:
            found = torch.zeros(len(given), 2, n)
        for i, layer in enumerate(given):
            rows = layer[0, :, n:]
            divided = rows / rows[..., among].sum(-1, keepdim=True)
            found[i, :, start:stop] = divided[..., start:stop].amax(1).unflatten(0, (2, -1)).amax(1)
    assert found is not None
    return found.tolist()


def kept(found: list[list[list[float]]], most: int, sinks: int, window_size: int) -> list[list[set[int]]]:
    tokens = len(found[0][0])
    stays = {p for p in range(tokens) if p < sinks or p >= tokens - window_size}
    return [
        [set(sorted(range(tokens), key=lambda p, h=head: (p not in stays, -h[p]))[:most]) for head in layer]
        for layer in found
    ]


def held(cache: Any) -> list[list[set[int]]]:
    return [[set(row.tolist()) for row in kv.positions()[0]] for kv in hf.kv_layers(cache)]


def alike(one: list[list[set[int]]], other: list[list[set[int]]]) -> float:
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(len(a & b) for a, b in pairs) / sum(len(a | b) for a, b in pairs)


@pytest.mark.parametrize("most", [12, 24, 40])
def test_d4_a_long_text_is_read_again_in_parts_as_the_paper_does(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 16 tokens instead of 2,048, so that a small model has several; the sets that stay are the paper's."""
    monkeypatch.setattr(REHEARSED, 16)
    monkeypatch.setattr(REHEARSED_LEAD, 3)
    policy = KVzip(96, sinks=2, window_size=3)
    manager = KVCacheManager(tiny("llama"), policy)
    cache, ids = manager.new_cache(), token_ids(1, 57, seed=8)
    logits(manager.observed_model, ids, cache)
    manager.compress(cache, ids, most)
    parts = [(0, 16), (16, 32), (32, 48), (48, 57)]
    paper, among_all = (kept(looks(ids, parts, 3, sinks), most, 2, 3) for sinks in (2, None))
    assert held(cache) == paper
    assert alike(paper, among_all) < 0.95  # the other rule is another one: this test can tell


def test_d4_a_text_of_one_part_is_divided_among_all_of_it() -> None:
    ids = token_ids(1, 24, seed=5)
    assert looks(ids, [(0, 24)], 8, 4) == looks(ids, [(0, 24)], 8, None)


def test_d4_heads_that_share_a_budget_read_in_parts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REHEARSED, 16)
    monkeypatch.setattr(REHEARSED_LEAD, 3)
    manager = KVCacheManager(tiny("llama"), AdaKV(KVzip(96, sinks=2, window_size=3), alpha_safeguard=1.0))
    cache, ids = manager.new_cache(), token_ids(1, 40, seed=8)
    logits(manager.observed_model, ids, cache)
    manager.compress(cache, ids, 20)
    paper = kept(looks(ids, [(0, 16), (16, 32), (32, 40)], 3, 2), 20, 2, 3)
    found = [[set(part.positions()[0, 0].tolist()) for _, part in kv.parts()] for kv in hf.kv_layers(cache)]
    assert found == paper


# ---------------------------------------------------------------------- D11: what nobody asked for


@dataclass(frozen=True)
class Unasked(RankingPolicy):
    def score(self, seen: ScoringContext) -> Tensor:
        return seen.cumulative_attention


@dataclass(frozen=True)
class Asked(Unasked):
    needs_cumulative_attention: ClassVar[bool] = True


def test_d11_attention_that_was_not_asked_for_is_not_minus_one() -> None:
    manager = KVCacheManager(tiny("llama"), Unasked(16, sinks=1, window_size=4))
    with pytest.raises(PolicyError, match="needs_cumulative_attention: ClassVar"):
        logits(manager.observed_model, token_ids(1, 30), manager.new_cache())
    manager = KVCacheManager(tiny("llama"), Asked(16, sinks=1, window_size=4))
    cache = manager.new_cache()
    logits(manager.observed_model, token_ids(1, 30), cache)
    assert cache.layers[0].kv.stored == 14
