"""The decode engine: what fails, and its chunks and ends against plain Python."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.decoders import CPU, DRAWING, DRAWS, GREEDY, begin, decoding_of, generated, say, scripted
from support.families import tiny, token_ids
from support.inside import decoding as inside
from support.searching import search
from support.static_rows import GEOMETRY, assert_state, state_of

from kvcache import CapacityError, GeometryError, InputError, KVCacheManager
from kvcache.decoding import Decoding, Sampler, StaticKV, TextEnd, chunks_of

# ---------------------------------------------------------------------- what fails


@pytest.mark.parametrize("runs", [0, 1, 3])
def test_a_backend_that_fails_leaves_the_tokens_as_they_are(runs, caplog):
    model = tiny("llama")
    manager = KVCacheManager(model)
    expected = say(decoding_of(model, 2, 64), manager, token_ids(2, 9), DRAWING, 50)

    def breaks(step, restore):
        for _ in range(runs):
            step()
        raise RuntimeError("no capture today\nand a second line")

    decoding = decoding_of(model, 2, 64)
    graph = inside.run_by(decoding, inside.Graph(breaks))
    with caplog.at_level(logging.WARNING, "kvcache"):
        assert torch.equal(say(decoding, manager, token_ids(2, 9), DRAWING, 50), expected)
    assert decoding.fallback == "graph failed: RuntimeError: no capture today"
    assert decoding.backend == "eager"
    assert inside.recorded(graph) == {}
    assert len(caplog.records) == 1 and decoding.fallback in caplog.text


def test_a_compiler_that_fails_leaves_the_tokens_as_they_are(caplog):
    model = tiny("llama")
    manager = KVCacheManager(model)
    expected = say(decoding_of(model, 1, 64), manager, token_ids(1, 9), DRAWING, 20)

    def breaks(graph, inputs):
        raise ValueError("no compiler here")

    decoding = decoding_of(model, 1, 64)
    inside.run_by(decoding, inside.Compiled(CPU, compiler=breaks))
    with caplog.at_level(logging.CRITICAL, "torch"):
        assert torch.equal(say(decoding, manager, token_ids(1, 9), DRAWING, 20), expected)
    assert decoding.fallback.startswith("compile failed")
    assert decoding.backend == "eager"


def test_a_lack_of_room_passes_through():
    model = tiny("llama")
    manager = KVCacheManager(model)

    def breaks(step, restore):
        raise CapacityError("there is none")

    decoding = decoding_of(model, 1, 64)
    graph = inside.run_by(decoding, inside.Graph(breaks))
    begin(decoding, manager, token_ids(1, 9), GREEDY)
    with pytest.raises(CapacityError, match="there is none"):
        decoding.chunk(3)
    assert inside.backend_of(decoding) is graph and decoding.fallback is None


def test_a_model_that_fails_in_eager_mode_is_no_fallback():
    decoding = scripted(torch.zeros(1, 9, dtype=torch.long))

    def breaks(*args):
        raise ZeroDivisionError

    inside.run_with(decoding, breaks)
    with pytest.raises(ZeroDivisionError):
        decoding.chunk(1)
    assert decoding.fallback is None


def test_a_chunk_without_room_changes_nothing():
    model = tiny("llama")
    manager = KVCacheManager(model)
    decoding = decoding_of(model, 1, 20)
    begin(decoding, manager, token_ids(1, 15), DRAWING)
    decoding.chunk(2)
    before, drawn = [t.clone() for t in decoding.state()], torch.get_rng_state()
    held = state_of(decoding.kv)
    with pytest.raises(CapacityError, match="cannot decode 4 tokens: row 0 uses 17 of 20 slots"):
        decoding.chunk(4)
    assert all(torch.equal(a, b) for a, b in zip(decoding.state(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert_state(decoding.kv, held)
    decoding.chunk(3)
    for steps in (0, decoding.ahead + 1):
        with pytest.raises(GeometryError, match=f"a chunk of {steps} steps"):
            decoding.chunk(steps)


def test_what_cannot_be_made_is_refused():
    kv = StaticKV(GEOMETRY, 3, 8)
    with pytest.raises(GeometryError, match="need a cache of 4 rows, this one has 3"):
        Decoding(None, kv, Sampler(2, 9, inside.TRANSFORMERS, CPU, guided=True))
    with pytest.raises(
        InputError, match="backend='fast' must be one of 'eager', 'compile', 'graph', 'graph\\+compile'"
    ):
        Decoding(None, kv, Sampler(3, 9, inside.TRANSFORMERS, CPU), "fast")


# ---------------------------------------------------------------------- chunks and ends


def chunked_plainly(script, total, size, ends, pad, first_may_end):
    rows = []
    for row in script:
        said = []
        for i, token in enumerate(row[:total]):
            said.append(token)
            if token in ends and (i > 0 or first_may_end):
                break
        rows.append(said)
    longest = max(len(row) for row in rows)
    rows = [row + [pad] * (longest - len(row)) for row in rows]
    return [[row[at : at + size] for row in rows] for at in range(0, longest, size)]


@search(250)
@given(
    data=st.data(),
    requests=st.integers(1, 3),
    total=st.integers(1, 24),
    size=st.integers(1, 26),
    ends=st.lists(st.integers(0, 9), max_size=3),
    pad=st.integers(0, 9),
    first_may_end=st.booleans(),
    ahead=st.integers(1, 9),
)
def test_chunks_are_those_of_plain_python(data, requests, total, size, ends, pad, first_may_end, ahead):
    tokens = st.lists(st.integers(0, 9), min_size=total + 1, max_size=total + 1)
    script = [data.draw(tokens) for _ in range(requests)]
    decoding = scripted(torch.tensor(script), ahead)
    found = [chunk.tolist() for chunk in chunks_of(decoding, TextEnd(ends, total, first_may_end), size, pad)]
    assert found == chunked_plainly(script, total, size, ends, pad, first_may_end)


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 5, 6, 7])
def test_an_end_at_the_edge_of_a_chunk(at):
    script = [[1] * at + [7] + [2] * (8 - at)]
    for size in (1, 2, 3, 4):
        found = [chunk.tolist() for chunk in chunks_of(scripted(torch.tensor(script)), TextEnd([7], 8), size)]
        assert found == chunked_plainly(script, 8, size, [7], 0, True)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_an_early_end_leaves_torchs_generator_where_generate_leaves_it(size, rows):
    model = tiny("llama")
    manager = KVCacheManager(model)
    ids = token_ids(rows, 9)
    said = generated(manager, ids, 40, seed=2, **DRAWS)
    decoding = decoding_of(model, rows, 64)
    for end in {int(said[0, at]) for at in (0, 1, 6, 7, 25)}:
        torch.manual_seed(2)
        expected = manager.generate(ids, max_new_tokens=40, eos_token_id=end, pad_token_id=0, **DRAWS)[:, 9:]
        state = torch.get_rng_state()
        torch.manual_seed(2)
        begin(decoding, manager, ids, DRAWING)
        found = torch.cat(list(chunks_of(decoding, TextEnd([end], 40), size)), 1)
        assert torch.equal(found, expected)
        assert torch.equal(torch.get_rng_state(), state)


def test_a_generator_of_ones_own_leaves_torchs_alone():
    decoding = decoding_of(tiny("llama"), 1, 64)
    state = torch.get_rng_state()
    begin(decoding, KVCacheManager(tiny("llama")), token_ids(1, 9), DRAWING, [torch.Generator().manual_seed(1)])
    list(chunks_of(decoding, TextEnd([3], 40), 7))
    assert torch.equal(torch.get_rng_state(), state)
