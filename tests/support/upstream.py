"""Tiny T3 models that are made once, and upstream's own loops on them."""

from typing import Any

import torch
from torch import Tensor

from kvcache_chatterbox import random_conditionals
from support.t3_models import tiny_t3

MODELS: dict[str, Any] = {}


def model(kind: str) -> Any:
    if kind not in MODELS:
        MODELS[kind] = tiny_t3(kind)
        if kind == "gpt":  # among 6,563 tokens the stop token would turn up in some runs of 200
            MODELS[kind].speech_head.bias.data[MODELS[kind].hp.stop_speech_token] = -20
    return MODELS[kind]


def voice(t3: Any, seed: int = 0) -> Any:
    return random_conditionals(t3, seed)


def upstream(t3: Any, text: Tensor, tokens: int, seed: int, **settings: Any) -> Any:
    torch.manual_seed(seed)
    if t3.is_gpt:  # it makes one token more than asked for
        return t3.inference_turbo(t3_cond=voice(t3), text_tokens=text, max_gen_len=tokens - 1, **settings)
    rows = torch.cat([text, text])
    result = t3.inference(t3_cond=voice(t3), text_tokens=rows, max_new_tokens=tokens, **settings)
    t3.__dict__["_modules"].pop("patched_model", None)  # upstream registers its backbone a second time
    return result
