"""Geometry read from configs, against what the caches of tiny real models hold after a forward."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    DynamicCache,
    PreTrainedConfig,
)
from transformers.modeling_outputs import BaseModelOutput

from kvcache import CacheGeometry, GeometryError, PositionsError, SlidingWindow
from kvcache.cache import CacheSpec
from kvcache.models import exact_windows, facts_of, geometry_of, new_cache

# Three layers, four heads of which two hold keys and values, and a width of 48: no two numbers may be mistaken.
LLAMA = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
GQA = LLAMA | {"num_key_value_heads": 2, "pad_token_id": 0}
GPT = {"n_embd": 48, "n_layer": 3, "n_head": 4}
GPT_TABLE = GPT | {"n_positions": 40}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
EXPERTS = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ENCODER_DECODER = {
    "d_model": 48, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
WHISPER = ENCODER_DECODER | {"max_target_positions": 40, "max_source_positions": 9}
BART = ENCODER_DECODER | {"max_position_embeddings": 40}
T5 = {"d_model": 48, "d_kv": 10, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}

# model type: its config, positions, length of its position table
FAMILIES = {
    "llama": (GQA, "rope", None),
    "mistral": (GQA | {"sliding_window": 8}, "rope", None),
    "qwen2": (GQA, "rope", None),
    "qwen3": (GQA | {"head_dim": 20}, "rope", None),
    "gemma2": (GQA | {"head_dim": 20}, "rope", None),
    "gemma3_text": (GQA | {"head_dim": 20}, "rope", None),
    "phi3": (GQA, "rope", None),
    "cohere": (GQA, "rope", None),
    "stablelm": (GQA | {"partial_rotary_factor": 0.5}, "rope", None),
    "gpt_neox": (LLAMA, "rope", None),
    "gptj": (GPT | {"rotary_dim": 4}, "rope", None),
    "gpt2": (GPT_TABLE, "learned", 40),
    "gpt_bigcode": (GPT_TABLE | {"multi_query": True}, "learned", 40),
    "gpt_bigcode-heads": (GPT_TABLE | {"multi_query": False}, "learned", 40),
    "opt": (LLAMA | {"ffn_dim": 40, "word_embed_proj_dim": 48, "max_position_embeddings": 40}, "learned", 40),
    "bloom": ({"hidden_size": 48, "n_layer": 3, "n_head": 4}, "alibi", None),
    "mpt": ({"d_model": 48, "n_layers": 3, "n_heads": 4, "max_seq_len": 40}, "alibi", None),
    "falcon": (LLAMA | {"multi_query": True, "new_decoder_architecture": False, "alibi": False}, "rope", None),
    "falcon-heads": (LLAMA | {"num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False}, "rope", None),
    "falcon-alibi": (LLAMA | {"multi_query": False, "alibi": True}, "alibi", None),
    "deepseek_v3": (LLAMA | LATENT | EXPERTS | {"num_key_value_heads": 4}, "rope", None),
    "whisper": (WHISPER, "learned", 40),
    "whisper-decoder": (WHISPER, "learned", 40),
    "bart": (BART, "learned", 40),
    "bart-decoder": (BART, "learned", 40),
    "t5": (T5, "relative", None),
}


def tiny(family):
    """A random model of a few thousand weights, and a forward that fills its cache with five tokens."""
    kind = family.split("-")[0]
    config = AutoConfig.for_model(kind, vocab_size=96, **FAMILIES[family][0])
    auto = {"t5": AutoModelForSeq2SeqLM, "bart": AutoModelForSeq2SeqLM, "whisper": AutoModelForSpeechSeq2Seq}.get(
        family, AutoModelForCausalLM
    )
    model = auto.from_config(config).eval()
    tokens = torch.arange(3, 8)[None]
    if auto is AutoModelForCausalLM:
        return model, {"input_ids": tokens, "past_key_values": DynamicCache()}
    return model, {"decoder_input_ids": tokens, "encoder_outputs": BaseModelOutput(torch.randn(1, 9, 48))}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # gpt_bigcode in transformers 5.2
@pytest.mark.parametrize("family", FAMILIES)
def test_geometry_is_what_the_model_caches(family):
    _, positions, table = FAMILIES[family]
    model, given = tiny(family)
    with torch.no_grad():
        cache = model(**given, use_cache=True).past_key_values
    layers = getattr(cache, "self_attention_cache", cache).layers
    geometry = geometry_of(model)
    assert geometry.layers == len(layers) == 3
    for layer in layers:
        assert layer.keys.shape == (1, geometry.kv_heads, 5, geometry.head_dim)
        assert layer.values.shape == (1, geometry.kv_heads, 5, geometry.value_dim)
        assert (layer.keys.dtype, layer.keys.device) == (geometry.dtype, geometry.device)
    held = sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))
    assert 5 * geometry.token_bytes == held
    assert (geometry.positions, geometry.max_positions) == (positions, table)


def test_position_table_is_as_long_as_told():
    model, _ = tiny("gpt2")
    tokens = torch.arange(geometry_of(model).max_positions)[None]
    with torch.no_grad():
        model(tokens)
        with pytest.raises(IndexError):
            model(torch.cat((tokens, tokens[:, :1]), 1))


def test_dtype_is_the_given_one_then_the_configs():
    config = AutoConfig.for_model("llama", **GQA)
    assert CacheGeometry.from_config(config).dtype == torch.float32
    config.dtype = torch.bfloat16
    assert CacheGeometry.from_config(config).dtype == torch.bfloat16
    assert CacheGeometry.from_config(config, dtype=torch.float16).dtype == torch.float16


def test_the_text_decoder_of_a_vision_model_is_what_counts():
    text = AutoConfig.for_model("llama", **GQA)
    both = AutoConfig.for_model("llava", text_config=text.to_dict(), vision_config={"model_type": "clip_vision_model"})
    assert CacheGeometry.from_config(both) == CacheGeometry.from_config(text)


def test_a_config_without_layers_is_refused():
    with pytest.raises(GeometryError, match=r"PreTrainedConfig does not say .* build CacheGeometry\(layers="):
        CacheGeometry.from_config(PreTrainedConfig())


@pytest.mark.parametrize(
    ("positions", "rerotate", "why"),
    [
        ("alibi", False, "ALiBi.*KeepAll"),
        ("relative", False, "T5-style.*KeepAll"),
        ("unknown", False, "cannot tell.*KeepAll"),
        ("alibi", True, "ALiBi"),
        ("learned", True, "learned.*positions='absolute'"),
        ("learned", False, None),
        ("rope", False, None),
        ("rope", True, None),
    ],
)
def test_eviction_is_refused_where_it_would_be_silently_wrong(positions, rerotate, why):
    geometry = CacheGeometry(layers=2, kv_heads=2, head_dim=8, value_dim=8, positions=positions)
    if why is None:
        geometry.check_eviction(rerotate=rerotate)
    else:
        with pytest.raises(PositionsError, match=why):
            geometry.check_eviction(rerotate=rerotate)


def test_latent_keys_are_turned_where_they_are_keys_and_refused_where_they_are_latents():
    """Multi-head latent attention caches keys whose last channels are rotary, or, in newer releases, no keys at all."""
    model, _ = tiny("deepseek_v3")
    new_cache(model, SlidingWindow(4, sinks=2))
    if facts_of(model).why_no_rerotation is not None:
        with pytest.raises(PositionsError, match=r"cannot be re-rotated.*positions='absolute'"):
            new_cache(model, CacheSpec(SlidingWindow(4, sinks=2), positions="rerotated"))
        return
    cache = new_cache(model, CacheSpec(SlidingWindow(4, sinks=2), positions="rerotated"))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad(), exact_windows(model):
        for token in ids.split(1, 1):
            model(input_ids=token, past_key_values=cache)
        kept = DynamicCache(config=model.config)
        model(  # sinks are turned towards the window
            input_ids=ids[:, [0, 1, 8, 9, 10, 11]], position_ids=torch.arange(6, 12)[None], past_key_values=kept
        )
    layer = cache.layers[0].kv
    ours = layer.keys[:, :, layer.positions()[0].argsort()]
    # The first layer's keys depend on token and position alone; a turn and its inverse round twice.
    torch.testing.assert_close(ours, kept.layers[0].keys, atol=1e-5, rtol=0)
