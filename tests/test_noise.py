"""Noise by place: the same numbers, however a text is cut."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.inside.speech import HARMONICS
from support.searching import search

from kvcache_chatterbox.units import MELS, SAMPLES_PER_FRAME
from kvcache_chatterbox.vocoder import SeededNoise


@search(100)
@given(
    st.integers(-(2**63), 2**64 - 1), st.integers(0, 300), st.integers(0, 130), st.integers(0, 130), st.integers(0, 90)
)
def test_two_pieces_are_the_piece_of_both(seed, place, first, second, reference):
    noise = SeededNoise(seed)
    whole = noise.start(reference, place, first + second)
    assert whole.shape == (MELS, reference + first + second)
    assert torch.equal(whole[:, : reference + first], noise.start(reference, place, first))
    assert torch.equal(whole[:, reference + first :], noise.start(0, place + first, second))
    source = noise.source(place, first + second)
    assert source.shape == (HARMONICS, SAMPLES_PER_FRAME * (first + second))
    parts = [noise.source(place, first), noise.source(place + first, second)]
    assert torch.equal(source, torch.cat(parts, 1))


def test_it_is_normal_and_no_two_places_or_seeds_are_alike():
    drawn = torch.cat([SeededNoise(seed).start(100, 0, 400) for seed in range(3)])
    assert abs(float(drawn.mean())) < 0.01 and abs(float(drawn.std()) - 1) < 0.01
    rows = drawn.reshape(-1, 50)  # stretches, each of one generator
    close = torch.corrcoef(rows).fill_diagonal_(0)
    assert float(close.abs().max()) < 0.8


def test_phases_are_those_of_the_text():
    phases = SeededNoise(4).phases()
    assert phases.shape == (HARMONICS,) and phases[0] == 0
    assert bool((phases[1:].abs() <= torch.pi).all()) and len(set(phases.tolist())) == HARMONICS
    assert torch.equal(phases, SeededNoise(4).phases()) and not torch.equal(phases, SeededNoise(5).phases())


def test_the_global_generator_is_not_touched():
    state = torch.get_rng_state()
    SeededNoise(1).start(3, 0, 60), SeededNoise(1).source(0, 2), SeededNoise(1).phases()
    assert torch.equal(torch.get_rng_state(), state)
