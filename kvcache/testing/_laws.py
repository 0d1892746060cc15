"""The laws of a cache layer, each a function that takes what makes layers and what is done to one of them.

A law that is broken raises AssertionError. Laws 4 (save, load, fork) and 7 (a model's logits) need a model and are not here.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from functools import partial
from typing import Any, Protocol

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvcache.cache import (
    CacheGeometry,
    CacheSpec,
    Expected,
    KeyRotation,
    LayerCache,
    MaxBytes,
    Pinned,
    PositionMode,
    SizePolicy,
    Whole,
)
from kvcache.errors import CapacityError, GeometryError, PolicyError, RollbackError
from kvcache.testing._oracle import Oracle

HEADS, KEY_DIM, VALUE_DIM, MAX_LENGTH = 2, 6, 3, 64
FREQUENCIES = torch.tensor([1.0, 0.1])  # four of the six key channels are rotary
BUFFERS: dict[str, dict[str, Any]] = {
    "grown": {},
    "static": {"max_length": MAX_LENGTH},
    "preallocated": {"max_length": MAX_LENGTH, "static": True},
}


class Maker(Protocol):
    """What is tested: makes layers."""

    @property
    def tolerance(self) -> float:
        """How far what is held may be from what came; 0 for a layer that holds it bit by bit."""

    def policy(self, rows: int, dtype: torch.dtype = torch.float32, layers: int = 1) -> SizePolicy:
        """Of a cache of so many rows and layers."""

    def tokens(self, rows: int, count: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
        """Queries, keys and values of `count` tokens, such as the layers hold within the tolerance."""

    def __call__(
        self, padding: list[int], dtype: torch.dtype = torch.float32, layers: int = 1, **options: Any
    ) -> LayerCache:
        """A layer whose rows begin with so many pads."""


@dataclass(frozen=True)
class Scenario:
    """What is done to a layer. Each law takes from it what it needs."""

    padding: list[int]
    chunks: list[int]
    more: list[int]
    cut: int
    rows: list[int]
    buffer: str
    dtype: torch.dtype


def scenarios(variant: str) -> st.SearchStrategy[Scenario]:
    """Of a variant: ``"plain"``, ``"padded"`` or ``"rerotated"``."""
    # Chunks, and runs of single tokens long enough to go round a ring; 60 tokens at most, fewer than MAX_LENGTH.
    piece = st.integers(1, 9).map(lambda n: [n]) | st.integers(2, 12).map(lambda n: [1] * n)
    return st.builds(
        Scenario,
        padding=st.lists(st.integers(0, 12) if variant == "padded" else st.just(0), min_size=1, max_size=3),
        chunks=st.lists(piece, min_size=1, max_size=4).map(lambda pieces: [n for piece in pieces for n in piece]),
        more=piece,
        cut=st.integers(-12, 8),  # from the start, or from the end: about the pinned tokens and the last eviction
        rows=st.lists(st.integers(0, 2), min_size=1, max_size=4),
        buffer=st.sampled_from(list(BUFFERS)),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    )


# ---------------------------------------------------------------------- a layer beside its oracle


def turn(key: Tensor, delta: int) -> Tensor:
    """A rotary key ``[H, D]`` some positions on, by complex numbers: nothing shared with `KeyRotation`."""
    n = len(FREQUENCIES)
    pairs = torch.complex(key[:, :n].double(), key[:, n : 2 * n].double()) * torch.exp(
        1j * FREQUENCIES.double() * delta
    )
    return torch.cat((pairs.real, pairs.imag, key[:, 2 * n :].double()), 1)


def tokens(rows: int, count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys and values of `count` tokens."""
    generator = torch.Generator().manual_seed(seed)
    dims = (KEY_DIM, KEY_DIM, VALUE_DIM)
    return [torch.randn(rows, HEADS, count, dim, generator=generator).to(dtype) for dim in dims]


class Pair:
    """A layer and the oracle, fed the same tokens and compared after each call."""

    def __init__(self, make: Maker, padding: list[int], dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.layer, self.dtype, self.tolerance = make(padding, dtype, **options), dtype, make.tolerance
        self.make = make
        self.oracle = Oracle(self.layer.policy, padding, turn if self.layer.rotation else None)
        self.history = tokens(len(padding), 0, dtype=dtype)

    def append(self, count: int) -> None:
        """Append so many tokens to both."""
        fresh = self.make.tokens(len(self.oracle.padding), count, 1 + self.layer.seen, self.dtype)
        self.history = [torch.cat(both, 2) for both in zip(self.history, fresh, strict=True)]
        expected, start = self.oracle.append(*fresh), self.layer.seen
        mask = self.layer.mask(count)
        keys, values = self.layer.append(*fresh[1:]).states
        if self.dtype == torch.float32 and not self.tolerance:
            outputs = torch.nn.functional.scaled_dot_product_attention(fresh[0], keys, values, attn_mask=mask)
            real = torch.arange(start, start + count) >= torch.tensor(self.oracle.padding)[:, None]
            # fp32 softmax over some twenty keys of unit size rounds by 1e-6; a wrong token would show as 0.1.
            difference = (outputs - expected).abs().amax((1, 3))[real]
            assert difference.numel() == 0 or difference.max() < 1e-5, "attention differs from the oracle's"
        self.check()

    def check(self) -> None:
        """The layer holds what the oracle holds: bit by bit, each token by its own position."""
        layer, oracle = self.layer, self.oracle
        assert layer.seen == oracle.seen, f"seen is {layer.seen}, {oracle.seen} tokens went in"
        assert layer.stored == len(oracle.rows[0]), f"{layer.stored} tokens are stored, not {len(oracle.rows[0])}"
        assert layer.evicted == oracle.seen - len(oracle.rows[0]), "evicted is not what has left"
        limit = layer.policy.limit
        assert limit is None or layer.stored <= limit, f"{layer.stored} tokens are stored, the limit is {limit}"
        held_keys, held_values = layer.keys, layer.values
        if layer.seen == 0 and held_keys is None:
            return
        assert held_keys is not None and held_values is not None, "there are tokens, but no keys and values"
        assert held_keys.shape[2] == held_values.shape[2] == layer.stored <= layer.capacity, "wrong number of slots"
        positions = layer.positions().expand(len(oracle.rows), -1).tolist()
        for b, (pads, row) in enumerate(zip(oracle.padding, oracle.rows, strict=True)):
            held = sum(token[0] < pads for token in row)
            # What is left of the padding is the first slots, as the caller's own mask has it; which pads is all one.
            assert all(position < pads for position in positions[b][:held]), "pads are not the first slots"
            real = row[held:]
            named = [position for position, _, _ in real]
            assert sorted(positions[b][held:]) == named, f"row {b} keeps {positions[b]}, not {named}"
            if real:
                slots = [positions[b].index(position, held) for position in named]
                self._same(held_values[b, :, slots], torch.stack([value for _, _, value in real], 1), "values")
                # Pinned keys may be turned: what is seen of them is compared in `append`.
                turned = layer.policy.pinned if layer.rotation else 0
                for slot, (_, key, _) in zip(slots[turned:], real[turned:], strict=True):
                    self._same(held_keys[b, :, slot], key, "keys")

    def _same(self, held: Tensor, came: Tensor, what: str) -> None:
        alike = torch.equal(held, came) if not self.tolerance else torch.allclose(held, came, 0, self.tolerance)
        assert alike, f"the {what} at a position are not those that came with it"

    def select(self, rows: list[int]) -> None:
        """Choose rows of both."""
        self.layer.select(torch.tensor(rows))
        self.selected(rows)

    def selected(self, rows: list[int]) -> None:
        """Choose rows of the oracle, as the layer has."""
        self.oracle.select(rows)
        self.history = [t[rows] for t in self.history]
        self.oracle.policy = self.layer.policy  # a budget in bytes holds fewer tokens of more rows
        if self.layer.policy.limit is not None:
            self.oracle.drop(self.layer.policy.limit)
        self.check()


def run(make: Maker, s: Scenario, **options: Any) -> Pair:
    """A layer that the chunks of a scenario were appended to."""
    pair = Pair(make, s.padding, **options, **BUFFERS[s.buffer])
    for count in s.chunks:
        pair.append(count)
    return pair


def parts_of(held: object) -> dict[str, Any]:
    """All that an object is, by name: of containers and objects of objects too."""
    found: dict[str, Any] = {}

    def visit(name: str, x: object) -> None:
        if isinstance(x, Tensor):
            found[name] = x
        elif isinstance(x, Mapping):
            for key, part in x.items():
                visit(f"{name}.{key}", part)
        elif isinstance(x, Sequence) and not isinstance(x, str):
            found[name] = len(x)
            for i, part in enumerate(x):
                visit(f"{name}.{i}", part)
        elif hasattr(x, "__dict__") and not callable(x) and not is_dataclass(x):
            visit(name, vars(x))
        else:
            found[name] = x

    visit("", held if isinstance(held, Mapping) else vars(held))
    return found


def state(layer: LayerCache) -> dict[str, Any]:
    """All that a layer is: its tensors by their bytes (free slots too), anything else by value."""

    def bits(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        return x.shape, x.dtype, x.contiguous().view(-1).view(torch.uint8).tolist()

    return {name: bits(value) for name, value in parts_of(layer).items()}


def held_bytes(layer: LayerCache) -> int:
    """Bytes of the storages behind all keys and values of a layer, and what it knows of each of them."""
    held = [x.untyped_storage() for x in parts_of(layer).values() if isinstance(x, Tensor) and x.dim() > 2]
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


Errors = type[Exception] | tuple[type[Exception], ...]


def refused(error: Errors, call: Callable[[], object], layer: LayerCache, before: Mapping[str, Any]) -> None:
    """Make a call that must fail, and see that nothing has changed."""
    try:
        call()
    except error:
        pass
    else:
        raise AssertionError(f"{call} should have raised {error}")
    now = state(layer)
    changed = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
    assert not changed, f"a call that failed has changed {', '.join(changed)}"


# ---------------------------------------------------------------------- the laws


def any_chunking(make: Maker, s: Scenario) -> None:
    """Law 1: any chunking of the same tokens gives the attention outputs, and keeps the tokens, of one by one.

    Re-rotated keys are the exception by definition: a chunk sees its pinned keys directly before the retained tail as
    its *first* query attends to it. A chunk that evicts within itself therefore differs from its tokens one by one, and
    is compared with the oracle, which has the same definition, in its own chunking.
    """
    run(make, s)


def truncate_then_append(make: Maker, s: Scenario) -> None:
    """Law 2: what was truncated was never appended; a roll back over evicted tokens is refused."""
    pair = run(make, s)
    seen, capacity = pair.layer.seen, pair.layer.capacity
    length = max(0, seen + s.cut) if s.cut < 0 else min(seen, s.cut)
    before, done = state(pair.layer), False
    if pair.oracle.can_truncate(length):
        with suppress(*([RollbackError] if make.tolerance else [])):  # in few bits, some lengths are lost
            pair.layer.truncate(length)
            done = True
        if done:
            history, old = [t[:, :, :length] for t in pair.history], pair.oracle
            pair.oracle, pair.history = Oracle(old.policy, old.padding, old.turn), history
            if length:
                pair.oracle.append(*history)
            assert make.tolerance or pair.layer.capacity == capacity, "a roll back has given memory away"
        else:
            assert state(pair.layer) == before, "a roll back that failed has changed something"
    else:
        refused(RollbackError, partial(pair.layer.truncate, length), pair.layer, before)
    pair.check()
    for count in s.more:
        pair.append(count)


def reset_then_append(make: Maker, s: Scenario) -> None:
    """Law 2: a reset layer is a fresh one that has its memory already."""
    pair = run(make, s)
    capacity = pair.layer.capacity
    pair.layer.reset()
    pair.oracle = Oracle(pair.oracle.policy, pair.oracle.padding, pair.oracle.turn)
    pair.check()
    assert make.tolerance or pair.layer.capacity == capacity, "a reset has given memory away"
    for count in s.more:
        pair.append(count)


def kept_is_named(make: Maker, s: Scenario) -> None:
    """Law 3: kept are the row's pinned tokens and its most recent ones, as many as the policy says, in any dtype."""
    pair = Pair(make, s.padding, s.dtype, **BUFFERS[s.buffer])
    layer, stored = pair.layer, 0
    pinned, limit = layer.policy.pinned, layer.policy.limit
    for count in s.chunks:
        pair.append(count)
        for _ in range(count):
            stored = layer.policy.keep(stored + 1)
        assert layer.stored == stored
        for pads, row in zip(s.padding, layer.positions().expand(len(s.padding), -1), strict=True):
            real = sorted(int(p) for p in row if p >= pads)
            left = max(0, pads - (layer.seen - stored)) if layer.seen > pads else stored  # pads still held
            first = range(pads, min(pads + pinned, layer.seen))
            assert len(real) == stored - left
            assert real[: len(first)] == list(first), "a pinned token has left"
            assert real[len(first) :] == list(range(layer.seen - len(real) + len(first), layer.seen))
        if (limit is None or layer.seen <= limit) and not make.tolerance:  # untouched, in order
            assert layer.keys is not None and layer.values is not None
            assert torch.equal(layer.keys, pair.history[1]) and torch.equal(layer.values, pair.history[2])


def failed_call_changes_nothing(make: Maker, s: Scenario) -> None:
    """Law 5: after a call that failed, all is as before, to the bit, and goes on as before."""
    pair = run(make, s)
    layer, rows = pair.layer, len(s.padding)
    _, k, v = tokens(rows, 2)
    _, k_more, v_more = tokens(rows + 1, 2)
    wrong = {
        "no heads": (k[:, 0], v),
        "one dimension more": (k, v[None]),
        "tokens of values": (k, v[:, :, :1]),
        "rows": (k_more, v_more),
        "heads": (k[:, :1], v[:, :1]),
        "key size": (k[..., :-1], v),
        "value size": (k, v[..., :-1]),
        "dtype of keys": (k.double(), v),
        "dtype of values": (k, v.half()),
        "device": (k.to("meta"), v.to("meta")),
    }
    calls: list[tuple[Errors, Callable[[], object]]]
    calls = [(GeometryError, partial(layer.append, *given)) for given in wrong.values()]
    calls += [(PolicyError, partial(layer.trim, n)) for n in (-1, 0, layer.policy.pinned - 1)]
    lengths = [n for n in range(layer.seen) if not pair.oracle.can_truncate(n)]
    calls += [(RollbackError, partial(layer.truncate, n)) for n in (-1, layer.seen + 1, *lengths)]
    calls += [((IndexError, RuntimeError), partial(layer.select, torch.tensor([0] * (rows - 1) + [rows])))]
    if layer.max_length is not None and not layer.policy.evicts:
        calls += [(CapacityError, partial(layer.append, *tokens(rows, MAX_LENGTH - layer.stored + 1)[1:]))]
    before = state(layer)
    for error, call in calls:
        refused(error, call, layer, before)
    for count in s.more:
        pair.append(count)


def rows_commute(make: Maker, s: Scenario) -> None:
    """Law 6: rows may be reordered, dropped and repeated before or after tokens are appended."""
    pair = run(make, s)
    rows = [i % len(s.padding) for i in s.rows][: 2 * len(s.padding)]  # of more rows, a budget would not hold a token
    pair.select(rows)
    for count in s.more:
        pair.append(count)
    if len(rows) <= len(s.padding):
        pair.layer.repeat(2)
        pair.selected([i for i in range(len(rows)) for _ in range(2)])
        for count in s.more[:1]:
            pair.append(count)


def bytes_are_told(make: Maker, s: Scenario) -> None:
    """Law 8: bytes reported = bytes held = bytes estimated; and a budget in bytes holds them."""
    rows, options, layers = len(s.padding), BUFFERS[s.buffer], 2
    pair = [make(s.padding, s.dtype, layers=layers, **options) for _ in range(layers)]
    assert sum(layer.nbytes for layer in pair) == 0, "an empty layer reports bytes"
    geometry = CacheGeometry(layers, HEADS, KEY_DIM, VALUE_DIM, s.dtype)
    policy = make.policy(rows, s.dtype, layers)
    budget = policy.policy if isinstance(policy, Pinned) else policy
    for count in s.chunks:
        for layer in pair:
            layer.append(*tokens(rows, count, dtype=s.dtype)[1:])
        held, told = sum(held_bytes(layer) for layer in pair), sum(layer.nbytes for layer in pair)
        assert told == held, f"{told} bytes are reported, {held} are held"
        if not make.tolerance:
            positions: PositionMode = "absolute" if pair[0].rotation is None else "rerotated"
            spec = CacheSpec(policy, positions=positions, storage=pair[0].storage, **options)
            expected = spec.nbytes(geometry, pair[0].seen, rows=rows)
            assert held == expected, f"{held} bytes are held, CacheSpec.nbytes says {expected}"
        if isinstance(budget, MaxBytes) and isinstance(budget.budget, int):
            assert held <= budget.budget, f"{held} bytes are held, the budget is {budget.budget}"


Law = Callable[[Maker, Scenario], None]

LAWS: dict[Law, int] = {
    any_chunking: 6,
    truncate_then_append: 20,
    reset_then_append: 4,
    kept_is_named: 8,
    failed_call_changes_nothing: 4,
    rows_commute: 10,
    bytes_are_told: 20,
}
"""And the number of scenarios that each is worth: those that find more with more of them have more."""


def layer_of(
    make: Callable[..., LayerCache],
    policy: SizePolicy,
    variant: str,
    padding: list[int],
    dtype: torch.dtype = torch.float32,
    layers: int = 1,
    **options: Any,
) -> LayerCache:
    """A layer as a cache of `layers` layers makes one, with rows that begin with so many pads."""
    token = HEADS, KEY_DIM, VALUE_DIM, dtype
    return make(
        policy,
        padding=torch.tensor(padding),
        rotation=KeyRotation(FREQUENCIES) if variant == "rerotated" else None,
        expected=Expected(len(padding), token, Whole((token,) * layers)),
        **options,
    )
