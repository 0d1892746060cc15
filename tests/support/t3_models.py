"""Small T3 models of upstream's own classes, with random weights."""

import importlib
import importlib.util
import warnings
from typing import Any

import pytest
import torch

if importlib.util.find_spec("chatterbox") is None:
    pytest.skip(
        "chatterbox-tts is not installed (pip install --no-deps chatterbox-tts==0.1.7)", allow_module_level=True
    )

from kvcache_chatterbox.upstream import upstream_t3

UPSTREAMS_WARNINGS = [  # from inside its own loop
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*output_attentions.*"),
]


def tiny_t3(kind: str, seed: int = 0) -> Any:
    """`kind` is "english", "multilingual" (deep enough for its analyzer's layers) or "gpt"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the audio stack, which upstream's package imports where there is one
        upstream: Any = upstream_t3()
    upstream.tqdm = lambda steps, **_: steps  # upstream's progress bar, not what is tested
    configs = importlib.import_module("chatterbox.models.t3.llama_configs").LLAMA_CONFIGS
    small = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 8,
    }
    configs["tiny"] = {**configs["Llama_520M"], **small, "num_hidden_layers": 4}
    configs["tiny_deep"] = {**configs["Llama_520M"], **small, "num_hidden_layers": 14}
    configs["tiny_gpt"] = {**configs["GPT2_medium"], "n_embd": 128, "hidden_size": 128, "n_layer": 4, "n_head": 4}
    config = importlib.import_module("chatterbox.models.t3.modules.t3_config").T3Config
    settings = {"english": config.english_only, "multilingual": config.multilingual, "gpt": lambda: config(50276)}[
        kind
    ]()
    settings.llama_config_name = {"english": "tiny", "multilingual": "tiny_deep", "gpt": "tiny_gpt"}[kind]
    settings.use_perceiver_resampler = False  # its width is fixed at 1024
    settings.speech_cond_prompt_len = 20
    if kind == "gpt":
        settings.emotion_adv, settings.input_pos_emb, settings.speech_tokens_dict_size = False, None, 6563
    torch.manual_seed(seed)
    return upstream.T3(settings).eval()


def likely_end(t3: Any, by: float = 6.0) -> Any:
    """The same model, more inclined to stop: its stop token's logit raised."""
    t3.speech_head = torch.nn.Linear(t3.dim, t3.speech_head.out_features, bias=True)
    with torch.no_grad():
        t3.speech_head.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(7))
        t3.speech_head.bias.zero_()
        t3.speech_head.bias[t3.hp.stop_speech_token] = by
    return t3


def fingerprint(t3: Any) -> tuple[Any, ...]:
    """All that must be as before after a request: parameters' names, modules, hooks, configuration."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in t3.modules()]
    return sorted(t3.state_dict()), [n for n, _ in t3.named_modules()], hooks, str(t3.tfmr.config), sorted(vars(t3))
