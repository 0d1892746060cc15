"""Tiny random models that `generate` is given something else than token ids, or that say something else than one token a step."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    BlipConfig,
    BlipForConditionalGeneration,
    CsmConfig,
    CsmForConditionalGeneration,
    DiaConfig,
    DiaForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mamba2Config,
    Mamba2ForCausalLM,
    MusicgenConfig,
    MusicgenForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

VOCABULARY = 97
CODEBOOKS = 3
_LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 8,
    "patch_size": 4, "projection_dim": 32,
}  # fmt: skip
_ENDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _widened(model: Any, scale: float = 0.2) -> Any:
    """Weights wide enough that what is attended to shows in the text."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("A_log", "dt_bias", "codec_model", "audio_encoder")):
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * 0.1) if parameter.dim() == 1 else parameter.copy_(noise * scale)
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


def _whisper() -> Any:
    config = WhisperConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=4, max_source_positions=20,
        max_target_positions=64, decoder_start_token_id=3, suppress_tokens=None, begin_suppress_tokens=None, **_ENDS,
    )  # fmt: skip
    model = _widened(WhisperForConditionalGeneration(config), 0.4)
    model.generation_config.no_timestamps_token_id = 96
    model.generation_config.forced_decoder_ids = None
    return model


def _csm() -> Any:
    codec = {"model_type": "mimi", "num_hidden_layers": 1, "hidden_size": 16, "num_quantizers": CODEBOOKS, "upsample_groups": 16,
        "num_filters": 2, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
        "codebook_dim": 8, "codebook_size": 64, "vector_quantization_hidden_dimension": 8}  # fmt: skip
    depth = {**_LLAMA, "num_codebooks": CODEBOOKS, "backbone_hidden_size": 32, "vocab_size": 40}
    config = CsmConfig(
        **{**_LLAMA, "vocab_size": 40}, text_vocab_size=VOCABULARY, num_codebooks=CODEBOOKS, codebook_pad_token_id=38,
        codebook_eos_token_id=39, audio_token_id=90, audio_eos_token_id=91, depth_decoder_config=depth, codec_config=codec,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = _widened(CsmForConditionalGeneration(config), 0.5)
    model.depth_decoder.generation_config.min_new_tokens = model.depth_decoder.generation_config.max_new_tokens = (
        CODEBOOKS - 1
    )
    return model


def _dia() -> Any:
    encoder = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 8, "vocab_size": VOCABULARY,
    }  # fmt: skip
    decoder = {
        **encoder, "num_key_value_heads": 2, "num_hidden_layers": 2, "cross_num_attention_heads": 4,
        "cross_num_key_value_heads": 4, "cross_head_dim": 8, "cross_hidden_size": 32, "num_channels": CODEBOOKS,
        "vocab_size": 40, "eos_token_id": 37, "pad_token_id": 38, "bos_token_id": 39,
    }  # fmt: skip
    config = DiaConfig(
        encoder_config=encoder, decoder_config=decoder, delay_pattern=[0, 1, 2], eos_token_id=37, pad_token_id=38,
        bos_token_id=39,
    )  # fmt: skip
    model = _widened(DiaForConditionalGeneration(config), 0.5)
    model.generation_config.pad_token_id = 38
    return model


def _musicgen() -> Any:
    text = {
        "model_type": "t5", "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4,
    }  # fmt: skip
    decoder = {
        "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 32,
        "num_codebooks": CODEBOOKS + 1, "pad_token_id": 40, "bos_token_id": 40, "max_position_embeddings": 64,
    }  # fmt: skip
    codec = {
        "model_type": "encodec", "hidden_size": 16, "num_filters": 4, "codebook_size": 64, "upsampling_ratios": [2, 2],
        "num_residual_layers": 1, "num_lstm_layers": 1, "codebook_dim": 16, "target_bandwidths": [10.0],
        "sampling_rate": 1000,
    }  # fmt: skip
    config = MusicgenConfig(text_encoder=text, audio_encoder=codec, decoder=decoder)
    model = _widened(MusicgenForConditionalGeneration(config), 0.3)
    for name, value in (("pad_token_id", 40), ("decoder_start_token_id", 40), ("bos_token_id", 40)):
        setattr(model.generation_config, name, value)
    return model


def _blip() -> Any:
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "encoder_hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 32, "max_position_embeddings": 64,
        "sep_token_id": 2, "use_cache": True, **_ENDS,
    }  # fmt: skip
    config = BlipConfig(text_config=text, vision_config=_VISION, projection_dim=32, image_text_hidden_size=32)
    return _widened(BlipForConditionalGeneration(config), 0.4)


def _blip2() -> Any:
    former = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
        "intermediate_size": 32, "encoder_hidden_size": 32,
    }  # fmt: skip
    text = {
        "model_type": "opt", "vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32, **_ENDS,
    }  # fmt: skip
    config = Blip2Config(
        vision_config=_VISION, qformer_config=former, text_config=text, num_query_tokens=3, image_token_index=90
    )
    return _widened(Blip2ForConditionalGeneration(config), 0.4)


def _llava() -> Any:
    vision = {**_VISION, "model_type": "clip_vision_model", "num_hidden_layers": 2}
    text = {**_LLAMA, "model_type": "llama", **_ENDS}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=90, image_seq_length=4)  # type: ignore[call-arg]  # its other name
    return _widened(LlavaForConditionalGeneration(config), 0.4)


def _mamba2() -> Any:
    config = Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, n_groups=1,
        chunk_size=8, **_ENDS,
    )  # fmt: skip
    return _widened(Mamba2ForCausalLM(config), 0.4)


def _xlnet() -> Any:
    config = XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=32, **_ENDS)
    return _widened(XLNetLMHeadModel(config), 0.3)


_MAKERS = {
    "whisper": _whisper, "csm": _csm, "dia": _dia, "musicgen": _musicgen, "blip": _blip, "blip2": _blip2,
    "llava": _llava, "mamba2": _mamba2, "xlnet": _xlnet,
}  # fmt: skip


@cache
def model_of(name: str) -> Any:
    """The model, made once. Not to be changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _MAKERS[name]()


def ids_of(rows: int, tokens: int, seed: int = 0, most: int = 80) -> Tensor:
    return torch.randint(4, most, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def picture_behind(tokens: int) -> dict[str, Tensor]:
    """Token ids with the four places of a picture, for LLaVA."""
    ids = ids_of(2, tokens)
    ids[:, 1:5] = 90
    return {"input_ids": ids, "pixel_values": noise(2, 3, 8, 8)}


def inputs_of(name: str, rows: int = 2) -> dict[str, Tensor]:
    """What `generate` starts from, by its name."""
    if name == "whisper":
        return {"input_features": noise(rows, 4, 40)}
    if name in ("blip", "blip2"):
        return {"pixel_values": noise(rows, 3, 8, 8)}
    return {"input_ids": ids_of(rows, 7)}
