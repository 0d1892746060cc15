"""Every class of transformers that generates, as a tiny random model: its config's own defaults, with all sizes made small.

A rule by the names of settings makes most of them; `EXCEPTIONS` has what the others need.
"""
# Not by `make bench`: a part of families.py.

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto import modeling_auto

from kvcache.models import MADE_AS

VOCABULARY = 99
WINDOW = 6  # of layers that have one of their own
PROMPT = 7  # tokens
_LARGEST = 30_000_000  # numbers; a model with more is not tiny

_MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT",
    "MODEL_FOR_MULTIMODAL_LM",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ",
    "MODEL_FOR_TEXT_TO_WAVEFORM",
)
# Generate as well, and are in none of these.
_BESIDE = (
    "BarkCoarseModel", "BarkSemanticModel", "BlipForQuestionAnswering", "ClvpForCausalLM", "GPT2DoubleHeadsModel",
    "GlmImageForConditionalGeneration", "ImageGPTForCausalImageModeling", "SeamlessM4TModel",
)  # fmt: skip

POPULAR = (
    "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM",
    "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "PhiForCausalLM", "Phi3ForCausalLM", "GPT2LMHeadModel",
    "GPTNeoXForCausalLM", "GPTJForCausalLM", "GPTBigCodeForCausalLM", "GptOssForCausalLM", "OPTForCausalLM",
    "BloomForCausalLM", "FalconForCausalLM", "MptForCausalLM", "StableLmForCausalLM", "Starcoder2ForCausalLM",
    "CohereForCausalLM", "Cohere2ForCausalLM", "Olmo2ForCausalLM", "GraniteForCausalLM", "SmolLM3ForCausalLM",
    "DeepseekV3ForCausalLM", "JambaForCausalLM", "Lfm2ForCausalLM", "MambaForCausalLM",
    "LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration", "WhisperForConditionalGeneration",
    "T5ForConditionalGeneration", "BartForConditionalGeneration", "MarianMTModel",
)  # fmt: skip


def names() -> list[str]:
    """The classes of this release that generate, by name."""
    mapped = {
        name
        for mapping in _MAPPINGS
        for value in getattr(modeling_auto, f"{mapping}_MAPPING_NAMES", {}).values()
        for name in ([value] if isinstance(value, str) else value)
    }
    found = [name for name in sorted(mapped | set(_BESIDE)) if name not in NOT_TRIED]
    there = set(dir(transformers))  # unlike hasattr, imports no model
    return [name for name in found if name in there]


# ---------------------------------------------------------------------- configs

# The first pattern that a setting's whole name matches says its size.
_RULES: tuple[tuple[str, int], ...] = (
    (r"type_vocab_size|vocab_size_per_layer_input_offset", 2),
    (r".*vocab_size(_.*)?", VOCABULARY),
    (r"(.*_)?(num_key_value_heads|num_kv_heads|n_kv_heads)", 2),
    (r"(.*_)?(num_attention_heads|attention_heads|num_heads|n_heads?|num_query_heads)", 4),
    (r"(.*_)?(num_hidden_layers|n_layers?|num_layers|depth)|(en|de)coder_layers|num_(en|de)coder_layers", 2),
    (r"(.*_)?(head_dim|d_kv|v_head_dim|head_size)", 16),
    (r"qk_rope_head_dim", 8),
    (r"kv_lora_rank|(.*_)?lora_rank", 16),
    (r"(.*_)?(n_routed_experts|num_experts|num_local_experts|n_experts)", 4),
    (r"(.*_)?(num_experts_per_tok|num_experts_per_token|moe_top_?k|experts_per_token)", 2),
    (r"n_group|topk_group|num_expert_group|num_limited_groups", 1),
    (r"(.*_)?(moe_.*|shared_expert_)intermediate_size(_mlp)?", 32),
    (r"(.*_)?(intermediate_size|ffn_dim|d_ff|ffn_hidden_size|mlp_dim|n_inner|inner_dim)(_.*)?", 96),
    (r"(.*_)?(hidden_size|d_model|n_embd|hidden_dim|projection_dim|embed_proj_dim|embedding_size|embedding_dim|emb_dim)", 64),
    (r"(.*_)?(embed_dim|model_dim|width|out_hidden_size|output_dim|output_hidden_size|encoder_hidden_dim)", 64),
    (r"(sliding|attention|local)_?(window|chunk)(_size)?|window_size|sliding_window_size", WINDOW),
    (r"max_position_embeddings|n_positions|max_(target|source)_positions|max_sequence_length|n_ctx", 256),
    (r"(.*_)?image_size", 16),
    (r"(.*_)?patch_size", 4),
    (r"num_mel_bins|feature_size|n_mels|input_feat_per_channel", 16),
    (r"(.*_)?(d_state|state_size)|mamba_d_head|mamba_head_dim", 8),
    (r"(.*_)?chunk_size", 8),
    (r"num_codebooks|num_quantizers|n_codes_total", 3),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads|index_topk(_blocks)?|n_shared_heads", 4),
    (r"rotary_dim|mamba_num_heads|mamba_n_heads|n_mamba_heads|(.*_)?expert_capacity|image_seq_length", 8),
    (r"kv_channels|dim_head|hidden_size_per_layer_input|laurel_rank|mm_tokens_per_image", 16),
    (r"(d_ff|dff|dim_ff|d_inner|share_expert_dim|mamba_d_ssm)", 96),
    (r"block_size|max_seq_len|max_(en|de)coder_position_embeddings|context_length", 256),
    (r"moe_k", 2),
    (r"num_kv_shared_layers", 2),
    (r".*num_(query_tokens|latents|queries)", 4),
)  # fmt: skip
_PATTERNS = tuple((re.compile(pattern), value) for pattern, value in _RULES)
_COUNT = re.compile(r"(.*_)?(num_hidden_layers|n_layers?|num_layers)")
_TOKEN = re.compile(r".*_token_(id|index)|(pad|bos|eos)_id")
_FEW_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_OWN_KEYS = (
    "transformers_version",
    "architectures",
    "model_type",
    "dtype",
    "id2label",
    "label2id",
    "attn_implementation",
)


@dataclass(frozen=True)
class Case:
    """What one class needs besides the rule.

    Attributes:
        config: settings, by their dotted path (``"text_config.rope_parameters"``).
        inputs: how it is called: names of `INPUTS`; by default what works first.
        tokens: generated, where 20 are too many.
        generation: settings of its generation config.
        beside: attributes that its config lacks, and its code reads.
        call: what its `generate` needs beside inputs.
        made: the name of the config's class, where it is not the model's own.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Sequence[str] = ()
    tokens: int = 20
    made: str = ""
    generation: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)


def config_of(name: str, **settings: Any) -> Any:
    """The small config of a class; `settings` by dotted path go before all else."""
    case = EXCEPTIONS.get(name, Case())
    made = getattr(transformers, case.made) if case.made else getattr(transformers, name).config_class
    given = {**case.config, **settings}
    if name.endswith(("ForCausalLM", "LMHeadModel")) and "is_decoder" in _settings(made):
        given.setdefault("is_decoder", True)  # of one that can be an encoder as well
    config = _small(_default(made, given), given, "")
    for one in {id(c): c for c in (config, config.get_text_config(decoder=True))}.values():
        for ending in ("eos_token_id", "forced_eos_token_id", "forced_bos_token_id"):
            if vars(one).get(ending) is not None and "None" in str(_annotations(type(one)).get(ending, "None")):
                setattr(one, ending, None)
    text = config.get_text_config(decoder=True)
    if text is not config and "rope_type" in (vars(text).get("rope_parameters") or {}):
        text.rope_parameters.setdefault("mrope_section", [4, 2, 2])  # of those that tell pictures from text so
    return config


def _small(default: Any, given: Mapping[str, Any], path: str) -> Any:
    """A config like `default`, and its parts like those of it, but small."""
    made = type(default)
    settings = {key.removeprefix(path): value for key, value in given.items() if key.startswith(path)}
    settings = {key: value for key, value in settings.items() if "." not in key}
    known, fresh = _settings(made), _default(made, settings)
    said, usual = _said(default), _said(fresh)
    kept = {key: said[key] for key in known & set(said) if said[key] != usual.get(key)}
    parts = {key: value for key, value in vars(default).items() if isinstance(value, PreTrainedConfig)}
    small = {key: _small(part, given, f"{path}{key}.") for key, part in parts.items() if key not in settings}
    return _made(made, {**kept, **_shrunk(default, known), **small, **settings}, set(settings) | set(parts))


def _made(made: type, kept: dict[str, Any], given: set[str]) -> Any:
    """The config; settings of the rule that it names in a complaint are left at their defaults, one after the other."""
    parts = {key: value for key, value in kept.items() if isinstance(value, PreTrainedConfig)}
    while True:
        try:
            config = made(**kept)
            if parts.keys() <= vars(config).keys():
                return config
            blamed = []  # older releases take parts as dicts, and leave others out
        except Exception as error:  # whatever a config's own checks raise
            blamed = [key for key in kept if key not in given and re.search(rf"\b{key}\b", str(error))]
        if not blamed:
            return made(**{**kept, **{key: part.to_dict() for key, part in parts.items()}})
        del kept[blamed[0]]


def _default(made: type, settings: Mapping[str, Any]) -> Any:
    try:
        return made()
    except Exception:  # one that has no defaults; what is missing is in the table
        return made(**{key: value for key, value in settings.items() if "." not in key})


def _said(config: Any) -> dict[str, Any]:
    """The settings of a config as they are kept, and under their other names; its parts are left out."""
    said = {k: v for k, v in vars(config).items() if not isinstance(v, PreTrainedConfig) and k != "per_layer_config"}
    return {**{other: said[name] for other, name in type(config).attribute_map.items() if name in said}, **said}


def _annotations(made: type) -> dict[str, Any]:
    """The fields of a config's class, but those that all configs have."""
    found: dict[str, Any] = {}
    for one in made.__mro__[: made.__mro__.index(PreTrainedConfig)]:
        found = {**inspect.get_annotations(one), **found}
    return found


def _settings(made: type) -> set[str]:
    """The names that a config's class takes."""
    found = set(_annotations(made))
    for one in made.__mro__[: made.__mro__.index(PreTrainedConfig)]:
        if "__init__" in vars(one):
            found |= set(inspect.signature(one.__init__).parameters)
    return found - {"kwargs", "self", *_OWN_KEYS, *vars(PreTrainedConfig())} | found & {"is_decoder", "use_cache"}


def _shrunk(default: Any, known: set[str]) -> dict[str, Any]:
    """The settings that the rule changes."""
    layers = _pick(default)
    small: dict[str, Any] = {}
    said = _said(default)
    latent = said.get("kv_lora_rank") is not None
    for key in sorted(known & set(said)):
        value = said[key]
        if isinstance(value, int) and not isinstance(value, bool):
            size = _size(key, value)
            if size is not None and size != value:
                small[key] = size
        elif isinstance(value, list | tuple) and layers.before and len(value) == layers.before and key != "id2label":
            small[key] = type(value)(_entry(key, value[i]) for i in layers.kept)
        elif isinstance(value, list | tuple) and re.fullmatch(r".*(indexes|indices)", key):
            small[key] = type(value)([i for i in value if i < 2] or [1])
        elif isinstance(value, dict) and "mrope_section" in value:
            small[key] = {**value, "mrope_section": [4, 2, 2]}
    if len(layers.kept) != 2:
        small |= {key: len(layers.kept) for key in known if _COUNT.fullmatch(key) and said.get(key) == layers.before}
    if latent and "num_key_value_heads" in known:
        small["num_key_value_heads"] = 4
    if "head_dim" in said and said["head_dim"] is None:
        small["head_dim"] = 16
    return small


def _size(key: str, value: int) -> int | None:
    if _TOKEN.fullmatch(key):
        return _token(key) if value >= 0 else value
    for pattern, size in _PATTERNS:
        if pattern.fullmatch(key):
            return min(size, value) if value > 0 else value
    return None


def _token(key: str) -> int:
    """A small token for what a config calls one: the same wherever it has this name."""
    if key in _FEW_TOKENS:
        return _FEW_TOKENS[key]
    return VOCABULARY - 1 - sum(map(ord, key)) % 16


def _entry(key: str, value: Any) -> Any:
    size = _size(key, value) if isinstance(value, int) and not isinstance(value, bool) and value > 8 else None
    return value if size is None else size


@dataclass(frozen=True)
class _Layers:
    before: int
    kept: tuple[int, ...]


def _pick(default: Any) -> _Layers:
    """Which of a default's layers stay: two, or two of each of its kinds, but no more than four."""
    before = next(
        (v for k, v in sorted(vars(default).items()) if _COUNT.fullmatch(k) and isinstance(v, int) and v > 0), 0
    )
    kinds = vars(default).get("layer_types") or vars(default).get("layers_block_type")
    if not before or not isinstance(kinds, list | tuple) or len(kinds) != before:
        return _Layers(before, (0, min(1, max(before - 1, 0))))
    first = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())
    return _Layers(before, tuple(first * 2 if len(first) <= 2 else first)[: max(4, len(first))])


# ---------------------------------------------------------------------- models


def build(name: str, spread: float | None = None, **settings: Any) -> Any:
    """The tiny model of a class, with weights of this standard deviation; by default those that it is made with.

    Raises:
        ValueError: if it is not tiny.
    """
    config = config_of(name, **settings)
    made = getattr(transformers, name)
    with torch.device("meta"):
        numbers = sum(p.numel() for p in made(config).parameters())
    if numbers > _LARGEST:
        raise ValueError(f"{numbers / 1e6:.0f} million parameters are not tiny")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = made(config_of(name, **settings))
    if spread is not None:
        _spread(model, spread)
    model = model.float().eval().requires_grad_(False)
    settings = getattr(model, "generation_config", None)
    _plain(settings)
    if model.config.is_encoder_decoder and settings.decoder_start_token_id is None:
        settings.decoder_start_token_id = 1
    case = EXCEPTIONS.get(name, Case())
    for key, value in case.generation.items():
        setattr(settings, key, value)
    for path, value in case.beside.items():
        *parts, last = path.split(".")
        setattr(attrgetter(".".join(parts))(model.config) if parts else model.config, last, value)
    return model


def _spread(model: Any, deviation: float) -> None:
    """Weights so wide that what is in the cache shows in the text. A state-space layer's own would run away."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and not re.search(r"A_log|dt_|conv1d|inv_freq|logit_scale", name):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * 0.1) if parameter.dim() == 1 else parameter.copy_(noise * deviation)


def _plain(settings: Any) -> None:
    """Greedy, and no token ends a text."""
    if settings is None:
        return
    for ending in ("eos_token_id", "forced_eos_token_id", "forced_bos_token_id"):
        setattr(settings, ending, None)
    if settings.pad_token_id is None:
        settings.pad_token_id = 0
    settings.do_sample, settings.use_cache, settings.num_beams = False, True, 1


# ---------------------------------------------------------------------- inputs


def special_tokens(config: Any) -> set[int]:
    """The tokens to which a config, or a part of it, gives a meaning."""
    found: set[int] = set()

    def look(values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                look(value)
            elif re.fullmatch(r".*_(token|tokens)?_?(id|ids|index)", str(key)):
                found.update(i for i in (value if isinstance(value, list | tuple) else [value]) if type(i) is int)

    look(config.to_dict())
    return found


def tokens(config: Any, rows: int, count: int, seed: int = 0) -> Tensor:
    """Random tokens ``[rows, count]`` without a meaning of their own."""
    size = getattr(config.get_text_config(decoder=True), "vocab_size", None) or 40
    known = special_tokens(config)
    plain = torch.tensor([i for i in range(3, min(size, 80)) if i not in known])
    return plain[torch.randint(0, len(plain), (rows, count), generator=torch.Generator().manual_seed(seed))]


def _text(model: Any) -> dict[str, Any]:
    ids = tokens(model.config, 2, PROMPT)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def _encoded(model: Any) -> dict[str, Any]:
    config = model.config.get_text_config(encoder=True)
    own = getattr(model.get_encoder(), "config", config)
    width = getattr(own, "hidden_size", None) or getattr(config, "hidden_size", 64)
    return {"encoder_outputs": BaseModelOutput(last_hidden_state=_noise(2, 5, width))}


def _features(model: Any) -> dict[str, Any]:
    called = ("num_mel_bins", "feature_size", "feature_projection_input_dim")
    bins = next((size for one in _all(model.config) for name in called if (size := getattr(one, name, None))), 16)
    return {"input_features": _noise(2, bins, 60)}


def _frames(model: Any) -> dict[str, Any]:
    features = _features(model)["input_features"].transpose(1, 2)
    return {"input_features": features, "attention_mask": torch.ones(features.shape[:2], dtype=torch.long)}


def _picture(model: Any) -> dict[str, Any]:
    size = next((s for c in _all(model.config) if (s := getattr(c, "image_size", None)) is not None), 16)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return {"pixel_values": _noise(2, 3, height, width)}


def _pictures(model: Any) -> dict[str, Any]:
    text, pictures = _text(model), _picture(model)["pixel_values"][:, None]
    return {**text, "pixel_values": pictures, "image_attention_mask": torch.ones(2, PROMPT, 1, dtype=torch.long)}


def _asked(model: Any) -> dict[str, Any]:
    return {**_picture(model), **_text(model), "qformer_input_ids": tokens(model.config, 2, 5, seed=1)}


def _film(model: Any) -> dict[str, Any]:
    return {**_asked(model), "pixel_values": _pictures(model)["pixel_values"].repeat(1, 2, 1, 1, 1)}


def _boxed(model: Any) -> dict[str, Any]:
    return {**_text(model), "bbox": torch.zeros(2, PROMPT, 4)}


def _before_sound(model: Any) -> dict[str, Any]:
    text = _text(model)
    text["input_ids"][:, -1] = model.config.audio_bos_token_id
    return text


def _wave(model: Any) -> dict[str, Any]:
    return {"input_values": _noise(2, 4000)}


def _channel(model: Any) -> dict[str, Any]:
    return {"input_values": _noise(2, 1, 4000)}


def _all(config: Any) -> Iterator[Any]:
    """A config and those within it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _all(value)


INPUTS = {
    "text": _text,
    "encoded": _encoded,
    "features": _features,
    "frames": _frames,
    "picture": _picture,
    "picture and text": lambda model: _picture(model) | _text(model),
    "pictures and text": _pictures,
    "picture, text and a question": _asked,
    "film, text and a question": _film,
    "text with boxes": _boxed,
    "text that ends where sound begins": _before_sound,
    "mel spectrogram": lambda model: {"input_features": _noise(2, 9, model.config.d_model)},
    "wave": _wave,
    "wave of one channel": _channel,
}
"""What a model can be called with, by name."""


def inputs_of(name: str, model: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """What to try, the likeliest first."""
    case = EXCEPTIONS.get(name, Case())
    first = {"input_ids": "text", "input_features": "features", "pixel_values": "picture", "input_values": "wave"}
    kind = first.get(getattr(model, "main_input_name", "input_ids"), "text")
    if model.config.is_encoder_decoder:
        order: Sequence[str] = (kind, "encoded", "features", "frames", "picture", "wave")
    else:
        order = ("text", kind, "picture and text", "features", "frames", "wave")
    for one in dict.fromkeys(case.inputs or order):
        yield one, {**INPUTS[one](model), **case.call}


# ---------------------------------------------------------------------- what the rule cannot know

NOT_TRIED = {
    "FastSpeech2ConformerModel": "makes no tokens",
    "FastSpeech2ConformerWithHifiGan": "makes no tokens",
    "VitsModel": "makes no tokens",
    "PI0ForConditionalGeneration": "makes no tokens",
    "DiffusionGemmaForBlockDiffusion": "diffuses blocks of tokens",
    "Gemma4AssistantForCausalLM": "drafts for another model, whose keys it reads",
    "Gemma4UnifiedAssistantForCausalLM": "drafts for another model, whose keys it reads",
}
_JAMBA = {
    "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
    "expert_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False,
}  # fmt: skip
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
_MIMI = {
    "num_hidden_layers": 1, "hidden_size": 16, "num_quantizers": 3, "upsample_groups": 16, "num_filters": 2,
    "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "codebook_dim": 8,
    "codebook_size": 64, "vector_quantization_hidden_dimension": 8,
}  # fmt: skip
_QSA = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2,
    "hc_lowrank": 8, "output_gate_type": "sigmoid",
}  # fmt: skip
_GEMMA4 = {
    "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 16,
    "global_head_dim": 32, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCABULARY, "per_layer_config": None,
}  # fmt: skip
_MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}


def _within(part: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{part}.{key}": value for key, value in settings.items()}


_SPOKEN = Case(
    generation={
        "text_decoder_lang_to_code_id": {"eng": 5}, "t2u_lang_code_to_id": {"eng": 5}, "vocoder_lang_code_to_id": {"eng": 0},
        "id_to_text": {str(i): "a" for i in range(VOCABULARY)}, "char_to_id": {"a": 1},
    },
    call={"tgt_lang": "eng"},
)  # fmt: skip
_TRANSDUCED = {"n_groups": 1, "use_mamba_kernels": False}

EXCEPTIONS: dict[str, Case] = {
    "Blip2ForConditionalGeneration": Case({"image_token_index": 97}, inputs=["picture and text"]),
    "IdeficsForVisionText2Text": Case(inputs=["pictures and text"]),
    "InstructBlipForConditionalGeneration": Case({"image_token_index": 97}, inputs=["picture, text and a question"]),
    "InstructBlipVideoForConditionalGeneration": Case({"video_token_index": 97}, inputs=["film, text and a question"]),
    "GradiumPhononTTSForConditionalGeneration": Case(inputs=["text that ends where sound begins"]),
    "MoonshineForConditionalGeneration": Case({"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4}),
    "NemotronHForCausalLM": Case(_TRANSDUCED),
    "NemotronH_Omni_Reasoning_V3": Case(_within("text_config", _TRANSDUCED)),
    "Nemotron3_5TranscribeForConditionalGeneration": Case(_within("text_config", _TRANSDUCED)),
    "PocketTTSForConditionalGeneration": Case(inputs=["text that ends where sound begins"]),
    "Pop2PianoForConditionalGeneration": Case(
        inputs=["mel spectrogram"],
        generation={"composer_to_feature_token": {f"composer{i}": 4 + i for i in range(1, 22)}},
    ),
    "Qwen2_5OmniThinkerForConditionalGeneration": Case(beside={"vision_start_token_id": 90}),
    "Qwen3OmniMoeThinkerForConditionalGeneration": Case(beside={"vision_start_token_id": 90}),
    "RecurrentGemmaForCausalLM": Case({"num_hidden_layers": 3}),
    "SeamlessM4TForSpeechToText": Case(inputs=["frames"]),
    "SeamlessM4Tv2ForSpeechToText": Case(inputs=["frames"]),
    "SeamlessM4TForTextToSpeech": _SPOKEN,
    "SeamlessM4Tv2ForTextToSpeech": _SPOKEN,
    "SeamlessM4TModel": _SPOKEN,
    "Step3p7ForConditionalGeneration": Case({"text_config.sliding_window": WINDOW}),
    "UdopForConditionalGeneration": Case(inputs=["text with boxes"]),
    "XmodForCausalLM": Case({"default_language": "en_XX", "languages": ("en_XX",)}),
    "ZambaForCausalLM": Case(
        {"attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4, "use_mamba_kernels": False}
    ),
    "xLSTMForCausalLM": Case({"qk_dim_factor": 1.0}),
    "BambaForCausalLM": Case({**_MAMBA2, "attn_layer_indices": [1]}),
    "ChameleonForConditionalGeneration": Case({"vocabulary_map": {"<image>": 90}}),
    "CohereCompassForCausalLM": Case(
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
    ),
    "CsmForConditionalGeneration": Case(
        {**_within("codec_config", _MIMI), "depth_decoder_config.backbone_hidden_size": 64}
    ),
    "BltForCausalLM": Case({"encoder_hash_byte_group_vocab": 20}),
    "CohereCompassForConditionalGeneration": Case(
        {"text_config.rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
    ),
    "DeepseekOcr2ForConditionalGeneration": Case(
        _within(
            "text_config",
            {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
        )
    ),
    "DeepseekV2ForCausalLM": Case({"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}),
    "Dots3NoteForCausalLM": Case(
        {
            "swa_q_lora_rank": 16,
            "swa_kv_lora_rank": 16,
            "swa_head_dim": 24,
            "swa_qk_nope_head_dim": 16,
            "swa_v_head_dim": 16,
        }
    ),
    "Granite4VisionForConditionalGeneration": Case({"deepstack_layer_map": [], "downsample_rate": "1/2"}),
    "DbrxForCausalLM": Case({"attn_config.rope_theta": 1e4, "attn_config.kv_n_heads": 2, "attn_config.clip_qkv": 8.0}),
    "Dots1ForCausalLM": Case(_MOE),
    "Emu3ForConditionalGeneration": Case(
        {
            "vocabulary_map": {"<image>": 90},
            **_within(
                "vq_config",
                {
                    "base_channels": 32,
                    "channel_multiplier": [1],
                    "num_res_blocks": 1,
                    "embed_dim": 16,
                    "hidden_size": 16,
                    "latent_channels": 16,
                    "codebook_size": 64,
                },
            ),
        }
    ),
    "Ernie4_5_VLMoeForConditionalGeneration": Case(
        {"text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}}
    ),
    "Florence2ForConditionalGeneration": Case(
        _within(
            "vision_config", {"depths": [1] * 4, "embed_dim": [16] * 4, "num_heads": [2] * 4, "num_groups": [2] * 4}
        )
    ),
    "FunAsrNanoForConditionalGeneration": Case({"adaptor_config.intermediate_size": 16}),
    "Glm4vMoeForConditionalGeneration": Case(
        {
            "text_config.rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 0.5,
            }
        }
    ),
    "Gemma4ForCausalLM": Case(_GEMMA4),
    "Gemma4ForConditionalGeneration": Case(_within("text_config", _GEMMA4)),
    "Gemma4UnifiedForCausalLM": Case(_GEMMA4),
    "Gemma4UnifiedForConditionalGeneration": Case(_within("text_config", _GEMMA4)),
    "GraniteMoeHybridForCausalLM": Case({**_MAMBA2, "layer_types": ["mamba", "attention"] * 2, "num_hidden_layers": 4}),
    "JambaForCausalLM": Case(_JAMBA),
    "JanusForConditionalGeneration": Case(
        _within(
            "vq_config", {"base_channels": 32, "channel_multiplier": [1, 1], "num_embeddings": 32, "num_patches": 4}
        )
    ),
    "Molmo2ForConditionalGeneration": Case({"adapter_config.vision_feature_layer": [1, 0]}),
    "KyutaiSpeechToTextForConditionalGeneration": Case(_within("codec_config", _MIMI), inputs=["wave of one channel"]),
    "LongcatFlashForCausalLM": Case(
        {"zero_expert_num": 2, "num_key_value_heads": 4, "head_dim": 16, "qk_head_dim": 32, "qk_rope_head_dim": 16}
    ),
    "Lfm2MoeForCausalLM": Case({"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4}),
    "NemotronForCausalLM": Case({"num_key_value_heads": 2}),
    "Mamba2ForCausalLM": Case({"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 8}),
    "MoonshineStreamingForConditionalGeneration": Case({"num_key_value_heads": 4}),
    "Qwen4ExpForCausalLM": Case(_QSA),
    "Qwen4ExpForConditionalGeneration": Case(_within("text_config", _QSA)),
    "Qwen2_5OmniForConditionalGeneration": Case({"enable_audio_output": False}),
    "Qwen3OmniMoeForConditionalGeneration": Case(
        {"enable_audio_output": False},
        beside={"thinker_config.vision_start_token_id": 90},
        call={"return_audio": False, "thinker_max_new_tokens": 20},
    ),
    "ReformerModelWithLMHead": Case(
        {
            "is_decoder": True,
            "axial_pos_embds_dim": [16, 48],
            "axial_pos_shape": [16, 16],
            "attn_layers": ["local", "lsh"],
        }
    ),
}

__all__ = [
    "EXCEPTIONS",
    "INPUTS",
    "MADE_AS",
    "NOT_TRIED",
    "POPULAR",
    "build",
    "config_of",
    "inputs_of",
    "names",
    "tokens",
]
