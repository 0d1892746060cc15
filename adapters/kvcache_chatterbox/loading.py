"""Loading T3 alone, without the audio stack: the real upstream classes, with weights from a folder or random."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from kvcache import InputError
from kvcache_chatterbox.upstream import needed_beside, upstream_t3

Variant = Literal["english", "multilingual", "turbo", "nano"]

WEIGHTS: dict[str, tuple[str, ...]] = {
    "english": ("t3_cfg.safetensors",),
    "multilingual": ("t3_mtl23ls_v2.safetensors",),
    "turbo": ("t3_turbo_v1.safetensors",),
    "nano": ("t3_nano_v1.safetensors", "t3_nano.safetensors"),
}
_NANO = {"n_embd": 768, "hidden_size": 768, "n_head": 12, "n_layer": 12}  # chatterbox-tts 0.1.7 has no entry for it


def load_t3(variant: Variant, checkpoint: str | Path | None = None, *, device: str = "cpu", seed: int = 0) -> Any:
    """A T3 model of upstream's own class, in evaluation mode.

    Args:
        variant: which Chatterbox.
        checkpoint: a folder with the variant's T3 weights; None makes random ones, which keep shapes and speed.
        seed: of the random weights.

    Raises:
        InputError: for an unknown variant or a folder without its weights.
    """
    if variant not in WEIGHTS:
        raise InputError(f"variant={variant!r} is not one of {', '.join(WEIGHTS)}")
    upstream = upstream_t3()
    state = None if checkpoint is None else _read_weights(variant, Path(checkpoint))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        t3 = upstream.T3(_settings(upstream, variant))
    if state is not None:
        t3.load_state_dict(state)
    if t3.is_gpt and hasattr(t3.tfmr, "wte"):
        del t3.tfmr.wte  # as upstream does: embeddings are T3's own
    return t3.to(device).eval()


def _settings(upstream: Any, variant: str) -> Any:
    package = upstream.__package__
    config = importlib.import_module(f"{package}.modules.t3_config").T3Config
    if variant in ("english", "multilingual"):
        return config.multilingual() if variant == "multilingual" else config.english_only()
    settings = config(text_tokens_dict_size=50276)
    settings.llama_config_name = "GPT2_medium"
    if variant == "nano":
        configs = importlib.import_module(f"{package}.llama_configs").LLAMA_CONFIGS
        configs.setdefault("GPT2_nano", {**configs["GPT2_medium"], **_NANO})
        settings.llama_config_name = "GPT2_nano"
    settings.speech_tokens_dict_size = 6563
    settings.input_pos_emb = None
    settings.speech_cond_prompt_len = 375
    settings.use_perceiver_resampler = False
    settings.emotion_adv = False
    return settings


def _read_weights(variant: str, folder: Path) -> dict[str, Tensor]:
    files = [folder / name for name in WEIGHTS[variant]]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise InputError(f"no weights for {variant!r} in {folder}: looked for {', '.join(file.name for file in files)}")
    return load_file(found)


def random_conditionals(t3: Any, seed: int = 0) -> Any:
    """A `T3Cond` of the right shapes with a made-up voice, for models with random weights."""
    conditionals = needed_beside(t3, "T3Cond")
    generator = torch.Generator().manual_seed(seed)
    return conditionals(
        speaker_emb=torch.randn(1, t3.hp.speaker_embed_size, generator=generator),
        cond_prompt_speech_tokens=torch.randint(0, 6561, (1, t3.hp.speech_cond_prompt_len), generator=generator),
        emotion_adv=0.5 * torch.ones(1, 1, 1),
    )


def byte_tokens(t3: Any, text: str) -> Tensor:
    """A stand-in for the tokenizer, whose vocabulary comes with the weights: the text's UTF-8 bytes, ``[1, n]``."""
    tokens = [min(max(byte, 1), 254) for byte in text.encode()]
    if not t3.is_gpt:
        tokens = [t3.hp.start_text_token, *tokens, t3.hp.stop_text_token]
    return torch.tensor([tokens])
