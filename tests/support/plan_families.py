"""Tiny random models of families whose caches are of every kind: windows of their own, states, latents, shared and uneven layers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers

from support.families import RELEASE

WINDOW = 8  # of the layers that have one of their own
VOCABULARY = 97

_ENDS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SMALL: dict[str, Any] = {
    **_ENDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_OWN = {"sliding_window": WINDOW}
_STATES = (5, 14)  # in older releases models with states have caches of their own
_LATER = (99, 0)  # their geometry is not read yet
_SEQ2SEQ: dict[str, Any] = {
    **_ENDS,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
}


@dataclass(frozen=True)
class Kind:
    """A family, and what its cache allows.

    Attributes:
        name: of its classes, as ``MistralForCausalLM`` and ``MistralConfig``.
        settings: of its config.
        head: what follows the name of the model's class.
        config: the name of its config's class, where that is another.
        evicts: whether it is tried with policies under which tokens leave.
        bits: whether it has a layer that fewer bits can hold.
        since: the release that its cache can be served from on.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=lambda: _SMALL)
    head: str = "ForCausalLM"
    config: str = ""
    evicts: bool = True
    bits: bool = True
    since: tuple[int, int] = (5, 2)


KINDS: dict[str, Kind] = {
    "llama": Kind("Llama"),
    "mistral": Kind("Mistral", {**_SMALL, **_OWN}, evicts=False, bits=False),
    "gemma2": Kind("Gemma2", {**_SMALL, **_OWN, "head_dim": 16}),
    "gemma3": Kind(
        "Gemma3",
        {**_SMALL, **_OWN, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
        config="Gemma3TextConfig",
    ),
    "gemma3n": Kind(
        "Gemma3n",
        {
            **_SMALL, **_OWN, "head_dim": 16, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "laurel_rank": 4,
            "intermediate_size": [48] * 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.0] * 4, "altup_num_inputs": 2, "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY, "pad_token_id": 0,
        },
        config="Gemma3nTextConfig", evicts=False, since=_STATES,  # what layers share is beside the cache before
    ),
    "gemma4": Kind(
        "Gemma4",
        {
            **_SMALL, **_OWN, "head_dim": 8, "global_head_dim": 16, "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0,
        },
        config="Gemma4TextConfig",
        since=_LATER,
    ),
    "gpt-oss": Kind(
        "GptOss",
        {**_SMALL, **_OWN, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
         "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "llama4": Kind(
        "Llama4",
        {**_SMALL, "head_dim": 8, "attention_chunk_size": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1,
         "intermediate_size_mlp": 48, "layer_types": ["chunked_attention", "full_attention"]},
        config="Llama4TextConfig", evicts=False,
    ),
    "mixtral": Kind("Mixtral", {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": Kind(
        "Qwen3Moe", {**_SMALL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    ),
    "deepseek-v3": Kind(
        "DeepseekV3",
        {**_SMALL, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 12, "qk_rope_head_dim": 8,
         "qk_nope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
         "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
    ),
    "falcon": Kind("Falcon", {**_SMALL, "multi_query": True, "new_decoder_architecture": False}),
    "falcon-groups": Kind("Falcon", {**_SMALL, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "gpt2": Kind("GPT2", {**_ENDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}, head="LMHeadModel"),
    "bloom": Kind("Bloom", {**_ENDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}, evicts=False),
    "jamba": Kind(
        "Jamba",
        {**_SMALL, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
         "expert_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 4, "mamba_d_conv": 4,
         "mamba_expand": 2, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        evicts=False, since=_STATES,
    ),
    "lfm2": Kind(
        "Lfm2", {**_SMALL, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3},
        since=_STATES,
    ),
    "qwen3-next": Kind(
        "Qwen3Next",
        {**_SMALL, "head_dim": 8, "num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "linear_num_value_heads": 4,
         "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
         "layer_types": ["linear_attention", "full_attention"] * 2},
        since=_STATES,
    ),
    "mamba": Kind(
        "Mamba",
        {**_ENDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4},
        evicts=False, bits=False, since=_LATER,
    ),
    "t5": Kind(
        "T5",
        {**_ENDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 2, "num_heads": 4,
         "decoder_start_token_id": 0},
        head="ForConditionalGeneration", evicts=False,
    ),
    "bart": Kind("Bart", {**_SEQ2SEQ, "max_position_embeddings": 512}, head="ForConditionalGeneration"),
    "whisper": Kind(
        "Whisper",
        {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 30, "max_target_positions": 512,
         "suppress_tokens": [], "begin_suppress_tokens": []},
        head="ForConditionalGeneration",
    ),
}  # fmt: skip
NAMES = [name for name, kind in KINDS.items() if kind.since <= RELEASE]


def config_of(name: str) -> Any:
    kind = KINDS[name]
    return getattr(transformers, kind.config or f"{kind.name}Config")(**kind.settings)


def class_of(name: str) -> Callable[[Any], Any]:
    found: Callable[[Any], Any] = getattr(transformers, KINDS[name].name + KINDS[name].head)
    return found


@cache
def made(name: str) -> Any:
    """The model of a family, made once. Not to be changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = class_of(name)(config_of(name)).eval().requires_grad_(False)
    for setting in ("eos_token_id", "forced_eos_token_id", "forced_bos_token_id"):
        setattr(model.generation_config, setting, None)
    model.generation_config.pad_token_id = 0
    return model
