"""What cannot be done is refused where it is asked for, with what was given, the limit and the next step."""

import inspect
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.families import RELEASE, build, logits, tiny, token_ids
from transformers import AutoModelForCausalLM, DeepseekV3Config, DynamicCache, JambaConfig, LlamaForCausalLM

import kvcache
from kvcache import (
    CacheSpec,
    CapacityError,
    DiskStore,
    GeometryError,
    InputError,
    KeepAll,
    KVCacheManager,
    KVQuantization,
    MemoryStore,
    MissingDependencyError,
    PolicyError,
    RollbackError,
    SlidingWindow,
    SnapKV,
    SpeakerCache,
    subscribe,
)
from kvcache import models as hf


def memory() -> SpeakerCache:
    return SpeakerCache(MemoryStore("1MiB"))


def model_of(config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


# ---------------------------------------------------------------------- D9: constructors

MODELS = {
    "a name": ("gpt2", r"the name 'gpt2'; load it first"),
    "none": (None, "got None"),
    "a class": (LlamaForCausalLM, r"the class LlamaForCausalLM; give an instance"),
    "another thing": (SimpleNamespace(config=1), "loaded transformers model"),
    "a module": (torch.nn.Linear(1, 1), "loaded transformers model"),
}


@pytest.mark.parametrize("name", MODELS)
def test_d9_what_is_no_model_is_refused(name: str) -> None:
    given, said = MODELS[name]
    for make in (KVCacheManager, hf.new_cache):
        with pytest.raises(InputError, match=said):
            make(given)


ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"storage": 8}, InputError, r"storage=8.*KVQuantization\(8\)"),
    ({"kv_dtype": "bf16"}, InputError, r"kv_dtype='bf16'.*torch\.bfloat16"),
    ({"kv_dtype": torch.int8}, InputError, r"kv_dtype=torch\.int8.*floating-point"),
    ({"prefix_cache": "redis://localhost"}, InputError, r"prefix_cache='redis://localhost'.*PrefixCache\("),
    ({"max_cache_length": 0}, PolicyError, "max_length=0 must be at least 1"),
    ({"max_cache_length": 2.5}, PolicyError, r"max_length=2\.5"),
    ({"static": True}, PolicyError, "static=True.*max_cache_length"),
]


@pytest.mark.parametrize(("given", "error", "said"), ARGUMENTS, ids=lambda value: str(value)[:30])
def test_d9_arguments_of_the_manager_are_checked(given: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        KVCacheManager(tiny("llama"), **{"prefix_cache": memory(), **given})


def test_d9_preallocation_takes_any_limit() -> None:
    for policy, length in ((None, 32), (SlidingWindow(16), None), (kvcache.MaxBytes("64KiB"), None)):
        cache = KVCacheManager(tiny("llama"), policy, length, static=True, prefix_cache=memory()).new_cache()
        logits(tiny("llama"), token_ids(1, 3), cache)
        assert cache.layers[0].kv.capacity >= 16


@pytest.mark.parametrize(
    "given",
    [{"storage": KVQuantization(8)}, {"policy": SlidingWindow(4)}],
    ids=str,
)
def test_d9_what_has_no_layer_to_work_on_is_refused(given: dict[str, Any]) -> None:
    """A model whose every layer keeps a window of its own: nothing of it is managed."""
    with pytest.raises(PolicyError, match=r"has no layer to work on.*DynamicSlidingWindowLayer"):
        hf.new_cache(tiny("mistral-own-window"), CacheSpec(**given))
    assert hf.new_cache(tiny("mistral-own-window")).get_seq_length() == 0


def test_d9_stores_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"store=\{\} must be a Store"):
        SpeakerCache({})  # type: ignore[arg-type]
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(InputError, match="is a file; give a folder"):
        DiskStore(file)
    DiskStore(tmp_path / "new")


# ---------------------------------------------------------------------- D9: calls


def test_d9_a_body_without_a_head_says_so_at_the_call() -> None:
    manager = KVCacheManager(tiny("llama").model, prefix_cache=memory())
    assert manager.new_cache().get_seq_length() == 0
    for call in (manager.generate, manager.stream):
        with pytest.raises(InputError, match="LlamaModel has no head"):
            call(token_ids())


def test_d9_numbers_are_checked_at_the_call() -> None:
    manager = KVCacheManager(tiny("llama"), prefix_cache=memory())
    calls: list[tuple[Any, str]] = [
        (lambda: manager.estimate(-5), "tokens=-5"),
        (lambda: manager.estimate(5, 0), "batch_size=0"),
        (lambda: manager.new_cache(0), "batch_size=0"),
        (lambda: manager.new_cache(1.0), r"batch_size=1\.0"),  # type: ignore[arg-type]
        (lambda: manager.stream(token_ids(), chunk_size=2.5), r"chunk_size=2\.5"),  # type: ignore[arg-type]
        (lambda: manager.stream(token_ids(), chunk_size=True), "chunk_size=True"),
        (lambda: manager.stream(token_ids(), chunk_size=0), "chunk_size=0"),
    ]
    for call, said in calls:
        with pytest.raises(InputError, match=said):
            call()


def test_d9_only_a_cache_of_ours_has_a_report() -> None:
    manager = KVCacheManager(tiny("llama"), prefix_cache=memory())
    for other in (DynamicCache(), "x"):
        with pytest.raises(GeometryError, match=r"no cache of ours: make one with new_cache\(\)"):
            manager.report(other)
    assert manager.report(manager.new_cache()).seen == 0
    assert KVCacheManager(tiny("bart"), prefix_cache=memory()).report(hf.new_cache(tiny("bart"))).seen == 0


@pytest.mark.parametrize("backend", ["off", "eager"])
def test_d9_a_stream_says_at_the_call_what_nothing_takes(backend: Any) -> None:
    manager = KVCacheManager(tiny("llama"), prefix_cache=memory(), backend=backend)
    with pytest.raises(InputError, match="max_new_token"):
        manager.stream(token_ids(), max_new_token=4)
    with pytest.raises(InputError, match="no prefix 'voice'"):
        manager.stream(token_ids(), prefix="voice")
    assert torch.cat(list(manager.stream(token_ids(), max_new_tokens=4, do_sample=False)), 1).shape == (2, 4)


@pytest.mark.parametrize("backend", ["off", "eager"])
def test_d9_a_limit_within_a_stream_comes_after_all_tokens_that_there_was_room_for(backend: Any) -> None:
    """Ten slots and six tokens of prompt: one token is drawn from the prompt, four from what is run after it."""
    manager = KVCacheManager(tiny("llama"), max_cache_length=10, prefix_cache=memory())
    reference = tiny("llama").generate(token_ids(2, 6), max_new_tokens=5, do_sample=False)[:, 6:]
    for size in (1, 3, 16):
        stream, chunks = (
            manager.stream(token_ids(2, 6), max_new_tokens=40, do_sample=False, chunk_size=size, backend=backend),
            [],
        )
        with pytest.raises(CapacityError, match="max_cache_length"):
            chunks.extend(stream)  # what came before the error stays
        assert torch.equal(torch.cat(chunks, 1), reference)
    whole = manager.stream(token_ids(2, 6), max_new_tokens=5, do_sample=False, backend=backend)
    assert torch.equal(torch.cat(list(whole), 1), reference)


def test_d9_a_name_that_stands_for_another_content_says_so() -> None:
    manager, told = KVCacheManager(tiny("llama"), prefix_cache=memory()), []
    with subscribe(told.append, ["replaced"]):
        manager.add_prefix("voice", token_ids(1, 8))
        manager.add_prefix("voice", token_ids(1, 8), pin=True)
        assert not told
        manager.add_prefix("voice", token_ids(1, 6, seed=2))
    assert [(event.about, dict(event.numbers)) for event in told] == [("prefix 'voice'", {"tokens": 6, "known": 8})]


def test_d9_public_objects_say_what_they_are(tmp_path: Path) -> None:
    manager = KVCacheManager(tiny("llama"), prefix_cache=memory())
    list(manager.stream(token_ids(), max_new_tokens=4, do_sample=False))
    report = repr(manager.report())
    assert report.startswith("CacheReport(23 tokens seen, 23 kept, ")
    assert "MiB in 2 layers" in report
    assert repr(manager.prefix_cache) == "PrefixCache(MemoryStore(max_bytes=1048576, 0 snapshots, nbytes=0))"
    assert str(tmp_path) in repr(DiskStore(tmp_path))
    silent = [
        name
        for name in kvcache.__all__
        if inspect.isclass(kind := getattr(kvcache, name))
        and not inspect.isabstract(kind)
        and kind.__repr__ is object.__repr__
    ]
    assert not silent


# ---------------------------------------------------------------------- D11


@pytest.mark.skipif(RELEASE < (5, 13), reason="there the cache holds whole keys")
def test_d11_latents_are_not_ranked() -> None:
    config = DeepseekV3Config(
        vocab_size=97, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1,
        first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    model = model_of(config)
    with pytest.raises(PolicyError, match=r"SnapKV.*latent attention.*SlidingWindow"):
        KVCacheManager(model, SnapKV(128), prefix_cache=memory())
    out = KVCacheManager(model, prefix_cache=memory()).generate(token_ids(), max_new_tokens=3, do_sample=False)
    assert torch.equal(out, model.generate(token_ids(), max_new_tokens=3, do_sample=False))


# ---------------------------------------------------------------------- a state cannot be rolled back


@pytest.mark.skipif(RELEASE < (5, 24), reason="up to some release Jamba brings a cache of its own")
def test_hybrid_truncate_is_refused_or_right() -> None:
    config = JambaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=4, mamba_dt_rank=4,
        use_mamba_kernels=False, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = model_of(config)
    manager = KVCacheManager(model, prefix_cache=memory())
    cache, ids = manager.new_cache(), token_ids(1, 9)
    reference = logits(model, ids, cache)
    before = [layer.kv.seen for layer in cache.layers if hasattr(layer, "kv")]
    with pytest.raises(RollbackError, match=r"5 of 9 tokens.*LinearAttentionLayer.*give 0"):
        manager.truncate(cache, 5)
    assert [layer.kv.seen for layer in cache.layers if hasattr(layer, "kv")] == before == [9, 9]
    manager.truncate(cache, 9)
    more = token_ids(1, 3, seed=3)
    expected = logits(model, torch.cat([ids, more], 1))[:, 9:]
    torch.testing.assert_close(
        logits(model, more, cache), expected, atol=1e-4, rtol=0
    )  # the state is scanned in other steps
    manager.truncate(cache, 0)
    assert torch.equal(logits(model, ids, cache), reference)
    cache.reset()
    both = token_ids(3, 5)
    assert torch.equal(logits(model, both, cache), logits(model, both, manager.new_cache(3)))  # another batch size
    cache.batch_select_indices((0, 2))
    alone = manager.new_cache(2)
    logits(model, both[[0, 2]], alone)
    torch.testing.assert_close(
        logits(model, more.expand(2, -1), cache), logits(model, more.expand(2, -1), alone), atol=1e-4, rtol=0
    )


# ---------------------------------------------------------------------- told badly


def test_a_package_that_is_missing_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert issubclass(MissingDependencyError, ImportError)
    assert issubclass(MissingDependencyError, InputError)
    monkeypatch.setitem(__import__("sys").modules, "redis", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'kvcache\[redis\]'"):
        kvcache.RedisStore()
    again = pickle.loads(pickle.dumps(MissingDependencyError("x; run: pip install x")))
    assert str(again) == "x; run: pip install x"


def test_models_are_the_same_afterwards() -> None:
    model = build("llama")
    before = sorted(model.__dict__)
    with pytest.raises(InputError):
        KVCacheManager(model, KeepAll(), prefix_cache=memory()).stream(token_ids(), unknown=1)
    assert sorted(model.__dict__) == before


def test_what_is_missing_is_said_in_words() -> None:
    manager = KVCacheManager(tiny("llama"), storage=KVQuantization(8), prefix_cache=memory())
    cache = manager.new_cache()
    logits(tiny("llama"), token_ids(1, 9), cache)
    tensors, counts = cache.layers[0].kv.state()
    del tensors["keys.tail"]
    counts["tensors"] -= 1
    with pytest.raises(kvcache.CorruptError, match=r"not a state of this layer: 'keys\.tail' is missing"):
        manager.new_cache().layers[0].kv.restore(tensors, counts)
