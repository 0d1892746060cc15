"""Wherever a `DynamicCache` stands, ours does: what transformers' own tests ask of their caches, asked of ours.

The reference is a `DynamicCache` of the same model that was given the same tokens.
"""

import copy
import pickle
from typing import Any

import pytest
import torch
from support.families import RELEASE, build, dynamic_cache, logits, tiny, token_ids
from support.inside.models import chosen, exactly
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from kvcache import (
    GeometryError,
    InputError,
    KVCacheManager,
    KVQuantization,
    MaxBytes,
    PolicyError,
    RollbackError,
    SlidingWindow,
    SnapKV,
)
from kvcache import models as hf
from kvcache.cache import CacheSpec
from kvcache.models import MADE_AS, ManagedCache


def filled(model: Any, ids: Tensor, **given: Any) -> tuple[Any, Any]:
    """Ours and transformers' own cache after the same tokens."""
    ours, theirs = hf.new_cache(model, CacheSpec(**given)), dynamic_cache(model)
    for cache in (ours, theirs):
        logits(model, ids, cache)
    return ours, theirs


def same(ours: Any, theirs: Any) -> None:
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(mine.keys, other.keys)
        assert torch.equal(mine.values, other.values)
        assert mine.get_seq_length() == other.get_seq_length()


# ---------------------------------------------------------------------- D1: iterating, length, type


def test_d1_it_is_a_dynamic_cache_that_is_iterated_like_one() -> None:
    model = tiny("llama")
    ours, theirs = filled(model, token_ids())
    assert isinstance(ours, DynamicCache)
    assert len(ours) == len(theirs) == 2
    for mine, other in zip(ours, theirs, strict=True):
        assert len(mine) == len(other) == 3
        assert torch.equal(mine[0], other[0])
        assert torch.equal(mine[1], other[1])
        assert mine[2] is other[2] is None
    assert hasattr(ours, "__getitem__") == hasattr(theirs, "__getitem__")
    assert "KeepAll" in repr(ours)


def test_d1_an_empty_one_is_iterated_like_an_empty_one() -> None:
    assert list(hf.new_cache(tiny("llama"))) == list(dynamic_cache(tiny("llama"))) == [(None, None, None)] * 2


def test_d1_around_it_stands_an_encoder_decoder_cache() -> None:
    model = tiny("bart")
    ours, theirs = filled(model, token_ids())
    assert isinstance(ours, EncoderDecoderCache)
    assert isinstance(ours.self_attention_cache, DynamicCache)
    ours.check_dynamic_cache("crop")
    for mine, other in zip(ours, theirs, strict=False):
        for a, b in zip(mine, other, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    for cache in (ours, theirs):
        cache.crop(-3)
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(3)
    same(ours.self_attention_cache, theirs.self_attention_cache)
    again = EncoderDecoderCache(hf.new_cache(tiny("llama")), DynamicCache())
    assert again.get_seq_length() == 0


def test_d1_it_is_initialized_when_it_is() -> None:
    """Paligemma and others take a cache that is not for the begin of a prompt, and give that another mask."""
    model = tiny("llama")
    for cache in (hf.new_cache(model), DynamicCache(config=model.config)):
        assert not cache.is_initialized
        logits(model, token_ids(), cache)
        assert cache.is_initialized
        assert all(layer.is_initialized for layer in cache.layers)
    ours = hf.new_cache(model)
    logits(model, token_ids(), ours)
    ours.reset()
    assert not ours.is_initialized
    assert ours.layers[0].keys is None
    ours.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    assert ours.is_initialized
    assert ours.layers[0].keys.numel() == 0


def test_d1_it_is_never_compiled_unasked() -> None:
    assert not hf.new_cache(tiny("llama")).is_compileable
    assert not ManagedCache([]).is_compileable


# ---------------------------------------------------------------------- D1: rows

INDICES: dict[str, Any] = {
    "tensor": torch.tensor([2, 0]),
    "repeated": torch.tensor([1, 1, 1]),
    "negative": torch.tensor([-1, 0]),
    "int32": torch.tensor([2, 0], dtype=torch.int32),
    "bools": torch.tensor([True, False, True]),
    "list": [2, 0],
    "list-of-bools": [False, True, True],
    "tuple": (0, 2),
    "range": range(1, 3),
    "slice": slice(1, None),
    "slice-step": slice(None, None, 2),
}


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_d1_rows_are_chosen_by_any_index(name: str, index: str) -> None:
    ours, theirs = filled(tiny(name), token_ids(3))
    for cache in (ours, theirs):
        cache.batch_select_indices(INDICES[index])
    same(ours, theirs)


def test_d1_one_row_stays_a_row() -> None:
    """Of a `DynamicCache` an index without a dimension takes the dimension away, and the next forward fails."""
    model, ids = tiny("llama"), token_ids(3)
    for index in (-1, 2, torch.tensor(-1)):
        ours, theirs = filled(model, ids)
        ours.batch_select_indices(index)
        theirs.batch_select_indices(torch.tensor([2]))
        same(ours, theirs)


@pytest.mark.parametrize("index", [3, [0, 7], torch.tensor([True]), [], torch.tensor([[0, 1]]), "1", None, slice(5, 9)])
def test_d1_rows_that_are_not_there_are_refused_with_nothing_changed(index: Any) -> None:
    ours, theirs = filled(tiny("llama"), token_ids(3))
    with pytest.raises(GeometryError, match="3 rows"):
        ours.batch_select_indices(index)
    same(ours, theirs)


def test_d1_rows_of_an_empty_cache_are_nobodys() -> None:
    cache = hf.new_cache(tiny("llama"))
    for index in INDICES.values():
        cache.batch_select_indices(index)
    assert chosen((1,), 2).tolist() == [1]


# ---------------------------------------------------------------------- D1: crop, reset


@pytest.mark.parametrize("given", [5, 0, -3, -200, 200, torch.tensor(-3), torch.tensor([-3])])
def test_d1_crop_does_what_this_release_does(given: Any) -> None:
    """From asking transformers' own layer: 0 empties or does nothing, a length cuts or is refused."""
    ours, theirs = filled(tiny("llama"), token_ids())
    try:
        theirs.crop(given)
    except ValueError:
        with pytest.raises(InputError, match=r"negative number.*truncate\(cache, "):
            ours.crop(given)
        theirs = filled(tiny("llama"), token_ids())[1]
    else:
        ours.crop(given)
    if (seen := theirs.get_seq_length()) == 0:
        assert ours.get_seq_length() == 0
        assert ours.layers[0].keys.numel() == 0
    elif int(given) == -200:  # up to 5.13 such a number wraps around
        assert RELEASE < (5, 14)
        assert ours.get_seq_length() == 0
    else:
        assert ours.get_seq_length() == seen
        same(ours, theirs)


def test_d1_crop_changes_all_layers_or_none() -> None:
    model = tiny("gemma3")
    cache = hf.new_cache(model, SlidingWindow(8, sinks=2))
    with hf.exact_windows(model):
        logits(model, token_ids(), cache)
    before = copy.deepcopy(cache)
    with pytest.raises((RollbackError, RuntimeError, ValueError)):
        cache.crop(-3)
    same(cache, before)


@pytest.mark.parametrize(
    "policy", [None, SlidingWindow(64, sinks=4), MaxBytes("64KiB")], ids=["keep", "window", "bytes"]
)
def test_d1_after_a_reset_another_batch_comes(policy: Any) -> None:
    model = tiny("llama")
    manager = KVCacheManager(model, policy)
    cache = manager.new_cache(batch_size=2)
    logits(model, token_ids(2), cache)
    cache.reset()
    logits(model, token_ids(3, 11), cache)
    same(cache, filled(model, token_ids(3, 11))[1])
    assert cache.layers[0].kv.rows == 3


def test_d1_after_a_reset_another_dtype_comes() -> None:
    model, half = tiny("llama"), build("llama").to(torch.bfloat16)
    for given in ({}, {"storage": KVQuantization(8, group_size=16)}):
        cache = hf.new_cache(model, CacheSpec(**given))
        logits(model, token_ids(), cache)
        cache.reset()
        logits(half, token_ids(), cache)
        assert cache.layers[0].keys.dtype == torch.bfloat16
        if not given:
            same(cache, filled(half, token_ids())[1])


def test_d1_after_a_reset_ranked_rows_change() -> None:
    manager = KVCacheManager(tiny("llama"), SnapKV(24, window_size=8, sinks=2))
    cache, fresh = manager.new_cache(2), manager.new_cache(3)
    logits(manager.observed_model, token_ids(2, 40), cache)
    cache.reset()
    for one in (cache, fresh):
        logits(manager.observed_model, token_ids(3, 40), one)
    same(cache, fresh)


def test_d1_a_budget_resolved_for_other_rows_takes_no_long_chunk() -> None:
    """Its mask was made before, from what the budget held then."""
    cache = hf.new_cache(tiny("llama"), MaxBytes("16KiB"), rows=1)
    logits(tiny("llama"), token_ids(1, 5), cache)
    cache.reset()
    with pytest.raises(PolicyError, match=r"before the reset.*new cache"):
        cache.update(torch.zeros(4, 2, 30, 16), torch.zeros(4, 2, 30, 16), 0)
    assert cache.get_seq_length() == 0
    cache.update(torch.zeros(4, 2, 3, 16), torch.zeros(4, 2, 3, 16), 0)
    assert cache.get_seq_length() == 3


# ---------------------------------------------------------------------- D1: keys and values assigned


def test_d1_keys_and_values_are_assigned() -> None:
    model, ids = tiny("llama"), token_ids(3)
    ours, theirs = filled(model, ids)
    for cache in (ours, theirs):
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[[2, 0], :, :12], layer.values[[2, 0], :, :12]
    same(ours, theirs)
    more = token_ids(2, 3, seed=4)
    assert torch.equal(logits(model, more, ours), logits(model, more, theirs))
    ours.layers[0].values = ours.layers[0].values * 2
    theirs.layers[0].values = theirs.layers[0].values * 2
    same(ours, theirs)


def test_d1_assigned_halves_wait_for_each_other() -> None:
    ours, theirs = filled(tiny("llama"), token_ids())
    layer = ours.layers[0]
    layer.keys = layer.keys[:, :, :5]
    assert layer.keys.shape[2] == 5
    with pytest.raises(GeometryError, match="assign both"):
        logits(tiny("llama"), token_ids(2, 1), ours)
    layer.values = layer.values[:, :, :5]
    assert layer.get_seq_length() == 5
    with pytest.raises(GeometryError, match=r"keys must be a tensor \[batch"):
        layer.keys = torch.zeros(3)
    layer.keys = layer.values = None
    assert not layer.is_initialized
    assert theirs.get_seq_length() == 20


def test_d1_what_nobody_could_name_is_not_assigned() -> None:
    model = tiny("llama")
    window = hf.new_cache(model, SlidingWindow(8))
    with hf.exact_windows(model):
        logits(model, token_ids(), window)
    layer = window.layers[0]
    held = layer.keys.clone()
    layer.keys = layer.keys + 1
    assert torch.equal(layer.keys, held + 1)
    assert (layer.get_seq_length(), layer.kv.stored) == (20, 8)
    layer.values = layer.values[:, :, :5]
    with pytest.raises(GeometryError, match=r"12 tokens have left.*8"):
        layer.keys = layer.keys[:, :, :5]
    limited = hf.new_cache(model, CacheSpec(max_length=6)).layers[0]
    limited.keys = torch.zeros(1, 2, 7, 16)
    with pytest.raises(GeometryError, match="at most 6"):
        limited.values = torch.zeros(1, 2, 7, 16)
    manager = KVCacheManager(model, SnapKV(24, window_size=8, sinks=2))
    ranked = manager.new_cache(2)
    logits(manager.observed_model, token_ids(), ranked)
    with pytest.raises(PolicyError, match="each head holds tokens of its own"):
        ranked.layers[0].keys = ranked.layers[0].keys + 1


def test_d1_a_quantized_layer_quantizes_what_it_is_assigned() -> None:
    layer = hf.new_cache(tiny("llama"), CacheSpec(storage=KVQuantization(8, group_size=16))).layers[0]
    keys = torch.randn(2, 2, 40, 16, generator=torch.Generator().manual_seed(3))
    layer.keys, layer.values = keys, -keys
    assert layer.get_seq_length() == 40
    torch.testing.assert_close(layer.keys, keys, atol=0.03, rtol=0)  # half of 3.5 / 127, and its rounding to bf16
    assert torch.equal(layer.keys[:, :, 32:], keys[:, :, 32:])  # the tail as it came


def test_d1_a_layer_goes_to_another_device_and_back() -> None:
    """What transformers' offloading does with a layer: it assigns keys and values on another device."""
    ours, theirs = filled(tiny("llama"), token_ids())
    layer = ours.layers[0]
    assert (layer.dtype, layer.device) == (torch.float32, torch.device("cpu"))
    layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")
    assert layer.device == torch.device("meta")
    layer.keys, layer.values = theirs.layers[0].keys, theirs.layers[0].values
    same(ours, theirs)


# ---------------------------------------------------------------------- D1: copies, export, pipeline


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize(
    "policy", [None, SlidingWindow(16, sinks=2), SnapKV(24, window_size=8, sinks=2)], ids=["keep", "window", "ranked"]
)
def test_d1_a_copy_goes_on_by_itself(policy: Any, how: str) -> None:
    manager = KVCacheManager(tiny("llama"), policy)
    cache, more = manager.new_cache(2), token_ids(2, 3, seed=5)
    with exactly(manager):
        logits(manager.observed_model, token_ids(2, 40), cache)
        other = copy.deepcopy(cache) if how == "deepcopy" else pickle.loads(pickle.dumps(cache))
        before = [layer.keys.clone() for layer in cache.layers]
        result = logits(manager.observed_model, more, other)
        assert all(torch.equal(layer.keys, held) for layer, held in zip(cache.layers, before, strict=True))
        assert torch.equal(logits(manager.observed_model, more, cache), result)
    assert other.layers[0].beside[1] is other.layers[1].kv


def exported(model: Any, cache: Any, shapes: Any = None, **given: Any) -> Any:
    return torch.export.export(
        model, (), {**given, MADE_AS: cache, "use_cache": True}, strict=False, dynamic_shapes=shapes
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_d1_torch_export_takes_and_gives_it(name: str) -> None:
    model, ids = tiny(name), token_ids(1, 6)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        program = exported(model, hf.new_cache(model), **given)
        result = program.module()(**given, **{MADE_AS: hf.new_cache(model), "use_cache": True})
        theirs = DynamicCache(config=model.config)
        reference = model(**given, past_key_values=theirs, use_cache=True).logits
    torch.testing.assert_close(result.logits, reference, atol=1e-5, rtol=0)  # other kernels may be chosen
    held = result[MADE_AS]
    assert isinstance(held, ManagedCache)
    for mine, other in zip(held.layers, theirs.layers, strict=True):
        torch.testing.assert_close(mine.keys, other.keys, atol=1e-5, rtol=0)
        assert mine.get_seq_length() == 6
    assert len(program.graph_signature.output_specs) == 1 + 2 * len(held)


def test_d1_an_exported_program_goes_on_at_any_length() -> None:
    model, ids = tiny("llama"), token_ids(1, 4)
    cache = filled(model, ids)[0]
    length = torch.export.Dim.DYNAMIC(max=512)
    shapes = torch.export.ShapesCollection()
    for layer in cache.layers:
        shapes[layer.keys] = shapes[layer.values] = (None, None, length, None)
    with torch.no_grad():
        run = exported(model, cache, shapes, input_ids=ids).module()
        theirs = filled(model, ids)[1]
        for _ in range(3):
            result = run(input_ids=ids, **{MADE_AS: cache, "use_cache": True})
            cache = result[MADE_AS]
            reference = model(ids, past_key_values=theirs, use_cache=True).logits
            torch.testing.assert_close(result.logits, reference, atol=1e-5, rtol=0)
    assert cache.get_seq_length() == 16


def test_d1_a_tree_of_it_is_it() -> None:
    """PyTorch takes arguments apart and puts them together elsewhere, too: what cannot be is left whole."""
    from torch.utils import _pytree

    model = tiny("gemma3")
    cache = filled(model, token_ids(), max_length=100)[0]
    again = _pytree.tree_map(lambda t: t, cache)
    same(again, cache)
    assert again.layers[5].kv.max_length == 100
    more = token_ids(2, 2, seed=3)
    assert torch.equal(logits(model, more, again), logits(model, more, cache))
    shapes = _pytree.tree_map(lambda t: tuple(t.shape), cache)
    assert shapes.layers[5].keys == (2, 2, 22, 16)
    window = hf.new_cache(model, SlidingWindow(8))
    assert _pytree.tree_map(lambda t: t, window) is window


def test_d1_a_pipeline_runs_on_it() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast, pipeline

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 97)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    model = build("llama")
    run = pipeline(
        "text-generation", model=model, tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    )
    asked = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    text = "w5 w9 w31 w8"
    cache = hf.new_cache(model)
    assert run(text, **asked, **{MADE_AS: cache}) == run(text, **asked)
    assert cache.get_seq_length() == 11
