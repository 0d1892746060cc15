"""Snapshots of prefixes and the keys that they are found by, to the bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.inside.testing import tokens
from support.prefixes import all_bits, bits, some
from support.searching import search
from torch import Tensor

from kvcache import CorruptError, GeometryError, InputError, KVLayer, PrefixKey, PrefixSnapshot, SlidingWindow

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def content(kind: str, n: int = 5, seed: int = 0) -> Tensor:
    embeddings = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return torch.arange(seed, seed + n) if kind == "ids" else embeddings.to(getattr(torch, kind))


@pytest.mark.parametrize("secret", [None, b"secret"], ids=["open", "signed"])
@pytest.mark.parametrize("kind", ["ids", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_and_back_is_the_same_to_the_bit(dtype: torch.dtype, kind: str, secret: bytes | None) -> None:
    snapshot = some(PrefixKey("a" * 64, content(kind)), dtype=dtype, seconds=0.125)
    snapshot.layers[0][0].view(-1)[:2] = torch.tensor([torch.finfo(dtype).smallest_normal / 2, -0.0])
    if kind != "ids":
        snapshot.key.content.view(-1)[:2] = torch.tensor([float("nan"), -0.0])
    loaded = PrefixSnapshot.from_bytes(snapshot.to_bytes(secret), secret)
    assert all_bits(loaded) == all_bits(snapshot)
    assert loaded.key == snapshot.key
    assert loaded.key.address == snapshot.key.address
    assert (loaded.key.model, loaded.build_seconds, len(loaded.layers)) == ("a" * 64, 0.125, 2)
    cut = snapshot.first(3)
    assert all_bits(PrefixSnapshot.from_bytes(cut.to_bytes())) == all_bits(cut)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=["inference", "no-grad"])
def test_a_snapshot_of_one_row_is_its_own(mode: Any) -> None:
    key = PrefixKey("model", torch.arange(7))
    with mode():
        layers = [KVLayer(), KVLayer()]
        for i, layer in enumerate(layers):
            layer.append(*tokens(3, 9, seed=i)[1:])
        snapshot = PrefixSnapshot.of(layers, key, row=1, build_seconds=2.0)
        expected = [bits(states[1, :, :7]) for layer in layers for states in (layer.keys, layer.values)]
        for layer in layers:
            layer.select(torch.tensor([2, 2, 2]))
    assert [bits(states[0]) for layer in snapshot.layers for states in layer] == expected
    assert (len(snapshot), snapshot.build_seconds) == (7, 2.0)
    assert not any(states.is_inference() for layer in snapshot.layers for states in layer)


def test_a_cache_that_lacks_the_prefix_gives_no_snapshot() -> None:
    key = PrefixKey("model", torch.arange(7))
    evicted, short = KVLayer(SlidingWindow(8)), KVLayer()
    evicted.append(*tokens(1, 9)[1:])
    short.append(*tokens(1, 6)[1:])
    with pytest.raises(GeometryError, match="9 were seen and 1 evicted; run it on a cache that keeps everything"):
        PrefixSnapshot.of([evicted], key)
    with pytest.raises(GeometryError, match="of 7 tokens cannot be taken: 6 were seen"):
        PrefixSnapshot.of([short], key)
    with pytest.raises(GeometryError, match="no layers"):
        PrefixSnapshot.of([], key)
    keys, values = tokens(2, 7)[1:]
    for wrong in (keys, keys[:1, :, :6], keys[0]):
        with pytest.raises(GeometryError, match=r"layer 0 of a prefix of 7 tokens must be \[1, heads, 7, head_dim\]"):
            PrefixSnapshot(key, ((wrong, values[:1]),))


def test_the_first_tokens_are_views_and_compact_lets_go_of_the_rest() -> None:
    whole = some(PrefixKey("model", torch.arange(10)), seconds=5.0)
    cut = whole.first(4)
    assert cut.key == PrefixKey("model", torch.arange(4))
    assert cut.build_seconds == 2.0  # in proportion
    for ours, theirs in zip(cut.layers, whole.layers, strict=True):
        for part, all_ in zip(ours, theirs, strict=True):
            assert torch.equal(part, all_[:, :, :4])
            assert part.data_ptr() == all_.data_ptr()
    states = sum(t.nbytes for layer in whole.layers for t in layer)
    assert whole.nbytes == states + 80  # ten ids of eight bytes
    assert cut.nbytes == states + 32  # what a view keeps alive
    own = cut.compact()
    assert all_bits(own) == all_bits(cut)
    assert own.nbytes == states * 4 // 10 + 32
    assert [t.data_ptr() for layer in whole.compact().layers for t in layer] == [
        t.data_ptr() for layer in whole.layers for t in layer
    ]
    assert whole.first(10) is whole
    for n in (0, 11, -1):
        with pytest.raises(InputError, match=f"first {n} tokens of a prefix of 10; give 1 to 10"):
            whole.first(n)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, header: header.update(version=2),
        lambda tensors, header: header.update(format="something-else"),
        lambda tensors, header: header.pop("model"),
        lambda tensors, header: header.update(layers=3),
        lambda tensors, header: header.update(layers=0),
        lambda tensors, header: header.update(build_seconds="long"),
        lambda tensors, header: tensors.pop("content"),
        lambda tensors, header: tensors.update(content=torch.arange(4)),
        lambda tensors, header: tensors.update(content=torch.zeros(5)),
        lambda tensors, header: tensors.update({"keys.0": torch.zeros(2, 4, 6)}),
        lambda tensors, header: tensors.update({"values.1": torch.zeros(4, 6)}),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    snapshot = some(PrefixKey("model", torch.arange(5)))
    tensors, header = snapshot.tensors(), snapshot.header()
    assert all_bits(PrefixSnapshot.from_tensors(tensors, header)) == all_bits(snapshot)
    change(tensors, header)
    with pytest.raises(CorruptError):
        PrefixSnapshot.from_tensors(tensors, header)


@search(200)
@given(data=st.data())
def test_keys_are_equal_if_every_byte_and_the_model_are(data: st.DataObject) -> None:
    def key() -> PrefixKey:
        model, kind = data.draw(st.sampled_from("ab")), data.draw(st.sampled_from(["ids", "float32", "bfloat16"]))
        numbers = data.draw(st.lists(st.sampled_from([0, 1, 2**40]), min_size=1, max_size=5))
        ids = torch.tensor(numbers)
        return PrefixKey(model, ids if kind == "ids" else ids[:, None].to(getattr(torch, kind)))

    def said(k: PrefixKey) -> tuple[Any, ...]:
        return k.model, k.content.dtype, k.content.tolist()

    one, two = key(), key()
    (model_a, dtype_a, a), (model_b, dtype_b, b) = said(one), said(two)
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    common = same if (model_a, dtype_a) == (model_b, dtype_b) else 0
    assert one.common(two) == two.common(one) == common
    assert (one == two) == (said(one) == said(two)) == (one.address == two.address)
    assert one != two or hash(one) == hash(two)
    assert (one.family == two.family) == (common > 0)
    for n in range(1, common + 1):
        assert one.first(n) == two.first(n)
        assert len(one.first(n)) == n


def test_a_key_keeps_its_own_copy_of_what_it_names() -> None:
    ids, embeddings = torch.arange(4, dtype=torch.int32), torch.zeros(2, 3)
    keys = PrefixKey("m", ids), PrefixKey("m", embeddings)
    assert keys[0] == PrefixKey("m", torch.arange(4))  # whatever the width of the integers
    addresses = [key.address for key in keys]
    ids[0] = 7
    embeddings[0, 0] = 7
    assert [PrefixKey("m", key.content).address for key in keys] == addresses
    assert keys[1] != PrefixKey("m", -torch.zeros(2, 3))  # -0.0 is another input, to the byte
    assert PrefixKey("m", torch.zeros(2, 3)) != PrefixKey("m", torch.zeros(3, 2))
    assert keys[0] != "m"
    wrong = (torch.zeros(4), torch.zeros(1, 4, dtype=torch.long), torch.tensor(3), torch.ones(3, dtype=torch.bool))
    for given_ in (*wrong, torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), torch.zeros(2, dtype=torch.complex64)):
        with pytest.raises(InputError, match=r"token ids \[tokens\] or embeddings \[tokens, dim\].* got torch\."):
            PrefixKey("m", given_)
