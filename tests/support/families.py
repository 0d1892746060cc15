"""Tiny random models of many families, built from their configs: nothing is downloaded, everything runs on a CPU.

Weights are drawn wide enough that attention matters and greedy text varies: with transformers' own narrow
initialization most of these models repeat one token whatever their cache holds, and a parity test could not fail.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForCausalLM,
)

from kvcache.models import watch_of

transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
torch.set_num_threads(1)

RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
VOCABULARY = 97
OWN_WINDOW = 8  # of the layers that a model manages its own way

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_MHA = {**_LLAMA_LIKE, "num_key_value_heads": 4}
_NO_GQA = {k: v for k, v in _LLAMA_LIKE.items() if k != "num_key_value_heads"}
_ENDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
_GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, **_ENDS}
_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    **_ENDS,
}


@dataclass(frozen=True)
class Family:
    """How to build one, and what its cache allows.

    Attributes:
        model: the class.
        config: the class of its config.
        settings: of its config.
        attention: the implementations it has under every release.
        evicts: whether tokens may be evicted: it has full-attention layers, and positions that survive it.
        rope: whether its keys can be re-rotated.
        padded: whether it tells the positions of a row padded on the left from its attention mask.
        hybrid: whether some of its layers keep a window of their own.
    """

    model: type
    config: type
    settings: dict[str, Any]
    attention: tuple[str, ...] = ("sdpa", "eager")
    evicts: bool = True
    rope: bool = False
    padded: bool = True
    hybrid: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family(LlamaForCausalLM, LlamaConfig, _LLAMA_LIKE, rope=True),
    "mistral": Family(MistralForCausalLM, MistralConfig, {**_LLAMA_LIKE, "sliding_window": None}, rope=True),
    "mistral-own-window": Family(
        MistralForCausalLM, MistralConfig, {**_LLAMA_LIKE, "sliding_window": OWN_WINDOW}, evicts=False, hybrid=True
    ),
    "qwen2": Family(Qwen2ForCausalLM, Qwen2Config, _LLAMA_LIKE, rope=True),
    "qwen3": Family(Qwen3ForCausalLM, Qwen3Config, {**_LLAMA_LIKE, "head_dim": 24}, rope=True),
    "gemma2": Family(
        Gemma2ForCausalLM,
        Gemma2Config,
        {**_LLAMA_LIKE, "head_dim": 16, "sliding_window": OWN_WINDOW},
        attention=("eager",),  # its soft-capped scores have no sdpa
        rope=True,
        hybrid=True,
    ),
    "gemma3": Family(
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {**_LLAMA_LIKE, "num_hidden_layers": 6, "head_dim": 16, "sliding_window": OWN_WINDOW},
        rope=True,
        hybrid=True,
    ),
    "phi3": Family(Phi3ForCausalLM, Phi3Config, _LLAMA_LIKE, rope=True),
    "gpt2": Family(GPT2LMHeadModel, GPT2Config, {**_GPT2, "n_positions": 256}),
    "gptj": Family(
        GPTJForCausalLM, GPTJConfig, {**_GPT2, "rotary_dim": 8, "n_positions": 256}, attention=("eager",), rope=True
    ),
    "gpt-neox": Family(GPTNeoXForCausalLM, GPTNeoXConfig, _NO_GQA, rope=True),
    "opt": Family(
        OPTForCausalLM,
        OPTConfig,
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            **_ENDS,
        },
    ),
    "stablelm": Family(StableLmForCausalLM, StableLmConfig, _MHA, rope=True),
    "cohere": Family(CohereForCausalLM, CohereConfig, {**_LLAMA_LIKE, "logit_scale": 1.0}, rope=True),
    "whisper-decoder": Family(
        WhisperForCausalLM, WhisperConfig, {**_SEQ2SEQ, "max_target_positions": 256}, padded=False
    ),
    "bart": Family(
        BartForConditionalGeneration,
        BartConfig,
        {**_SEQ2SEQ, "decoder_layers": 3, "max_position_embeddings": 256},
        padded=False,
    ),
    "t5": Family(
        T5ForConditionalGeneration,
        T5Config,
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 3,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
        },
        attention=("eager",),  # the first releases have no other
        evicts=False,
        padded=False,
    ),
    "bloom": Family(
        BloomForCausalLM,
        BloomConfig,
        {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4, **_ENDS},
        attention=("eager",),
        evicts=False,
    ),
    "mpt": Family(
        MptForCausalLM,
        MptConfig,
        {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, **_ENDS},
        attention=("eager",),
        evicts=False,
    ),
    "falcon-alibi": Family(
        FalconForCausalLM,
        FalconConfig,
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "alibi": True,
            **_ENDS,
        },
        evicts=False,
    ),
}
EVICTING = [name for name, family in FAMILIES.items() if family.evicts]
ROTATING = [name for name, family in FAMILIES.items() if family.rope]
SEQ2SEQ = ["bart", "t5"]


def cases(names: Sequence[str] = tuple(FAMILIES)) -> list[tuple[str, str]]:
    """Each family with each of its attention implementations."""
    return [(name, attention) for name in names for attention in FAMILIES[name].attention]


def build(name: str, attention: str | None = None, **settings: Any) -> Any:
    """A new model of a family, with a few settings of its config changed; the same weights every time."""
    family = FAMILIES[name]
    attention = attention or family.attention[0]
    config = family.config(**{**family.settings, **settings}, attn_implementation=attention)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = widened(family.model(config))
    assert model.config._attn_implementation == attention
    return model


def widened(model: Any) -> Any:
    """A model to test with: wide random weights, the same every time, no gradients, no token that ends a text."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.eval().named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "A_log" not in name and "dt_" not in name:  # a state-space layer would run away
                parameter.add_(noise * 0.1) if parameter.dim() == 1 else parameter.copy_(noise * 0.15)
    model.generation_config.eos_token_id = None
    model.generation_config.forced_eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.requires_grad_(False)


_WATCHES: list[object] = []


@cache
def tiny(name: str, attention: str | None = None) -> Any:
    """The model of a family, made once. Not to be changed."""
    model = build(name, attention)
    _WATCHES.append(watch_of(model))  # as while somebody serves it: each test's managers need not walk it anew
    return model


def token_ids(rows: int = 2, tokens: int = 20, seed: int = 0) -> Tensor:
    """Random tokens that are neither pad nor begin nor end."""
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def dynamic_cache(model: Any) -> Any:
    """What `generate` makes by itself: the reference."""
    cache = DynamicCache(config=model.config)
    return EncoderDecoderCache(cache, DynamicCache()) if model.config.is_encoder_decoder else cache


def encoded(model: Any, rows: int) -> Any:
    """An encoder's output for some other text."""
    return model.get_encoder()(token_ids(rows, 9, seed=7))


@torch.no_grad()
def logits(model: Any, ids: Tensor, cache: Any = None, chunks: Sequence[int] | None = None, **given: Any) -> Tensor:
    """The logits of all tokens, fed in `chunks` through `cache`; or in one forward without a cache.

    In `given`, ``attention_mask`` ``[batch, tokens]`` and ``position_ids`` are cut to each chunk; a 4-D mask goes as is.
    """
    if model.config.is_encoder_decoder:
        outputs = encoded(model, ids.shape[0])
        # As `generate` does: the encoder runs once, and each step gets its output.
        extra = {"encoder_outputs": outputs}
        if "attention_mask" in given:
            given["decoder_attention_mask"] = given.pop("attention_mask")
        name = "decoder_input_ids"
    else:
        extra, name = {}, "input_ids"
    if cache is None:
        whole: Tensor = model(**{name: ids}, use_cache=False, **extra, **given).logits
        return whole
    result, start = [], 0
    for length in chunks or [ids.shape[1]]:
        end = start + length
        now = {key: value[:, start:end] if key == "position_ids" else value[:, :end] for key, value in given.items()}
        output = model(**{name: ids[:, start:end]}, past_key_values=cache, use_cache=True, **extra, **now)
        result.append(output.logits)
        start = end
    return torch.cat(result, 1)


ROPE_BY_LENGTH = [  # whose frequencies depend on how long the text becomes
    {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
]
