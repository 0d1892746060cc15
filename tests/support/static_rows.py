"""Rows of a static cache beside layers that grow: what each of them is to show."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kvcache import CacheGeometry, KeepAll, KVLayer, MaxTokens, Pinned, SizePolicy, SlidingWindow
from kvcache.cache import ring_slot
from kvcache.decoding import StaticKV
from support.inside.decoding import pending_of, policies_of

States: TypeAlias = tuple[Tensor, Tensor]  # keys and values
State: TypeAlias = tuple[list[Tensor], list[int], list[Any], int]

LAYERS, HEADS, KEY_DIM, VALUE_DIM = 2, 2, 4, 3
GEOMETRY = CacheGeometry(LAYERS, HEADS, KEY_DIM, VALUE_DIM)


POLICIES: list[SizePolicy] = [
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


class Row:
    """A text of random keys and values, per layer ``[1, heads, tokens, dim]``, and what a policy keeps of it."""

    def __init__(self, policy: SizePolicy, tokens: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.keys = torch.randn(LAYERS, 1, HEADS, tokens, KEY_DIM, generator=generator)
        self.values = torch.randn(LAYERS, 1, HEADS, tokens, VALUE_DIM, generator=generator)
        self.layers = [KVLayer(policy) for _ in range(LAYERS)]
        self.seen = 0

    def token(self, layer: int, position: int) -> States:
        return self.keys[layer][:, :, position : position + 1], self.values[layer][:, :, position : position + 1]

    def append(self, upto: int) -> None:
        for position in range(self.seen, upto):
            for layer, kv in enumerate(self.layers):
                kv.append(*self.token(layer, position))
        self.seen = upto

    def kept(self, layer: int) -> dict[int, States]:
        """By position."""
        kv = self.layers[layer]
        if kv.keys is None or kv.values is None:
            return {}
        positions = kv.positions()[0].tolist()
        keys, values = kv.keys[0], kv.values[0]
        return {p: (keys[:, i], values[:, i]) for i, p in enumerate(positions)}


def prefilled(
    policy: SizePolicy, rows: Sequence[Row], length: int, pads: Sequence[int], chunks: Sequence[int], told: bool
) -> list[KVLayer]:
    """Layers of rows with `pads` before `length - pads` tokens, appended in chunks."""
    padding = torch.tensor(list(pads))
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


def place(policy: SizePolicy, position: int, slots: int) -> int:
    pinned = policy.pinned if policy.evicts else 0
    return int(ring_slot(torch.tensor([position]), torch.tensor([pinned]), slots))


def shown(kv: StaticKV, row: int, layer: int, mask: Tensor) -> dict[int, States]:
    """What a row's current token sees: as many tokens as keys and values, each ``[heads, dim]``."""
    columns = mask[row, 0, 0].nonzero()[:, 0].tolist()
    return {c: (kv.keys[layer][row, :, c], kv.values[layer][row, :, c]) for c in columns}


def assert_shows(kv: StaticKV, rows: Sequence[Row | None], policies: Sequence[SizePolicy | None], mask: Tensor) -> None:
    for i, row in enumerate(rows):
        if row is None:
            continue
        policy = policies[i]
        assert policy is not None
        for layer in range(LAYERS):
            found = shown(kv, i, layer, mask)
            expected = {place(policy, p, kv.slots): states for p, states in row.kept(layer).items()}
            assert found.keys() == expected.keys()
            for column, (keys, values) in expected.items():
                assert torch.equal(found[column][0], keys.to(kv.keys[0].dtype))
                assert torch.equal(found[column][1], values.to(kv.values[0].dtype))


def step(kv: StaticKV, rows: Sequence[Row | None]) -> Tensor:
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


def state_of(kv: StaticKV) -> State:
    tensors = [*kv.keys, *kv.values, kv.length, kv.pinned, kv.low, kv.limit]
    return [t.clone() for t in tensors], list(kv.seen), list(policies_of(kv)), len(pending_of(kv))


def assert_state(kv: StaticKV, before: State) -> None:
    tensors, *rest = state_of(kv)
    assert rest == list(before[1:])
    assert all(torch.equal(a, b) for a, b in zip(tensors, before[0], strict=True))


def layer(
    policy: SizePolicy | None = None, length: int = 4, rows: int = 1, heads: int = HEADS, **options: Any
) -> KVLayer:
    kv = KVLayer(policy, **options)
    if length:
        kv.append(torch.ones(rows, heads, length, KEY_DIM), torch.ones(rows, heads, length, VALUE_DIM))
    return kv
