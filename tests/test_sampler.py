"""The sampler on the device against transformers' own processors and `torch.multinomial`."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.inside.decoding import TRANSFORMERS
from support.searching import search
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvcache import InputError
from kvcache.decoding import Sampler, Sampling
from kvcache_chatterbox.speech import order

CPU = torch.device("cpu")
ORDERS = {"transformers": TRANSFORMERS, "chatterbox": order(False), "turbo": order(True)}
GREEDY = Sampling(temperature=0, repetition_penalty=1)


# ---------------------------------------------------------------------- cases


def logits_of(kind, rows, vocabulary, generator):
    made = torch.randn(rows, vocabulary, generator=generator)
    if kind == "ties":
        return made.round()
    if kind == "wide":
        return made * 60
    if kind == "peaked":
        made[:, 0] += 30
    if kind == "flat":
        return torch.full((rows, vocabulary), 1.5)
    return made * 3


SETTINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0, 0.05, 0.3, 0.8, 1, 2.5]),
    top_p=st.sampled_from([0.01, 0.3, 0.5, 0.8, 0.95, 0.999, 1]),
    min_p=st.sampled_from([0, 0, 0.02, 0.1, 0.5, 1]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 1000]),
    repetition_penalty=st.sampled_from([0.2, 0.8, 1, 1.2, 2, 10]),
    cfg_weight=st.sampled_from([0, 0.3, 0.5, 2]),
)


@st.composite
def cases(draw):
    """Logits and what was seen of several requests with settings of their own."""
    requests = draw(st.integers(1, 4))
    vocabulary = draw(st.integers(2, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["plain", "ties", "wide", "peaked", "flat"]))
    logits = logits_of(kind, requests, vocabulary, generator)
    seen = [
        torch.randint(0, vocabulary, (draw(st.integers(1, 20)),), generator=generator, dtype=torch.long)
        for _ in range(requests)
    ]
    return logits, seen, draw(st.lists(SETTINGS, min_size=requests, max_size=requests))


def sampler_of(logits, seen, chosen, names, guided=False):
    sampler = Sampler(len(chosen), logits.shape[1], names, CPU, guided)
    for request, (ids, sampling) in enumerate(zip(seen, chosen, strict=True)):
        sampler.set(request, sampling)
        sampler.begin(request, ids)
    return sampler


# ---------------------------------------------------------------------- the reference


def processor(name, sampling):
    """Transformers' own, or None where `generate` would leave it out."""
    greedy = sampling.greedy
    if name == "penalty":
        used, made = sampling.repetition_penalty != 1, RepetitionPenaltyLogitsProcessor
        return made(float(sampling.repetition_penalty)) if used else None
    if name == "temperature":
        return TemperatureLogitsWarper(float(sampling.temperature)) if sampling.temperature not in (0, 1) else None
    if name == "top_k":
        return TopKLogitsWarper(sampling.top_k) if sampling.top_k and not greedy else None
    if name == "top_p":
        return TopPLogitsWarper(float(sampling.top_p)) if sampling.top_p < 1 and not greedy else None
    return MinPLogitsWarper(float(sampling.min_p)) if sampling.min_p > 0 and not greedy else None


def reference(logits, ids, sampling, names):
    """The scores of one request ``[vocabulary]``."""
    scores = logits[None]
    for name in names:
        if (one := processor(name, sampling)) is not None:
            scores = one(ids[None], scores)
    return scores[0]


def assert_same(found, logits, ids, sampling, names):
    """The same kept set, ties included, and the same scores: nothing is computed in another way."""
    expected = reference(logits, ids, sampling, names)
    assert torch.equal(found > -torch.inf, expected > -torch.inf), sampling
    assert torch.equal(found, expected), sampling


# ---------------------------------------------------------------------- scores


@pytest.mark.parametrize("names", ORDERS.values(), ids=ORDERS)
@search(150)
@given(case=cases())
def test_scores_are_those_of_transformers_processors(names, case):
    logits, seen, chosen = case
    sampler = sampler_of(logits, seen, chosen, names)
    found = sampler.process(logits, sampler.drawing)
    for row in range(len(chosen)):
        assert_same(found[row], logits[row], seen[row], chosen[row], names)


@pytest.mark.parametrize("names", ORDERS.values(), ids=ORDERS)
@search(25)
@given(case=cases(), seed=st.integers(0, 2**32))
def test_guided_scores_are_those_of_the_guided_logits(names, case, seed):
    conditional, seen, chosen = case
    generator = torch.Generator().manual_seed(seed)
    unconditional = conditional + torch.randn(conditional.shape, generator=generator)
    rows = torch.stack([conditional, unconditional], 1).flatten(0, 1)
    sampler = sampler_of(rows, seen, chosen, names, guided=True)
    found = sampler.process(rows, sampler.drawing)
    for row, sampling in enumerate(chosen):
        weight = torch.tensor(float(sampling.cfg_weight))
        guided = conditional[row] + weight * (conditional[row] - unconditional[row])
        assert_same(found[row], guided, seen[row], sampling, names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_processed_in_fp32(dtype):
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    seen = [torch.tensor([1]), torch.tensor([2])]
    sampler = sampler_of(logits, seen, [Sampling()] * 2, TRANSFORMERS)
    found = sampler.process(logits, sampler.drawing)
    assert found.dtype == torch.float32
    assert torch.equal(found, sampler.process(logits.float(), sampler.drawing))


def test_the_best_token_survives_every_filter():
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    for one in (Sampling(top_p=1e-9), Sampling(min_p=1), Sampling(top_k=1), Sampling(top_p=1e-9, min_p=1, top_k=1)):
        one = replace(one, repetition_penalty=1)
        for names in ORDERS.values():
            sampler = sampler_of(logits, [torch.tensor([0])], [one], names)
            found = sampler.process(logits, sampler.drawing)
            assert (found > -torch.inf).tolist() == [[False, True, False]]


@pytest.mark.parametrize("greedy", [False, True])
def test_a_nucleus_of_all_drops_not_even_what_is_next_to_impossible(greedy):
    # A penalty behind the filters may lift a token whose probability was 0 in fp32.
    logits = torch.tensor([[110.0, 1.0], [0.0, 0.0]])
    hot = Sampling(temperature=0 if greedy else 1, top_p=1, repetition_penalty=200)
    sampler = sampler_of(logits, [torch.tensor([0])] * 2, [hot, Sampling()], order(True))
    found = sampler.process(logits, sampler.drawing)
    torch.testing.assert_close(found[0], torch.tensor([0.55, 1.0]))
    if greedy:
        assert sampler(logits, torch.ones(2, 2), sampler.drawing).tolist()[0] == 1


# ---------------------------------------------------------------------- draws


def multinomial(scores, generator):
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


def noise_of(shape, generator):
    return torch.empty(shape).exponential_(generator=generator)


@pytest.mark.parametrize("names", ORDERS.values(), ids=ORDERS)
@search(60)
@given(case=cases(), seed=st.integers(0, 2**32))
def test_a_batch_that_shares_a_generator_draws_what_multinomial_draws(names, case, seed):
    logits, seen, chosen = case
    sampler = sampler_of(logits, seen, chosen, names)
    if sampler.drawing is None:
        return
    mine, theirs = (torch.Generator().manual_seed(seed) for _ in range(2))
    for _ in range(5):  # what was drawn is penalized at the next step
        scores = sampler.process(logits, sampler.drawing)
        expected = multinomial(scores, theirs)
        for row, sampling in enumerate(chosen):
            if sampling.greedy:
                expected[row] = scores[row].argmax()
        found = sampler(logits, noise_of(logits.shape, mine), sampler.drawing)
        assert torch.equal(found, expected)
        assert torch.equal(mine.get_state(), theirs.get_state())
        seen = [torch.cat([ids, token[None]]) for ids, token in zip(seen, found, strict=True)]
        for row, ids in enumerate(seen):
            assert sampler.seen[row].nonzero()[:, 0].tolist() == sorted(set(ids.tolist()))


@pytest.mark.parametrize("names", ORDERS.values(), ids=ORDERS)
@search(25)
@given(case=cases(), seed=st.integers(0, 2**32))
def test_single_requests_draw_what_transformers_processors_and_multinomial_draw(names, case, seed):
    logits, seen, chosen = case
    for row, sampling in enumerate(chosen):
        sampler = sampler_of(logits, [seen[row]], [sampling], names)
        mine, theirs = (torch.Generator().manual_seed(seed) for _ in range(2))
        ids = seen[row]
        for step in range(4):
            now = logits[row : row + 1].roll(step, 1)
            scores = reference(now[0], ids, sampling, names)
            assert_same(sampler.process(now, sampler.drawing)[0], now[0], ids, sampling, names)
            expected = scores.argmax(-1, keepdim=True) if sampling.greedy else multinomial(scores[None], theirs)
            found = sampler(now, noise_of(now.shape, mine), sampler.drawing)
            assert torch.equal(found, expected)
            ids = torch.cat([ids, found])


def test_drawn_tokens_are_distributed_as_their_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(4000, -1)
    sampler = sampler_of(
        logits, [torch.tensor([0])] * 4000, [Sampling(1, 1, repetition_penalty=1)] * 4000, TRANSFORMERS
    )
    tokens = sampler(logits, noise_of(logits.shape, torch.Generator().manual_seed(0)), sampler.drawing)
    share = tokens.bincount(minlength=4) / 4000
    # Five standard deviations of a binomial share, at most.
    torch.testing.assert_close(share, logits[0].softmax(-1), atol=5 * 0.5 / 4000**0.5, rtol=0)


@search(40)
@given(case=cases(), seed=st.integers(0, 2**32), data=st.data())
def test_some_of_the_requests_are_drawn_as_if_alone(case, seed, data):
    logits, seen, chosen = case
    names = data.draw(st.sampled_from(list(ORDERS.values())))
    first = data.draw(st.integers(0, len(chosen) - 1))
    which = slice(first, data.draw(st.integers(first + 1, len(chosen))))
    whole = sampler_of(logits, seen, chosen, names)
    part = sampler_of(logits[which], seen[which], chosen[which], names)
    noise = noise_of(logits[which].shape, torch.Generator().manual_seed(seed))
    before = whole.seen.clone()
    drawing = whole.drawing_of(which)
    assert drawing == part.drawing
    assert torch.equal(whole(logits[which], noise, drawing, which), part(logits[which], noise, drawing))
    assert torch.equal(whole.seen[which], part.seen)
    outside = torch.ones(len(chosen), dtype=torch.bool)
    outside[which] = False
    assert torch.equal(whole.seen[outside], before[outside])


# ---------------------------------------------------------------------- ties

LARGE = 49_152
TIED = {
    "a small vocabulary": lambda generator: (torch.randn(1, 300, generator=generator) * 2).round(),
    "a large one in bf16": lambda generator: (torch.randn(1, LARGE, generator=generator) * 3).bfloat16(),
    "nothing but ties": lambda generator: torch.full((1, 300), 1.5),
}
GRID = [
    Sampling(temperature, top_p, min_p, top_k, penalty)
    for temperature in (0.7, 1.0)
    for top_k in (0, 50, 700)
    for top_p in (0.3, 0.9, 1.0)
    for min_p in (0.0, 0.05)
    for penalty in (1.0, 1.3)
]


def tied(kind, dtype, seed):
    """Logits with ties all over: those of a large vocabulary are that in bf16, whatever they are held in."""
    return TIED[kind](torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["a small vocabulary", "nothing but ties"])
@pytest.mark.parametrize("sampling", GRID, ids=str)
def test_d2_tied_tokens_stay_and_are_drawn_as_generate_keeps_and_draws_them(sampling, kind, dtype):
    check_ties(sampling, kind, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sampling", GRID, ids=str)
def test_d2_tied_tokens_of_a_large_vocabulary(sampling, dtype):
    check_ties(sampling, "a large one in bf16", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_d2_tied_tokens_of_a_large_vocabulary_under_top_k_and_top_p(dtype):
    check_ties(Sampling(0.7, 0.9, 0.0, 50, 1.3), "a large one in bf16", dtype)


def check_ties(sampling, kind, dtype):
    """The same set is kept and the same token drawn under one seed, for several texts; ``generate`` works in float32."""
    for seed in range(3):
        logits = tied(kind, dtype, seed)
        ids = torch.tensor([1, 5, 7])
        sampler = sampler_of(logits, [ids], [sampling], TRANSFORMERS)
        scores = reference(logits[0].float(), ids, sampling, TRANSFORMERS)
        assert_same(sampler.process(logits, sampler.drawing)[0], logits[0].float(), ids, sampling, TRANSFORMERS)
        mine, theirs = (torch.Generator().manual_seed(seed) for _ in range(2))
        found = sampler(logits, noise_of(logits.shape, mine), sampler.drawing)
        assert torch.equal(found, multinomial(scores[None], theirs))


# ---------------------------------------------------------------------- logits that are no numbers


NO_NUMBERS = {"nan": float("nan"), "inf": float("inf"), "all -inf": -float("inf")}


@pytest.mark.parametrize("kind", NO_NUMBERS)
def test_d10_what_multinomial_refuses_is_a_failure_of_the_request_alone(kind):
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    if kind == "all -inf":
        logits[1:] = NO_NUMBERS[kind]
    else:
        logits[1:, 4] = NO_NUMBERS[kind]
    drawn = Sampling(1, 1, repetition_penalty=1)
    sampler = sampler_of(logits, [torch.tensor([0])] * 3, [drawn, drawn, GREEDY], TRANSFORMERS)
    with pytest.raises(RuntimeError):
        multinomial(logits[1:2], torch.Generator())
    tokens = sampler(logits, torch.ones(3, 20), sampler.drawing)
    assert sampler.failed.tolist() == [False, True, False]  # the last takes what is best, as `generate` does
    assert int(tokens[2]) == int(logits[2].argmax())
    sampler(torch.randn(3, 20), torch.ones(3, 20), sampler.drawing)
    assert sampler.failed.tolist() == [False, True, False], "until the place is taken by another"
    sampler.set(1, drawn)
    assert not sampler.failed.any()


# ---------------------------------------------------------------------- settings


@search(40)
@given(first=cases(), changes=st.lists(SETTINGS, min_size=1, max_size=4), data=st.data())
def test_changed_settings_leave_nothing_of_those_before(first, changes, data):
    logits, seen, chosen = first
    names = data.draw(st.sampled_from(list(ORDERS.values())))
    sampler = sampler_of(logits, seen, chosen, names)
    for sampling in changes:
        sampler(logits, torch.ones_like(logits), sampler.drawing)
        request = data.draw(st.integers(0, len(chosen) - 1))
        chosen = [*chosen[:request], sampling, *chosen[request + 1 :]]
        sampler.set(request, sampling)
        for row, ids in enumerate(seen):
            sampler.begin(row, ids)
        fresh = sampler_of(logits, seen, chosen, names)
        assert sampler.drawing == fresh.drawing
        assert (sampler.drawing is not None) == any(not one.greedy for one in chosen)
        assert torch.equal(sampler.process(logits, sampler.drawing), fresh.process(logits, fresh.drawing))


def test_a_new_sampler_is_greedy_and_penalizes_nothing():
    sampler = Sampler(2, 5, TRANSFORMERS, CPU)
    logits = torch.tensor([[0.0, 3, 1, 2, 0], [9.0, 3, 1, 2, 0]])
    assert sampler.drawing is None
    for _ in range(2):
        assert sampler(logits, torch.ones(2, 5), sampler.drawing).tolist() == [1, 0]
    sampler.set(0, replace(GREEDY, repetition_penalty=4))  # what it drew counts from now on
    assert sampler(logits, torch.ones(2, 5), sampler.drawing).tolist() == [3, 0]
    sampler.begin(0, torch.tensor([3]))
    assert sampler(logits, torch.ones(2, 5), sampler.drawing).tolist() == [1, 0]


BAD_ORDERS = [
    (),
    ("penalty", "temperature", "top_k", "top_p"),
    (*TRANSFORMERS, "top_p"),
    ("penalty", "penalty", "top_k", "top_p", "min_p"),
    ("top_k", "penalty", "top_p", "min_p", "temperature"),
    ("top_k", "top_p", "temperature", "min_p", "penalty"),
    ("penalty", "temperature", "top_k", "top_p", "typical_p"),
]


@pytest.mark.parametrize("names", BAD_ORDERS, ids=str)
def test_orders_that_cannot_be_are_refused(names):
    with pytest.raises(InputError, match="the three filters together"):
        Sampler(1, 5, names, CPU)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("top_k", -1),
        ("repetition_penalty", 0),
        ("repetition_penalty", -2),
        ("cfg_weight", -0.1),
    ],
)
def test_settings_that_cannot_be_are_refused(name, value):
    with pytest.raises(InputError, match=f"{name}={value} must be"):
        Sampling(**{name: value})
