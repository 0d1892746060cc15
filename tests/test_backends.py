"""`KVCacheManager.stream(backend=…)`: whatever runs the steps, the tokens are those of `generate`."""

import functools
import gc
import logging
import weakref

import pytest
import torch
from support.decoders import streamed
from support.families import FAMILIES, RELEASE, VOCABULARY, build, tiny, token_ids
from support.inside import decoding as inside
from transformers import (
    AttentionInterface,
    GenerationConfig,
    GptOssConfig,
    GptOssForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from kvcache import CapacityError, GeometryError, InputError, KVCacheManager, MaxBytes, MaxTokens, SlidingWindow
from kvcache.decoding import unsupported_reason
from kvcache.models import own_attention

NATIVE = {"llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2", "gpt-neox", "opt", "cohere"}
NATIVE |= {"gptj"} if RELEASE >= (5, 24) else set()  # before, it brought its own attention
DRAWING = [
    {"do_sample": False},
    {"do_sample": False, "repetition_penalty": 1.5},
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
]
POLICIES = [None, SlidingWindow(12, sinks=3), MaxTokens(24, 15), MaxBytes("40KB")]


def same(manager, ids, backend, native=True, **given):
    """The tokens equal those of `generate`, and torch's generator is left where that leaves it."""
    expected, drawn = streamed(manager, ids, "off", **given)
    tokens, ours = streamed(manager, ids, backend, **given)
    report = manager.report()
    assert (report.fallback is None) == native, report.fallback
    assert report.backend == (backend if native else None)
    assert torch.equal(tokens, expected)
    assert torch.equal(drawn, ours)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("bart", "t5")])
def test_every_family_says_the_same_or_says_why_not(name):
    model = tiny(name)
    manager = KVCacheManager(model)
    native = name in NATIVE
    assert (unsupported_reason(model) is None) == native
    for drawing in DRAWING[::3]:
        same(manager, token_ids(2, 9), "eager", native, max_new_tokens=40, chunk_size=7, **drawing)


@pytest.mark.grid(4)
@pytest.mark.parametrize("backend", ["eager", "graph"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_policies_padding_and_prefixes(name, policy, backend):
    manager = KVCacheManager(tiny(name), policy)
    manager.add_prefix("before", token_ids(1, 11, seed=5))
    ids = token_ids(2, 9)
    padded = ids.clone()
    padded[1, :4] = 0
    trims_at_once = isinstance(policy, MaxTokens | MaxBytes)
    for drawing in DRAWING:
        same(manager, ids, backend, max_new_tokens=40, prefix="before", **drawing)
        mask = (padded != 0).long()
        same(manager, padded, backend, not trims_at_once, attention_mask=mask, max_new_tokens=40, **drawing)


def test_rows_end_by_themselves():
    manager = KVCacheManager(tiny("llama"))
    ids = token_ids(3, 6)
    said, _ = streamed(manager, ids, "off", max_new_tokens=30, do_sample=False)
    for ends in ([int(said[0, 4])], [int(said[0, 4]), int(said[1, 11]), int(said[2, 20])], [int(said[2, 0])]):
        for size in (1, 4, 64):
            for drawing in DRAWING:
                same(manager, ids, "eager", max_new_tokens=30, eos_token_id=ends, chunk_size=size, **drawing)


def test_embeddings_and_a_generation_config():
    model = tiny("llama")
    manager = KVCacheManager(model)
    embeds = model.get_input_embeddings()(token_ids(2, 9))
    expected = torch.cat(list(manager.stream(inputs_embeds=embeds, max_new_tokens=20, do_sample=False)), 1)
    ours = torch.cat(list(manager.stream(inputs_embeds=embeds, max_new_tokens=20, do_sample=False, backend="eager")), 1)
    assert torch.equal(ours, expected)
    config = GenerationConfig(max_length=25, do_sample=True, top_k=5, pad_token_id=0)
    same(manager, token_ids(2, 9), "eager", generation_config=config)


def test_one_manager_serves_requests_of_all_shapes_in_turn():
    manager = KVCacheManager(tiny("gpt2"), max_cache_length=80)
    for rows, prompt, new in ((1, 9, 30), (2, 5, 10), (1, 3, 70), (1, 30, 50), (2, 9, 30)):
        for backend in ("eager", "graph"):
            same(manager, token_ids(rows, prompt, seed=new), backend, max_new_tokens=new, do_sample=True)


NOT_OURS = {
    "beams": ({"num_beam_groups": 2}, "num_beam_groups"),
    "without a cache": ({"use_cache": False}, "use_cache=False"),
    "a hole in the mask": ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 1]])}, "mask hides more"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_OURS)
def test_what_the_engine_cannot_do_generate_does(case):
    given, reason = NOT_OURS[case]
    manager = KVCacheManager(tiny("llama"))
    same(manager, token_ids(1, 9), "eager", False, max_new_tokens=20, **given)
    assert reason in manager.report().fallback
    assert reason in str(manager.report()) or not manager.report().enabled


def far_sighted(module, query, keys, values, mask, scaling=None, **others):
    """Sees the last ten tokens alone: a trial of six does not show it."""
    slots, fresh = keys.shape[2], query.shape[2]
    at, mine = torch.arange(slots), torch.arange(slots - fresh, slots)[:, None]
    keys, values = (states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (keys, values))
    seen = (at <= mine) & (at > mine - 10)
    out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, seen, scale=scaling)
    return out.transpose(1, 2), None


OWN = {
    "an attention of its own": ("local", far_sighted, None),
    "transformers' name for another function": ("sdpa", far_sighted, None),
    "a function that calls itself transformers'": ("sdpa", functools.wraps(sdpa_attention_forward)(far_sighted), None),
    "a mask of its own": ("sdpa", None, lambda *args, **others: None),
}


@pytest.mark.parametrize("case", OWN)
def test_an_attention_that_somebody_registered_is_left_to_generate(case, monkeypatch):
    name, attention, mask = OWN[case]
    model = build("llama")
    manager = KVCacheManager(model)
    same(manager, token_ids(1, 40), "eager", max_new_tokens=4, do_sample=False)
    for kind, function in ((AttentionInterface, attention), (AttentionMaskInterface, mask)):
        if function is not None or name not in kind._global_mapping:
            given = function or kind._global_mapping["sdpa"]
            monkeypatch.setitem(kind._global_mapping, name, given)
    model.set_attn_implementation(name)
    same(manager, token_ids(1, 40), "eager", False, max_new_tokens=4, do_sample=False)
    assert f"attends by {name!r}" in manager.report().fallback


def test_transformers_own_attentions_are_no_reason():
    model = build("llama")
    for name in ("eager", "sdpa", "flash_attention_2", "flex_attention", "paged|eager", "paged|sdpa"):
        model.config._attn_implementation_internal = name  # by hand: some are not installed
        assert own_attention(model) is None
    model.config._attn_implementation_internal = "nobody's"
    assert own_attention(model) == "nobody's"


@pytest.mark.parametrize("more", ["s_aux", "sinks", "softcap", "position_bias", "sliding_window", "new"])
def test_attention_that_is_told_more_than_it_computes_is_refused(more):
    query, keys, values = torch.randn(3, 2, 4, 5, 8).unbind()
    expected = torch.nn.functional.scaled_dot_product_attention(query[:, :, :1], keys, values).transpose(1, 2)
    harmless = {"dropout": 0.0, "is_causal": False, "position_ids": torch.zeros(2, 1), "use_cache": True, more: None}
    torch.testing.assert_close(inside.attend(None, query[:, :, :1], keys, values, None, **harmless)[0], expected)
    for given in ({more: 0.5}, {"dropout": 0.5}):
        with pytest.raises(GeometryError, match=f"depends on {next(iter(given))}"):
            inside.attend(None, query[:, :, :1], keys, values, None, **given)


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("heads", "kv_heads", "value_dim"), [(4, 4, 16), (6, 2, 16), (8, 1, 12)])
@pytest.mark.parametrize("masked", ["whole", "row", "head"])
@pytest.mark.parametrize("scaling", [None, 0.4])
def test_what_a_compiled_step_reduces_is_torchs_attention(
    held, heads, kv_heads, value_dim, masked, scaling, monkeypatch
):
    """Of bfloat16 the keys and values are rounded, as they are held, and nothing besides."""
    torch.manual_seed(0)
    query, slots = torch.randn(3, heads, 1, 16, dtype=torch.promote_types(held, torch.float32)), 21
    keys = torch.randn(3, kv_heads, slots, 16).to(held)
    values = torch.randn(3, kv_heads, slots, value_dim).to(held)
    seen = None
    if masked != "whole":
        seen = torch.rand(3, 1 if masked == "row" else heads, 1, slots) < 0.6
        seen[..., 7] = True
    exact = [states.to(query.dtype).repeat_interleave(heads // kv_heads, 1) for states in (keys, values)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *exact, attn_mask=seen, scale=scaling)
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)  # which must not be asked
    added = None if seen is None else seen.float().log()
    found, _ = inside.attend(None, query, keys, values, added, scaling=scaling)
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-5, atol=1e-5)


def test_what_another_thread_compiles_is_no_matter_of_an_eager_step(monkeypatch):
    """torch tells of a compiler at work in any thread, and of one that traces in this one."""
    query, keys, values = torch.randn(3, 2, 4, 5, 8).unbind()
    expected = inside.attend(None, query[:, :, :1], keys, values, None)[0]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert torch.equal(inside.attend(None, query[:, :, :1], keys, values, None)[0], expected)


def test_sinks_in_half_precision_are_left_to_generate():
    config = GptOssConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=2, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    torch.manual_seed(0)
    manager = KVCacheManager(GptOssForCausalLM(config).eval().to(torch.bfloat16))
    assert "depends on s_aux" in manager.explain(token_ids(1, 9), backend="eager", max_new_tokens=4).reason


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT names the cache as transformers did before
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_prompts_that_peft_has_learned_are_left_to_generate(kind):
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(num_virtual_tokens=5, task_type="CAUSAL_LM")
    model = peft.get_peft_model(build("llama"), config).eval().requires_grad_(False)
    ids = token_ids(1, 9)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    manager = KVCacheManager(model)
    tokens = torch.cat(list(manager.stream(backend="eager", **given)), 1)
    assert torch.equal(tokens, model.generate(**given)[:, 9:])
    assert manager.report().fallback is not None


def test_rerotation_layers_of_their_own_and_a_disabled_cache_are_left_to_generate():
    for given in ({"positions": "rerotated"}, {}):
        policy = SlidingWindow(12, sinks=3)
        manager = KVCacheManager(tiny("llama"), policy if given else [policy, policy], **given)
        same(manager, token_ids(2, 9), "eager", False, max_new_tokens=20, do_sample=False)
    manager = KVCacheManager(tiny("llama"))
    manager.enabled = False
    same(manager, token_ids(2, 9), "eager", False, max_new_tokens=8, do_sample=False)


def test_too_long_is_refused_as_generate_refuses_it():
    ids = token_ids(1, 9)
    for manager in (KVCacheManager(tiny("llama"), max_cache_length=30), KVCacheManager(tiny("gpt2"))):
        for backend in ("eager", "graph"):
            with pytest.raises(CapacityError, match=r"30 slots|learned 256 positions"):
                list(manager.stream(ids, max_new_tokens=300, do_sample=False, backend=backend))
        same(manager, ids, "eager", max_new_tokens=15, do_sample=False)  # and the next request is served


def test_bad_backends_are_refused_at_once():
    manager = KVCacheManager(tiny("llama"))
    with pytest.raises(InputError, match="backend='fast' must be one of 'eager', 'compile'"):
        manager.stream(token_ids(1, 3), backend="fast")


def test_a_backend_that_fails_is_left_for_the_eager_one(monkeypatch, caplog):
    manager = KVCacheManager(tiny("llama"))
    ids = token_ids(1, 9)
    expected, _ = streamed(manager, ids, "off", max_new_tokens=30, do_sample=True)
    monkeypatch.setattr(inside.MAKE_FX, lambda step: _breaking)
    with caplog.at_level(logging.WARNING, "kvcache"):
        tokens, _ = streamed(manager, ids, "graph", max_new_tokens=30, do_sample=True)
    assert torch.equal(tokens, expected)
    assert manager.report().backend == "eager"
    assert "graph failed: RuntimeError: no memory for a graph" in manager.report().fallback
    assert "goes on in eager mode" in caplog.text


def _breaking():
    raise RuntimeError("no memory for a graph")


def test_closing_a_stream_gives_its_cache_back_and_release_frees_it():
    manager = KVCacheManager(build("llama"), max_cache_length=64)
    stream = manager.stream(token_ids(1, 9), max_new_tokens=50, chunk_size=4, backend="eager", do_sample=False)
    next(stream)
    stream.close()
    (waiting,) = inside.idle(inside.pool_of(manager)).values()
    assert waiting.kv.seen == [0]
    gone = weakref.ref(waiting.kv)
    del waiting, stream
    same(manager, token_ids(1, 5), "eager", max_new_tokens=50, do_sample=False)
    assert gone() is not None  # served again
    manager.release()
    gc.collect()
    assert gone() is None


def test_the_model_is_left_as_it_was():
    model = build("llama")
    before = str(model.config), {name: id(module) for name, module in model.named_modules()}, list(model.state_dict())
    manager = KVCacheManager(model)
    same(manager, token_ids(1, 9), "graph", max_new_tokens=20, do_sample=False)
    assert model.config._attn_implementation == "sdpa"
    assert before == (str(model.config), {n: id(m) for n, m in model.named_modules()}, list(model.state_dict()))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
