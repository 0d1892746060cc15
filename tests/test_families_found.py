"""Kinds of models that the family sweep found wrong, or crashing: each once, small."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from support.families import RELEASE, VOCABULARY, token_ids, widened
from support.inside.models import LayerShape
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    DogeConfig,
    DogeForCausalLM,
    FSMTConfig,
    FSMTForConditionalGeneration,
    GPTNeoConfig,
    GPTNeoForCausalLM,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from kvcache import KVCacheManager, MaxBytes, SlidingWindow, SnapKV
from kvcache.cache import CacheShape, CacheSpec
from kvcache.errors import GeometryError, PositionsError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import family_models

_SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GREEDY = {"max_new_tokens": 8, "do_sample": False}


def test_a_mask_for_each_head_is_read_by_the_engine_where_heads_share_keys():
    config = DogeConfig(**_SMALL, num_key_value_heads=2, head_dim=8)
    model = widened(DogeForCausalLM(config))
    manager, ids = KVCacheManager(model), token_ids(2, 6)
    out = torch.cat(list(manager.stream(ids, backend="eager", **_GREEDY)), 1)
    assert manager.report().backend is not None or RELEASE < (
        5,
        14,
    )  # whose masks the engine does not read, and says so
    assert torch.equal(out, model.generate(ids, **_GREEDY)[:, 6:])


def test_a_table_of_slots_in_which_far_ones_are_hidden_refuses_eviction():
    settings = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 16}
    local = GPTNeoConfig(**settings, max_position_embeddings=64, attention_types=[[["global", "local"], 1]])
    with pytest.raises(PositionsError, match="counts slots"):
        KVCacheManager(widened(GPTNeoForCausalLM(local)), SlidingWindow(8))
    whole = GPTNeoConfig(**settings, max_position_embeddings=64, attention_types=[[["global"], 2]])
    KVCacheManager(widened(GPTNeoForCausalLM(whole)), SlidingWindow(8))


@pytest.mark.skipif(RELEASE < (5, 14), reason="in older releases models with states have caches of their own")
def test_a_model_without_heads_generates_on_its_own_cache():
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=4, pad_token_id=0
    )
    model = widened(transformers.MambaForCausalLM(config))
    manager, ids = KVCacheManager(model), token_ids(2, 6)
    assert torch.equal(manager.generate(ids, **_GREEDY), model.generate(ids, **_GREEDY))
    assert manager.estimate(13, 2) == manager.report().nbytes


def test_an_encoder_without_a_config_is_planned():
    sizes = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_model"), 32)
    config = FSMTConfig(
        langs=["en", "de"], src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY, encoder_layers=1, decoder_layers=2,
        num_beams=1, max_length=20, **sizes,
    )  # fmt: skip
    model = widened(FSMTForConditionalGeneration(config))
    model.generation_config.decoder_start_token_id = 2
    manager, ids = KVCacheManager(model), token_ids(2, 6)
    manager.generate(ids, num_beams=1, **_GREEDY)
    held = manager.report()
    assert manager.estimate(held.seen, 2, encoder_tokens=6) == held.nbytes


def test_a_model_that_needs_a_picture_is_not_estimated_and_says_so():
    part = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {**part, "vocab_size": VOCABULARY, "bos_token_id": 1, "sep_token_id": 2, "encoder_hidden_size": 32}
    config = BlipConfig(text_config=text, vision_config={**part, "image_size": 8, "patch_size": 4})
    with pytest.raises(GeometryError, match=r"cannot be run on tokens alone.*report"):
        KVCacheManager(BlipForConditionalGeneration(config).eval()).estimate(8)


def test_a_model_that_counts_its_positions_in_its_own_way_is_left_to_generate():
    kosmos = pytest.importorskip("transformers.models.kosmos2_5.modeling_kosmos2_5", reason="not in older releases")
    config = kosmos.Kosmos2_5TextConfig(
        vocab_size=VOCABULARY, embed_dim=32, ffn_dim=32, layers=2, attention_heads=4, max_position_embeddings=64
    )
    model = widened(kosmos.Kosmos2_5TextForCausalLM(config))
    manager, ids = KVCacheManager(model), token_ids(2, 6)
    out = torch.cat(list(manager.stream(ids, backend="eager", **_GREEDY)), 1)
    assert torch.equal(out, model.generate(ids, **_GREEDY)[:, 6:])
    assert manager.report().backend is None
    assert "positions" in (
        manager.report().fallback or ""
    )  # counted in a way of its own, or, in older releases, in none


def test_a_model_that_takes_only_its_own_cache_is_given_none():
    config = transformers.MiniMaxConfig(
        **_SMALL, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, block_size=16,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    model = widened(transformers.MiniMaxForCausalLM(config))
    manager, ids = KVCacheManager(model), token_ids(2, 6)
    assert torch.equal(manager.generate(ids, **_GREEDY), model.generate(ids, **_GREEDY))
    with pytest.raises(GeometryError, match="of its own making"):
        manager.new_cache(2)
    tiny = transformers.OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4)
    with pytest.raises(GeometryError, match="of its own making"):
        KVCacheManager(transformers.OpenAIGPTLMHeadModel(tiny).eval()).new_cache(2)


@pytest.mark.skipif(RELEASE >= (5, 14), reason="newer releases keep all states in one kind of cache")
def test_a_model_that_generates_on_a_cache_without_layers_is_left_to_generate():
    config = transformers.Lfm2Config(**_SMALL, num_key_value_heads=2, layer_types=["conv", "full_attention"])
    model = widened(transformers.Lfm2ForCausalLM(config))
    manager, ids = KVCacheManager(model), token_ids(2, 6)
    out = torch.cat(list(manager.stream(ids, backend="eager", **_GREEDY)), 1)
    assert "cache of its own making" in manager.report().fallback
    assert torch.equal(out, model.generate(ids, **_GREEDY)[:, 6:])


def test_what_fails_in_a_trial_of_the_engine_is_left_to_generate():
    settings = {name: value for name, value in _SMALL.items() if name != "num_hidden_layers"}
    config = MllamaTextConfig(
        **settings, num_hidden_layers=3, num_key_value_heads=2, cross_attention_layers=[1], max_position_embeddings=64
    )
    model = widened(transformers.MllamaForCausalLM(config))
    manager, ids = KVCacheManager(model), token_ids(2, 6)
    out = torch.cat(list(manager.stream(ids, backend="eager", **_GREEDY)), 1)
    assert torch.equal(out, model.generate(ids, **_GREEDY)[:, 6:])
    assert "trial" in (manager.report().fallback or "")


def test_a_model_that_makes_its_cross_attention_cache_anew_gets_one():
    part = {**_SMALL, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}
    config = transformers.T5GemmaConfig(encoder=part, decoder=part, vocab_size=VOCABULARY)
    model = widened(transformers.T5GemmaForConditionalGeneration(config))
    model.generation_config.decoder_start_token_id = 1
    ids = token_ids(2, 6)
    assert torch.equal(KVCacheManager(model).generate(ids, **_GREEDY), model.generate(ids, **_GREEDY))


def test_what_an_earlier_request_left_on_the_model_enters_no_estimate_and_no_policy():
    """Qwen2-VL keeps how far positions are from the tokens' order, for as many rows as the last request had."""
    text = {
        **_SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    sight = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 1}
    model = widened(
        transformers.Qwen2VLForConditionalGeneration(transformers.Qwen2VLConfig(text_config=text, vision_config=sight))
    )
    manager, ids = KVCacheManager(model), token_ids(2, 6)
    out = manager.generate(ids, **_GREEDY)
    left = model.model.rope_deltas
    assert manager.estimate(13, 2) == manager.report().nbytes
    assert model.model.rope_deltas is left
    for policy in (SlidingWindow(32), SnapKV(80)):
        assert torch.equal(KVCacheManager(model, policy).generate(ids, **_GREEDY), out)
    assert torch.equal(manager.generate(ids, **_GREEDY), out)


def built(name):
    if name not in family_models.names():
        pytest.skip(f"this release of transformers has no {name}")
    return family_models.build(name, 0.2)


def test_a_model_that_reads_text_beside_its_own_tokens_is_asked_with_text():
    # CSM's embeddings are of codebooks; behind a cache that holds something it cannot go on with text, which is its own.
    manager = KVCacheManager(built("CsmForConditionalGeneration"))
    with pytest.raises(PositionsError, match="prefix"):
        manager.add_prefix("beginning", torch.tensor([3, 4, 5]))


@pytest.mark.parametrize("prompt", [3, 9])
@pytest.mark.parametrize("new", [2, 30])
def test_layers_of_a_models_own_kind_are_asked_what_they_hold(prompt, new):
    # Compressed states, of every fourth token, beside a window.
    manager = KVCacheManager(built("DeepseekV4ForCausalLM"))
    manager.generate(token_ids(2, prompt), max_new_tokens=new, min_new_tokens=new, do_sample=False)
    held = manager.report()
    assert held.seen == prompt + new - 1
    assert manager.estimate(held.seen, 2) == held.nbytes
    assert manager.estimate(0) == 0


def test_what_depends_on_how_tokens_came_is_not_estimated():
    # The first tokens that come together stay; of those that come one by one some do.
    manager = KVCacheManager(built("UnlimitedOcrForConditionalGeneration"))
    with pytest.raises(GeometryError, match="came at once"):
        manager.estimate(26, 2)


def test_a_layer_without_a_known_end_takes_no_share_of_a_budget_in_bytes():
    odd = LayerShape(False, asked=lambda tokens: tokens**2)
    usual = LayerShape(True, (2, 8, 8, torch.float32))
    shape = CacheShape((usual, odd))
    assert CacheSpec().nbytes(shape, 3) == CacheSpec().nbytes(CacheShape((usual,)), 3) + 9
    with pytest.raises(GeometryError, match="no end that is known"):
        CacheSpec(MaxBytes("1MiB")).nbytes(shape, 3)


def test_a_cache_has_the_layers_of_one_part_of_a_model():
    # SeamlessM4T's units' decoder, of more layers, runs on the cache that its text decoder was given.
    cache = KVCacheManager(built("SeamlessM4TModel")).new_cache(2)
    states = torch.zeros(2, 4, 3, 16)
    with pytest.raises(GeometryError, match="layer 2 was asked for, and the cache has 2 layers"):
        cache.self_attention_cache.update(states, states, 2)
