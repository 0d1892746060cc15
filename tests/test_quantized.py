"""A quantized layer against a slow reference: a list of tokens, and each group quantized by the formula."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.inside.layers import beside_the_states
from support.inside.testing import held_bytes
from support.searching import search

from kvcache import (
    AdaKV,
    CacheGeometry,
    CapacityError,
    CorruptError,
    GeometryError,
    InputError,
    KeepAll,
    KeyRotation,
    KVLayer,
    KVQuantization,
    MaxBytes,
    MaxTokens,
    PerHead,
    Pinned,
    PolicyError,
    PositionsError,
    RollbackError,
    SlidingWindow,
    SnapKV,
)
from kvcache.cache import CacheSpec, Expected, GroupedLayer, Plain, Whole, pack, unpack

pytestmark = pytest.mark.one_release

HEADS, KEY_DIM, VALUE_DIM, GROUP = 2, 5, 3, 8  # odd sizes
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

POLICIES = {
    "all": KeepAll(),
    "one": SlidingWindow(1),
    "window": SlidingWindow(21),
    "short": SlidingWindow(5, sinks=1),
    "sinks": SlidingWindow(24, sinks=4),
    "max": MaxTokens(30),
    "max-low": MaxTokens(33, low_water=3),
    "max-one": MaxTokens(4, low_water=1),
    "pinned-all": Pinned(3, KeepAll()),
    "pinned-window": Pinned(11, SlidingWindow(17, sinks=2)),
    "bytes": MaxBytes(5000),
    "pinned-bytes": Pinned(2, MaxBytes(6000, low_water=0.5)),
}


@dataclass(frozen=True)
class Case:
    policy: str
    bits: int
    dtype: torch.dtype
    rows: int
    chunks: list[int]

    @property
    def quantization(self) -> KVQuantization:
        return KVQuantization(self.bits, group_size=GROUP)

    def make(self, **options) -> GroupedLayer:
        rows = options.pop("rows", self.rows)
        token = (HEADS, KEY_DIM, VALUE_DIM, self.dtype) if options.pop("known", True) else None
        return GroupedLayer(POLICIES[self.policy], self.quantization, expected=Expected(rows, token), **options)

    def run(self, chunks: list[int] | None = None, **options) -> GroupedLayer:
        layer = self.make(**options)
        for count in self.chunks if chunks is None else chunks:
            feed(layer, self, count)
        return layer


piece = st.integers(1, 30).map(lambda n: [n]) | st.integers(2, 20).map(lambda n: [1] * n)
pieces = st.lists(piece, min_size=1, max_size=4).map(lambda pieces: [n for piece in pieces for n in piece])
cases = st.builds(
    Case, st.sampled_from(list(POLICIES)), st.sampled_from([8, 4]), st.sampled_from(DTYPES), st.integers(1, 3), pieces
)


def token(position: int, rows: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + position)
    keys = torch.randn(rows, HEADS, 1, KEY_DIM, generator=generator)
    keys[..., 0] = 7 + keys[..., 0] / 9  # a channel that is large in every token, as some of a model's are
    return keys.to(dtype), torch.randn(rows, HEADS, 1, VALUE_DIM, generator=generator).to(dtype)


def tokens(start: int, count: int, rows: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    if count == 0:
        return [states[:, :, :0] for states in token(0, rows, dtype)]
    made = [token(position, rows, dtype, seed) for position in range(start, start + count)]
    return [torch.cat(states, 2) for states in zip(*made, strict=True)]


def feed(layer: GroupedLayer, case: Case, count: int, seed: int = 0) -> list[torch.Tensor]:
    return list(layer.append(*tokens(layer.seen, count, case.rows, case.dtype, seed)).states)


def held(layer: GroupedLayer) -> dict:
    """All that a layer is, but for the memory that it does not use."""
    tensors, counts = layer.state()
    return {name: tensor.tolist() for name, tensor in tensors.items()} | counts


def formula(group: torch.Tensor, bits: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ``[tokens, dim]`` of one head become in float64, their scale, and how far each is from the next code."""
    dtype, exact = group.dtype, group.double()
    low = exact.amin(dim, keepdim=True) if bits == 4 else torch.zeros(1, 1, dtype=torch.float64)
    if dtype == torch.float32:  # scales and minima are bf16, the one rounded up, the other down
        near = low.to(torch.bfloat16)
        below = torch.nextafter(near, torch.full_like(near, -torch.inf))
        low = torch.where(near.double() > low, below, near).double()
    spread = exact.amax(dim, keepdim=True) - low if bits == 4 else exact.abs().amax(dim, keepdim=True)
    levels = 15 if bits == 4 else 127
    scale = spread.float() / levels
    if dtype == torch.float32:
        scale = (scale * (1 + 2**-8)).to(torch.bfloat16)
    else:
        scale = (scale + 2**-25).to(dtype) if dtype == torch.float16 else scale.to(dtype)
    scale = scale.double()
    at = (exact - low) / scale
    code = at.round().clamp(-127 if bits == 8 else 0, levels)
    return low + code * scale, scale.expand_as(exact), ((at - at.floor()) - 0.5).abs()


def check(stored: torch.Tensor, came: torch.Tensor, positions: list[int], pinned: int, seen: int, bits: int, dim: int):
    """Each stored token is as it came, or its group's by the formula."""
    full = pinned + max(0, seen - pinned) // GROUP * GROUP
    for column, position in enumerate(positions):
        if position < pinned or position >= full:
            assert torch.equal(stored[:, :, column], came[:, :, position])
            continue
        begin = position - (position - pinned) % GROUP
        for b in range(stored.shape[0]):
            for h in range(HEADS):
                expected, scale, tie = (
                    t[position - begin] for t in formula(came[b, h, begin : begin + GROUP], bits, dim)
                )
                got, exact = stored[b, h, column].double(), came[b, h, position].double()
                # One rounding to the dtype, of the sum; and of int8's and float32's product.
                rounding = torch.finfo(stored.dtype).eps * (expected.abs() + 16 * scale)
                assert ((got - exact).abs() <= scale / 2 + rounding).all()
                assert (((got - expected).abs() <= rounding) | (tie < 1e-4)).all()


# ---------------------------------------------------------------------- what is held


@search(75)
@given(cases)
def test_holds_what_the_reference_holds(case: Case):
    layer = case.make()
    full = KVLayer(layer.policy)
    came = tokens(0, sum(case.chunks), case.rows, case.dtype)
    pinned = layer.policy.pinned
    for count in case.chunks:
        fresh = [states[:, :, layer.seen : layer.seen + count] for states in came]
        assert torch.equal(layer.mask(count), full.mask(count))
        before = [[], []] if layer.keys is None else [layer.keys, layer.values]
        retained, stored = layer.retained, layer.stored
        sees = [*range(min(layer.seen, pinned)), *range(stored - retained + min(layer.seen, pinned), stored)]
        attended = layer.append(*fresh).states
        full.append(*fresh)
        for now, old, new in zip(attended, before, fresh, strict=True):
            assert now.shape[2] == retained + count
            assert torch.equal(now[:, :, retained:], new)
            assert not retained or torch.equal(now[:, :, :retained], old[:, :, sees])
        assert (layer.seen, layer.stored, layer.evicted, layer.retained) == (
            full.seen, full.stored, full.evicted, full.retained,
        )  # fmt: skip
        positions = layer.positions()[0].tolist()
        assert positions == sorted(full.positions()[0].tolist())
        assert layer.policy.limit is None or layer.stored <= layer.policy.limit
        assert layer.stored <= layer.capacity
        for states, whole, dim in ((layer.keys, came[0], 0), (layer.values, came[1], 1)):
            assert states.dtype == case.dtype
            check(states, whole, positions, pinned, layer.seen, case.bits, dim)


@search(200)
@given(cases)
def test_bytes_are_those_told_before(case: Case):
    layer = case.make()
    for count in case.chunks:
        feed(layer, case, count)
        geometry = CacheGeometry(1, HEADS, KEY_DIM, VALUE_DIM, case.dtype)
        expected = CacheSpec(POLICIES[case.policy], storage=case.quantization).nbytes(
            geometry, layer.seen, rows=case.rows
        )
        assert layer.nbytes == held_bytes(layer) == expected
        if "bytes" in case.policy:
            assert layer.nbytes <= {"bytes": 5000, "pinned-bytes": 6000}[case.policy]
        if layer.policy.limit is not None:
            assert layer.capacity <= layer.policy.limit + 2 * GROUP  # a group begun, and the tail


@search(60)
@given(cases)
def test_state_does_not_depend_on_the_chunks(case: Case):
    assert held(case.run()) == held(case.run([1] * sum(case.chunks)))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_budget_in_bytes_is_shared_by_layers_and_kept_with_more_rows(bits):
    quantization = KVQuantization(bits, group_size=GROUP)
    whole = Expected(whole=Whole(((HEADS, KEY_DIM, VALUE_DIM, torch.float16),) * 3))
    layers = [GroupedLayer(MaxBytes(40_000), quantization, expected=whole) for _ in range(3)]
    for layer in layers:
        layer.append(*tokens(0, 600, 2, torch.float16))
    assert 36_000 < sum(layer.nbytes for layer in layers) <= 40_000
    for layer in layers:
        layer.repeat(2)
        assert layer.stored <= layer.policy.limit
    assert sum(layer.nbytes for layer in layers) <= 40_000
    for layer in layers:
        layer.append(*tokens(600, 50, 4, torch.float16))
    assert sum(layer.nbytes for layer in layers) <= 40_000
    before = held(layers[0])
    with pytest.raises(PolicyError, match="does not hold one token"):
        layers[0].repeat(20)
    assert held(layers[0]) == before
    with pytest.raises(PolicyError, match="does not hold one token"):
        GroupedLayer(MaxBytes(100), quantization).append(*tokens(0, 1, 1, torch.float16))


# How much smaller. Against the bare states the tail alone costs 64 of 2048 tokens in full precision.
@pytest.mark.parametrize(("bits", "layers", "bare"), [(8, 1.9, 1.8), (4, 3.4, 3.2)])
def test_it_is_smaller(bits, layers, bare):
    states = torch.zeros(1, 3, 2048, 64, dtype=torch.float16)
    small, full = GroupedLayer(None, KVQuantization(bits)), KVLayer()
    small.append(states, states)
    full.append(states, states)
    assert full.nbytes / small.nbytes >= layers
    assert 2 * states.numel() * 2 / small.nbytes >= bare


# ---------------------------------------------------------------------- numbers


@pytest.mark.grid(36)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dim", [1, 2, 7, 64])
@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-4, 1.0, 60000.0, 3e38])
def test_every_magnitude_is_off_by_half_a_scale(dtype, bits, dim, size):
    info = torch.finfo(dtype)
    # Beyond half of its range the spread of an int4 group is not a number of the dtype.
    size = min(info.max / 2.1, size) if bits == 4 else size
    states = (torch.rand(2, HEADS, 2 * GROUP, dim, generator=torch.Generator().manual_seed(0)) * 2 - 1) * size
    states[0, 0, 0], states[0, 0, 1] = size, -size
    states = states.clamp(-info.max, info.max).to(dtype)
    layer = GroupedLayer(None, KVQuantization(bits, group_size=GROUP))
    layer.append(states, states)
    exact = states.double()
    for got, over in ((layer.keys, 2), (layer.values, 3)):
        assert got.isfinite().all()
        grouped = exact.unflatten(2, (2, GROUP)) if over == 2 else exact[..., None, :]
        low = grouped.amin(-2 if over == 2 else -1, keepdim=True)
        high = grouped.amax(-2 if over == 2 else -1, keepdim=True)
        scale = (high - low) / 15 if bits == 4 else torch.maximum(high, -low) / 127
        if dtype == torch.float32:  # scales and minima are bf16: the one is rounded up, the other down
            scale = (scale + (low.abs() * 2**-7 / 15 if bits == 4 else 0)) * (1 + 2**-7)
        bound = (scale.expand_as(grouped)).reshape(exact.shape) / 2
        # A few roundings: of the scale, 15 or 127 times, and of the result; and fp16's smallest number.
        bound = bound + info.eps * (exact.abs() + 8 * bound) + (2**-24 if dtype == torch.float16 else 1e-37)
        assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_constant_channels(dtype, bits):
    keys = torch.tensor([0.0, 3.0, -0.1]).expand(1, 1, GROUP, 3).to(dtype)
    layer = GroupedLayer(None, KVQuantization(bits, group_size=GROUP))
    layer.append(keys, keys)
    if dtype == torch.float32:
        torch.testing.assert_close(layer.keys, keys, atol=0, rtol=2**-8)  # scales and minima are bf16
    elif bits == 4:
        assert torch.equal(layer.keys, keys)  # the minimum itself
    else:
        torch.testing.assert_close(layer.keys, keys)  # 127 times a rounded 127th


@pytest.mark.parametrize("bits", [8, 4])
def test_whole_numbers_come_back(bits):
    for dim in (1, 2, 3, 8):
        codes = torch.randint(0, 16, (1, 2, 3 * GROUP, dim), generator=torch.Generator().manual_seed(dim)).float()
        codes[:, :, ::GROUP], codes[:, :, 1::GROUP] = 0, 15  # so that a key channel's scale is 1
        layer = GroupedLayer(None, KVQuantization(bits, group_size=GROUP))
        layer.append(codes, codes)
        torch.testing.assert_close(layer.keys, codes, atol=0.0 if bits == 4 else 15 / 127 / 2, rtol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_not_finite_shows_and_stays_in_its_channel_and_token(bits, bad):
    keys, values = tokens(0, 3 * GROUP, 1, torch.float32)
    clean = GroupedLayer(None, KVQuantization(bits, group_size=GROUP))
    clean.append(keys, values)
    keys, values = keys.clone(), values.clone()
    keys[0, 1, 10, 2] = values[0, 1, 10, 2] = bad
    layer = GroupedLayer(None, KVQuantization(bits, group_size=GROUP))
    layer.append(keys, values)
    wrong = torch.zeros_like(keys, dtype=torch.bool)
    wrong[0, 1, GROUP : 2 * GROUP, 2] = True
    assert torch.equal(layer.keys.isnan(), wrong)
    assert torch.equal(layer.keys[~wrong], clean.keys[~wrong])
    wrong = torch.zeros_like(values, dtype=torch.bool)
    wrong[0, 1, 10] = True
    assert torch.equal(layer.values.isnan(), wrong)
    assert torch.equal(layer.values[~wrong], clean.values[~wrong])


# ---------------------------------------------------------------------- laws


@search(200)
@given(cases, pieces, st.integers(0, 60))
def test_truncate_then_append_equals_never_appended(case: Case, more: list[int], back: int):
    layer = case.run()
    length = max(0, layer.seen - back)
    before = held(layer)
    pinned = layer.policy.pinned
    quantized = pinned + max(0, layer.seen - pinned) // GROUP * GROUP
    within = pinned < length < quantized and (length - pinned) % GROUP
    evicted_since = pinned < length < before["floor"]
    if (within or evicted_since) and length:
        with pytest.raises(RollbackError, match="give"):
            layer.truncate(length)
        assert held(layer) == before
        return
    layer.truncate(length)
    assert layer.seen == length
    never = case.run([1] * length, rows=case.rows)
    if length:
        assert held(layer) == held(never)
    for count in more:  # another text than the one rolled back
        for ours, theirs in zip(feed(layer, case, count, 1), feed(never, case, count, 1), strict=True):
            assert torch.equal(ours, theirs)
    assert held(layer) == held(never)


@search(60)
@given(cases, pieces)
def test_reset_then_append_equals_new(case: Case, more: list[int]):
    layer, new = case.run(), case.run([])
    layer.reset()
    assert (layer.seen, layer.stored) == (0, 0)
    for count in more:
        feed(layer, case, count, 1)
        feed(new, case, count, 1)
    assert held(layer) == held(new)


@search(80)
@given(cases, st.lists(st.integers(0, 2), min_size=1, max_size=4), pieces)
def test_rows_commute(case: Case, rows: list[int], more: list[int]):
    if "bytes" in case.policy:  # there, fewer rows leave room for more tokens
        return
    rows = [row % case.rows for row in rows]
    layer, chosen = case.run(), case.make(rows=len(rows))
    layer.select(torch.tensor(rows))
    for count in case.chunks:
        chosen.append(*(t[rows] for t in tokens(chosen.seen, count, case.rows, case.dtype)))
    assert held(layer) == held(chosen)
    for count in more:
        fresh = [t[rows] for t in tokens(layer.seen, count, case.rows, case.dtype)]
        for ours, theirs in zip(layer.append(*fresh).states, chosen.append(*fresh).states, strict=True):
            assert torch.equal(ours, theirs)
    assert held(layer) == held(chosen)


@search(80)
@given(cases, st.integers(0, 40), pieces)
def test_trim_keeps_the_newest(case: Case, keep: int, more: list[int]):
    layer = case.run()
    pinned, seen, stored = layer.policy.pinned, layer.seen, layer.stored
    keep = max(1, pinned, min(keep, stored))
    came = tokens(0, seen + sum(more), case.rows, case.dtype)
    assert layer.trim(keep) == max(0, stored - keep)
    count = min(keep, stored)
    expected = [*range(min(pinned, seen)), *range(seen - count + min(pinned, seen), seen)]
    assert layer.positions()[0].tolist() == expected
    check(layer.keys, came[0], expected, pinned, seen, case.bits, 0)
    case.make().restore(*layer.state())
    if keep < stored and seen - 1 > pinned:
        with pytest.raises(RollbackError):
            layer.truncate(seen - 1)
    for n in more:
        feed(layer, case, n)
    positions = layer.positions()[0].tolist()
    check(layer.values, came[1], positions, pinned, layer.seen, case.bits, 1)
    assert layer.policy.limit is None or layer.stored <= layer.policy.limit


def test_memory_does_not_grow_where_it_is_trimmed_by_hand():
    layer = GroupedLayer(None, KVQuantization(8, group_size=GROUP), max_length=40)
    sizes = set()
    for _ in range(30):
        layer.append(*tokens(layer.seen, 20, 1, torch.float32))
        layer.trim(9)
        sizes.add(layer.capacity)
    assert max(sizes) <= 40 + GROUP


@search(80)
@given(cases, pieces)
def test_a_saved_layer_continues_as_the_original(case: Case, more: list[int]):
    layer = case.run()
    tensors, counts = layer.state()
    saved = unpack(pack(tensors, counts))
    forks = [case.make(), case.make(rows=None, known=False), case.run(case.chunks[:1])]
    forks[2].reset()
    for fork in forks:
        fork.restore(*saved)
        assert fork is forks[2] or fork.nbytes == layer.nbytes
    left = held(layer)
    for count in more:
        expected = feed(layer, case, count)
        for fork in forks[:2]:
            assert all(torch.equal(a, b) for a, b in zip(expected, feed(fork, case, count), strict=True))
            assert fork.mask(3).equal(layer.mask(3))
    assert held(forks[0]) == held(forks[1]) == held(layer)
    assert held(forks[2]) == left  # nothing is shared
    assert forks[1].nbytes == layer.nbytes
    tensors, counts = left_state = forks[2].state()
    for tensor in tensors.values():
        tensor.zero_()
    assert held(forks[2]) == left, left_state


@search(150)
@given(cases, st.data())
def test_a_state_that_does_not_fit_is_refused(case: Case, data: st.DataObject):
    tensors, counts = case.run().state()
    kind = data.draw(
        st.sampled_from(["missing", "more", "shape", "dtype", "count", "no-count", "group", "other", "float"])
    )
    name = data.draw(st.sampled_from(sorted(tensors)))
    if kind == "missing":
        del tensors[name]
    elif kind == "more":
        tensors["other"] = tensors[name]
    elif kind == "shape":
        dim = data.draw(st.integers(1, 3))
        tensors[name] = torch.cat((tensors[name], tensors[name].narrow(dim, 0, min(1, tensors[name].shape[dim]))), dim)
        if tensors[name].shape[dim] < 2:
            tensors[name] = tensors[name].flatten()
    elif kind == "dtype":
        tensors[name] = tensors[name].to(torch.int32)
    elif kind == "count":
        count = data.draw(st.sampled_from(sorted(counts)))
        changed = data.draw(st.integers(-3, 300))
        if changed == counts[count] or count == "floor":
            changed = -1
        counts[count] = changed
    elif kind == "no-count":
        del counts[data.draw(st.sampled_from(sorted(counts)))]
    elif kind == "group":
        counts["group_size"] = 2 * counts["group_size"]
    elif kind == "float":
        counts["seen"] = float(counts["seen"])
    else:
        tensors = dict.fromkeys(tensors)
    layer = case.make()
    with pytest.raises(CorruptError):
        layer.restore(tensors, counts)
    assert (layer.seen, layer.stored, layer.nbytes) == (0, 0, 0)


def test_a_state_goes_into_an_empty_layer_alike():
    case = Case("sinks", 8, torch.float32, 2, [40])
    layer = case.run()
    state = layer.state()
    with pytest.raises(CorruptError, match="already holds 40 tokens"):
        layer.restore(*state)
    with pytest.raises(CorruptError, match="rows"):
        case.make(rows=3).restore(*state)
    for other in (KVQuantization(4, group_size=GROUP), KVQuantization(8, group_size=16)):
        with pytest.raises(CorruptError, match=r"it is of groups|not a state of this layer"):
            GroupedLayer(POLICIES["sinks"], other).restore(*state)
    with pytest.raises(CorruptError, match="tokens stored of"):
        GroupedLayer(SlidingWindow(10, sinks=4), KVQuantization(8, group_size=GROUP)).restore(*state)
    empty = case.make()
    empty.restore(*case.make().state())
    assert empty.keys is None
    feed(empty, case, 3)


# ---------------------------------------------------------------------- refusals change nothing


@pytest.mark.parametrize("bits", [8, 4])
def test_a_failed_call_changes_nothing(bits):
    case = Case("pinned-all", bits, torch.float32, 2, [30])
    layer = case.run(max_length=32)
    before = held(layer)
    keys, values = tokens(30, 2, 2, torch.float32)
    failing = {
        CapacityError: lambda: layer.append(*tokens(30, 3, 2, torch.float32)),
        GeometryError: lambda: layer.append(keys.half(), values.half()),
        ValueError: lambda: layer.append(keys[:1], values[:1]),
        RollbackError: lambda: layer.truncate(12),
        PolicyError: lambda: layer.trim(2),
        IndexError: lambda: layer.select(torch.tensor([0, 5])),
    }
    for error, call in failing.items():
        with pytest.raises(error):
            call()
        assert held(layer) == before
    with pytest.raises(GeometryError, match="no rows"):
        layer.select(torch.tensor([], dtype=torch.long))
    with pytest.raises(RollbackError, match="0 to 30"):
        layer.truncate(31)
    with pytest.raises(RollbackError, match=r"give 11, 19 or another .* or 27 to 30"):
        layer.truncate(12)
    assert held(layer) == before
    layer.append(keys, values)
    for states in ((keys.long(), values.long()), (keys.half(), values)):
        with pytest.raises(GeometryError, match="one floating-point dtype"):
            GroupedLayer(None, KVQuantization(8)).append(*states)


@pytest.mark.parametrize(
    "wrong",
    [
        {"keys": 2},
        {"keys": 16},
        {"keys": True},
        {"keys": 8, "values": 3},
        *({"keys": 8, "group_size": n} for n in (7, 9, 0, 8.0)),
    ],
    ids=str,
)
def test_what_cannot_be_a_quantization(wrong):
    with pytest.raises(InputError, match="must be"):
        KVQuantization(**wrong)


def test_padded_rows_that_evict_are_refused():
    padding = torch.tensor([2, 0])
    for policy in (SlidingWindow(5), MaxBytes(10_000), Pinned(2, MaxTokens(9))):
        with pytest.raises(PositionsError, match=r"group_size=None\), run the rows apart, or use KeepAll\(\)"):
            GroupedLayer(policy, KVQuantization(8), padding=padding)
    GroupedLayer(SlidingWindow(5), KVQuantization(8), padding=torch.zeros(2))
    layer = GroupedLayer(None, KVQuantization(8), padding=padding)
    layer.append(*tokens(0, 5, 2, torch.float32))
    with pytest.raises(PositionsError, match="padded rows"):
        layer.trim(3)
    assert layer.stored == 5 and layer.trim() == 0


@search(60)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), pieces, st.sampled_from(["all", "pinned-all"]), st.data())
def test_padded_rows_without_eviction(padding: list[int], chunks: list[int], policy: str, data: st.DataObject):
    case = Case(policy, 8, torch.float32, len(padding), chunks)
    layer, full = case.make(padding=torch.tensor(padding)), KVLayer(POLICIES[policy], padding=torch.tensor(padding))
    for i, count in enumerate(chunks):
        assert torch.equal(layer.mask(count), full.mask(count))
        fresh = tokens(layer.seen, count, case.rows, case.dtype)
        assert [t.shape for t in layer.append(*fresh).states] == [t.shape for t in full.append(*fresh).states]
        if i == 0:
            rows = data.draw(st.permutations(range(case.rows)))
            for both in (layer, full):
                both.select(torch.tensor(rows))
    length = layer.policy.pinned + (layer.seen - layer.policy.pinned) // GROUP * GROUP
    if 0 <= length <= layer.seen:
        layer.truncate(length)
        full.truncate(length)
    assert torch.equal(layer.mask(4), full.mask(4))
    fork = case.make(padding=layer.padding)
    fork.restore(*layer.state())
    assert torch.equal(fork.mask(4), full.mask(4))


def test_inference_mode_and_gradients():
    case = Case("sinks", 4, torch.float32, 2, [])
    layer, expected = case.make(), case.run([5, 30, 1, 7, 20])
    with torch.inference_mode():
        feed(layer, case, 5)
    keys, values = tokens(5, 30, 2, torch.float32)
    assert not layer.append(keys.requires_grad_(), values).keys.requires_grad
    with torch.inference_mode():
        feed(layer, case, 1)
        layer.select(torch.tensor([0, 1]))
        layer.repeat(1)
    with torch.no_grad():
        feed(layer, case, 7)
    feed(layer, case, 20)
    assert held(layer) == held(expected)
    assert keys.requires_grad


def test_what_is_given_is_not_changed():
    keys, values = tokens(0, 3 * GROUP, 1, torch.float32)
    copies = keys.clone(), values.clone()
    for bits in (8, 4):
        layer = GroupedLayer(None, KVQuantization(bits, group_size=GROUP))
        attended = layer.append(keys, values).states
        before = held(layer)
        for states in attended:
            states.zero_()
        assert held(layer) == before
        assert torch.equal(keys, copies[0]) and torch.equal(values, copies[1])
    layer.append(keys.transpose(1, 2).contiguous().transpose(1, 2), values.expand(1, -1, -1, -1))
    assert layer.stored == 6 * GROUP


# ---------------------------------------------------------------------- each token by itself


@pytest.mark.grid(36)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dim", [1, 2, 7, 64])
@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-4, 1.0, 60000.0, 3e38])
def test_a_token_by_itself_is_off_by_half_a_scale(dtype, bits, dim, size):
    info = torch.finfo(dtype)
    size = min(info.max / 2.1, size) if bits == 4 else size
    states = (torch.rand(2, HEADS, 9, dim, generator=torch.Generator().manual_seed(0)) * 2 - 1) * size
    states = states.clamp(-info.max, info.max).to(dtype)
    storage = KVQuantization(bits, group_size=None)
    for side in ("keys", "values"):
        held = storage.encode(states, side)
        got = storage.decode(held, side, states[:, :, :0])
        assert got.dtype == dtype and got.isfinite().all()
        shared = 32 if bits == 4 and dim == 64 else dim
        grouped = states.double().unflatten(3, (-1, shared))
        low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        scale = (high - low) / 15 if bits == 4 else torch.maximum(high, -low) / 127
        if dtype == torch.float32:
            scale = (scale + (low.abs() * 2**-7 / 15 if bits == 4 else 0)) * (1 + 2**-7)
        bound = scale.expand_as(grouped).flatten(3) / 2
        bound = bound + info.eps * (states.double().abs() + 8 * bound) + (2**-24 if dtype == torch.float16 else 1e-37)
        assert ((got.double() - states.double()).abs() <= bound).all()
        one = storage.encode(states[:, :, 3:4], side)
        assert all(torch.equal(part[:, :, 3:4], one[name]) for name, part in held.items()), "depends on other tokens"


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_not_finite_stays_in_its_token(bits):
    states = torch.randn(1, 2, 5, 6)
    states[0, 1, 3, 2] = torch.inf
    storage = KVQuantization(bits, group_size=None)
    got = storage.decode(storage.encode(states, "keys"), "keys", states[:, :, :0])
    assert got[0, 1, 3].isnan().all()
    assert got.isnan().sum() == 6


@pytest.mark.parametrize(("bits", "smaller"), [(8, 1.9), (4, 3.1)])
@pytest.mark.parametrize("policy", [SnapKV(512), SlidingWindow(512)], ids=repr)
def test_tokens_that_leave_one_by_one_are_smaller_too(policy, bits, smaller):
    token, states = (3, 64, 64, torch.float16), torch.randn(1, 3, 700, 64, dtype=torch.float16)
    sizes = []
    for storage in (Plain(), KVQuantization(bits, group_size=None)):
        layer = CacheSpec(policy, storage=storage).layer(expected=Expected(1, token))
        for span in layer.append(states, states).spans:
            span.observe(states, 0.125)
        more = beside_the_states(layer)
        sizes.append(layer.nbytes - sum(t.nbytes for t in more))
        assert layer.stored <= 512
    assert sizes[0] / sizes[1] >= smaller


def test_keys_and_values_may_have_bits_of_their_own():
    token, states = (2, 32, 32, torch.float16), torch.randn(1, 2, 128, 32, dtype=torch.float16)
    layers = {}
    for pair in ((8, 8), (8, 4), (4, 8), (4, 4)):
        for group in (16, None):
            storage = KVQuantization(*pair, group_size=group)
            layers[pair, group] = layer = CacheSpec(storage=storage).layer(expected=Expected(1, token))
            layer.append(states, states)
            off = [(held - states).abs().max() for held in (layer.keys, layer.values)]
            assert [error > 0.05 for error in off] == [bits == 4 for bits in pair]
            assert layer.nbytes == CacheSpec(storage=storage).nbytes(CacheGeometry(1, 2, 32, 32, torch.float16), 128)
    assert layers[(8, 8), 16].nbytes > layers[(8, 4), 16].nbytes > layers[(4, 4), 16].nbytes


def test_which_layers_hold_groups():
    expected = Expected(1, (2, 8, 8, torch.float32))
    groups = KVQuantization(8, group_size=8)
    turn = KeyRotation(torch.ones(4))
    layers = [
        (True, CacheSpec(storage=groups).layer()),
        (True, CacheSpec(SlidingWindow(9, sinks=2), storage=groups).layer()),
        (False, CacheSpec(storage=KVQuantization(8, group_size=None)).layer()),
        (False, CacheSpec(SlidingWindow(9, sinks=2), positions="rerotated", storage=groups).layer(rotation=turn)),
        (False, CacheSpec(SlidingWindow(9), storage=groups, static=True).layer()),
        (False, CacheSpec(SnapKV(128), storage=groups).layer()),
        (False, CacheSpec(PerHead((KeepAll(), SlidingWindow(9))), storage=groups).layer(expected=expected)),
        (False, CacheSpec(AdaKV(SnapKV(128)), storage=groups).layer(expected=expected)),
    ]
    for grouped, layer in layers:
        for _, part in layer.parts():
            assert (part.storage.group_size is not None) == grouped, layer
