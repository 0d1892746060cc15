"""The decode engine: its cache against `KVLayer`, its backends against `generate`, its chunks against plain Python."""

import gc
import logging
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.families import FAMILIES, RELEASE, ROPE_BY_LENGTH, VOCABULARY, build, tiny, token_ids
from support.searching import search
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from kvcache import (
    CacheGeometry,
    CapacityError,
    GeometryError,
    InputError,
    KeepAll,
    KeyRotation,
    KVCacheManager,
    KVLayer,
    MaxTokens,
    Pinned,
    PolicyError,
    SlidingWindow,
)
from kvcache.cache import ring_sees, ring_slot, staying_of
from kvcache.decoding import (
    Decoding,
    Drawing,
    Pool,
    Sampler,
    Sampling,
    StaticKV,
    decoder_copy,
    traced,
    unsupported_reason,
)
from kvcache.decoding._backends import Compiled, Graph
from kvcache.decoding._sampler import TRANSFORMERS
from kvcache.models import exact_windows, geometry_of, kv_layers

CPU = torch.device("cpu")
LAYERS, HEADS, KEY_DIM, VALUE_DIM = 2, 2, 4, 3
GEOMETRY = CacheGeometry(LAYERS, HEADS, KEY_DIM, VALUE_DIM)
GREEDY = Sampling(temperature=0, repetition_penalty=1)
DRAWING = Sampling(0.9, 0.9, 0.02, 20, 1.3)
DRAWS = {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3}
POLICIES = [
    KeepAll(),
    SlidingWindow(5),
    SlidingWindow(1, sinks=1),
    SlidingWindow(4, sinks=2),
    MaxTokens(9, low_water=3),
    MaxTokens(6, low_water=6),
    MaxTokens(4, low_water=1),
    Pinned(3, SlidingWindow(4, sinks=1)),
    Pinned(2, MaxTokens(7, low_water=2)),
    Pinned(3, KeepAll()),
]


# ---------------------------------------------------------------------- the arithmetic of slots


@search(150)
@given(policy=st.sampled_from(POLICIES), length=st.integers(1, 60), spare=st.integers(0, 7))
def test_a_ring_shows_what_the_policy_keeps(policy, length, spare):
    stays, held = 0, []
    for position in range(length):
        held.append(position)
        stays = policy.keep(len(held))
        del held[policy.pinned : policy.pinned + len(held) - stays]
    limit = 2**62 if policy.limit is None else policy.limit
    low = 0 if policy.limit is None else policy.keep(policy.limit + 1)
    pinned = policy.pinned if policy.evicts else 0
    slots = (length if policy.limit is None else policy.limit) + spare
    one = [torch.tensor([n]) for n in (length, limit, low, pinned)]
    stored = staying_of(*one[:3])
    assert stored.tolist() == [stays]
    places = [int(ring_slot(torch.tensor([position]), one[3], slots)) for position in held]
    assert len(set(places)) == stays
    sees = ring_sees(one[0], stored, one[3], slots, torch.arange(slots))
    assert sees[0].nonzero()[:, 0].tolist() == sorted(places)
    if pinned:
        assert places[: min(pinned, length)] == list(range(min(pinned, length)))


# ---------------------------------------------------------------------- StaticKV against KVLayer


class Row:
    """A text of random keys and values, per layer ``[1, heads, tokens, dim]``, and what a policy keeps of it."""

    def __init__(self, policy, tokens, seed):
        generator = torch.Generator().manual_seed(seed)
        self.keys = torch.randn(LAYERS, 1, HEADS, tokens, KEY_DIM, generator=generator)
        self.values = torch.randn(LAYERS, 1, HEADS, tokens, VALUE_DIM, generator=generator)
        self.layers = [KVLayer(policy) for _ in range(LAYERS)]
        self.seen = 0

    def token(self, layer, position):
        return self.keys[layer][:, :, position : position + 1], self.values[layer][:, :, position : position + 1]

    def append(self, upto):
        for position in range(self.seen, upto):
            for layer, kv in enumerate(self.layers):
                kv.append(*self.token(layer, position))
        self.seen = upto

    def kept(self, layer):
        """By position."""
        kv = self.layers[layer]
        if kv.keys is None:
            return {}
        positions = kv.positions()[0].tolist()
        return {p: (kv.keys[0, :, i], kv.values[0, :, i]) for i, p in enumerate(positions)}


def prefilled(policy, rows, length, pads, chunks, told):
    """Layers of rows with `pads` before `length - pads` tokens, appended in chunks."""
    padding = torch.tensor(pads)
    layers = []
    for layer in range(LAYERS):
        kv = KVLayer(policy, padding=padding if told else None)
        keys = [
            torch.cat([torch.full((HEADS, p, KEY_DIM), 77.0), row.keys[layer][0, :, : length - p]], 1)
            for p, row in zip(pads, rows, strict=True)
        ]
        values = [
            torch.cat([torch.full((HEADS, p, VALUE_DIM), 77.0), row.values[layer][0, :, : length - p]], 1)
            for p, row in zip(pads, rows, strict=True)
        ]
        start, sizes = 0, list(chunks)
        while start < length:
            end = min(length, start + (sizes.pop(0) if sizes else length))
            kv.append(torch.stack(keys)[:, :, start:end], torch.stack(values)[:, :, start:end])
            start = end
        layers.append(kv)
    return layers


def place(policy, position, slots):
    pinned = policy.pinned if policy.evicts else 0
    return int(ring_slot(torch.tensor([position]), torch.tensor([pinned]), slots))


def shown(kv, row, layer, order, mask):
    """What a row's current token sees: as many tokens as keys and values, each ``[heads, dim]``."""
    columns = mask[row, 0, 0].nonzero()[:, 0].tolist()
    return {c: (kv.keys[layer][row, :, c], kv.values[layer][row, :, c]) for c in columns}


def assert_shows(kv, rows, policies, mask):
    for i, row in enumerate(rows):
        if row is None:
            continue
        for layer in range(LAYERS):
            found = shown(kv, i, layer, kv.order, mask)
            expected = {place(policies[i], p, kv.slots): states for p, states in row.kept(layer).items()}
            assert found.keys() == expected.keys()
            for column, (keys, values) in expected.items():
                assert torch.equal(found[column][0], keys.to(kv.keys[0].dtype))
                assert torch.equal(found[column][1], values.to(kv.values[0].dtype))


def step(kv, rows):
    """A step of every row: writes, looks, moves on."""
    columns, whole = kv.reach()
    kv.begin(columns)
    tokens = [
        [(torch.zeros(1, HEADS, 1, KEY_DIM), torch.zeros(1, HEADS, 1, VALUE_DIM))] * LAYERS
        if row is None
        else [row.token(layer, row.seen) for layer in range(LAYERS)]
        for row in rows
    ]
    for layer in range(LAYERS):
        keys, values = (torch.cat([tokens[i][layer][n] for i in range(len(rows))]) for n in (0, 1))
        read = kv.write(layer, keys, values)
        assert read[0].shape[2] == read[1].shape[2] == columns
    mask = kv.mask(kv.order[:columns])
    counts = kv.counts()
    kv.length.add_(1)
    kv.advance(1)
    for i, row in enumerate(rows):
        if row is not None:
            row.append(row.seen + 1)
            assert counts[i].tolist()[:2] == [row.seen, row.layers[0].stored]
            assert kv.seen[i] == row.seen
    if whole:
        assert bool(mask.all())
    return mask


@st.composite
def plans(draw):
    """Groups of rows: policy, length, pads of each row, chunks; and how many slots are to spare, how many steps."""
    groups = []
    for _ in range(draw(st.integers(1, 3))):
        policy = draw(st.sampled_from(POLICIES))
        length = draw(st.integers(1, 24))
        rows = draw(st.integers(1, 2))
        pads = [draw(st.integers(0, length - 1)) for _ in range(rows)] if draw(st.booleans()) else [0] * rows
        chunks = draw(st.lists(st.integers(1, 9), max_size=5))
        groups.append((policy, length, pads, chunks))
    return groups, draw(st.integers(0, 5)), draw(st.integers(1, 25)), draw(st.booleans()), draw(st.booleans())


@search(120)
@given(plan=plans(), seed=st.integers(0, 2**20))
def test_what_is_seen_is_what_a_layer_keeps_token_by_token(plan, seed):
    groups, spare, steps, later, again = plan
    needed = max(length + steps if policy.limit is None else policy.limit for policy, length, _, _ in groups)
    total = sum(len(pads) for _, _, pads, _ in groups)
    kv = StaticKV(GEOMETRY, total, needed + spare)
    assert kv.nbytes == total * (needed + spare) * LAYERS * HEADS * (KEY_DIM + VALUE_DIM) * 4
    rows, policies, first = [None] * total, [None] * total, 0
    for number, (policy, length, pads, chunks) in enumerate(groups):
        mine = [Row(policy, length + 3 * steps, seed + 10 * number + i) for i in range(len(pads))]
        for row, p in zip(mine, pads, strict=True):
            row.append(length - p)
        layers = prefilled(policy, mine, length, pads, chunks, told=True)
        positions = layers[0].positions().expand(len(pads), -1) - torch.tensor(pads)[:, None]
        held = [sorted(p for p in row.tolist() if p >= 0) for row in positions]
        if held == [sorted(row.kept(0)) for row in mine]:
            kv.load(first, layers, later=later)
            rows[first : first + len(pads)], policies[first : first + len(pads)] = mine, [policy] * len(pads)
        else:  # pads made the policy trim sooner than these tokens alone would have
            assert isinstance(policy, MaxTokens | Pinned) and any(pads)
            with pytest.raises(PolicyError, match="cannot go on here"):
                kv.load(first, layers)
        first += len(pads)
    kv.settle()
    for _ in range(steps):
        assert_shows(kv, rows, policies, step(kv, rows))
    report = kv.report()
    longest = max((row for row in rows if row is not None), key=lambda row: row.seen, default=None)
    if longest is not None:
        ours = longest.layers[0]
        assert [(one.seen, one.stored, one.evicted) for one in report.layers] == [
            (ours.seen, ours.stored, ours.seen - ours.stored)
        ] * LAYERS
        assert report.nbytes == kv.nbytes
    if again and rows[0] is not None:  # a row is freed and used again, while the others go on
        kv.free(0, len(groups[0][2]))
        rows[: len(groups[0][2])] = [None] * len(groups[0][2])
        assert_shows(kv, rows, policies, step(kv, rows))
        fresh = Row(groups[0][0], 3 * steps + 3, seed + 99)
        fresh.append(1)
        kv.load(0, prefilled(groups[0][0], [fresh], 1, [0], [], told=True))
        rows[0] = fresh
        for _ in range(steps - 1):
            assert_shows(kv, rows, policies, step(kv, rows))


@search(30)
@given(length=st.integers(1, 12), data=st.data())
def test_pads_that_the_layers_do_not_know_are_left_out(length, data):
    pads = data.draw(st.lists(st.integers(0, length - 1), min_size=2, max_size=2))
    rows = [Row(KeepAll(), length + 6, i) for i in range(2)]
    for row, p in zip(rows, pads, strict=True):
        row.append(length - p)
    kv = StaticKV(GEOMETRY, 2, length + 6)
    kv.load(0, prefilled(KeepAll(), rows, length, pads, [], told=False), torch.tensor(pads))
    assert kv.seen == kv.length.tolist() == [length - p for p in pads]
    for _ in range(6):
        assert_shows(kv, rows, [KeepAll()] * 2, step(kv, rows))


def test_a_cache_of_its_own_dtype_rounds_once():
    rows = [Row(SlidingWindow(6), 40, 3)]
    rows[0].append(9)
    kv = StaticKV(GEOMETRY, 1, 8, dtype=torch.bfloat16)
    assert kv.nbytes == 8 * LAYERS * HEADS * (KEY_DIM + VALUE_DIM) * 2
    assert {t.dtype for t in (*kv.keys, *kv.values)} == {torch.bfloat16}
    kv.load(0, prefilled(SlidingWindow(6), rows, 9, [0], [], told=True))
    for _ in range(12):
        assert_shows(kv, rows, [SlidingWindow(6)], step(kv, rows))


def state_of(kv):
    tensors = [*kv.keys, *kv.values, kv.length, kv.pinned, kv.low, kv.limit]
    return [t.clone() for t in tensors], list(kv.seen), list(kv._policies), len(kv._pending)


def assert_state(kv, before):
    tensors, *rest = state_of(kv)
    assert rest == list(before[1:])
    assert all(torch.equal(a, b) for a, b in zip(tensors, before[0], strict=True))


def layer(policy=None, length=4, rows=1, heads=HEADS, **options):
    kv = KVLayer(policy, **options)
    if length:
        kv.append(torch.ones(rows, heads, length, KEY_DIM), torch.ones(rows, heads, length, VALUE_DIM))
    return kv


def trimmed(policy, length, to):
    kv = layer(policy, length)
    kv.trim(to)
    return kv


TURN = KeyRotation(torch.tensor([1.0, 0.1]))
REFUSED = {
    "policies": (PolicyError, "the same", 0, lambda: [layer(SlidingWindow(4)), layer(SlidingWindow(5))]),
    "lengths": (PolicyError, "the same", 0, lambda: [layer(), layer(length=3)]),
    "rerotated": (PolicyError, "absolute", 0, lambda: [layer(SlidingWindow(4), rotation=TURN) for _ in range(2)]),
    "rows": (GeometryError, "not among the 2 rows", 1, lambda: [layer(rows=2), layer(rows=2)]),
    "below": (GeometryError, "not among the 2 rows", -1, lambda: [layer(), layer()]),
    "empty": (GeometryError, "without any token", 0, lambda: [layer(length=0), layer(length=0)]),
    "one empty": (GeometryError, "does not fit", 0, lambda: [layer(), layer(length=0)]),
    "too few layers": (GeometryError, "cannot be loaded into 2", 0, lambda: [layer()]),
    "heads": (GeometryError, "does not fit", 0, lambda: [layer(heads=3), layer(heads=3)]),
    "too long": (CapacityError, "9 tokens do not fit 8", 0, lambda: [layer(length=9), layer(length=9)]),
    "window": (CapacityError, "9 tokens do not fit 8", 0, lambda: [layer(SlidingWindow(9)) for _ in range(2)]),
    "trimmed": (PolicyError, "trimmed", 0, lambda: [trimmed(SlidingWindow(6), 9, 3) for _ in range(2)]),
    "all trimmed": (PolicyError, "trimmed", 0, lambda: [trimmed(KeepAll(), 9, 3) for _ in range(2)]),
    "trimmed with pads": (
        PolicyError,
        "cannot go on here",
        0,
        lambda: [layer(MaxTokens(7, 2), 8, padding=torch.tensor([2])) for _ in range(2)],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_loaded_is_refused_before_anything_changed(name):
    error, words, first, layers = REFUSED[name]
    kv = StaticKV(GEOMETRY, 2, 8)
    kv.load(0, [layer(length=2, rows=2), layer(length=2, rows=2)])
    before = state_of(kv)
    with pytest.raises(error, match=words):
        kv.load(first, layers())
    assert_state(kv, before)


def test_room_is_asked_for_before_anything_changes():
    kv = StaticKV(GEOMETRY, 2, 8)
    kv.load(0, [layer(SlidingWindow(4), 6) for _ in range(2)])
    kv.check(1000)
    kv.load(1, [layer(length=6) for _ in range(2)])
    kv.check(2)
    with pytest.raises(CapacityError, match="cannot decode 3 tokens: row 1 uses 6 of 8 slots"):
        kv.check(3)
    kv.free(1, 1)
    kv.check(1000)
    table = StaticKV(replace(GEOMETRY, max_positions=10), 1, 64)
    table.load(0, [layer(SlidingWindow(4), 6) for _ in range(2)])
    table.check(4)
    with pytest.raises(CapacityError, match="10"):
        table.check(5)
    for rows, slots in ((0, 4), (1, 0)):
        with pytest.raises(GeometryError, match="holds nothing"):
            StaticKV(GEOMETRY, rows, slots)


# ---------------------------------------------------------------------- backends against generate


def decoding_of(model, rows, slots, backend="eager", dtype=None, **options):
    """A decoding of a language model; "aot_eager" is torch's compiler without its slow half."""
    kv = StaticKV(geometry_of(model), rows, slots, dtype=dtype)
    decoder = decoder_copy(model)

    def forward(tokens, made, given):
        return decoder(input_ids=tokens[:, None], **given).logits[:, -1]

    named = "eager" if backend == "aot_eager" else backend
    decoding = Decoding(forward, kv, Sampler(rows, VOCABULARY, TRANSFORMERS, CPU), named, **options)
    if backend == "aot_eager":
        decoding._backend = Compiled(CPU, compiler="aot_eager")
    return decoding


@torch.no_grad()
def begin(decoding, manager, ids, sampling, generators=None, first=0):
    """Prefill and the first token ``[rows, 1]``."""
    cache = manager.new_cache(ids.shape[0])
    with exact_windows(manager.model):
        logits = manager.model(ids, past_key_values=cache).logits[:, -1]
    decoding.load(first, kv_layers(cache))
    rows = ids.shape[0]
    start = decoding.start(first, logits, [sampling] * rows, generators or [None] * rows, list(ids))
    return start[:, None]


def say(decoding, manager, ids, sampling, tokens, seed=0):
    torch.manual_seed(seed)
    said = [begin(decoding, manager, ids, sampling)]
    while (left := tokens - sum(one.shape[1] for one in said)) > 0:
        said.append(decoding.chunk(min(left, 37)))
    return torch.cat(said, 1)


def generated(manager, ids, tokens, seed=0, **drawing):
    torch.manual_seed(seed)
    return manager.generate(ids, max_new_tokens=tokens, **(drawing or {"do_sample": False}))[:, ids.shape[1] :]


@pytest.mark.grid(4)
@pytest.mark.parametrize("backend", ["eager", "graph", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gpt2"])
def test_tokens_are_those_of_generate(name, backend):
    model = tiny(name)
    manager = KVCacheManager(model)
    ids = token_ids(2, 9)
    decoding = decoding_of(model, 2, 128, backend)
    for sampling, drawing in ((GREEDY, {}), (DRAWING, DRAWS)):
        expected = generated(manager, ids, 120, seed=3, **drawing)
        assert torch.equal(say(decoding, manager, ids, sampling, 120, seed=3), expected)
        assert torch.equal(decoding.token, expected[:, -1])
    assert decoding.fallback is None
    assert decoding.backend == ("compile" if backend == "aot_eager" else backend)
    report = decoding.report()
    assert (report.backend, report.fallback, report.layers[0].seen) == (decoding.backend, None, 128)


WINDOWS = [(SlidingWindow(12, sinks=3), 9), (SlidingWindow(7, sinks=1), 20), (MaxTokens(24, 15), 9)]


@pytest.mark.grid(4)
@pytest.mark.parametrize("backend", ["eager", "graph"])
@pytest.mark.parametrize(("policy", "prompt"), WINDOWS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_windows_say_what_the_manager_says(name, policy, prompt, backend):
    model = tiny(name)
    manager = KVCacheManager(model, policy)
    ids = token_ids(1, prompt)
    decoding = decoding_of(model, 1, policy.limit, backend)
    for sampling, drawing in ((GREEDY, {}), (DRAWING, DRAWS)):
        expected = generated(manager, ids, 120, seed=1, **drawing)
        assert torch.equal(say(decoding, manager, ids, sampling, 120, seed=1), expected)
    assert decoding.report().layers[0].stored == manager.report().layers[0].stored


@pytest.mark.slow
def test_a_compiled_window_says_what_the_manager_says():
    model, policy = tiny("llama"), SlidingWindow(12, sinks=3)
    manager = KVCacheManager(model, policy)
    decoding = decoding_of(model, 1, 15, "aot_eager")
    expected = generated(manager, token_ids(1, 9), 60)
    assert torch.equal(say(decoding, manager, token_ids(1, 9), GREEDY, 60), expected)
    assert decoding.fallback is None


@pytest.mark.one_release
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own, at the compiler's import
def test_inductors_tokens_are_those_of_generate():
    model = build("llama", num_hidden_layers=1)
    manager = KVCacheManager(model)
    expected = generated(manager, token_ids(1, 9), 40)
    decoding = decoding_of(model, 1, 64, "compile")
    assert torch.equal(say(decoding, manager, token_ids(1, 9), GREEDY, 40), expected)
    assert (decoding.backend, decoding.fallback) == ("compile", None)


def test_compiled_graphs_are_only_compiled_on_a_cpu():
    decoding = decoding_of(tiny("llama"), 1, 8, "graph+compile")
    assert decoding.backend == "compile"
    assert "no graphs on a CPU" in decoding.report().fallback


def test_rows_of_different_lengths_and_generators_say_what_each_says_alone():
    model = tiny("llama")
    manager = KVCacheManager(model)
    texts = [token_ids(1, n, seed=n) for n in (3, 11, 7)]
    alone = []
    for i, ids in enumerate(texts):
        one = decoding_of(model, 1, 80)
        start = begin(one, manager, ids, [DRAWING, GREEDY, DRAWING][i], [torch.Generator().manual_seed(i)])
        alone.append(torch.cat([start, one.chunk(40)], 1))
    together = decoding_of(model, 3, 80, "graph")
    starts = [
        begin(together, manager, ids, [DRAWING, GREEDY, DRAWING][i], [torch.Generator().manual_seed(i)], first=i)
        for i, ids in enumerate(texts)
    ]
    said = torch.cat([torch.cat(starts), together.chunk(40)], 1)
    assert torch.equal(said, torch.cat(alone))


def test_a_bf16_cache_of_an_fp32_model_is_close():
    model = tiny("llama")
    manager = KVCacheManager(model)
    wide, narrow = (decoding_of(model, 1, 64, dtype=dtype) for dtype in (None, torch.bfloat16))
    seen = []
    for decoding in (wide, narrow):
        begin(decoding, manager, token_ids(1, 20), GREEDY)
        decoding.kv.settle()
        given = decoding._inputs.of_step(decoding.order[:21], True)
        with torch.no_grad():
            seen.append(decoding._forward(torch.tensor([5]), decoding.made, given))
    assert narrow.kv.nbytes * 2 == wide.kv.nbytes
    # Keys and values rounded to 8 bits: the logits, of some units, move by some hundredths.
    torch.testing.assert_close(seen[1], seen[0], atol=0.02 * float(seen[0].abs().max()), rtol=0)


# ---------------------------------------------------------------------- whether a step can be captured


@pytest.mark.parametrize("policy", [KeepAll(), SlidingWindow(10, sinks=3), MaxTokens(20, 9)], ids=str)
def test_one_recorded_step_replayed_is_the_eager_one(policy):
    model = build("llama", num_hidden_layers=1)
    manager = KVCacheManager(model, policy)
    slots = policy.limit or 220
    recorded = decoding_of(model, 1, slots, "graph")
    expected = say(decoding_of(model, 1, slots), manager, token_ids(1, 9), DRAWING, 202, seed=5)
    assert torch.equal(say(recorded, manager, token_ids(1, 9), DRAWING, 202, seed=5), expected)
    assert len(recorded._backend._recorded) == 1
    assert recorded.fallback is None


@pytest.mark.parametrize("whole", [True, False])
def test_the_compiler_makes_one_graph_for_all_lengths(whole):
    model = build("llama", num_hidden_layers=1)
    manager = KVCacheManager(model)
    rows = 1 if whole else 2
    decoding = decoding_of(model, rows, 128)
    counter = CompileCounterWithBackend("eager")
    decoding._backend = Compiled(CPU, compiler=counter)
    for row in range(rows):  # rows of different lengths need a mask
        begin(decoding, manager, token_ids(1, 5 + row), DRAWING, first=row)
    assert decoding.kv.reach()[1] == whole
    for _ in range(4):
        decoding.chunk(25)
    assert decoding.fallback is None
    assert counter.frame_count == 1


def fake_decoding(model, plant):
    kv = StaticKV(geometry_of(model), 2, 16)
    decoder = decoder_copy(model)

    def forward(tokens, made, given):
        if plant and int(made[0]) > 3:  # a look at the host
            tokens = tokens + 1
        return decoder(input_ids=tokens[:, None], **given).logits[:, -1]

    sampler = Sampler(2, VOCABULARY, TRANSFORMERS, CPU)
    for request in range(2):
        sampler.set(request, DRAWING)
    return Decoding(forward, kv, sampler)


@pytest.mark.parametrize("plant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_step_asks_the_host_nothing(name, plant, monkeypatch):
    # The system's own pages cannot be faked.
    monkeypatch.setattr(
        "kvcache.decoding._static_cache.zeros", lambda shape, dtype, device: torch.zeros(shape, dtype=dtype)
    )
    family = FAMILIES[name]
    with FakeTensorMode(), torch.no_grad():
        model = {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel}[name](family.config(**family.settings)).eval()
        decoding = fake_decoding(model, plant)
        drawing = Drawing(64, True, True)
        for whole, wanted in ((True, drawing), (False, drawing), (False, None)):
            if plant:
                with pytest.raises(DataDependentOutputException):
                    decoding.step(decoding.order[:7], whole, wanted)
            else:
                decoding.step(decoding.order[:7], whole, wanted)


# ---------------------------------------------------------------------- settings that change


def guided_decoding(model, slots, requests, backend):
    kv = StaticKV(geometry_of(model), 2 * requests, slots)
    decoder = decoder_copy(model)

    def forward(tokens, made, given):
        return decoder(input_ids=tokens[:, None].repeat_interleave(2, 0), **given).logits[:, -1]

    return Decoding(forward, kv, Sampler(requests, VOCABULARY, TRANSFORMERS, CPU, guided=True), backend)


@st.composite
def requests_of(draw):
    """Requests: how many at once, slots, prompt, and settings for each chunk."""
    one = st.builds(
        Sampling,
        temperature=st.sampled_from([0, 0.7, 1.1]),
        top_p=st.sampled_from([0.8, 1]),
        min_p=st.sampled_from([0, 0.05]),
        top_k=st.sampled_from([0, 12]),
        repetition_penalty=st.sampled_from([1, 1.4]),
        cfg_weight=st.sampled_from([0, 0.5, 1.5]),
    )
    request = st.tuples(
        st.integers(1, 2),
        st.sampled_from([24, 40, 60]),
        st.integers(1, 8),
        st.lists(st.tuples(one, st.integers(1, 5)), min_size=1, max_size=3),
        st.integers(0, 100),
    )
    return draw(st.lists(request, min_size=2, max_size=4))


def run_request(decoding, manager, prompt, chunks, seed, requests):
    ids = token_ids(2 * requests, prompt, seed=seed)
    cache = manager.new_cache(2 * requests)
    with torch.no_grad():
        logits = manager.model(ids, past_key_values=cache).logits[:, -1]
    decoding.load(0, kv_layers(cache))
    generators = [torch.Generator().manual_seed(seed + i) for i in range(requests)]
    said = [decoding.start(0, logits, [chunks[0][0]] * requests, generators, list(ids[::2]))[:, None]]
    for sampling, steps in chunks:
        for request in range(requests):
            decoding.sampler.set(request, sampling)
        said.append(decoding.chunk(steps))
    return torch.cat(said, 1)


@search(6)
@given(script=requests_of())
def test_whatever_changes_between_chunks_and_requests_the_graph_follows(script):
    model = MODELS["guided"]
    manager = KVCacheManager(model)
    pool = Pool()
    for requests, slots, prompt, chunks, seed in script:

        def make(slots, requests=requests):
            return guided_decoding(model, slots, requests, "graph")

        fresh = guided_decoding(model, slots, requests, "eager")
        expected = run_request(fresh, manager, prompt, chunks, seed, requests)
        with pool.lent(requests, slots, make) as decoding:
            assert torch.equal(run_request(decoding, manager, prompt, chunks, seed, requests), expected)
            assert decoding.fallback is None


MODELS = {"guided": build("llama", num_hidden_layers=1)}


def test_a_backend_that_gets_another_cache_records_anew():
    model = MODELS["guided"]
    manager = KVCacheManager(model)
    backend = Graph(traced)
    for slots in (30, 50):
        decoding = decoding_of(model, 1, slots)
        decoding._backend = backend
        expected = say(decoding_of(model, 1, slots), manager, token_ids(1, 5), GREEDY, 20)
        assert torch.equal(say(decoding, manager, token_ids(1, 5), GREEDY, 20), expected)
        assert backend._of is decoding and len(backend._recorded) == 1


def test_longer_caches_record_one_step_a_bucket():
    model = build("llama", num_hidden_layers=1)
    manager = KVCacheManager(model)
    decoding = decoding_of(model, 1, 300, "graph")
    expected = say(decoding_of(model, 1, 300), manager, token_ids(1, 240), DRAWING, 40)
    assert torch.equal(say(decoding, manager, token_ids(1, 240), DRAWING, 40), expected)
    drawing = decoding.sampler.drawing_of(slice(1))
    assert sorted(decoding._backend._recorded) == [(256, drawing), (300, drawing)]


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
    graph = decoding._backend = Graph(breaks)
    with caplog.at_level(logging.WARNING, "kvcache"):
        assert torch.equal(say(decoding, manager, token_ids(2, 9), DRAWING, 50), expected)
    assert decoding.fallback == "graph failed: RuntimeError: no capture today"
    assert decoding.backend == "eager"
    assert graph._recorded == {}
    assert len(caplog.records) == 1 and decoding.fallback in caplog.text


def test_a_compiler_that_fails_leaves_the_tokens_as_they_are(caplog):
    model = tiny("llama")
    manager = KVCacheManager(model)
    expected = say(decoding_of(model, 1, 64), manager, token_ids(1, 9), DRAWING, 20)

    def breaks(graph, inputs):
        raise ValueError("no compiler here")

    decoding = decoding_of(model, 1, 64)
    decoding._backend = Compiled(CPU, compiler=breaks)
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
    graph = decoding._backend = Graph(breaks)
    begin(decoding, manager, token_ids(1, 9), GREEDY)
    with pytest.raises(CapacityError, match="there is none"):
        decoding.chunk(3)
    assert decoding._backend is graph and decoding.fallback is None


def test_a_model_that_fails_in_eager_mode_is_no_fallback():
    decoding = scripted(torch.zeros(1, 9, dtype=torch.long))

    def breaks(*args):
        raise ZeroDivisionError

    decoding._forward = breaks
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
        Decoding(None, kv, Sampler(2, 9, TRANSFORMERS, CPU, guided=True))
    with pytest.raises(
        InputError, match="backend='fast' must be one of 'eager', 'compile', 'graph', 'graph\\+compile'"
    ):
        Decoding(None, kv, Sampler(3, 9, TRANSFORMERS, CPU), "fast")


# ---------------------------------------------------------------------- chunks and ends


def scripted(script, ahead=64):
    """A decoding whose requests say what the script says, ``[requests, tokens]``; its first token is made already."""
    requests, vocabulary = script.shape[0], 10

    def forward(tokens, made, given):
        return torch.nn.functional.one_hot(script.gather(1, made[:, None])[:, 0], vocabulary).float()

    kv = StaticKV(CacheGeometry(1, 1, 2, 2), requests, 8)
    decoding = Decoding(forward, kv, Sampler(requests, vocabulary, TRANSFORMERS, CPU), ahead=ahead)
    first = torch.nn.functional.one_hot(script[:, 0], vocabulary).float()
    decoding.start(0, first, [GREEDY] * requests, [None] * requests, [torch.zeros(0, dtype=torch.long)] * requests)
    return decoding


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
    found = [chunk.tolist() for chunk in decoding.chunks(total, size, ends, pad, first_may_end)]
    assert found == chunked_plainly(script, total, size, ends, pad, first_may_end)


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 5, 6, 7])
def test_an_end_at_the_edge_of_a_chunk(at):
    script = [[1] * at + [7] + [2] * (8 - at)]
    for size in (1, 2, 3, 4):
        found = [chunk.tolist() for chunk in scripted(torch.tensor(script)).chunks(8, size, [7])]
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
        found = torch.cat(list(decoding.chunks(40, size, [end])), 1)
        assert torch.equal(found, expected)
        assert torch.equal(torch.get_rng_state(), state)


def test_a_generator_of_ones_own_leaves_torchs_alone():
    decoding = decoding_of(tiny("llama"), 1, 64)
    state = torch.get_rng_state()
    begin(decoding, KVCacheManager(tiny("llama")), token_ids(1, 9), DRAWING, [torch.Generator().manual_seed(1)])
    list(decoding.chunks(40, 7, [3]))
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------- the model


REASONS = {
    "mistral-own-window": "manages layers its own way",
    "gemma2": "manages layers its own way",
    "gemma3": "manages layers its own way",
    "bart": "is an encoder-decoder",
    "t5": "is an encoder-decoder",
    **({"gptj": "brings its own attention"} if RELEASE < (5, 24) else {}),
    "bloom": "brings its own attention",
    "mpt": "brings its own attention",
    "falcon-alibi": "brings its own attention",
    "whisper-decoder": "brings its own attention",
}


@pytest.mark.parametrize("name", REASONS)
def test_models_that_cannot_are_refused_and_told_why(name):
    model = tiny(name)
    assert REASONS[name] in unsupported_reason(model)
    with pytest.raises(GeometryError, match=REASONS[name]):
        decoder_copy(model)


def test_more_models_that_cannot():
    for rope in ROPE_BY_LENGTH:
        assert "depend on the length" in unsupported_reason(
            build("llama", rope_parameters=rope, max_position_embeddings=64)
        )
    assert "scales its attention" in unsupported_reason(build("gpt2", scale_attn_by_inverse_layer_idx=True))


def snapshot(model):
    hooks = [
        {name: dict(held) for name, held in vars(module).items() if name.endswith("_hooks")}
        for module in model.modules()
    ]
    tensors = {name: (tensor.data_ptr(), tensor._version) for name, tensor in model.state_dict().items()}
    own = [sorted(vars(module)) for module in model.modules()]
    ids = [(name, id(module), id(vars(module).get("config"))) for name, module in model.named_modules()]
    return hooks, tensors, own, ids, model.config.to_dict(), model.config._attn_implementation


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt"])
def test_the_model_itself_stays_as_it_is(name, attention):
    model = build(name, attention)
    manager = KVCacheManager(model)
    before, said = snapshot(model), generated(manager, token_ids(1, 9), 20)
    decoder = decoder_copy(model)
    assert snapshot(model) == before
    for a, b in zip(decoder.parameters(), model.parameters(), strict=True):
        assert a is b
    for a, b in zip(decoder.modules(), model.modules(), strict=True):
        assert a is not b and type(a) is type(b)
    assert decoder.config._attn_implementation != model.config._attn_implementation
    say(decoding_of(model, 1, 64, "graph"), manager, token_ids(1, 9), GREEDY, 20)
    assert snapshot(model) == before
    assert torch.equal(generated(manager, token_ids(1, 9), 20), said)


# ---------------------------------------------------------------------- the pool


def pooled(pool, kind, slots):
    def make(slots):
        kv = StaticKV(GEOMETRY, 1, slots)
        return Decoding(None, kv, Sampler(1, 9, TRANSFORMERS, CPU))

    return pool.lent(kind, slots, make)


def test_a_pool_keeps_one_of_a_kind_and_the_larger():
    pool = Pool()
    with pooled(pool, "a", 8) as first:
        assert first.kv.slots == 8
    with pooled(pool, "a", 5) as again, pooled(pool, "b", 5) as other:
        assert again is first and other is not first
        with pooled(pool, "a", 16) as beside:  # the first is lent already
            assert beside is not first
    with pooled(pool, "a", 9) as kept:
        assert kept is beside and kept.kv.slots == 16
    with pooled(pool, "a", 20) as longer:
        assert longer.kv.slots == 20
    with pooled(pool, "a", 1) as kept, pooled(pool, "b", 1) as others:
        assert kept is longer and others is other


def test_a_pool_lets_go():
    pool = Pool()
    with pooled(pool, "a", 8) as lent:
        held = weakref.ref(lent)
    del lent
    gc.collect()
    assert held() is not None
    with pooled(pool, "a", 9) as lent:  # one that is too short goes before another is made
        gc.collect()
        assert held() is None
        held = weakref.ref(lent)
    del lent
    pool.clear()
    gc.collect()
    assert held() is None


def test_rows_are_free_again_after_an_error():
    pool, lent = Pool(), []

    def fails():
        with pooled(pool, "a", 8) as decoding:
            lent.append(decoding)
            decoding.load(0, [layer(length=5) for _ in range(2)])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    with pooled(pool, "a", 8) as again:
        assert again is lent[0]
        assert (again.kv.seen, again.kv.length.tolist(), again.kv._policies) == ([0], [0], [None])
        assert again.kv._pending == []
        again.kv.check(1000)
